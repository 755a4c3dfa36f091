"""The collectives of adapted models on a mesh, read from the compiler's output. Nothing is run.

Every dimension is chosen so that a size identifies an array: activations have a factor 5 (the batch
on a device, the length of a row), weights do not, and the two ranks are 7 and 11.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import models, paths, sharding
from lora_jax.models.placement import rules
from lora_jax.planner import hlo
from lora_jax.planner.collectives import Collective, collectives

pytestmark = pytest.mark.standard_promotion  # Flax and jnp inside the models promote

BATCH, LENGTH, RANKS = 40, 5, (7, 11)
TENSOR, FSDP, ALL = (1, 1, 8), (1, 8, 1), (2, 2, 2)
SIZES: dict[str, Any] = {"hidden_size": 64, "num_layers": 1, "num_heads": 8, "mlp_size": 96}
LLAMA = models.DecoderConfig(
    vocab_size=192, num_kv_heads=8, head_dim=8, max_positions=16, scan_layers=True, **SIZES
)
BERT = models.BertConfig(vocab_size=187, max_positions=16, **SIZES)


class _Block(nn.Module):
    """Two Megatron pairs, attention and an MLP, in plain Linen."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        scale = self.param("scale", nn.initializers.ones, (64,))
        x = x + nn.MultiHeadDotProductAttention(8, use_bias=False, name="attention")(
            x * scale[None, None]
        )
        wide = nn.gelu(nn.Dense(96, use_bias=False, name="up")(x))
        return x + nn.Dense(64, use_bias=False, name="down")(wide)


BLOCK = (
    ("params/scale", P()),
    ("params/attention/{query,key,value}/kernel", P("fsdp", "tensor", None)),
    ("params/attention/out/kernel", P("tensor", None, "fsdp")),
    ("params/up/kernel", P("fsdp", "tensor")),
    ("params/down/kernel", P("tensor", "fsdp")),
)

# f(params, x), the parameters, x, the sharding table, and the path of a base vector before all
# adapted products.
Built = tuple[Callable[..., Any], Any, Any, Any, str]


def _llama() -> Built:
    f = lambda p, ids: models.DecoderModel(LLAMA).apply({"params": p}, ids)  # noqa: E731
    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    return f, models.shapes(LLAMA), ids, rules(LLAMA), "layers/attention_norm/scale"


def _bert() -> Built:
    head = models.Head("roberta_head", 3)
    model = models.BertClassifier(BERT, 3, head.pooling)
    f = lambda p, ids: model.apply({"params": p}, ids)  # noqa: E731
    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    return f, models.shapes(BERT, head), ids, rules(BERT, head), "bert/embeddings/norm/scale"


def _block() -> Built:
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, 64), jnp.float32)
    params = jax.eval_shape(_Block().init, jax.random.key(0), x)
    return _Block().apply, params, x, BLOCK, "params/scale"


MODELS: dict[str, Callable[[], Built]] = {"block": _block, "llama": _llama, "bert": _bert}


def grid(sizes: tuple[int, int, int]) -> Mesh:
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def put(tree: Any, specs: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)),
        tree,
        specs,
    )


@functools.cache
def gradient(name: str, sizes: tuple[int, int, int], rank: int | None) -> hlo.Module:
    """HLO of the gradient by the adapters or, without a rank, of the base by one of its vectors."""
    f, params, x, table, vector = MODELS[name]()
    mesh = grid(sizes)
    specs = sharding.place(params, dict(mesh.shape), table=table)
    placed = paths.flatten(params)
    placed = put(placed, {path: specs[path] for path in placed}, mesh)
    base, x = paths.replace(params, placed), put(x, P(("fsdp", "data")), mesh)

    def loss(out: Any) -> Any:
        return jnp.square(jax.nn.log_softmax(out)).mean()

    with jax.set_mesh(mesh):
        if rank is None:
            by_vector = lambda v, p, x: loss(f(paths.replace(p, {vector: v}), x))  # noqa: E731
            step = jax.jit(jax.grad(by_vector))
            return hlo.parse(step.lower(placed[vector], base, x).compile().as_text())
        layout = lora_jax.resolve(lora_jax.LoraSpec(rank, 2.0), f, params, x)
        where = lora_jax.partition_specs(layout, specs)
        adapters = jax.eval_shape(lambda: lora_jax.init(jax.random.key(0), layout))
        adapters = put(adapters, where, mesh)
        kept = jax.tree.map(lambda leaf: leaf.sharding, adapters)
        g = lora_jax.adapt(layout, f)
        step = jax.jit(jax.grad(lambda ad, p, x: loss(g(p, ad, x))), out_shardings=kept)
        return hlo.parse(step.lower(adapters, base, x).compile().as_text())


def sizes_of(moved: Collective) -> set[int]:
    return {moved.operand.size, moved.result.size}


def whole_weights(name: str) -> set[int]:
    """The sizes of kernels and embeddings; where layers are stacked, the sizes of one layer."""
    leaves = paths.flatten(MODELS[name]()[1])
    slices = [x.shape[1:] if "layers/" in path else x.shape for path, x in leaves.items()]
    return {math.prod(shape) for shape in slices if len(shape) > 1}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", MODELS)
def test_no_collective_moves_a_whole_weight_over_tensor(name: str) -> None:
    found = collectives(gradient(name, TENSOR, RANKS[0]))
    assert found
    assert not [i for i in found if sizes_of(i) & whole_weights(name)]
    # The reader would see such a collective: over fsdp every weight is gathered.
    gathered = [i for i in collectives(gradient(name, FSDP, None)) if i.kind == "all-gather"]
    if name != "block":  # the block does not keep its activations sharded by the batch
        assert {s for i in gathered for s in sizes_of(i)} & whole_weights(name)


@pytest.mark.few(2)
@pytest.mark.parametrize("sizes", [TENSOR, ALL])
@pytest.mark.parametrize("name", MODELS)
def test_adapters_add_collectives_of_their_rank_alone(
    name: str, sizes: tuple[int, int, int]
) -> None:
    def counted(rank: int | None) -> Counter[Any]:
        return Counter((i.kind, i.operand) for i in collectives(gradient(name, sizes, rank)))

    def added(rank: int) -> Counter[Any]:
        """The new collectives, with the rank taken out of their shapes."""
        new = counted(rank) - counted(None)
        assert new
        out: Counter[Any] = Counter()
        for (kind, shape), times in new.items():
            assert rank in shape.dims, (kind, shape)
            out[kind, tuple("rank" if n == rank else n for n in shape.dims)] += times
        return out

    first, second = map(added, RANKS)
    assert first == second


@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_of_a_weight(name: str) -> None:
    sizes = {size // n for size in whole_weights(name) for n in (1, 2, 4, 8)}
    products = [i for i in gradient(name, ALL, RANKS[0]).instructions if i.kind == "dot"]
    assert products
    assert not [i for i in products if i.results[0].size in sizes]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_activations_stay_where_the_batch_is(name: str) -> None:
    """Over fsdp alone, only weights, factors and gradients of factors move."""
    found = collectives(gradient(name, FSDP, RANKS[0]))
    assert found
    assert not [i for i in found if any(size % LENGTH == 0 for size in sizes_of(i))]
