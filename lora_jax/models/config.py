"""The configurations of the two model families: sizes, variants, and how to compile them."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """A BERT or RoBERTa encoder.

    The two differ in `position_offset` only: RoBERTa's positions start behind the row of the
    padding token, at `pad_id + 1`. `max_positions` counts the rows that text can use.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    max_positions: int
    num_token_types: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    position_offset: int = 0
    pad_id: int = 0
    bos_id: int | None = None
    eos_id: int | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    scan_layers: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        _divisible("hidden_size", self.hidden_size, "num_heads", self.num_heads)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A decoder of the Llama family: Llama, SmolLM2, Mistral, Qwen2, Qwen3.

    `rope_divisors` (one number per rotated pair, head_dim / 2 of them) divides the rotary
    frequencies: every published scaling of a fixed context length comes down to it, see
    `lora_jax.models.rope`. `sliding_window` lets a token see that many tokens, itself included.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_positions: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_divisors: tuple[float, ...] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    tied: bool = True
    sliding_window: int | None = None
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    scan_layers: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        _divisible("num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)
        _divisible("head_dim", self.head_dim, "the two halves that rope rotates", 2)
        divisors = self.rope_divisors
        if divisors is not None and len(divisors) != self.head_dim // 2:
            raise ValueError(
                f"rope_divisors: expected head_dim / 2 = {self.head_dim // 2} numbers, "
                f"got {len(divisors)}"
            )


BuiltInConfig = BertConfig | LlamaConfig


def check_choice(field: str, value: str, choices: Mapping[str, object]) -> None:
    """Raise ValueError, naming the field and the choices, unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{field}: got {value!r}, expected one of {', '.join(sorted(choices))}")


def _divisible(name: str, size: int, of: str, parts: int) -> None:
    if parts <= 0 or size % parts:
        raise ValueError(f"{name}: got {size}, which {of} = {parts} does not divide")
