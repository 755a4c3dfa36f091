"""A model in one GGUF file, of the Llama family: metadata, tokenizer, quantised weights."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers

from lora_jax.models import gguf_tokenizer
from lora_jax.models.assemble import Head, Stored, Tree, WeightsError, assemble
from lora_jax.models.config import Config, LlamaConfig
from lora_jax.models.hf_config import ConfigError
from lora_jax.models.names import GGUF, GGUF_TURNED, Row, Turned
from lora_jax.models.rope import linear_divisors


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A GGUF file, memory-mapped; no weight is read before `load`."""

    path: Path

    @functools.cached_property
    def _reader(self) -> gguf.GGUFReader:
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is not there")
        return gguf.GGUFReader(self.path)

    @functools.cached_property
    def _tensors(self) -> dict[str, gguf.ReaderTensor]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def _kind(self) -> str:
        kind = self._value("general.architecture")
        if kind not in GGUF:
            raise ConfigError(
                f"{self.path}: the architecture is {kind!r}; the GGUF loader knows "
                f"{', '.join(sorted(GGUF))}"
            )
        return kind

    def _value(self, key: str, default: Any = None) -> Any:
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    @functools.cached_property
    def config(self) -> Config:
        """The configuration that the metadata describes.

        Raises:
            ConfigError: another architecture, or a field that is not there.
        """
        kind = self._kind

        def need(key: str) -> Any:
            value = self._value(f"{kind}.{key}")
            if value is None:
                raise ConfigError(f"{self.path}: no field {kind}.{key} in the metadata")
            return value

        def may(key: str, default: Any = None) -> Any:
            return self._value(f"{kind}.{key}", default)

        heads = need("attention.head_count")
        hidden = need("embedding_length")
        head_dim = may("attention.key_length", hidden // heads)
        turned = may("rope.dimension_count", head_dim)
        if turned != head_dim:
            raise ConfigError(f"{self.path}: rope turns {turned} of a head's {head_dim} numbers")
        return LlamaConfig(
            vocab_size=int(self._tensors["token_embd.weight"].shape[-1]),
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
            return tuple(map(float, self._array("rope_freqs.weight")))
        kind = self._value(f"{self._kind}.rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind != "linear":
            raise ConfigError(f"{self.path}: rope scaling {kind!r} is not supported")
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
        config: Config | None = None,
        *,
        head: Head | None = None,
        shardings: Tree | None = None,
    ) -> Tree:
        """The parameters, see `lora_jax.models.assemble.assemble`; None: of `self.config`."""
        config = self.config if config is None else config
        if not isinstance(config, LlamaConfig):
            raise WeightsError(f"{self.path} holds a decoder, but the configuration is {config}")
        turned = self._kind in GGUF_TURNED
        heads = {Turned.QUERY: config.num_heads, Turned.KEY: config.num_kv_heads}

        def read(name: str, row: Row) -> np.ndarray:
            array = self._array(name)
            return unturn(array, heads[row.turned]) if turned and row.turned in heads else array

        stored = Stored(str(self.path), GGUF[self._kind], "gguf", tuple(self._tensors), read)
        return assemble(stored, config, head, shardings)

    def _array(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32 (float16 and float32 as they are)."""
        tensor = self._tensors[name]
        try:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise WeightsError(
                f"{self.path}: tensor {name} is quantised as {tensor.tensor_type.name}, which the "
                "gguf package cannot expand"
            ) from error


def unturn(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from GGUF's order to Hugging Face's.

    The Llama architecture's GGUF files store the rotary pairs of a head in adjacent rows
    (0, 1), (2, 3), ...; our rope has them half a head apart.

    Args:
        array: [heads * H, ...], a kernel [out, in] or a bias.
    """
    shape = array.shape
    pairs = array.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
    return pairs.swapaxes(1, 2).reshape(shape)
