"""Check the fields of a model's stored config before any is used.

A config may come from a stranger. Sizes have limits of about ten times the sizes of the largest
published models. Below them, nothing that is built from a size alone (a tuple with a number for
each rotated pair, one with a flag for each layer) takes noticeable time or memory.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from lora_jax.errors import ModelConfigError, shown

_WIDTH, _LAYERS, _TOKENS = 2**20, 1_000, 2**31 - 1
_LARGEST = 1e15  # for a number that is not a size: below the limit of float32


class FieldKind(NamedTuple):
    """The valid values of a field, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]

    def or_null(self) -> "FieldKind":
        """Return the kind that also allows null."""
        return FieldKind(f"{self.words}, or null", lambda x: x is None or self.fits(x))


def _size(most: int) -> FieldKind:
    return FieldKind(f"an integer from 1 to {most:,}", lambda x: type(x) is int and 1 <= x <= most)


def _is_id(value: Any) -> bool:
    return type(value) is int and abs(value) <= _TOKENS


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST  # so it is neither NaN nor inf


_WIDE, _DEEP, _LONG = _size(_WIDTH), _size(_LAYERS), _size(_TOKENS)
_ID = FieldKind("a token's id, or null", lambda x: x is None or _is_id(x))
_IDS = FieldKind(
    "a token's id, a list of at least one, or null",
    lambda x: x is None or _is_id(x) or (isinstance(x, list) and x != [] and all(map(_is_id, x))),
)
_POSITIVE = FieldKind(f"a number above 0, up to {_LARGEST:g}", lambda x: _is_number(x) and x > 0)
_EPSILON = FieldKind("a number above 0 and below 1", lambda x: _is_number(x) and 0 < x < 1)
_CAP = FieldKind("a number above 0, up to 1e6", lambda x: _is_number(x) and 0 < x <= 1e6)
_RATE = FieldKind("a number in [0, 1)", lambda x: _is_number(x) and 0 <= x < 1)
_FLAG = FieldKind("true, false or null", lambda x: x is None or isinstance(x, bool))
_COUNT = FieldKind(
    f"an integer from 0 to {_WIDTH:,}", lambda x: type(x) is int and 0 <= x <= _WIDTH
)
_COUNT_OR_NONE = FieldKind(
    f"an integer from -1 (none) to {_WIDTH:,}", lambda x: type(x) is int and -1 <= x <= _WIDTH
)
_TEXT = FieldKind("a text", lambda x: isinstance(x, str))
_TEXTS = FieldKind(
    f"a list of at most {_LAYERS:,} texts, or null",
    lambda x: (
        x is None
        or (isinstance(x, list) and len(x) <= _LAYERS and all(isinstance(one, str) for one in x))
    ),
)
_NUMBERS = FieldKind(
    f"a list of at most {_WIDTH:,} numbers above 0",
    lambda x: isinstance(x, list) and len(x) <= _WIDTH and all(map(_POSITIVE.fits, x)),
)
_EXTENT = FieldKind(
    "an integer from 1 to 65,536, or a list of two",
    lambda x: all(
        type(one) is int and 1 <= one <= 2**16
        for one in (x if isinstance(x, list) and len(x) == 2 else [x])
    ),
)
_SHARE = FieldKind("a number in (0, 1]", lambda x: _is_number(x) and 0 < x <= 1)
_OBJECT = FieldKind("an object, or null", lambda x: x is None or isinstance(x, dict))


def _table(*rows: tuple[FieldKind, str]) -> dict[str, FieldKind]:
    return {name: kind for kind, names in rows for name in names.split()}


# The fields of a Hugging Face `config.json`; a field that is missing here is checked when it is
# read.
HF = _table(
    (_TEXT, "model_type"),
    (_WIDE, "hidden_size n_embd dim intermediate_size hidden_dim moe_intermediate_size"),
    (_WIDE, "num_attention_heads n_head n_heads sliding_window_pattern conv_groups num_channels"),
    (_WIDE.or_null(), "head_dim num_key_value_heads n_inner"),
    (_size(2**14).or_null(), "num_local_experts num_experts"),
    (_size(2**14), "num_experts_per_tok global_attn_every_n_layers"),
    (_DEEP, "num_hidden_layers n_layer n_layers"),
    (_LONG, "vocab_size max_position_embeddings n_positions local_attention"),
    (_LONG.or_null(), "original_max_position_embeddings sliding_window"),
    (_ID, "pad_token_id bos_token_id"),
    (_IDS, "eos_token_id"),
    (_EPSILON, "layer_norm_eps norm_eps rms_norm_eps layer_norm_epsilon"),
    (_POSITIVE.or_null(), "rope_theta global_rope_theta local_rope_theta"),
    (_POSITIVE, "rope_local_base_freq query_pre_attn_scalar"),
    (_CAP.or_null(), "attn_logit_softcapping final_logit_softcapping"),
    (_SHARE.or_null(), "partial_rotary_factor"),
    (_RATE, "hidden_dropout_prob attention_probs_dropout_prob"),
    (_RATE, "dropout attention_dropout mlp_dropout"),
    (_COUNT, "type_vocab_size max_window_layers"),
    (_COUNT.or_null(), "conv_kernel_size"),
    (_COUNT_OR_NONE, "position_buckets max_relative_positions"),
    (_EXTENT, "image_size patch_size"),
    (_FLAG, "attention_bias mlp_bias norm_bias qkv_bias classifier_bias tie_word_embeddings"),
    (_FLAG, "share_att_key position_biased_input relative_attention norm_topk_prob"),
    (_FLAG, "use_sliding_window scale_attn_weights"),
    (_TEXT.or_null(), "hidden_act hidden_activation activation activation_function"),
    (_TEXT.or_null(), "pooler_hidden_act conv_act classifier_activation"),
    (_TEXTS, "layer_types"),
    (_OBJECT, "rope_scaling rope_parameters quantization_config"),
)

# The fields of its `rope_scaling` or `rope_parameters`.
_ROPE = _table(
    (_TEXT.or_null(), "rope_type type"),
    (_POSITIVE, "factor low_freq_factor high_freq_factor"),
    (_POSITIVE.or_null(), "attention_factor rope_theta"),
    (_NUMBERS, "short_factor long_factor"),
    (_SHARE.or_null(), "partial_rotary_factor"),
    (_LONG.or_null(), "original_max_position_embeddings"),
    (_OBJECT, "full_attention sliding_attention"),
)

# The fields of GGUF metadata, without the architecture that most names begin with.
GGUF = _table(
    (_TEXT, "general.architecture rope.scaling.type tokenizer.ggml.model tokenizer.ggml.pre"),
    (_TEXT, "tokenizer.chat_template"),
    (_WIDE, "embedding_length feed_forward_length attention.head_count attention.head_count_kv"),
    (_WIDE, "attention.key_length rope.dimension_count"),
    (_DEEP, "block_count"),
    (_LONG, "context_length attention.sliding_window"),
    (_EPSILON, "attention.layer_norm_rms_epsilon"),
    (_POSITIVE, "rope.freq_base rope.scaling.factor"),
    (_ID, "tokenizer.ggml.padding_token_id tokenizer.ggml.bos_token_id"),
    (_ID, "tokenizer.ggml.eos_token_id"),
)


def check(fields: Mapping[str, Any], kinds: Mapping[str, FieldKind], origin: str) -> None:
    """Raise ModelConfigError for the first field, by name, whose value is not valid."""
    for name, value in fields.items():
        kind = kinds.get(name)
        if kind is not None and not kind.fits(value):
            raise ModelConfigError(f"{origin}: {name} is {shown(value)}, expected {kind.words}")


@contextlib.contextmanager
def describing(origin: str, kind: str) -> Iterator[None]:
    """Turn errors in the block into a ModelConfigError, while fields become the config of a
    `kind`."""
    try:
        yield
    except ModelConfigError:
        raise
    except KeyError as error:
        raise ModelConfigError(f"{origin}: no field {error}, which {kind} needs") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ModelConfigError(
            f"{origin} describes a {kind} that cannot be: {shown(error)}\n"
            "Take the file of the model's own folder, as it was published."
        ) from error


def check_hf(json: Mapping[str, Any], origin: str) -> None:
    """Check a `config.json` and its rope settings, which may be given for each kind of layer."""
    check(json, HF, origin)
    for name in ("rope_scaling", "rope_parameters"):
        whole = json.get(name) or {}
        check(whole, _ROPE, f"{origin}, {name}")
        for kind in ("full_attention", "sliding_attention"):
            check(whole.get(kind) or {}, _ROPE, f"{origin}, {name}.{kind}")
