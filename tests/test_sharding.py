"""Placements: parameters that are covered, rules that are refused, and bytes on a device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import paths, sharding
from lora_jax.sharding import flax_partitioning
from lora_jax.updates.factors import Factors

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
AXES = ("data", "fsdp", "tensor")


def sizes(mesh: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(AXES, mesh, strict=True))


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def share(params: Any, specs: Mapping[str, P], mesh: Mapping[str, int]) -> float:
    """The bytes on a device, relative to the total divided by (fsdp x tensor)."""
    leaves = paths.flatten(params)
    cuts = {p: [n for e in specs[p] for n in sharding.names_of(e)] for p in leaves}
    held = sum(x.size / math.prod(mesh[n] for n in cuts[p]) for p, x in leaves.items())
    return held * mesh["fsdp"] * mesh["tensor"] / sum(x.size for x in leaves.values())


PARAMS = {"layer_0": {"kernel": shape(16, 8), "bias": shape(8)}, "head": {"kernel": shape(8, 24)}}
KERNELS, BIASES = ("**/kernel", P("fsdp", "tensor")), ("*/bias", P())


def test_every_parameter_takes_its_one_rule_in_any_order() -> None:
    want = {"head/kernel": KERNELS[1], "layer_0/bias": P(), "layer_0/kernel": KERNELS[1]}
    assert sharding.specs([KERNELS, BIASES], PARAMS) == want
    assert sharding.specs([BIASES, KERNELS], PARAMS) == want


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([KERNELS], ["'layer_0/bias' is covered by no", "**/kernel", "Add a rule"]),
        ([KERNELS, BIASES, ("head/*", P())], ["'head/kernel' is covered by 2", "head/*", "Narrow"]),
        ([KERNELS, BIASES, ("heads/*", P())], ["('heads/*', ", "no parameter", "head/kernel"]),
        ([KERNELS, ("*/bias", P(None, None))], ["'layer_0/bias'", "2 entries", "1 axes"]),
    ],
)
def test_rules_that_do_not_fit_are_errors(rules: Any, words: list[str]) -> None:
    with pytest.raises(lora_jax.LoraError) as error:
        sharding.specs(rules, PARAMS)
    assert all(word in str(error.value) for word in words), error.value


def test_an_axis_that_is_not_divided_is_an_error() -> None:
    with pytest.raises(lora_jax.LoraError, match=r"\(8, 24\): its axis 0 of 8 .*\(fsdp=3\)"):
        sharding.place(PARAMS, {"data": 1, "fsdp": 3, "tensor": 1}, table=[KERNELS, BIASES])
    with pytest.raises(lora_jax.LoraError, match="names the mesh axis 'model'"):
        sharding.place(PARAMS, sizes((1, 8, 1)), table=[("**", P("model"))])


def test_own_rules_come_before_the_table() -> None:
    own = [("head/kernel", P(None, "tensor"))]
    placed = sharding.place(PARAMS, sizes((1, 2, 4)), table=[KERNELS, BIASES], own=own)
    assert placed["head/kernel"] == P(None, "tensor")
    assert placed["layer_0/kernel"] == P("fsdp", "tensor")
    with pytest.raises(lora_jax.LoraError, match=r"covers no parameter"):
        sharding.place(PARAMS, sizes((1, 1, 1)), table=[KERNELS, BIASES], own=[("heads", P())])


# --- the automatic rule -------------------------------------------------------------------------


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        x = x + nn.MultiHeadDotProductAttention(8, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(64, name="down")(nn.gelu(nn.Dense(160, name="up")(x))), None


class _Foreign(nn.Module):
    """A vocabulary of 250, three scanned layers of width 64, and a head of 5 classes."""

    @nn.compact
    def __call__(self, ids: Any) -> Any:
        x = nn.Embed(250, 64, name="embed")(ids)
        stack = nn.scan(_Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(5, name="head")(nn.Conv(64, (3,), name="conv")(x).mean(1))


def foreign() -> tuple[Any, Any, Any]:
    ids = jax.ShapeDtypeStruct((2, 6), jnp.int32)
    return _Foreign().apply, jax.eval_shape(_Foreign().init, jax.random.key(0), ids), ids


@pytest.mark.standard_promotion
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("traced", [True, False])
def test_automatic_placement_of_a_foreign_model(mesh: tuple[int, int, int], traced: bool) -> None:
    """A device holds at most 5 % more than its share of the bytes."""
    f, params, ids = foreign()
    placed = sharding.place(params, sizes(mesh), call=(f, (ids,)) if traced else None)
    assert share(params, placed, sizes(mesh)) <= 1.05


@pytest.mark.standard_promotion
def test_automatic_placement_reads_the_roles_of_axes() -> None:
    f, params, ids = foreign()
    placed = sharding.automatic(params, sizes((1, 2, 4)), call=(f, (ids,)))
    layers = "params/layers/"
    assert placed[layers + "attention/query/kernel"] == P(None, "fsdp", "tensor")  # [3, 64, 8, 8]
    assert placed[layers + "attention/out/kernel"] == P(None, "fsdp", None, "tensor")
    assert placed[layers + "up/kernel"] == P(None, "fsdp", "tensor")
    assert placed["params/embed/embedding"] == P("fsdp", "tensor")
    assert placed["params/conv/kernel"] == P(None, "fsdp", "tensor")  # [3, 64, 64], not stacked
    assert placed[layers + "LayerNorm_0/scale"] == P()
    # 8 does not divide 250 rows, so both mesh axes shard the other axis.
    placed = sharding.automatic(params, sizes((1, 8, 1)), call=(f, (ids,)))
    assert placed["params/embed/embedding"] == P(None, ("tensor", "fsdp"))
    # With 8 shards fewer bytes are to spare: the longer biases are sharded, but not along the
    # layers.
    assert placed[layers + "up/bias"] == P(None, ("tensor", "fsdp"))
    stacks = (sharding.names_of(s[0]) for p, s in placed.items() if "layers" in p and len(s))
    assert not any(stacks)


def test_small_parameters_are_whole_while_they_cost_little() -> None:
    """A parameter stays whole while that adds little to the bytes of a device.

    7/8 of 64 numbers are less than 4 % of an eighth of 100,000, but not of an eighth of 10,000.
    """
    few = {"kernel": shape(100, 1000), "bias": shape(64)}
    assert sharding.automatic(few, sizes((1, 8, 1)))["bias"] == P()
    many = {"kernel": shape(10, 1000), "bias": shape(64)}
    assert sharding.automatic(many, sizes((1, 8, 1)))["bias"] == P(("tensor", "fsdp"))
    odd = {"kernel": shape(10, 1000), "bias": shape(65)}  # no axis divides it
    assert sharding.automatic(odd, sizes((1, 8, 1)))["bias"] == P()


def test_a_large_parameter_that_nothing_divides_is_an_error() -> None:
    with pytest.raises(lora_jax.LoraError, match=r"'w'.*\(301, 301\).*fsdp=4.*rule of your own"):
        sharding.automatic({"w": shape(301, 301)}, sizes((1, 4, 2)))
    placed = sharding.place({"w": shape(301, 301)}, sizes((1, 4, 2)), own=[("w", P())])
    assert placed == {"w": P()}


# --- Flax metadata ------------------------------------------------------------------------------

LOGICAL = (("embed", "fsdp"), ("mlp", "tensor"))


def linen(**kwargs: Any) -> Any:
    kernel = nn.with_logical_partitioning(nn.initializers.zeros, ("embed", "mlp"), **kwargs)
    model = nn.Dense(16, kernel_init=kernel)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8)))


def test_metadata_of_linen_is_honoured() -> None:
    """The metadata of Linen decides before the automatic rule, which chooses (fsdp, tensor)."""
    kernel = nn.with_partitioning(nn.initializers.zeros, ("tensor", None))
    model = nn.Dense(16, kernel_init=kernel)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8)))
    placed = sharding.place(boxed, sizes((1, 2, 4)))
    assert placed["params/kernel/value"] == P("tensor", None)
    assert "params/bias" in placed
    turned = flax_partitioning.named(
        linen(rules=LOGICAL), AXES, [("embed", "tensor"), ("mlp", None)]
    )
    assert turned == {"params/kernel/value": P("tensor", None)}
    assert flax_partitioning.named(linen(rules=LOGICAL), AXES) == {
        "params/kernel/value": P(*AXES[1:])
    }


def test_metadata_of_nnx_is_honoured() -> None:
    init = nnx.with_partitioning(nnx.initializers.zeros_init(), ("embed", "mlp"))
    with nnx.use_eager_sharding(False):
        model = nnx.Linear(8, 16, kernel_init=init, rngs=nnx.Rngs(0))
    named = flax_partitioning.named(model, AXES, LOGICAL)
    assert named == {"kernel": P("fsdp", "tensor")}
    assert flax_partitioning.named(nnx.state(model), AXES, LOGICAL) == named
    placed = sharding.place({"kernel": shape(8, 16)}, sizes((1, 2, 4)), named={"kernel": P()})
    assert placed == {"kernel": P()}


def test_an_unknown_name_in_metadata_is_an_error() -> None:
    with pytest.raises(lora_jax.LoraError, match=r"(?s)'params/kernel/value'.*'embed'.*axis rule"):
        flax_partitioning.named(linen(), AXES, [("mlp", "tensor")])


# --- the adapters follow ------------------------------------------------------------------------


def test_the_arrays_of_every_kind_follow_the_weights() -> None:
    form = ((3, 8, 9), (0,), (1,), (2,))
    kinds = ("dora", "vera", "loha", "lokr", "miss", "ia3", "ia3_inputs", "oft", "bias")
    targets = [lora_jax.Target(k, *form, 2, 2.0, kind=k) for k in kinds]
    parts = lora_jax.Target("parts", *form, 2, 2.0, parts=((0, 3), (6, 3)))
    layout = lora_jax.Layout((*targets, parts))
    specs = {t.path: P("data", "fsdp", "tensor") for t in layout.targets}
    a, b = P("data", "fsdp", None), P("data", None, "tensor")
    small = P("data", None, None)
    assert {p: tuple(x) for p, x in lora_jax.partition_specs(layout, specs).items()} == {
        "dora": (a, b, P("data", "tensor")),
        "vera": (P("data", None), P("data", "tensor")),
        "loha": (a, b, a, b),
        "lokr": (small, small, small),
        "miss": (b,),
        "ia3": (P("data", "tensor"),),
        "ia3_inputs": (P("data", "fsdp"),),
        "oft": (small,),
        "bias": (P("data", "fsdp", "tensor"),),
        "parts": (P("data", "fsdp", None, None), P("data", None, None)),
    }


def test_adapters_follow_the_weights() -> None:
    """Factors are sharded as the axes of W: a as stack and inputs, b as stack and outputs."""

    def f(p: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            h = jnp.einsum("bd,dhk->bhk", x, w["q"])
            return jnp.einsum("bhk,hkd->bd", h, w["o"]), None

        return jax.lax.scan(layer, x, p["layers"])[0] @ p["head"]["kernel"]

    params = {"layers": {"q": shape(3, 8, 2, 4), "o": shape(3, 2, 4, 8)}}
    params["head"] = {"kernel": shape(8, 6)}
    spec = lora_jax.LoraSpec(rank=2, targets="**")
    layout = lora_jax.resolve(spec, f, params, shape(5, 8))
    tree = {
        "layers": {"q": P("data", "fsdp", "tensor"), "o": P(None, "tensor", None, "fsdp")},
        "head": {"kernel": P()},
    }
    want = {
        "layers/q": Factors(P("data", "fsdp", None), P("data", None, "tensor", None)),
        "layers/o": Factors(P(None, "tensor", None, None), P(None, None, "fsdp")),
        "head/kernel": Factors(P(None, None), P(None, None)),
    }
    assert lora_jax.partition_specs(layout, tree) == want
    flat = paths.flatten(tree)
    assert lora_jax.partition_specs(layout, {**flat, "more": P("fsdp")}) == want
    del flat["layers/q"]
    with pytest.raises(lora_jax.LoraError, match="'layers/q' is adapted"):
        lora_jax.partition_specs(layout, flat)
