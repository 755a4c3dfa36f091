"""Load a Llama-family model from one GGUF file: metadata, tokenizer, quantised weights."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers

from lora_jax.models.config import BuiltInConfig, LlamaConfig
from lora_jax.models.errors import ModelConfigError, WeightsError
from lora_jax.models.rope import linear_divisors
from lora_jax.models.weights import gguf_header, gguf_tokenizer
from lora_jax.models.weights.assemble import Head, ParameterTree, Stored, assemble
from lora_jax.models.weights.names import GGUF, GGUF_PERMUTED, Permuted, TensorName
from lora_jax.models.weights.shards import Index


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A GGUF file, memory-mapped; no weight is read before `load`."""

    path: Path

    @functools.cached_property
    def _header(self) -> gguf_header.Header:
        return gguf_header.read(self.path)

    @property
    def _tensors(self) -> dict[str, gguf_header.Quantised]:
        return self._header.tensors

    @property
    def _kind(self) -> str:
        kind = self._value("general.architecture")
        if kind not in GGUF:
            raise ModelConfigError(
                f"{self.path}: the architecture is {kind!r}; the GGUF loader knows "
                f"{', '.join(sorted(GGUF))}"
            )
        return kind

    def _value(self, key: str, default: Any = None) -> Any:
        return self._header.fields.get(key, default)

    @functools.cached_property
    def config(self) -> BuiltInConfig:
        """The configuration that the metadata describes.

        Raises:
            ModelConfigError: another architecture, or a field that is not there.
        """
        kind = self._kind

        def need(key: str) -> Any:
            value = self._value(f"{kind}.{key}")
            if value is None:
                raise ModelConfigError(f"{self.path}: no field {kind}.{key} in the metadata")
            return value

        def may(key: str, default: Any = None) -> Any:
            return self._value(f"{kind}.{key}", default)

        heads = need("attention.head_count")
        hidden = need("embedding_length")
        head_dim = may("attention.key_length", hidden // heads)
        rotary = may("rope.dimension_count", head_dim)
        if rotary != head_dim:
            raise ModelConfigError(
                f"{self.path}: rope turns {rotary} of a head's {head_dim} numbers"
            )
        return LlamaConfig(
            vocab_size=self._tensors["token_embd.weight"].shape[0],
            hidden_size=hidden,
            num_layers=need("block_count"),
            num_heads=heads,
            num_kv_heads=may("attention.head_count_kv", heads),
            head_dim=head_dim,
            mlp_size=need("feed_forward_length"),
            max_positions=need("context_length"),
            norm_eps=need("attention.layer_norm_rms_epsilon"),
            rope_theta=may("rope.freq_base", 10000.0),
            rope_divisors=self._rope_divisors(head_dim),
            qkv_bias="blk.0.attn_q.bias" in self._tensors,
            output_bias="blk.0.attn_output.bias" in self._tensors,
            qk_norm="blk.0.attn_q_norm.weight" in self._tensors,
            tied="output.weight" not in self._tensors,
            sliding_window=may("attention.sliding_window"),
            pad_id=self._value("tokenizer.ggml.padding_token_id"),
            bos_id=self._value("tokenizer.ggml.bos_token_id"),
            eos_id=self._value("tokenizer.ggml.eos_token_id"),
        )

    def _rope_divisors(self, head_dim: int) -> tuple[float, ...] | None:
        if "rope_freqs.weight" in self._tensors:
            count = self._tensors["rope_freqs.weight"].shape[0]
            return tuple(map(float, self._read("rope_freqs.weight", (slice(0, count),))))
        kind = self._value(f"{self._kind}.rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind != "linear":
            raise ModelConfigError(f"{self.path}: rope scaling {kind!r} is not supported")
        return linear_divisors(head_dim, self._value(f"{self._kind}.rope.scaling.factor"))

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer that the metadata describes, see `gguf_tokenizer.build`."""
        return gguf_tokenizer.build(self._value, str(self.path))

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that turns a conversation into a prompt; None if there is none."""
        return self._value("tokenizer.chat_template")

    def load(
        self,
        config: BuiltInConfig | None = None,
        *,
        head: Head | None = None,
        shardings: ParameterTree | None = None,
    ) -> ParameterTree:
        """Return the parameters, as `assemble.assemble` does; None stands for `self.config`."""
        config = self.config if config is None else config
        if not isinstance(config, LlamaConfig):
            raise WeightsError(f"{self.path} holds a decoder, but the configuration is {config}")
        permuted = self._kind in GGUF_PERMUTED
        heads = {Permuted.QUERY: config.num_heads, Permuted.KEY: config.num_kv_heads}

        def read(name: str, row: TensorName, index: Index) -> np.ndarray:
            if not permuted or row.permuted not in heads:
                return self._read(name, index)
            return self._unpermuted(name, heads[row.permuted], index)

        shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        stored = Stored(str(self.path), GGUF[self._kind], "gguf", shapes, read)
        return assemble(stored, config, head, shardings)

    def _unpermuted(self, name: str, heads: int, index: Index) -> np.ndarray:
        """A part of q or k with its rows in Hugging Face's order."""
        rows = unpermute(np.arange(self._tensors[name].shape[0]), heads)[index[0]]
        # A head's rows are together in either order: of whole heads, no other row is read.
        first, last = int(rows.min()), int(rows.max())
        return self._read(name, (slice(first, last + 1), *index[1:]))[rows - first]

    def _read(self, name: str, index: Index) -> np.ndarray:
        """A part of one tensor, dequantised to float32; of the blocks only those it lies in."""
        tensor = self._tensors[name]
        block = gguf.GGML_QUANT_SIZES[tensor.kind][0]
        unit = tensor.region.shape[-1] * block // tensor.shape[-1]  # stored items of one block
        *outer, last = index
        first, end = last.start // block, -(-last.stop // block)
        stored = tensor.region.read((*outer, slice(first * unit, end * unit)))
        try:
            numbers: np.ndarray = gguf.quants.dequantize(stored, tensor.kind)
        except NotImplementedError as error:
            raise WeightsError(
                f"{self.path}: tensor {name} is quantised as {tensor.kind.name}, which the gguf "
                "package cannot expand"
            ) from error
        return numbers[..., last.start - first * block : last.stop - first * block]


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from GGUF's order to Hugging Face's.

    The Llama architecture's GGUF files store the rotary pairs of a head in adjacent rows
    (0, 1), (2, 3), ...; our rope has them half a head apart.

    Args:
        array: [heads * H, ...], a kernel [out, in] or a bias.
    """
    shape = array.shape
    pairs = array.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
    return pairs.swapaxes(1, 2).reshape(shape)
