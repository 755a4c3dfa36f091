"""The name of every tensor in our parameter trees, in Hugging Face's files and in GGUF.

One row per tensor; `{layer}` stands for the layer's number. A row whose path the model of a
given configuration does not have (a bias, a q/k norm, an untied head) is not looked for.
"""

import dataclasses
import fnmatch
import re


@dataclasses.dataclass(frozen=True)
class TensorName:
    """One tensor (of each layer): our path, Hugging Face's name, GGUF's name."""

    path: str
    hf: str
    gguf: str = ""

    @property
    def transposed(self) -> bool:
        """Whether it is a kernel: stored [out, in], ours [in, out]."""
        return self.path.endswith("/kernel")

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
        prefix: what may stand before every Hugging Face name that `rows` has.
        skipped: patterns (fnmatch) of names that are there and not wanted.
        renamed: endings of old files and what they are called now.
    """

    rows: tuple[TensorName, ...]
    heads: dict[str, tuple[TensorName, ...]] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    skipped: tuple[str, ...] = ()
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)

    def clean(self, name: str) -> str:
        """A stored name as the rows have it: without a prefix, in today's spelling."""
        name = name.removeprefix(self.prefix)
        for old, new in self.renamed.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return name

    def skips(self, name: str) -> bool:
        """Whether a (clean) name is known, and known not to be wanted."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.skipped)


def _linear(path: str, hf: str, gguf: str = "") -> tuple[TensorName, TensorName]:
    return (
        TensorName(f"{path}/kernel", f"{hf}.weight", gguf and f"{gguf}.weight"),
        TensorName(f"{path}/bias", f"{hf}.bias", gguf and f"{gguf}.bias"),
    )


def _layer_norm(path: str, hf: str) -> tuple[TensorName, TensorName]:
    return _scale(path, hf), TensorName(f"{path}/bias", f"{hf}.bias")


def _scale(path: str, hf: str, gguf: str = "") -> TensorName:
    return TensorName(f"{path}/scale", f"{hf}.weight", gguf and f"{gguf}.weight")


def _of_layers(path: str, hf: str, gguf: str, *rows: TensorName) -> tuple[TensorName, ...]:
    """Rows of every layer: each name with what stands before it."""
    return tuple(TensorName(path + row.path, hf + row.hf, gguf + row.gguf) for row in rows)


_BERT_ROWS = (
    TensorName("embeddings/word/embedding", "embeddings.word_embeddings.weight"),
    TensorName("embeddings/position/embedding", "embeddings.position_embeddings.weight"),
    TensorName("embeddings/token_type/embedding", "embeddings.token_type_embeddings.weight"),
    *_layer_norm("embeddings/norm", "embeddings.LayerNorm"),
    *_of_layers(
        *("encoder/layer_{layer}/", "encoder.layer.{layer}.", ""),
        *_linear("attention/query", "attention.self.query"),
        *_linear("attention/key", "attention.self.key"),
        *_linear("attention/value", "attention.self.value"),
        *_linear("attention/output", "attention.output.dense"),
        *_layer_norm("attention_norm", "attention.output.LayerNorm"),
        *_linear("mlp/up", "intermediate.dense"),
        *_linear("mlp/down", "output.dense"),
        *_layer_norm("mlp_norm", "output.LayerNorm"),
    ),
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
    prefix="bert.",
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
    prefix="roberta.",
    skipped=("embeddings.position_ids", "pooler.dense.*", "lm_head.*", "classifier.*"),
    renamed=_TF_ENDINGS,
)

LLAMA = TensorNames(
    rows=(
        TensorName("embed/embedding", "embed_tokens.weight", "token_embd.weight"),
        *_of_layers(
            *("layers_{layer}/", "layers.{layer}.", "blk.{layer}."),
            *_linear("attention/q", "self_attn.q_proj", "attn_q"),
            *_linear("attention/k", "self_attn.k_proj", "attn_k"),
            *_linear("attention/v", "self_attn.v_proj", "attn_v"),
            *_linear("attention/o", "self_attn.o_proj", "attn_output"),
            _scale("attention/q_norm", "self_attn.q_norm", "attn_q_norm"),
            _scale("attention/k_norm", "self_attn.k_norm", "attn_k_norm"),
            _scale("attention_norm", "input_layernorm", "attn_norm"),
            *_linear("mlp/gate", "mlp.gate_proj", "ffn_gate"),
            *_linear("mlp/up", "mlp.up_proj", "ffn_up"),
            *_linear("mlp/down", "mlp.down_proj", "ffn_down"),
            _scale("mlp_norm", "post_attention_layernorm", "ffn_norm"),
        ),
        _scale("norm", "norm", "output_norm"),
        TensorName("lm_head/kernel", "lm_head.weight", "output.weight"),
    ),
    prefix="model.",
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
