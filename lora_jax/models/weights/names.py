"""The name of every tensor in our parameter trees, in Hugging Face's files and in GGUF.

One row per tensor; `{layer}` stands for the layer's number. A row whose path the model of a
given configuration does not have (a bias, a q/k norm, an untied head) is not looked for.
"""

import dataclasses
import fnmatch
import re


@dataclasses.dataclass(frozen=True)
class TensorName:
    """One tensor (of each layer, of each expert): our path, Hugging Face's name, GGUF's name.

    Attributes:
        path: a bank of experts is one array, with the experts first; `hf` names that of one.
        first_layer: the layers before it have no such tensor.
        in_out: a kernel that Hugging Face stores as [in, out] too (GPT-2's `Conv1D`).
    """

    path: str
    hf: str
    gguf: str = ""
    in_out: bool = False
    first_layer: int = 0

    @property
    def transposed(self) -> bool:
        """Whether it is a kernel that is stored [out, in, ...]: ours is [..., in, out]."""
        return self.path.endswith("/kernel") and not self.in_out

    @property
    def layered(self) -> bool:
        """Whether there is one such tensor in every layer."""
        return "{layer}" in self.path

    @property
    def of_experts(self) -> bool:
        """Whether there is one such tensor for every expert."""
        return "{expert}" in self.hf

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


def _conv1d(path: str, hf: str) -> tuple[TensorName, TensorName]:
    return (
        TensorName(f"{path}/kernel", f"{hf}.weight", in_out=True),
        TensorName(f"{path}/bias", f"{hf}.bias"),
    )


def _layer_norm(path: str, hf: str) -> tuple[TensorName, TensorName]:
    return _scale(path, hf), TensorName(f"{path}/bias", f"{hf}.bias")


def _scale(path: str, hf: str, gguf: str = "") -> TensorName:
    return TensorName(f"{path}/scale", f"{hf}.weight", gguf and f"{gguf}.weight")


def _of_layers(path: str, hf: str, gguf: str, *rows: TensorName) -> tuple[TensorName, ...]:
    """Rows of every layer: each name with what stands before it."""
    return tuple(
        dataclasses.replace(row, path=path + row.path, hf=hf + row.hf, gguf=gguf + row.gguf)
        for row in rows
    )


def _as_bert(*, proj: str = "") -> tuple[TensorName, ...]:
    """The rows of an encoder that is named as BERT; `proj` is behind query, key and value."""
    return (
        TensorName("embeddings/word/embedding", "embeddings.word_embeddings.weight"),
        TensorName("embeddings/position/embedding", "embeddings.position_embeddings.weight"),
        TensorName("embeddings/token_type/embedding", "embeddings.token_type_embeddings.weight"),
        *_layer_norm("embeddings/norm", "embeddings.LayerNorm"),
        *_of_layers(
            *("encoder/layer_{layer}/", "encoder.layer.{layer}.", ""),
            *_linear("attention/query", f"attention.self.query{proj}"),
            *_linear("attention/key", f"attention.self.key{proj}"),
            *_linear("attention/value", f"attention.self.value{proj}"),
            *_linear("attention/output", "attention.output.dense"),
            *_layer_norm("attention_norm", "attention.output.LayerNorm"),
            *_linear("mlp/up", "intermediate.dense"),
            *_linear("mlp/down", "output.dense"),
            *_layer_norm("mlp_norm", "output.LayerNorm"),
        ),
    )


_SINGLE_HEAD = _linear("classifier/out", "classifier")
_POOLER_HEADS = {
    "mean": _SINGLE_HEAD,
    "cls": _SINGLE_HEAD,
    "roberta_head": (*_linear("classifier/dense", "pooler.dense"), *_SINGLE_HEAD),
}
_TF_ENDINGS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

BERT = TensorNames(
    rows=_as_bert(),
    heads=_POOLER_HEADS,
    prefix="bert.",
    skipped=("embeddings.position_ids", "pooler.dense.*", "cls.*", "classifier.*"),
    renamed=_TF_ENDINGS,
)

ROBERTA = TensorNames(
    rows=_as_bert(),
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

DEBERTA = TensorNames(
    rows=(
        *_as_bert(proj="_proj"),
        *_of_layers(
            *("encoder/layer_{layer}/attention/", "encoder.layer.{layer}.attention.self.", ""),
            *_linear("position_key", "pos_key_proj"),
            *_linear("position_query", "pos_query_proj"),
        ),
        TensorName("encoder/relative/embedding", "encoder.rel_embeddings.weight"),
        *_layer_norm("encoder/relative/norm", "encoder.LayerNorm"),
        *_linear("encoder/convolution/conv", "encoder.conv.conv"),
        *_layer_norm("encoder/convolution", "encoder.conv.LayerNorm"),
    ),
    heads=_POOLER_HEADS,
    prefix="deberta.",
    skipped=(
        *("embeddings.position_ids", "embeddings.position_embeddings.weight", "pooler.dense.*"),
        *("cls.*", "lm_predictions.*", "mask_predictions.*", "classifier.*"),
    ),
    renamed=_TF_ENDINGS,
)

DISTILBERT = TensorNames(
    rows=(
        TensorName("embeddings/word/embedding", "embeddings.word_embeddings.weight"),
        TensorName("embeddings/position/embedding", "embeddings.position_embeddings.weight"),
        *_layer_norm("embeddings/norm", "embeddings.LayerNorm"),
        *_of_layers(
            *("encoder/layer_{layer}/", "transformer.layer.{layer}.", ""),
            *_linear("attention/query", "attention.q_lin"),
            *_linear("attention/key", "attention.k_lin"),
            *_linear("attention/value", "attention.v_lin"),
            *_linear("attention/output", "attention.out_lin"),
            *_layer_norm("attention_norm", "sa_layer_norm"),
            *_linear("mlp/up", "ffn.lin1"),
            *_linear("mlp/down", "ffn.lin2"),
            *_layer_norm("mlp_norm", "output_layer_norm"),
        ),
    ),
    heads={
        "mean": _SINGLE_HEAD,
        "cls": _SINGLE_HEAD,
        "roberta_head": (*_linear("classifier/dense", "pre_classifier"), *_SINGLE_HEAD),
    },
    prefix="distilbert.",
    skipped=("embeddings.position_ids", "vocab_*", "pre_classifier.*", "classifier.*"),
)

MODERNBERT = TensorNames(
    rows=(
        TensorName("embeddings/word/embedding", "embeddings.tok_embeddings.weight"),
        *_layer_norm("embeddings/norm", "embeddings.norm"),
        *_of_layers(
            *("encoder/layer_{layer}/", "layers.{layer}.", ""),
            *(
                dataclasses.replace(row, first_layer=1)
                for row in _layer_norm("attention_norm", "attn_norm")
            ),
            *_linear("attention/qkv", "attn.Wqkv"),
            *_linear("attention/output", "attn.Wo"),
            *_layer_norm("mlp_norm", "mlp_norm"),
            *_linear("mlp/gate_up", "mlp.Wi"),
            *_linear("mlp/down", "mlp.Wo"),
        ),
        *_layer_norm("encoder/norm", "final_norm"),
    ),
    heads={
        "mean": _SINGLE_HEAD,
        "cls": _SINGLE_HEAD,
        "roberta_head": (
            *_linear("classifier/dense", "head.dense"),
            *_layer_norm("classifier/norm", "head.norm"),
            *_SINGLE_HEAD,
        ),
    },
    prefix="model.",
    skipped=("head.*", "decoder.*", "classifier.*"),
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


def _as_llama(*within: TensorName, skipped: tuple[str, ...] = ()) -> TensorNames:
    """A decoder whose layers are named as Llama's, each with q, k, v, o and `within`."""
    return TensorNames(
        rows=(
            TensorName("embed/embedding", "embed_tokens.weight"),
            *_of_layers(
                *("layers_{layer}/", "layers.{layer}.", ""),
                *(row for x in "qkvo" for row in _linear(f"attention/{x}", f"self_attn.{x}_proj")),
                _scale("attention_norm", "input_layernorm"),
                *within,
            ),
            _scale("norm", "norm"),
            TensorName("lm_head/kernel", "lm_head.weight"),
        ),
        prefix="model.",
        skipped=skipped,
    )


_GATED = tuple(row for x in ("gate", "up", "down") for row in _linear(f"mlp/{x}", f"mlp.{x}_proj"))
_QK_NORMS = tuple(_scale(f"attention/{x}_norm", f"self_attn.{x}_norm") for x in "qk")
_MLP_NORM = _scale("mlp_norm", "post_attention_layernorm")  # on what the MLP gets, all the same
_INV_FREQ = ("*.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")


def _experts(router: str, experts: str, **names: str) -> tuple[TensorName, ...]:
    """A router, and the products of each expert by our name."""
    each = {f"mlp/experts/{ours}/kernel": f"{experts}.{{expert}}.{x}" for ours, x in names.items()}
    every = {"mlp/router/kernel": router, **each}
    return tuple(TensorName(path, f"{hf}.weight") for path, hf in every.items())


GEMMA = _as_llama(
    *_GATED,
    *_QK_NORMS,  # Gemma 3's
    _scale("attention_post_norm", "post_attention_layernorm"),
    _scale("mlp_norm", "pre_feedforward_layernorm"),
    _scale("mlp_post_norm", "post_feedforward_layernorm"),
)
PHI3 = _as_llama(
    *_linear("attention/qkv", "self_attn.qkv_proj"),
    *_linear("mlp/gate_up", "mlp.gate_up_proj"),
    *_linear("mlp/down", "mlp.down_proj"),
    _MLP_NORM,
    skipped=_INV_FREQ,
)
MIXTRAL = _as_llama(
    *_experts(
        *("block_sparse_moe.gate", "block_sparse_moe.experts"), gate="w1", down="w2", up="w3"
    ),
    _MLP_NORM,
    skipped=_INV_FREQ,
)
QWEN3_MOE = _as_llama(
    *_QK_NORMS,
    *_experts("mlp.gate", "mlp.experts", gate="gate_proj", up="up_proj", down="down_proj"),
    _MLP_NORM,
)

GPT2 = TensorNames(
    rows=(
        TensorName("embed/embedding", "wte.weight"),
        TensorName("position/embedding", "wpe.weight"),
        *_of_layers(
            *("layers_{layer}/", "h.{layer}.", ""),
            *_layer_norm("attention_norm", "ln_1"),
            *_conv1d("attention/qkv", "attn.c_attn"),
            *_conv1d("attention/o", "attn.c_proj"),
            *_layer_norm("mlp_norm", "ln_2"),
            *_conv1d("mlp/up", "mlp.c_fc"),
            *_conv1d("mlp/down", "mlp.c_proj"),
        ),
        *_layer_norm("norm", "ln_f"),
        TensorName("lm_head/kernel", "lm_head.weight"),
    ),
    prefix="transformer.",
    skipped=("h.*.attn.bias", "h.*.attn.masked_bias"),  # the causal mask, in old files
)

HF = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "deberta-v2": DEBERTA,
    "distilbert": DISTILBERT,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MIXTRAL,
    "modernbert": MODERNBERT,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": QWEN3_MOE,
}
GGUF = {"llama": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA}
