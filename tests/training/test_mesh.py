"""A run on a mesh has the losses of a run on one device, and each device holds its part."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import models, paths
from lora_jax.data.config import DataConfig
from lora_jax.data.process_slice import Shard
from lora_jax.models import placement
from lora_jax.training import mesh, optimizer, step
from lora_jax.training.causal_lm import causal_lm
from lora_jax.training.classification import classification
from lora_jax.training.config import Config, ConfigError, LoraConfig, MeshConfig
from lora_jax.training.state import State
from lora_jax.training.text import ModelConfig, TextConfig
from lora_jax.training.workload import Loss, Workload
from tests.training import tiny

pytestmark = pytest.mark.slow

STEPS = 20
MESHES = [MeshConfig(8, 1, 1), MeshConfig(1, 8, 1), MeshConfig(1, 1, 8), MeshConfig(2, 2, 2)]
Q_AND_V = LoraConfig(rank=2, alpha=4.0, targets=("**/{query,value,q,v}/kernel",))


def text(folder: pathlib.Path, name: str) -> TextConfig:
    """Return the config of a tiny encoder that classifies, or of a tiny decoder that writes."""
    if name == "bert":
        model = tiny.write_model(folder / "model", {**tiny.ROBERTA, "hidden_size": 32})
        source = tiny.write_examples(folder, ("text",), lambda kind: ["a", "b", "c"][kind])
        data = DataConfig(source, text_fields=("text",), max_length=16, buckets=(16,), batch_size=8)
        workload: Callable[..., Workload] = classification
    else:
        description = {**tiny.LLAMA, "hidden_size": 32, "vocab_size": 64}
        model = tiny.write_model(folder / "model", description)
        source = tiny.write_examples(folder, ("prompt", "answer"), lambda kind: kind)
        data = DataConfig(
            source, prompt="{prompt}", answer=" {answer}", eos="</s>", max_length=24, batch_size=8
        )
        workload = causal_lm
    return TextConfig(
        workload=workload, model=ModelConfig(reference=str(model)), data=data, lora=Q_AND_V
    )


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.Dense(32, name="out")(nn.tanh(nn.Dense(512, name="in")(x))), None


class Foreign(nn.Module):
    """A user's network: convolution, attention, a stack of scanned layers. No table knows it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(32, (3,), name="conv")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="mix")(x, x)

        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = scan(name="blocks")(x, None)
        return nn.Dense(1, name="head")(x.mean(axis=1))[:, 0]


def foreign(config: Config) -> Workload:
    def load(shardings: Any) -> Any:
        return Foreign().init(jax.random.key(3), jnp.zeros((1, 12, 8)))["params"]

    def apply(params: Any, batch: Any, *, train: bool, key: Any) -> Any:
        return Foreign().apply({"params": params}, batch["x"])

    def loss(outputs: Any, batch: Any) -> Loss:
        return Loss(jnp.sum(jnp.square(outputs - batch["y"])), jnp.float32(outputs.size))

    class Data:
        def __init__(self, shard: Shard) -> None:
            self.random, self.shard = np.random.default_rng(0), shard

        def __next__(self) -> Any:
            x = self.random.normal(size=(16, 12, 8)).astype(np.float32)
            return self.shard.take({"x": x, "y": np.sin(x[:, 0, 0])})

    return Workload(apply=apply, loss=loss, params=jax.eval_shape(load, None), load=load,
                    train=Data)  # fmt: skip


class Run(NamedTuple):
    losses: list[float]
    state: State
    frozen: Any
    place: mesh.Placement
    trained: Any  # the shardings of the trained parameters


def run(config: Config, sizes: MeshConfig, devices: int = 8) -> Run:
    """Take twenty steps as train.py does."""
    grid = mesh.make(sizes, jax.devices()[:devices])
    workload = config.workload(config)
    with jax.set_mesh(grid):
        data = workload.train(mesh.shard_of(grid))
        batches = [next(data) for _ in range(STEPS)]
        place = mesh.place(workload, sizes, grid, batches[0])
        params, key = workload.arrays(place.params), jax.random.key(0)
        layout = lora_jax.resolve(
            config.lora.spec, workload.apply, params, batches[0], train=True, key=key
        )
        base, frozen = lora_jax.frozen.split(params, workload.trainable)
        tx = optimizer.adamw(optimizer.hyper(config.optimizer, STEPS))
        state = step.create(layout, base, tx, key, place)
        kept = jax.tree.map(lambda x: x.sharding, state)
        take = jax.jit(
            step.train_step(workload, layout, tx, "stop", config.accumulate),
            donate_argnums=0,
            out_shardings=(kept, place.whole),
        )
        losses = []
        for batch in batches:
            state, values = take(state, frozen, place.batch(batch))
            losses.append(float(values["loss"]))
    return Run(losses, state, frozen, place, place.trained(layout, base))


@pytest.fixture(scope="module")
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    if request.param != "foreign":
        return text(tmp_path_factory.mktemp(request.param), request.param)
    targets = ("**/{query,value}/kernel", "blocks/in/kernel", "conv/kernel")
    return Config(workload=foreign, lora=LoraConfig(rank=2, targets=targets))


@pytest.fixture(scope="module")
def alone(config: Config) -> Run:
    return run(config, MeshConfig(), devices=1)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [("bert", MESHES[-1]), ("foreign", MESHES[-1]), *(("llama", sizes) for sizes in MESHES)],
    ids=str,
    indirect=["config"],
)
def test_losses_are_those_of_one_device(config: Config, alone: Run, sizes: MeshConfig) -> None:
    """Meshes give the losses of one device: all axes at once, and for one workload each alone."""
    found = run(config, sizes)
    np.testing.assert_allclose(found.losses, alone.losses, rtol=1e-5)
    assert len(set(alone.losses)) == STEPS  # the losses change
    assert_placed(found)


def assert_placed(found: Run) -> None:
    """Assert that each array, and the optimizer's copies of it, are placed as expected."""
    wanted = paths.flatten(found.place.params)
    for path, leaf in paths.flatten(found.frozen).items():
        assert leaf.sharding.is_equivalent_to(wanted[path], leaf.ndim), path
    for tree in (found.state.trained, *_moments(found.state.optimizer)):
        for x, where in zip(jax.tree.leaves(tree), jax.tree.leaves(found.trained), strict=True):
            assert x.sharding.is_equivalent_to(where, x.ndim)


def _moments(optimizer_state: Any) -> list[Any]:
    holds = lambda x: isinstance(x, dict) and set(x) == {"adapters", "base"}  # noqa: E731
    found = [x for x in jax.tree.leaves(optimizer_state, is_leaf=holds) if holds(x)]
    assert len(found) == 2  # Adam's two moments
    return found


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", ["minilm", "smollm2", "foreign"])
def test_bytes_of_the_base_on_a_device(name: str, sizes: MeshConfig) -> None:
    """A device holds at most 1.05 times total / (fsdp x tensor) bytes of a real model's base."""
    grid = mesh.make(sizes)
    example, workload = _shapes_only(name)
    place = mesh.place(workload, sizes, grid, example)
    total = here = 0
    for x, where in zip(
        jax.tree.leaves(workload.params), jax.tree.leaves(place.params), strict=True
    ):
        total += math.prod(x.shape) * x.dtype.itemsize
        here += math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize
    assert here <= 1.05 * total / (grid.shape["fsdp"] * grid.shape["tensor"])


def _shapes_only(name: str) -> tuple[Any, Workload]:
    ids = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    if name == "foreign":
        x = jax.ShapeDtypeStruct((8, 12, 8), jnp.float32)
        return {"x": x}, foreign(Config(workload=foreign))
    if name == "minilm":
        config: Any = models.BertConfig(
            vocab_size=30522, hidden_size=384, num_layers=6, num_heads=12, mlp_size=1536,
            max_positions=512,
        )  # fmt: skip
        head: Any = models.Head("mean", 2)
    else:
        config = models.DecoderConfig(
            vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3,
            head_dim=64, mlp_size=1536, max_positions=8192, tied=True,
        )  # fmt: skip
        head = None
    params, table = models.shapes(config, head), placement.rules(config, head)
    never = functools.partial(pytest.fail, "it has a table: nothing is traced")
    return {"input_ids": ids}, Workload(
        apply=never, loss=never, params=params, train=never, placement=table
    )


@pytest.mark.parametrize("name", ["adamw", "muon", "schedule_free", "adafactor", "inject"])
def test_the_state_of_any_optimizer_follows_the_adapters(name: str) -> None:
    grid = mesh.make(MeshConfig(2, 2, 2))
    place = mesh.Placement(grid, {}, None)
    trained = {"adapters": {"w": lora_jax.Factors(jnp.ones((64, 8)), jnp.ones((8, 32)))}}
    specs = {"adapters": {"w": lora_jax.Factors(P("fsdp", None), P(None, "tensor"))}}
    where = place.named(specs)
    tx = {
        "adamw": optax.adamw(1e-3),
        "muon": optax.contrib.muon(1e-3),
        "schedule_free": optax.contrib.schedule_free_adamw(1e-3),
        "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=4),
        "inject": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    }[name]
    state = jax.eval_shape(tx.init, trained)
    found = place.following(state, trained, where)
    for leaf, at in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        at.shard_shape(leaf.shape)  # raises if it does not divide
        expected = {(64, 8): P("fsdp", None), (8, 32): P(None, "tensor")}.get(leaf.shape, P())
        assert at.spec == expected, leaf.shape


@pytest.mark.parametrize("config", ["llama"], indirect=True)
def test_accumulated_gradients_are_those_of_the_whole_batch(config: Config, alone: Run) -> None:
    parted = dataclasses.replace(config, accumulate=2)
    for sizes, devices in ((MeshConfig(), 1), (MeshConfig(2, 2, 2), 8)):
        found = run(parted, sizes, devices)
        np.testing.assert_allclose(found.losses, alone.losses, rtol=1e-5)


def test_parts_of_unequal_weight_count_by_their_tokens() -> None:
    def apply(params: Any, batch: Any, *, train: bool, key: Any) -> Any:
        return batch["x"] @ params["w"]

    def loss(outputs: Any, batch: Any) -> Loss:
        return Loss(jnp.sum(outputs[:, 0] * batch["weight"]), jnp.sum(batch["weight"]))

    params = {"w": jnp.ones((4, 4))}
    batch = {
        "x": np.arange(16.0, dtype=np.float32).reshape(4, 4),
        "weight": np.array([1, 5, 0, 2], np.float32),
    }
    never = functools.partial(pytest.fail, "not called")
    workload = Workload(apply=apply, loss=loss, params=params, train=never)
    layout = lora_jax.resolve(
        lora_jax.LoraSpec(rank=1, alpha=1.0, targets="w"),
        apply,
        params,
        batch,
        train=True,
        key=None,
    )
    place = mesh.place(workload, MeshConfig(), mesh.make(MeshConfig(), jax.devices()[:1]), batch)
    tx = optax.sgd(1.0)
    found = []
    for parts in (1, 2, 4):
        state = step.create(layout, {}, tx, jax.random.key(0), place)
        take = step.train_step(workload, layout, tx, "stop", parts)
        after, values = take(state, {**params}, batch)
        found.append((float(values["loss"]), after.trained["adapters"]["w"].b))
    for loss_, b in found[1:]:
        assert loss_ == pytest.approx(found[0][0], rel=1e-6)
        np.testing.assert_allclose(b, found[0][1], rtol=1e-6)


def test_a_batch_that_the_parts_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="accumulate must be a divisor of the 4 rows"):
        step.batch_parts({"x": np.ones((4, 2))}, 3)


def rows(batch: tuple[str, str], weight: P) -> list[float]:
    """Return the rows 0 to 7 after a product with an identity on a mesh (docs/partitioner.md)."""
    grid = jax.make_mesh((2, 2, 2), mesh.AXES, axis_types=(AxisType.Auto,) * 3)
    place = NamedSharding(grid, P(batch, "tensor"))
    x = jax.device_put(jnp.broadcast_to(jnp.arange(8.0)[:, None], (8, 4)), place)
    identity = jax.device_put(jnp.eye(4), NamedSharding(grid, weight))
    return jax.jit(jnp.matmul, out_shardings=place)(x, identity)[:, 0].tolist()


def test_rows_are_divided_in_the_order_that_the_partitioner_gets_right() -> None:
    """This tests XLA: once the last line fails, `mesh.BATCH` may have either order."""
    weight = P("tensor", "fsdp")
    assert mesh.BATCH[0] == ("fsdp", "data")
    assert rows(("fsdp", "data"), weight) == list(range(8))
    assert rows(("data", "fsdp"), weight) == [0, 1, 4, 5, 2, 3, 6, 7]


def test_sizes_must_multiply_to_the_devices() -> None:
    with pytest.raises(ConfigError, match=r"fsdp 3.*8 devices"):
        mesh.make(MeshConfig(fsdp=3))
    with pytest.raises(ConfigError, match="one axis only"):
        MeshConfig(data=-1, fsdp=-1)


def test_a_batch_that_the_devices_do_not_divide() -> None:
    place = mesh.Placement(mesh.make(MeshConfig(4, 2, 1)), {}, None)
    with pytest.raises(ConfigError, match=r"12 rows.*multiple of 8"):
        place.batch({"x": np.ones((12, 3))})
    example = {"x": jax.ShapeDtypeStruct((12, 12, 8), jnp.float32)}
    with pytest.raises(ConfigError, match=r"12 rows.*multiple of 8"):  # before weights are loaded
        mesh.place(foreign(Config(workload=foreign)), MeshConfig(), place.mesh, example)


def test_a_parameter_that_nothing_divides_names_the_flag() -> None:
    example = {"x": jax.ShapeDtypeStruct((8, 12, 8), jnp.float32)}
    grid = mesh.make(MeshConfig(1, 1, 7), jax.devices()[:7])
    with pytest.raises(lora_jax.LoraError, match=r"(?s)no way to shard it.*--mesh\.rules"):
        mesh.place(foreign(Config(workload=foreign)), MeshConfig(), grid, example)


@pytest.mark.parametrize("config", ["llama"], indirect=True)
def test_own_rules_come_before_the_table(config: Config) -> None:
    workload = config.workload(config)
    sizes = MeshConfig(2, 2, 2, rules=("layers_*/mlp/down/kernel=-,fsdp+tensor",))
    place = mesh.place(workload, sizes, mesh.make(sizes), workload.example)
    assert place.specs["layers_1/mlp/down/kernel"] == P(None, ("fsdp", "tensor"))
    assert place.specs["layers_1/mlp/up/kernel"] == P("fsdp", "tensor")
    with pytest.raises(ConfigError, match=r"mesh\.rules"):
        mesh.place(
            workload, MeshConfig(rules=("embed/*=data",)), mesh.make(sizes), workload.example
        )


@pytest.mark.parametrize("sizes", [(1, 1, 2), (1, 2, 1), (2, 1, 1)])
def test_one_process_holds_every_row(sizes: tuple[int, ...]) -> None:
    grid = mesh.make(MeshConfig(*sizes), jax.devices()[:2])
    assert mesh.shard_of(grid).rows(4).tolist() == [0, 1, 2, 3]


class Annotated(nn.Module):
    """A network whose author has specified the placement of its weights."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        put = functools.partial(nn.with_partitioning, nn.initializers.lecun_normal())
        x = nn.tanh(nn.Dense(64, kernel_init=put((None, "tensor")), name="up")(x))
        return nn.Dense(1, kernel_init=put(("tensor", None)), name="down")(x)[:, 0]


def annotated(config: Config) -> Workload:
    def load(shardings: Any) -> Any:
        return Annotated().init(jax.random.key(3), jnp.zeros((1, 8)))["params"]

    def apply(params: Any, batch: Any, *, train: bool, key: Any) -> Any:
        return Annotated().apply({"params": params}, batch["x"][:, 0])

    whole = foreign(config)
    return dataclasses.replace(whole, apply=apply, params=jax.eval_shape(load, None), load=load)


def test_a_models_own_annotations_place_it() -> None:
    lora = LoraConfig(rank=2, targets=("up/kernel/value",))
    config = Config(workload=annotated, lora=lora)
    found, wanted = run(config, MeshConfig(2, 2, 2)), run(config, MeshConfig(), devices=1)
    assert found.place.specs["up/kernel/value"] == P(None, "tensor")
    assert found.place.specs["down/kernel/value"] == P("tensor", None)
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-5)


def test_placements_may_be_given_by_path() -> None:
    workload = dataclasses.replace(
        foreign(Config(workload=foreign)), placement={"conv/kernel": P(None, None, "fsdp")}
    )
    example = {"x": jax.ShapeDtypeStruct((8, 12, 8), jnp.float32)}
    sizes = MeshConfig(2, 2, 2)
    place = mesh.place(workload, sizes, mesh.make(sizes), example)
    assert place.specs["conv/kernel"] == P(None, None, "fsdp")
    assert place.specs["blocks/in/kernel"] == P(None, "fsdp", "tensor")
