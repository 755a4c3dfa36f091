"""The name of every tensor in our parameter trees, in Hugging Face's files and in GGUF.

One row per tensor; `{layer}` stands for the layer's number. A row whose path the model of a
given configuration does not have (a bias, a q/k norm, an untied head) is not looked for.
"""

import dataclasses
import enum
import fnmatch
import re


class StoredForm(enum.Enum):
    """How a stored array becomes a parameter."""

    SAME = "same"
    TRANSPOSED = "transposed"  # a kernel: stored [out, in], ours [in, out]


class Permuted(enum.Enum):
    """Whose rotary pairs are stored interleaved in GGUF files of the Llama architecture."""

    NO = "no"
    QUERY = "query"
    KEY = "key"


@dataclasses.dataclass(frozen=True)
class TensorName:
    """One tensor (of each layer): our path, Hugging Face's name, GGUF's name."""

    path: str
    hf: str
    gguf: str = ""
    form: StoredForm = StoredForm.SAME
    permuted: Permuted = Permuted.NO

    @property
    def layered(self) -> bool:
        """Whether there is one such tensor in every layer."""
        return "{layer}" in self.path

    @property
    def stacked_path(self) -> str:
        """The path in a tree of scanned layers, where one array holds all of them."""
        return re.sub(r"layers?_\{layer\}", "layers", self.path)


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """The rows of one architecture, and how its Hugging Face files vary.

    Attributes:
        rows: the model's own tensors.
        heads: rows of a classification head by pooling; their paths start at `classifier/`.
        prefixes: what may stand before every Hugging Face name that `rows` has.
        skipped: patterns (fnmatch) of names that are there and not wanted.
        renamed: endings of old files and what they are called now.
    """

    rows: tuple[TensorName, ...]
    heads: dict[str, tuple[TensorName, ...]] = dataclasses.field(default_factory=dict)
    prefixes: tuple[str, ...] = ("",)
    skipped: tuple[str, ...] = ()
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)

    def clean(self, name: str) -> str:
        """A stored name as the rows have it: without a prefix, in today's spelling."""
        for prefix in self.prefixes:
            if prefix and name.startswith(prefix):
                name = name.removeprefix(prefix)
                break
        for old, new in self.renamed.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return name

    def skips(self, name: str) -> bool:
        """Whether a (clean) name is known, and known not to be wanted."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.skipped)


def _linear(
    path: str, hf: str, gguf: str = "", permuted: Permuted = Permuted.NO
) -> tuple[TensorName, TensorName]:
    return (
        TensorName(
            f"{path}/kernel",
            f"{hf}.weight",
            gguf and f"{gguf}.weight",
            StoredForm.TRANSPOSED,
            permuted,
        ),
        TensorName(f"{path}/bias", f"{hf}.bias", gguf and f"{gguf}.bias", permuted=permuted),
    )


def _layer_norm(path: str, hf: str) -> tuple[TensorName, TensorName]:
    return TensorName(f"{path}/scale", f"{hf}.weight"), TensorName(f"{path}/bias", f"{hf}.bias")


def _scale(path: str, hf: str, gguf: str) -> TensorName:
    return TensorName(f"{path}/scale", f"{hf}.weight", f"{gguf}.weight")


_BERT_LAYER, _HF_BERT_LAYER = "encoder/layer_{layer}", "encoder.layer.{layer}"
_BERT_ROWS = (
    TensorName("embeddings/word/embedding", "embeddings.word_embeddings.weight"),
    TensorName("embeddings/position/embedding", "embeddings.position_embeddings.weight"),
    TensorName("embeddings/token_type/embedding", "embeddings.token_type_embeddings.weight"),
    *_layer_norm("embeddings/norm", "embeddings.LayerNorm"),
    *_linear(f"{_BERT_LAYER}/attention/query", f"{_HF_BERT_LAYER}.attention.self.query"),
    *_linear(f"{_BERT_LAYER}/attention/key", f"{_HF_BERT_LAYER}.attention.self.key"),
    *_linear(f"{_BERT_LAYER}/attention/value", f"{_HF_BERT_LAYER}.attention.self.value"),
    *_linear(f"{_BERT_LAYER}/attention/output", f"{_HF_BERT_LAYER}.attention.output.dense"),
    *_layer_norm(f"{_BERT_LAYER}/attention_norm", f"{_HF_BERT_LAYER}.attention.output.LayerNorm"),
    *_linear(f"{_BERT_LAYER}/mlp/up", f"{_HF_BERT_LAYER}.intermediate.dense"),
    *_linear(f"{_BERT_LAYER}/mlp/down", f"{_HF_BERT_LAYER}.output.dense"),
    *_layer_norm(f"{_BERT_LAYER}/mlp_norm", f"{_HF_BERT_LAYER}.output.LayerNorm"),
)
_SINGLE_HEAD = _linear("classifier/out", "classifier")
_TF_ENDINGS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

BERT = TensorNames(
    rows=_BERT_ROWS,
    heads={
        "mean": _SINGLE_HEAD,
        "cls": _SINGLE_HEAD,
        "roberta_head": (*_linear("classifier/dense", "pooler.dense"), *_SINGLE_HEAD),
    },
    prefixes=("", "bert."),
    skipped=("embeddings.position_ids", "pooler.dense.*", "cls.*", "classifier.*"),
    renamed=_TF_ENDINGS,
)

ROBERTA = TensorNames(
    rows=_BERT_ROWS,
    heads={
        "mean": _SINGLE_HEAD,
        "cls": _SINGLE_HEAD,
        "roberta_head": (
            *_linear("classifier/dense", "classifier.dense"),
            *_linear("classifier/out", "classifier.out_proj"),
        ),
    },
    prefixes=("", "roberta."),
    skipped=("embeddings.position_ids", "pooler.dense.*", "lm_head.*", "classifier.*"),
    renamed=_TF_ENDINGS,
)

_LAYER, _HF_LAYER, _BLOCK = "layers_{layer}", "layers.{layer}", "blk.{layer}"
LLAMA = TensorNames(
    rows=(
        TensorName("embed/embedding", "embed_tokens.weight", "token_embd.weight"),
        *_linear(
            f"{_LAYER}/attention/q",
            f"{_HF_LAYER}.self_attn.q_proj",
            f"{_BLOCK}.attn_q",
            Permuted.QUERY,
        ),
        *_linear(
            f"{_LAYER}/attention/k",
            f"{_HF_LAYER}.self_attn.k_proj",
            f"{_BLOCK}.attn_k",
            Permuted.KEY,
        ),
        *_linear(f"{_LAYER}/attention/v", f"{_HF_LAYER}.self_attn.v_proj", f"{_BLOCK}.attn_v"),
        *_linear(f"{_LAYER}/attention/o", f"{_HF_LAYER}.self_attn.o_proj", f"{_BLOCK}.attn_output"),
        _scale(
            f"{_LAYER}/attention/q_norm", f"{_HF_LAYER}.self_attn.q_norm", f"{_BLOCK}.attn_q_norm"
        ),
        _scale(
            f"{_LAYER}/attention/k_norm", f"{_HF_LAYER}.self_attn.k_norm", f"{_BLOCK}.attn_k_norm"
        ),
        _scale(f"{_LAYER}/attention_norm", f"{_HF_LAYER}.input_layernorm", f"{_BLOCK}.attn_norm"),
        *_linear(f"{_LAYER}/mlp/gate", f"{_HF_LAYER}.mlp.gate_proj", f"{_BLOCK}.ffn_gate"),
        *_linear(f"{_LAYER}/mlp/up", f"{_HF_LAYER}.mlp.up_proj", f"{_BLOCK}.ffn_up"),
        *_linear(f"{_LAYER}/mlp/down", f"{_HF_LAYER}.mlp.down_proj", f"{_BLOCK}.ffn_down"),
        _scale(f"{_LAYER}/mlp_norm", f"{_HF_LAYER}.post_attention_layernorm", f"{_BLOCK}.ffn_norm"),
        _scale("norm", "norm", "output_norm"),
        TensorName("lm_head/kernel", "lm_head.weight", "output.weight", StoredForm.TRANSPOSED),
    ),
    prefixes=("", "model."),
    # rope_freqs holds the frequencies' divisors: they are read into the configuration.
    skipped=("*.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq", "rope_freqs.weight"),
)

HF = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}
GGUF = {"llama": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA}
GGUF_PERMUTED = frozenset({"llama"})  # the architectures that store q and k with interleaved pairs
