"""The configs of the model families: sizes, variants, and compilation options."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """The settings that the configs of all models have.

    Attributes:
      hidden_size: the width of the hidden states.
      num_layers: the number of layers.
      num_heads: the number of attention heads (in a decoder, of the queries).
      mlp_size: the width of the MLP, or of one expert.
      norm_eps: the epsilon of the norms.
      activation: the activation function of the MLP.
      dropout: the dropout of the embeddings and of the outputs of attention and MLP.
      attention_dropout: the dropout of the attention weights.
      scan_layers: whether the layers run in one `nn.scan`, so that their parameters are stacked.
      remat: which intermediate results of a layer the backward pass computes again: "none", "full"
        (all), "dots" (all but the products), or a policy of `jax.checkpoint_policies`.
      dtype: the dtype of the computation.
      param_dtype: the dtype of the parameters.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    norm_eps: float = 1e-12
    activation: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    scan_layers: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextModelConfig(LayersConfig):
    """The settings that the configs of encoders and decoders of texts have.

    Attributes:
      vocab_size: the number of tokens.
      max_positions: the largest number of tokens of a text.
      pad_id, bos_id, eos_id: the ids of padding, begin and end.
      neftune: alpha of the noise that is added to the embeddings where dropout is applied.
    """

    vocab_size: int
    max_positions: int
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    neftune: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(TextModelConfig):
    """The config of an encoder: BERT, RoBERTa, DistilBERT, DeBERTa v2 and v3, ModernBERT.

    The defaults are BERT's; the options below name the families that use them.

    Attributes:
      num_token_types: the number of token types. DistilBERT has none.
      head_activation: the activation function of the dense layer of the head.
      absolute_positions: whether there is a table of positions. Most DeBERTa models have none.
      relative: attention by relative positions (DeBERTa).
      pre_norm: layers that begin with their norms (ModernBERT).
      head_norm: whether a "roberta_head" has a norm (ModernBERT).
      head_bias: whether the dense layer of the head has a bias.
      head_dropout: the dropout before the last product of the head. None: `dropout`.
      pooler_dropout: whether a "roberta_head" also has this dropout before its first product. It
        has not in DeBERTa.
      position_offset: the row of the first position; `pad_id + 1` in RoBERTa.
    """

    root: ClassVar = "bert"  # the key of its parameters next to a head
    num_token_types: int = 2
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
    """The divisors of the rotary frequencies in long rows.

    Attributes:
      length: the divisors apply to a row with more positions than this.
      divisors: one for each rotated pair.
    """

    length: int
    divisors: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(TextModelConfig):
    """The config of a decoder.

    The families are Llama and its descendants (SmolLM2, Mistral, Qwen2, Qwen3), GPT-2, Gemma, Phi,
    and mixtures of experts (Mixtral, Qwen3-MoE). The defaults are Llama's; the options below name
    the families that use them.

    Attributes:
      num_kv_heads: the number of attention heads of keys and values, which divides `num_heads`.
      head_dim: the width of a head.
      norm: "rms", "rms_plus_one" (Gemma: multiplies by 1 + scale) or "layer" (GPT-2).
      post_norms: whether the outputs of attention and MLP are normalised, too (Gemma).
      positions: "rotary" or "learned" (GPT-2).
      rope_theta: the base of the rotary frequencies.
      rope_divisors: divisors of the rotary frequencies, one for each rotated pair. Every published
        scaling for a fixed context length has this form, see `lora_jax.models.rope`.
      rope_long: replaces `rope_divisors` in long rows (Phi).
      rope_amplitude: multiplies the rotated queries and keys.
      rotary_dim: the number of elements of a head that are rotated (Phi). None: all.
      local_rope_theta: `rope_theta` in the layers with a window (Gemma 3). None: the same.
      fused: whether q, k and v are one kernel `qkv`, and gate and up are one (GPT-2, Phi).
      qkv_bias: whether q, k and v have biases.
      output_bias: whether the output of attention has a bias.
      qk_norm: whether q and k are normalised.
      sliding_window: the number of tokens that a token sees, including itself. None: all.
      windowed: for each layer, whether it has the window. None: all have.
      attention_scale: multiplies the scores. None: 1 / sqrt(head_dim).
      attention_cap: a limit of the scores (Gemma 2).
      gated: whether the MLP is down(activation(gate) * up); otherwise it is down(activation(up)),
        as in GPT-2.
      mlp_bias: whether the MLP has biases.
      num_experts: the number of experts of a mixture; 0: an MLP without experts.
      experts_per_token: the number of experts that each token uses. They are weighted by the
        router's softmax over all experts.
      renormalised: whether the weights of a token's experts are scaled so that their sum is 1.
      embedding_scale: multiplies the embeddings (Gemma).
      tied: whether the embeddings are also the kernel of the head.
      logit_cap: a limit of the logits (Gemma 2).
    """

    num_kv_heads: int
    head_dim: int
    root: ClassVar = "decoder"  # the key of its parameters next to a head
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

    def without_logits(self) -> Self:
        """Return the config of the same decoder as a classifier: it has no `lm_head`."""
        return dataclasses.replace(self, tied=True)

    @property
    def has_biases(self) -> bool:
        """Whether any product or norm has a bias vector."""
        return self.qkv_bias or self.output_bias or self.mlp_bias or self.norm == "layer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig(LayersConfig):
    """The config of a ViT.

    Attributes:
      image_size: the height and width of an image.
      patch_size: the height and width of a patch.
      channels: the number of channels of an image.
      pre_norm: the form of the layers.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    root: ClassVar = "vit"  # the key of its parameters next to a head
    channels: int = 3
    pre_norm: PreNorm = PreNorm()

    def __post_init__(self) -> None:
        _divisible("hidden_size", self.hidden_size, "num_heads", self.num_heads)
        for image, patch in zip(self.image_size, self.patch_size, strict=True):
            _divisible("image_size", image, "patch_size", patch)

    @property
    def grid(self) -> tuple[int, int]:
        """The number of patches in vertical and in horizontal direction."""
        high, wide = self.patch_size
        return self.image_size[0] // high, self.image_size[1] // wide


BuiltInConfig = BertConfig | DecoderConfig  # models of text
StoredConfig = BuiltInConfig | VitConfig  # all models that the loaders know


def check_choice(field: str, value: str, choices: Mapping[str, object]) -> None:
    """Raise a ValueError that names the field and the choices unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{field}: got {value!r}, expected one of {', '.join(sorted(choices))}")


def _one_for_each(windowed: tuple[bool, ...] | None, layers: int) -> None:
    if windowed is not None and len(windowed) != layers:
        raise ValueError(f"windowed: got {len(windowed)} values for {layers} layers")


def _divisible(name: str, size: int, of: str, parts: int) -> None:
    if parts <= 0 or size % parts:
        raise ValueError(f"{name}: got {size}, which {of} = {parts} does not divide")
