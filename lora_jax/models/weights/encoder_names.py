"""The names of the tensors of encoders; see `names`."""

import dataclasses

from lora_jax.models.weights.tensor_names import (
    TensorName,
    TensorNames,
    layer_norm,
    linear,
    of_layers,
)


def _as_bert(*, proj: str = "") -> tuple[TensorName, ...]:
    """Return the names of an encoder that is named as BERT; `proj` follows query, key and value."""
    return (
        TensorName("embeddings/word/embedding", "embeddings.word_embeddings.weight"),
        TensorName("embeddings/position/embedding", "embeddings.position_embeddings.weight"),
        TensorName("embeddings/token_type/embedding", "embeddings.token_type_embeddings.weight"),
        *layer_norm("embeddings/norm", "embeddings.LayerNorm"),
        *of_layers(
            *("encoder/layer_{layer}/", "encoder.layer.{layer}.", ""),
            *linear("attention/query", f"attention.self.query{proj}"),
            *linear("attention/key", f"attention.self.key{proj}"),
            *linear("attention/value", f"attention.self.value{proj}"),
            *linear("attention/output", "attention.output.dense"),
            *layer_norm("attention_norm", "attention.output.LayerNorm"),
            *linear("mlp/up", "intermediate.dense"),
            *linear("mlp/down", "output.dense"),
            *layer_norm("mlp_norm", "output.LayerNorm"),
        ),
    )


def _heads(*dense: TensorName, out: str = "classifier") -> dict[str, tuple[TensorName, ...]]:
    """Return the heads: a product on the pooled text, and for "roberta_head" `dense` before it."""
    single = linear("classifier/out", "classifier")
    return {
        **dict.fromkeys(("mean", "cls"), single),
        "roberta_head": (*dense, *linear("classifier/out", out)),
    }


_POOLER_HEADS = _heads(*linear("classifier/dense", "pooler.dense"))
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
    heads=_heads(*linear("classifier/dense", "classifier.dense"), out="classifier.out_proj"),
    prefix="roberta.",
    skipped=("embeddings.position_ids", "pooler.dense.*", "lm_head.*", "classifier.*"),
    renamed=_TF_ENDINGS,
)

DEBERTA = TensorNames(
    rows=(
        *_as_bert(proj="_proj"),
        *of_layers(
            *("encoder/layer_{layer}/attention/", "encoder.layer.{layer}.attention.self.", ""),
            *linear("position_key", "pos_key_proj"),
            *linear("position_query", "pos_query_proj"),
        ),
        TensorName("encoder/relative/embedding", "encoder.rel_embeddings.weight"),
        *layer_norm("encoder/relative/norm", "encoder.LayerNorm"),
        *linear("encoder/convolution/conv", "encoder.conv.conv"),
        *layer_norm("encoder/convolution", "encoder.conv.LayerNorm"),
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
        *layer_norm("embeddings/norm", "embeddings.LayerNorm"),
        *of_layers(
            *("encoder/layer_{layer}/", "transformer.layer.{layer}.", ""),
            *linear("attention/query", "attention.q_lin"),
            *linear("attention/key", "attention.k_lin"),
            *linear("attention/value", "attention.v_lin"),
            *linear("attention/output", "attention.out_lin"),
            *layer_norm("attention_norm", "sa_layer_norm"),
            *linear("mlp/up", "ffn.lin1"),
            *linear("mlp/down", "ffn.lin2"),
            *layer_norm("mlp_norm", "output_layer_norm"),
        ),
    ),
    heads=_heads(*linear("classifier/dense", "pre_classifier")),
    prefix="distilbert.",
    skipped=("embeddings.position_ids", "vocab_*", "pre_classifier.*", "classifier.*"),
)

MODERNBERT = TensorNames(
    rows=(
        TensorName("embeddings/word/embedding", "embeddings.tok_embeddings.weight"),
        *layer_norm("embeddings/norm", "embeddings.norm"),
        *of_layers(
            *("encoder/layer_{layer}/", "layers.{layer}.", ""),
            *(
                dataclasses.replace(row, first_layer=1)
                for row in layer_norm("attention_norm", "attn_norm")
            ),
            *linear("attention/qkv", "attn.Wqkv"),
            *linear("attention/output", "attn.Wo"),
            *layer_norm("mlp_norm", "mlp_norm"),
            *linear("mlp/gate_up", "mlp.Wi"),
            *linear("mlp/down", "mlp.Wo"),
        ),
        *layer_norm("encoder/norm", "final_norm"),
    ),
    heads=_heads(
        *linear("classifier/dense", "head.dense"), *layer_norm("classifier/norm", "head.norm")
    ),
    prefix="model.",
    skipped=("head.*", "decoder.*", "classifier.*"),
)

VIT = TensorNames(
    rows=(
        TensorName("embeddings/class_token", "embeddings.cls_token"),
        TensorName("embeddings/position", "embeddings.position_embeddings"),
        *linear("embeddings/patch", "embeddings.patch_embeddings.projection"),
        *of_layers(
            *("encoder/layer_{layer}/", "encoder.layer.{layer}.", ""),
            *layer_norm("attention_norm", "layernorm_before"),
            *linear("attention/query", "attention.attention.query"),
            *linear("attention/key", "attention.attention.key"),
            *linear("attention/value", "attention.attention.value"),
            *linear("attention/output", "attention.output.dense"),
            *layer_norm("mlp_norm", "layernorm_after"),
            *linear("mlp/up", "intermediate.dense"),
            *linear("mlp/down", "output.dense"),
        ),
        *layer_norm("encoder/norm", "layernorm"),
    ),
    heads={"cls": _POOLER_HEADS["cls"]},
    prefix="vit.",
    skipped=("embeddings.mask_token", "pooler.dense.*", "classifier.*", "decoder.*"),
)
