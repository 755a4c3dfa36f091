"""Load a Llama-family model from one GGUF file: metadata, tokenizer, quantised weights."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lora_jax.base import QuantisedMatrix
from lora_jax.bases.ggml import FORMATS, GgmlBlocks
from lora_jax.errors import ModelConfigError, WeightsError
from lora_jax.models.config import DecoderConfig, StoredConfig
from lora_jax.models.rope import linear_divisors
from lora_jax.models.weights import field_kinds, gguf_header, gguf_tokenizer
from lora_jax.models.weights.assemble import Source
from lora_jax.models.weights.decoder_names import LLAMA
from lora_jax.models.weights.disk_arrays import ArrayOnDisk, Index
from lora_jax.models.weights.stored import Stored
from lora_jax.models.weights.tensor_names import TensorName

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class GgufFile(Source):
    """A GGUF file, memory-mapped. No weight is read before `load`."""

    path: Path

    @functools.cached_property
    def header(self) -> gguf_header.Header:
        return gguf_header.read(self.path)

    @property
    def _kind(self) -> str:
        field_kinds.check(self.header.fields, field_kinds.GGUF, str(self.path))
        kind = self.header.fields.get("general.architecture")
        if kind not in _ARCHITECTURES:
            raise ModelConfigError(
                f"{self.path}: the architecture is {kind!r}; the GGUF loader knows "
                f"{', '.join(_ARCHITECTURES)}"
            )
        return str(kind)

    @functools.cached_property
    def config(self) -> StoredConfig:
        """The config that the metadata describes."""
        kind, tensors = self._kind, self.header.tensors
        fields = {key.removeprefix(f"{kind}."): x for key, x in self.header.fields.items()}
        field_kinds.check(fields, field_kinds.GGUF, str(self.path))
        with field_kinds.describing(str(self.path), kind):
            heads, hidden = fields["attention.head_count"], fields["embedding_length"]
            head_dim = fields.get("attention.key_length", hidden // heads)
            rotary = fields.get("rope.dimension_count", head_dim)
            if rotary != head_dim:
                raise ModelConfigError(
                    f"{self.path}: rope rotates {rotary} of a head's {head_dim} elements"
                )
            return DecoderConfig(
                vocab_size=tensors["token_embd.weight"].shape[0],
                hidden_size=hidden,
                num_layers=fields["block_count"],
                num_heads=heads,
                num_kv_heads=fields.get("attention.head_count_kv", heads),
                head_dim=head_dim,
                mlp_size=fields["feed_forward_length"],
                max_positions=fields["context_length"],
                norm_eps=fields["attention.layer_norm_rms_epsilon"],
                rope_theta=float(fields.get("rope.freq_base", 10000.0)),
                rope_divisors=self._rope_divisors(head_dim, fields),
                qkv_bias="blk.0.attn_q.bias" in tensors,
                output_bias="blk.0.attn_output.bias" in tensors,
                qk_norm="blk.0.attn_q_norm.weight" in tensors,
                tied="output.weight" not in tensors,
                sliding_window=fields.get("attention.sliding_window"),
                pad_id=fields.get("tokenizer.ggml.padding_token_id"),
                bos_id=fields.get("tokenizer.ggml.bos_token_id"),
                eos_id=fields.get("tokenizer.ggml.eos_token_id"),
            )

    def _rope_divisors(self, head_dim: int, fields: dict[str, Any]) -> tuple[float, ...] | None:
        given = self.header.tensors.get("rope_freqs.weight")
        if given is not None:
            return tuple(map(float, given.read(tuple(slice(0, size) for size in given.shape))))
        kind = fields.get("rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind != "linear":
            raise ModelConfigError(f"{self.path}: rope scaling {kind!r} is not supported")
        return linear_divisors(head_dim, fields["rope.scaling.factor"])

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Return the tokenizer that the metadata describes; see `gguf_tokenizer.build`."""
        return gguf_tokenizer.build(self.header.fields, str(self.path))

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """See `Source`. The metadata has `tokenizer.chat_template`, and others by their name."""
        start, fields = "tokenizer.chat_template", self.header.fields
        found = {name.removeprefix(start): name for name in fields if name.startswith(start)}
        named = {key.removeprefix(".") or "default": fields[name] for key, name in found.items()}
        return {name: text for name, text in named.items() if isinstance(text, str)}

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """See `Source`."""
        fields = self.header.fields
        tokens = fields.get("tokenizer.ggml.tokens", ())
        ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        there = {name: i for name, i in ids.items() if i is not None and i < len(tokens)}
        return {f"{name}_token": tokens[i] for name, i in there.items()}

    def order(self, name: str, row: TensorName, config: StoredConfig) -> np.ndarray:
        """Return the row of a tensor for each row in Hugging Face's order."""
        assert isinstance(config, DecoderConfig)
        rows = np.arange(self.header.tensors[name].shape[0])
        permuted = {"q": config.num_heads, "k": config.num_kv_heads}
        heads = permuted.get(row.path.split("/")[-2]) if self._kind == "llama" else None
        return rows if heads is None else unpermute(rows, heads)

    def stored(self, config: StoredConfig | None = None) -> Stored:
        """Return the tensors of the file without reading them; `config` gives the heads."""
        tensors, own = self.header.tensors, self.config if config is None else config
        if not isinstance(own, DecoderConfig):
            raise WeightsError(f"{self.path} holds a decoder, but the config is {own}")

        def read(name: str, row: TensorName, index: Index) -> np.ndarray:
            rows = self.order(name, row, own)[index[0]]
            # A head's rows are adjacent in either order, so for whole heads no other row is read.
            first, last = int(rows.min()), int(rows.max())
            return tensors[name].read((slice(first, last + 1), *index[1:]))[rows - first]

        def keep(name: str, row: TensorName, dtype: np.dtype) -> QuantisedMatrix | None:
            return _base(tensors[name], self.order(name, row, own), row.transposed, dtype)

        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return Stored(str(self.path), LLAMA, "gguf", shapes, read, keep)


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of q or k (a kernel [heads * H, in] or a bias) from GGUF's order to Hugging
    Face's.

    GGUF files of the Llama architecture store the rotary pairs of a head in adjacent rows (0, 1),
    (2, 3), ...; in our rope they are half a head apart.
    """
    shape = array.shape
    pairs = array.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
    return pairs.swapaxes(1, 2).reshape(shape)


def _base(
    tensor: gguf_header.Quantised, order: np.ndarray, transposed: bool, dtype: np.dtype
) -> GgmlBlocks | None:
    """Return the base of a matrix in blocks, with arrays on disk; None for floats.

    `order` has, for each row of the result, the row of the file: blocks run along a row, so rows
    can change places without touching a block.
    """
    kind = tensor.kind.name
    if kind in _FLOATS:
        return None
    if kind not in FORMATS or len(tensor.shape) != 2:
        raise WeightsError(
            f"{tensor.path}: tensor {tensor.name} of shape {tensor.shape} is quantised as {kind}; "
            f"matrices in {', '.join(FORMATS)} can be held as they are. keep_quantised=False "
            "expands the others to floats."
        )
    record = FORMATS[kind].record
    axes = (1, 0) if transposed else (0, 1)
    fields: dict[str, Any] = {
        name: _field(tensor, record, name, order) for name in record.names or ()
    }
    return GgmlBlocks(tensor.shape, axes, np.dtype(dtype).name, fields, kind)


def _field(
    tensor: gguf_header.Quantised, record: np.dtype, name: str, order: np.ndarray
) -> ArrayOnDisk:
    def read(index: Index) -> np.ndarray:
        # The file is mapped for each call; see `Quantised.read`.
        rows = order[index[0]]
        return np.asarray(tensor.blocks(record)[name][rows][(slice(None), *index[1:])])

    dtype, shape = record[name].base, record[name].shape
    blocks = tensor.shape[1] // FORMATS[tensor.kind.name].size
    return ArrayOnDisk((tensor.shape[0], blocks, *shape), dtype, read)
