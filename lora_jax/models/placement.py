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

import re
from collections.abc import Iterator

import jax
from jax.sharding import PartitionSpec as P

from lora_jax.models.config import StoredConfig, VitConfig
from lora_jax.models.layers import tensor_axis
from lora_jax.models.weights.stored import Head, shapes

PlacementRule = tuple[str, P]

_FIRST, _SECOND, _WHOLE = P("fsdp", "tensor"), P("tensor", "fsdp"), P()
_BOTH = ("tensor", "fsdp")  # in this order, gathering over `fsdp` moves nothing else
_FEW_CLASSES = 64
_FIRSTS = "q|k|v|qkv|query|key|value|position_query|position_key|gate|up|gate_up|conv|dense"
# The end of a path -> the sharding; the first that fits.
_TABLE = (
    ("(experts/(gate|up)|conv)/kernel", P(None, *_FIRST)),
    ("experts/down/kernel", P(None, *_SECOND)),
    ("router/kernel", P(_BOTH)),  # it has few columns
    (f"({_FIRSTS})/kernel", _FIRST),
    (f"({_FIRSTS})/bias", P("tensor")),
    ("(o|output|down)/kernel", _SECOND),
    ("(position|token_type|relative)/embedding", P(None, _BOTH)),
    ("embeddings/position", P(None, None, _BOTH)),
    ("patch/kernel", P(None, None, None, _BOTH)),
    ("scale|bias|class_token", _WHOLE),
)


def rules(config: StoredConfig, head: Head | None = None) -> tuple[PlacementRule, ...]:
    """Return one sharding rule (pattern, PartitionSpec) for each kind of parameter, and no others.

    With a head, paths begin with `bert/`, `vit/` or `decoder/`, as in `lora_jax.models.shapes`.
    """
    found: dict[str, P] = {}
    for key_path, _ in jax.tree_util.tree_leaves_with_path(shapes(config, head)):
        path = "/".join(key.key for key in key_path)
        fitting = (spec for end, spec in _rows(config, head) if re.search(f"(^|/)({end})$", path))
        spec = next(fitting)
        if "layers/" in path:  # scanned ones have the axis of the layers first
            spec = P(None, *spec)
        found[re.sub(r"(layers?)_\d+/", r"\1_*/", path)] = spec
    return tuple(found.items())


def _rows(config: StoredConfig, head: Head | None) -> Iterator[PlacementRule]:
    if not isinstance(config, VitConfig):
        embedding = _SECOND if tensor_axis(config) == 0 else P(None, _BOTH)
        yield "(embed|word)/embedding", embedding
        yield "lm_head/kernel", P(*reversed(embedding))
    if head is not None:
        # The number of classes can rarely be divided: the last product of few classes is
        # replicated, which is cheaper than a sum; that of many is sharded by inputs.
        few = head.num_classes <= _FEW_CLASSES
        yield "classifier/out/kernel", _WHOLE if few else P(_BOTH)
    yield from _TABLE
