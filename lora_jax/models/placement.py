"""Rules that shard the built-in models over a mesh with the axes `fsdp` and `tensor`.

Products come in pairs (Shoeybi et al., arXiv 1909.08053): the first is sharded by its outputs, the
second by its inputs, so that a block needs one sum over `tensor`, and the activations between the
two products do not move. `fsdp` shards the other axis of each kernel. A vocabulary that 64 divides
is sharded over `tensor`, so that each device has the logits of its own tokens. Any other vocabulary
(BERT's 30,522) is not sharded; both axes shard the hidden axis instead.

    first of a pair    query, key, value, up, gate     P(fsdp, tensor)      its bias P(tensor)
    second of a pair   output, down                    P(tensor, fsdp)      its bias replicated
    experts            the same after the axis of the experts, which is not sharded
    embeddings         P(tensor, fsdp) or P(None, (tensor, fsdp))
    untied head        the same, transposed
    norms              replicated
"""

from jax.sharding import PartitionSpec as P

from lora_jax.models.config import (
    BertConfig,
    BuiltInConfig,
    DecoderConfig,
    Disentangled,
    PreNorm,
    StoredConfig,
    VitConfig,
)
from lora_jax.models.layers import tensor_axis
from lora_jax.models.weights.stored import Head

PlacementRule = tuple[str, P]

_FIRST, _SECOND, _WHOLE = P("fsdp", "tensor"), P("tensor", "fsdp"), P()
_BOTH = ("tensor", "fsdp")  # in this order, gathering over `fsdp` moves nothing else
_FEW_CLASSES = 64
_HIDDEN = P(None, _BOTH)  # for an embedding [rows, hidden]


def rules(config: StoredConfig, head: Head | None = None) -> tuple[PlacementRule, ...]:
    """Return one sharding rule (pattern, PartitionSpec) for each kind of parameter, and no others.

    With a head, paths begin with `bert/` or `vit/`, as in `lora_jax.models.shapes`.
    """
    if isinstance(config, DecoderConfig):
        return _decoder(config)
    own, before = (
        (_vit(config), "vit/") if isinstance(config, VitConfig) else (_bert(config), "bert/")
    )
    if head is None:
        return own
    return (*((before + pattern, spec) for pattern, spec in own), *_head(config, head))


def _embedding(config: BuiltInConfig) -> P:
    return P("tensor", "fsdp") if tensor_axis(config) == 0 else _HIDDEN


def _decoder(config: DecoderConfig) -> tuple[PlacementRule, ...]:
    layer = "layers" if config.scan_layers else "layers_*"
    first = "attention/qkv" if config.fused else "attention/{q,k,v}"
    norms = "{attention,mlp}_{norm,post_norm}" if config.post_norms else "{attention,mlp}_norm"
    leaves = "{scale,bias}" if config.norm == "layer" else "scale"
    up = "mlp/up" if not config.gated else "mlp/gate_up" if config.fused else "mlp/{gate,up}"
    within = [
        *_pair(first, "attention/o", config.qkv_bias, config.output_bias),
        *(_mixture() if config.num_experts else _pair(up, "mlp/down", *[config.mlp_bias] * 2)),
        (f"{norms}/{leaves}", _WHOLE),
    ]
    if config.qk_norm:
        within.append((f"attention/{{q,k}}_norm/{leaves}", _WHOLE))
    out = [
        ("embed/embedding", _embedding(config)),
        (f"norm/{leaves}", _WHOLE),
        *_layers(config, layer, within),
    ]
    if config.positions == "learned":
        out.append(("position/embedding", _HIDDEN))
    if not config.tied:
        out.append(("lm_head/kernel", P(*reversed(_embedding(config)))))
    return tuple(out)


def _pair(first: str, second: str, first_bias: bool, second_bias: bool) -> list[PlacementRule]:
    """Return the rules of a pair of products, and of the biases that they have."""
    out = [(f"{first}/kernel", _FIRST), (f"{second}/kernel", _SECOND)]
    out += [(f"{first}/bias", P("tensor"))] if first_bias else []
    out += [(f"{second}/bias", _WHOLE)] if second_bias else []
    return out


def _mixture() -> list[PlacementRule]:
    """Return the rules of experts, each sharded as an MLP, so that tokens stay on their device. The
    router, which has few columns, is sharded by its inputs."""
    return [
        ("mlp/router/kernel", P(_BOTH)),
        ("mlp/experts/{gate,up}/kernel", P(None, *_FIRST)),
        ("mlp/experts/down/kernel", P(None, *_SECOND)),
    ]


def _bert(config: BertConfig) -> tuple[PlacementRule, ...]:
    form = config.pre_norm or PreNorm()  # its defaults have the same biases as BERT
    leaves, within = "{scale,bias}" if form.norm_bias else "scale", _encoder_layer(form)
    if config.relative is not None and not config.relative.shared:
        kinds = {"c2p": "key", "p2c": "query"}
        names = [kinds[kind] for kind in config.relative.kinds]
        within += [(f"attention/position_{name}/kernel", _FIRST) for name in names]
        within += [(f"attention/position_{name}/bias", P("tensor")) for name in names]
    return (
        ("embeddings/word/embedding", _embedding(config)),
        *((("embeddings/position/embedding", _HIDDEN),) if config.absolute_positions else ()),
        *_relative(config.relative),
        *((("embeddings/token_type/embedding", _HIDDEN),) if config.num_token_types else ()),
        (f"embeddings/norm/{leaves}", _WHOLE),
        *(((f"encoder/norm/{leaves}", _WHOLE),) if config.pre_norm else ()),
        *_layers(config, _layer_of(config), within),
    )


def _encoder_layer(form: PreNorm) -> list[PlacementRule]:
    first = "attention/qkv" if form.fused else "attention/{query,key,value}"
    up = "mlp/gate_up" if form.gated else "mlp/up"
    leaves = "{scale,bias}" if form.norm_bias else "scale"
    return [
        *_pair(first, "attention/output", form.qkv_bias, form.output_bias),
        *_pair(up, "mlp/down", form.mlp_bias, form.mlp_bias),
        (f"{{attention,mlp}}_norm/{leaves}", _WHOLE),
    ]


def _vit(config: VitConfig) -> tuple[PlacementRule, ...]:
    return (
        ("embeddings/class_token", _WHOLE),
        ("embeddings/position", P(None, None, _BOTH)),
        ("embeddings/patch/kernel", P(None, None, None, _BOTH)),
        ("embeddings/patch/bias", _WHOLE),
        ("encoder/norm/{scale,bias}", _WHOLE),
        *_layers(config, _layer_of(config), _encoder_layer(config.pre_norm)),
    )


def _layer_of(config: BertConfig | VitConfig) -> str:
    return "encoder/layers" if config.scan_layers else "encoder/layer_*"


def _relative(relative: Disentangled | None) -> tuple[PlacementRule, ...]:
    if relative is None:
        return ()
    out: list[PlacementRule] = [("encoder/relative/embedding", _HIDDEN)]
    if relative.norm:
        out.append(("encoder/relative/norm/{scale,bias}", _WHOLE))
    if relative.conv_size:
        out += [
            ("encoder/convolution/conv/kernel", P(None, *_FIRST)),
            ("encoder/convolution/conv/bias", P("tensor")),
            ("encoder/convolution/{scale,bias}", _WHOLE),
        ]
    return tuple(out)


def _layers(config: StoredConfig, layer: str, within: list[PlacementRule]) -> list[PlacementRule]:
    """Apply the rules of one layer to all layers; scanned ones have the layer axis first."""
    stacked = lambda spec: P(None, *spec) if config.scan_layers else spec  # noqa: E731
    return [(f"{layer}/{pattern}", stacked(spec)) for pattern, spec in within]


def _head(config: BertConfig | VitConfig, head: Head) -> tuple[PlacementRule, ...]:
    """Return the rules of the head. The number of classes can rarely be divided: the last product
    of few classes is replicated, which is cheaper than a sum; that of many is sharded by inputs."""
    out: tuple[PlacementRule, ...] = (
        ("classifier/out/kernel", _WHOLE if head.num_classes <= _FEW_CLASSES else P(_BOTH)),
        ("classifier/out/bias", _WHOLE),
    )
    if isinstance(config, VitConfig) or head.pooling != "roberta_head":
        return out
    out = (*out, ("classifier/dense/kernel", _FIRST))
    if config.head_bias:
        out = (*out, ("classifier/dense/bias", P("tensor")))
    if config.head_norm and config.pre_norm is not None:
        leaves = "{scale,bias}" if config.pre_norm.norm_bias else "scale"
        out = (*out, (f"classifier/norm/{leaves}", _WHOLE))
    return out
