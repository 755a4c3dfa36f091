"""The configs of the model families: sizes, variants, and compilation options."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Disentangled:
    """DeBERTa's attention by relative positions; see `lora_jax.models.deberta`.

    Attributes:
        distances: the largest distance; larger ones count as this one.
        buckets: the number of different distances in each direction; 0: all of them.
        kinds: "c2p" (content to position), "p2c" (position to content).
        shared: whether positions use the kernels of the tokens' queries and keys.
        norm: whether the table of positions is normalised.
        conv_size: the size of the convolution that is added after the first layer; 0: none.
        conv_groups: the number of its groups.
        conv_activation: its activation function.
    """

    distances: int
    buckets: int = 0
    kinds: tuple[str, ...] = ("c2p", "p2c")
    shared: bool = True
    norm: bool = True
    conv_size: int = 0
    conv_groups: int = 1
    conv_activation: str = "tanh"

    @property
    def span(self) -> int:
        """The number of rows of the table for each direction."""
        return self.buckets or self.distances


@dataclasses.dataclass(frozen=True)
class PreNorm:
    """Layers that begin with their norms; see `lora_jax.models.pre_norm`. The defaults are ViT's.

    Attributes:
        rope_theta: the rotary base of layers that see all tokens. None: no rotation.
        local_rope_theta: the rotary base of layers with a window.
        window: a token sees itself, and at most window - 1 others on either side.
        windowed: for each layer, whether it has the window. None: no layer has.
        fused: whether query, key and value are one kernel `qkv`.
        gated: whether the MLP is down(activation(gate) * up), with gate and up one kernel
            `gate_up`.
        qkv_bias, output_bias, mlp_bias, norm_bias: whether these parts have biases.
        first_norm: whether the first layer's attention normalises the embeddings.
    """

    rope_theta: float | None = None
    local_rope_theta: float | None = None
    window: int | None = None
    windowed: tuple[bool, ...] | None = None
    fused: bool = False
    gated: bool = False
    qkv_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    first_norm: bool = True

    @property
    def norm(self) -> str:
        """The name of the norm in `lora_jax.models.layers`."""
        return "layer" if self.norm_bias else "layer_without_bias"


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """An encoder: BERT, RoBERTa, DistilBERT, DeBERTa v2 and v3, ModernBERT.

    RoBERTa's positions start after the row of the padding token: `position_offset` is `pad_id + 1`.
    `max_positions` counts the rows that text can use. DistilBERT has no token types, and its
    `head_activation` is "relu", in the dense layer of a "roberta_head". DeBERTa has `relative`
    positions, and mostly no absolute ones. ModernBERT has `pre_norm`, and a norm in its
    "roberta_head".

    `head_dropout` (None: the same as `dropout`) is applied before the head's last product and, with
    `pooler_dropout` (not DeBERTa), also before the first one of a "roberta_head".
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
    head_activation: str = "tanh"
    absolute_positions: bool = True
    relative: Disentangled | None = None
    pre_norm: PreNorm | None = None
    head_norm: bool = False
    head_bias: bool = True
    head_dropout: float | None = None
    pooler_dropout: bool = True
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
        if self.pre_norm is not None:
            _one_for_each(self.pre_norm.windowed, self.num_layers)

    @property
    def has_biases(self) -> bool:
        """Whether any product or norm of the layers has a bias vector."""
        form = self.pre_norm or PreNorm()
        return form.qkv_bias or form.output_bias or form.mlp_bias or form.norm_bias


@dataclasses.dataclass(frozen=True)
class LongRope:
    """The divisors of the rotary frequencies in a row with more than `length` positions."""

    length: int
    divisors: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A decoder: Llama and its family (SmolLM2, Mistral, Qwen2, Qwen3), GPT-2, Gemma, Phi, and
    mixtures of experts (Mixtral, Qwen3-MoE). The defaults are Llama's; the options below name the
    families that use them.

    Sizes: with experts, `mlp_size` is the size of one expert.

    Norms: `norm` is "rms", "rms_plus_one" (Gemma: multiplies by 1 + scale) or "layer" (GPT-2).
    `post_norms` (Gemma) also normalises the outputs of attention and MLP.

    Positions: `positions` is "rotary" or "learned" (GPT-2). `rotary_dim` (Phi) rotates only this
    many numbers of a head. `rope_divisors` (one number per rotated pair, rotary_dim / 2 of them)
    divides the rotary frequencies: every published scaling for a fixed context length can be
    written so, see `lora_jax.models.rope`. `rope_long` (Phi) replaces it in a row beyond a given
    length, and `rope_amplitude` multiplies the rotated queries and keys.

    Attention: `sliding_window` lets a token see only this many tokens, including itself, in the
    layers where `windowed` is True (None: in all). Those layers rotate by `local_rope_theta`
    (Gemma 3) if it is given. `attention_scale` multiplies the scores (None: 1 / sqrt(head_dim)),
    and `attention_cap` (Gemma 2) limits them. With `fused` (GPT-2, Phi), q, k and v are one kernel
    `qkv`, and gate and up are one kernel.

    MLP: down(activation(gate) * up), or down(activation(up)) if it is not `gated` (GPT-2). With
    `num_experts` it is a mixture: each token goes to `experts_per_token` of them, weighted by the
    router's softmax over all; if `renormalised`, the weights of a token sum to 1.

    Ends: `embedding_scale` (Gemma) multiplies the embeddings, `logit_cap` (Gemma 2) limits the
    logits.

    `dropout` is applied to the embeddings and to the outputs of attention and MLP, and
    `attention_dropout` to the attention weights, as in GPT-2.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_positions: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    post_norms: bool = False
    positions: str = "rotary"
    rope_theta: float = 10000.0
    rope_divisors: tuple[float, ...] | None = None
    rope_long: LongRope | None = None
    rope_amplitude: float = 1.0
    rotary_dim: int | None = None
    local_rope_theta: float | None = None
    fused: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    windowed: tuple[bool, ...] | None = None
    attention_scale: float | None = None
    attention_cap: float | None = None
    activation: str = "silu"
    gated: bool = True
    mlp_bias: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    renormalised: bool = True
    embedding_scale: float = 1.0
    tied: bool = True
    logit_cap: float | None = None
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    scan_layers: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if self.head_dim < 1:
            raise ValueError(f"head_dim: got {self.head_dim}, expected at least 1")
        _divisible("num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)
        _divisible("the rotated numbers", self.rotated, "the two halves that rope rotates", 2)
        long = None if self.rope_long is None else self.rope_long.divisors
        for name, divisors in (("rope_divisors", self.rope_divisors), ("rope_long", long)):
            if divisors is not None and len(divisors) != self.rotated // 2:
                raise ValueError(
                    f"{name}: expected half of the {self.rotated} rotated numbers of a head, "
                    f"{self.rotated // 2}, got {len(divisors)}"
                )
        _one_for_each(self.windowed, self.num_layers)
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token: got {self.experts_per_token} of {self.num_experts} experts"
            )

    @property
    def rotated(self) -> int:
        """The number of elements of a head that are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def kinds(self) -> tuple[int, ...]:
        """For each layer, 1 if it sees only the window, else 0."""
        if self.sliding_window is None:
            return (0,) * self.num_layers
        return tuple(map(int, self.windowed or (True,) * self.num_layers))

    def most_tokens(self, prompt: int) -> int:
        """Return the largest length of a text that continues a prompt with a cache.

        A text whose prompt is within `rope_long.length` ends there, because the keys in the cache
        cannot be rotated by other frequencies afterwards. (The last token is written but never
        read, hence the + 1.)

        Args:
            prompt: the number of tokens of the prompt.
        """
        if self.rope_long is None or prompt > self.rope_long.length:
            return self.max_positions
        return min(self.max_positions, self.rope_long.length + 1)

    @property
    def has_biases(self) -> bool:
        """Whether any product or norm has a bias vector."""
        return self.qkv_bias or self.output_bias or self.mlp_bias or self.norm == "layer"


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """A ViT; the sizes of images and patches are (height, width)."""

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    channels: int = 3
    norm_eps: float = 1e-12
    activation: str = "gelu"
    pre_norm: PreNorm = PreNorm()
    dropout: float = 0.0
    attention_dropout: float = 0.0
    scan_layers: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        _divisible("hidden_size", self.hidden_size, "num_heads", self.num_heads)
        for image, patch in zip(self.image_size, self.patch_size, strict=True):
            _divisible("image_size", image, "patch_size", patch)

    @property
    def grid(self) -> tuple[int, int]:
        """The number of patches in vertical and in horizontal direction."""
        high, wide = self.patch_size
        return self.image_size[0] // high, self.image_size[1] // wide


BuiltInConfig = BertConfig | LlamaConfig  # models of text
StoredConfig = BuiltInConfig | VitConfig  # all models that the loaders know


def check_choice(field: str, value: str, choices: Mapping[str, object]) -> None:
    """Raise a ValueError that names the field and the choices unless `value` is one of them.

    Args:
        field: the name of the field.
        value: its value.
        choices: the valid values.
    """
    if value not in choices:
        raise ValueError(f"{field}: got {value!r}, expected one of {', '.join(sorted(choices))}")


def _one_for_each(windowed: tuple[bool, ...] | None, layers: int) -> None:
    if windowed is not None and len(windowed) != layers:
        raise ValueError(f"windowed: got {len(windowed)} values for {layers} layers")


def _divisible(name: str, size: int, of: str, parts: int) -> None:
    if parts <= 0 or size % parts:
        raise ValueError(f"{name}: got {size}, which {of} = {parts} does not divide")
