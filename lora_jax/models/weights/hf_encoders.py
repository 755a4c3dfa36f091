"""Read the configs of encoders from a Hugging Face `config.json`."""

from typing import Any

from lora_jax.models.config import BertConfig, Disentangled, PreNorm, VitConfig
from lora_jax.models.weights.hf_fields import (
    Json,
    activation,
    refuse,
    refuse_set,
    sizes,
    sliding,
    special_ids,
)


def bert(json: Json, origin: str) -> BertConfig:
    """Read BERT, RoBERTa and XLM-RoBERTa."""
    position = json.get("position_embedding_type", "absolute")
    refuse(origin, "position_embedding_type", position, position not in ("absolute", None))
    refuse_set(json, origin, "is_decoder")
    own: dict[str, Any] = sizes(json)
    # RoBERTa's table has rows for the padding token and all rows before it, which no text uses.
    if json["model_type"] != "bert":
        pad = json.get("pad_token_id", 1)
        own |= {"pad_id": pad, "position_offset": pad + 1}
        own["max_positions"] -= pad + 1
    own |= {"num_token_types": json.get("type_vocab_size", 2)}
    return _encoder(json, origin, **own)


def deberta(json: Json, origin: str) -> BertConfig:
    """Read DeBERTa v2 and v3."""
    hidden, heads = json["hidden_size"], json["num_attention_heads"]
    for field, only in (
        *(("embedding_size", hidden), ("pooler_hidden_size", hidden)),
        ("attention_head_size", hidden // heads),
    ):
        refuse(origin, field, json.get(field), json.get(field) not in (None, only))
    return _encoder(
        json,
        origin,
        **sizes(json),
        num_token_types=json.get("type_vocab_size", 0),
        norm_eps=json.get("layer_norm_eps", 1e-7),
        head_activation=activation(json, "pooler_hidden_act", "gelu", origin),
        absolute_positions=json.get("position_biased_input", True),
        relative=_disentangled(json, origin),
        pooler_dropout=bool(json.get("pooler_dropout", 0)),
    )


def _disentangled(json: Json, origin: str) -> Disentangled:
    kinds = json.get("pos_att_type") or ()
    kinds = kinds.lower().split("|") if isinstance(kinds, str) else kinds
    kinds = tuple(sorted(kind.strip() for kind in kinds))
    refuse(origin, "pos_att_type", list(kinds), not {"c2p", "p2c"}.issuperset(kinds))
    relative, conv = json.get("relative_attention", False), json.get("conv_kernel_size") or 0
    refuse(origin, "relative_attention", relative, not relative)
    refuse(origin, "conv_kernel_size", conv, conv % 2 == 0 and conv > 0)
    most, norms = json.get("max_relative_positions", -1), json.get("norm_rel_ebd", "none")
    return Disentangled(
        distances=most if most > 0 else json["max_position_embeddings"],
        buckets=max(0, json.get("position_buckets", -1)),
        kinds=kinds,
        shared=json.get("share_att_key", False),
        norm="layer_norm" in [x.strip() for x in norms.lower().split("|")],
        conv_size=conv,
        conv_groups=json.get("conv_groups", 1),
        conv_activation=activation(json, "conv_act", "tanh", origin),
    )


def modernbert(json: Json, origin: str) -> BertConfig:
    count, period = json["num_hidden_layers"], json.get("global_attn_every_n_layers", 3)
    types = ["sliding_attention" if i % period else "full_attention" for i in range(count)]
    windowed = sliding(json.get("layer_types") or types, origin)
    both, thetas = json.get("rope_parameters") or {}, []
    for name, old, theta in (
        ("full_attention", "global_rope_theta", 160_000.0),
        ("sliding_attention", "local_rope_theta", 10_000.0),
    ):
        one = both.get(name) or {}
        kind = one.get("rope_type", "default")
        refuse(origin, f"rope_parameters.{name}.rope_type", kind, kind != "default")
        thetas.append(float(one.get("rope_theta") or json.get(old) or theta))
    refuse_set(json, origin, "rope_scaling")
    biases = {name: json.get(f"{name}_bias", False) for name in ("attention", "mlp", "norm")}
    return _encoder(
        json,
        origin,
        **sizes(json),
        num_token_types=0,
        norm_eps=json.get("norm_eps", 1e-5),
        activation=activation(json, "hidden_activation", "gelu", origin),
        head_activation=activation(json, "classifier_activation", "gelu", origin),
        absolute_positions=False,
        head_norm=True,
        head_bias=json.get("classifier_bias", False),
        pre_norm=PreNorm(
            rope_theta=thetas[0],
            local_rope_theta=thetas[1],
            window=json.get("local_attention", 128) // 2 + 1,
            windowed=windowed,
            fused=True,
            gated=True,
            qkv_bias=biases["attention"],
            output_bias=biases["attention"],
            mlp_bias=biases["mlp"],
            norm_bias=biases["norm"],
            first_norm=False,
        ),
        dropout=json.get("mlp_dropout", 0.0),
        attention_dropout=json.get("attention_dropout", 0.0),
    )


def distilbert(json: Json, origin: str) -> BertConfig:
    """Read DistilBERT. Its table of positions is in the file, even if it is sinusoidal."""
    named = {"hidden_size": "dim", "num_layers": "n_layers"}
    return _encoder(
        json,
        origin,
        **sizes(json, **named, num_heads="n_heads", mlp_size="hidden_dim"),
        num_token_types=0,
        norm_eps=1e-12,
        activation=activation(json, "activation", "gelu", origin),
        head_activation="relu",
        dropout=json.get("dropout", 0.1),
        attention_dropout=json.get("attention_dropout", 0.1),
    )


def _encoder(json: Json, origin: str, **own: Any) -> BertConfig:
    """Return the config with the fields that most encoders share, and `own`."""
    shared: dict[str, Any] = {
        **special_ids(json),
        "pad_id": json.get("pad_token_id") or 0,
        "norm_eps": json.get("layer_norm_eps", 1e-12),
        "dropout": json.get("hidden_dropout_prob", 0.1),
        "attention_dropout": json.get("attention_probs_dropout_prob", 0.1),
    }
    if "activation" not in own:
        shared["activation"] = activation(json, "hidden_act", "gelu", origin)
    return BertConfig(**(shared | own))


def vit(json: Json, origin: str) -> VitConfig:
    def pair(field: str, default: int) -> tuple[int, int]:
        size = json.get(field, default)
        high, wide = size if isinstance(size, list) else (size, size)
        return high, wide

    return VitConfig(
        image_size=pair("image_size", 224),
        patch_size=pair("patch_size", 16),
        channels=json.get("num_channels", 3),
        hidden_size=json["hidden_size"],
        num_layers=json["num_hidden_layers"],
        num_heads=json["num_attention_heads"],
        mlp_size=json["intermediate_size"],
        norm_eps=json.get("layer_norm_eps", 1e-12),
        activation=activation(json, "hidden_act", "gelu", origin),
        pre_norm=PreNorm(qkv_bias=json.get("qkv_bias", True)),
        dropout=json.get("hidden_dropout_prob", 0.0),
        attention_dropout=json.get("attention_probs_dropout_prob", 0.0),
    )
