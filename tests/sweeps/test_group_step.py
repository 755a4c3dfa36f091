"""The group step: each member's slice does what the member does alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.sweeps import batches, padded_state
from lora_jax.sweeps.step import Settings, group_step
from lora_jax.training import mesh, optimizer, step
from lora_jax.training.config import LoraConfig, MeshConfig, OptimizerConfig
from lora_jax.training.state import State
from lora_jax.training.workload import Loss, Workload

STEPS, WIDTH = 50, 8


class Network(nn.Module):
    """[B, T, 4] -> [B, C]: two layers, a mean over the real tokens, and a head."""

    classes: int

    @nn.compact
    def __call__(self, x: Any, mask: Any, train: bool) -> Any:
        x = nn.tanh(nn.Dense(WIDTH, name="first")(x))
        x = nn.tanh(nn.Dense(WIDTH, name="second")(x))
        x = (x * mask[..., None]).sum(1) / jnp.maximum(mask.sum(1, keepdims=True), 1)
        return nn.Dense(self.classes, name="head")(x)


def loss(logits: jax.Array, batch: Any) -> Loss:
    seen = jnp.arange(logits.shape[-1]) < batch["classes"]
    logs = jax.nn.log_softmax(jnp.where(seen, logits, -jnp.inf))
    each = -jnp.take_along_axis(logs, batch["label"][:, None], 1)[:, 0]
    return Loss((each * batch["weight"]).sum(), batch["weight"].sum())


def workload(classes: int) -> Workload:
    network = Network(classes)

    def apply(params: Any, batch: Any, *, train: bool, key: Any) -> Any:
        return network.apply({"params": params}, batch["x"], batch["mask"], train)

    params = network.init(jax.random.key(3), jnp.zeros((1, 2, 4)), jnp.ones((1, 2)), False)
    return Workload(
        apply=apply,
        loss=loss,
        params=params["params"],
        train=lambda shard: None,
        trainable=("head/**",),
    )


class Member(NamedTuple):
    classes: int
    rows: int
    length: int
    seed: int
    lora: LoraConfig
    optimizer: OptimizerConfig
    steps: int = STEPS


BOTH, FIRST, SECOND = ("{first,second}/kernel",), ("first/kernel",), ("second/kernel",)
MEMBERS = (
    Member(3, 6, 5, 0, LoraConfig(2, 4.0, BOTH), OptimizerConfig(3e-3, clip=0.1)),
    Member(5, 4, 7, 1, LoraConfig(4, 1.0, FIRST), OptimizerConfig(1e-2, None, "cosine", 0.2)),
    Member(
        2, 8, 3, 2, LoraConfig(1, 8.0, SECOND),
        OptimizerConfig(2e-3, 8e-3, "constant", 0.1, weight_decay=0.1, clip=None),
    ),
    Member(
        4, 2, 2, 3, LoraConfig(3, 3.0, BOTH),
        OptimizerConfig(5e-3, weight_decay=0.3, b1=0.8, b2=0.99, eps=1e-6), 30,
    ),
)  # fmt: skip


def batch(member: Member, index: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng((member.seed, index))
    mask = np.arange(member.length) < random.integers(1, member.length + 1, (member.rows, 1))
    return {
        "x": random.normal(size=(member.rows, member.length, 4)).astype(np.float32),
        "mask": mask.astype(np.float32),
        "label": random.integers(0, member.classes, member.rows).astype(np.int32),
        "weight": np.ones(member.rows, np.float32),
        "classes": np.int32(member.classes),
    }


class Parts(NamedTuple):
    layout: lora_jax.Layout
    state: State
    frozen: Any
    hyper: optimizer.Hyper
    place: mesh.Placement


def place_of(made: Workload) -> mesh.Placement:
    grid = mesh.make(MeshConfig(), jax.devices()[:1])
    return mesh.place(made, MeshConfig(), grid, batch(MEMBERS[0], 0))


def parts(member: Member, classes: int = 0) -> Parts:
    made = workload(classes or member.classes)
    example, key = batch(member, 0), jax.random.key(member.seed)
    layout = lora_jax.resolve(
        member.lora.spec, made.apply, made.params, example, train=True, key=key
    )
    base, frozen = lora_jax.frozen.split(made.params, made.trainable)
    hyper, place = optimizer.hyper(member.optimizer, member.steps), place_of(made)
    state = step.create(layout, base, optimizer.adamw(hyper), key, place)
    return Parts(layout, state, frozen, hyper, place)


def form(layout: lora_jax.Layout, base: Any, place: mesh.Placement) -> padded_state.StateShapes:
    tx = optimizer.adamw(optimizer.hyper(OptimizerConfig(), 1))
    return padded_state.StateShapes(step.shapes(layout, base, tx, jax.random.key(0), place))


@functools.cache
def compiled(layout: lora_jax.Layout, classes: int, at_once: int | None) -> Any:
    step = group_step(workload(classes), layout, at_once=at_once)
    return jax.jit(step, donate_argnums=0)


class Together:
    """A group of the members, which a test steps by hand."""

    def __init__(
        self,
        members: tuple[Member, ...] = MEMBERS,
        skip: bool = False,
        at_once: int | None = None,
    ) -> None:
        self.members, self.parts = members, [parts(member) for member in members]
        self.layout = lora_jax.multi.union(p.layout for p in self.parts)
        made = workload(max(member.classes for member in members))
        base, self.frozen = lora_jax.frozen.split(made.params, made.trainable)
        self.place = place_of(made)
        self.form = form(self.layout, base, self.place)
        self.own = [form(p.layout, p.state.trained["base"], p.place) for p in self.parts]
        hosts = [own.host(p.state) for own, p in zip(self.own, self.parts, strict=True)]
        self.state = self.form.stack([self.form.pad(host) for host in hosts], self.place.mesh)
        scales = [
            {t.path: 0.0 for t in self.layout.targets} | {t.path: t.scale for t in p.layout.targets}
            for p in self.parts
        ]
        stack = lambda *xs: jnp.stack([jnp.asarray(x) for x in xs])  # noqa: E731
        self.settings = Settings(
            jax.tree.map(stack, *[p.hyper for p in self.parts]),
            jax.tree.map(lambda *xs: jnp.float32(xs), *scales),
            jnp.full(len(members), skip),
        )
        self.step = compiled(self.layout, made.params["head"]["bias"].size, at_once)
        self.losses: list[list[float]] = [[] for _ in members]

    def take(self, each: list[dict[str, np.ndarray] | None]) -> None:
        names = [str(i) for i in range(len(each))]
        rows = batches.placed(self.place, batches.together(names, each))
        active = np.array([b is not None for b in each])
        self.state, values = self.step(self.state, self.settings, active, self.frozen, rows)
        for i in np.flatnonzero(active):
            self.losses[i].append(float(values["loss"][i]))

    def member(self, index: int) -> State:
        arrays = padded_state.unstack(self.form.host(self.state), index)
        return self.own[index].state(self.own[index].unpad(arrays))


def alone(member: Member) -> tuple[State, list[float]]:
    p, made, losses = parts(member), workload(member.classes), []
    take = jax.jit(step.train_step(made, p.layout, optimizer.adamw(p.hyper), "stop"))
    state = p.state
    for i in range(member.steps):
        state, values = take(state, p.frozen, batch(member, i))
        losses.append(float(values["loss"]))
    return state, losses


def close(got: Any, wanted: Any, bound: float = 1e-5) -> None:
    """Assert that each array differs from the wanted one by at most `bound` of the wanted norm."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(wanted), strict=True
    ):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        gap = np.linalg.norm(np.subtract(x, y, dtype=np.float64))
        size = np.linalg.norm(np.asarray(y, np.float64))
        assert gap <= bound * size, f"{jax.tree_util.keystr(path)}: {gap / max(size, 1e-30):.1e}"


@pytest.fixture(scope="module", params=[None, 3])
def finished(request: pytest.FixtureRequest) -> Together:
    """A group with all members at once, and one with three at once and then the fourth."""
    group = Together(at_once=request.param)
    for i in range(STEPS):
        group.take([batch(m, i) if i < m.steps else None for m in group.members])
    return group


@pytest.mark.few(3)
@pytest.mark.parametrize("index", range(len(MEMBERS)))
def test_a_member_is_what_it_is_alone(finished: Together, index: int) -> None:
    """A member's state and every loss equal the state and the losses of the member alone."""
    wanted, losses = alone(MEMBERS[index])
    close(finished.member(index), wanted)
    np.testing.assert_allclose(finished.losses[index], losses, rtol=1e-5)


def test_what_fills_up_stays_zero(finished: Together) -> None:
    """The padding of the parameters stays zero. Red without the mask of the logits in the loss."""
    for index, own in enumerate(finished.own):
        arrays = padded_state.unstack(finished.form.host(finished.state), index)
        again = finished.form.pad(own.unpad(arrays))
        for path, array in arrays.items():
            np.testing.assert_array_equal(array, again[path])


def test_of_an_absent_member_nothing_changes() -> None:
    """The state of an absent member keeps every bit, at any step of the others."""
    group = Together()
    for i in range(3):
        group.take([batch(m, i) for m in group.members])
    before = group.form.host(group.state)
    for i in range(3, 6):
        group.take([None, batch(MEMBERS[1], i), None, batch(MEMBERS[3], i)])
    after = group.form.host(group.state)
    for path, array in before.items():
        np.testing.assert_array_equal(array[[0, 2]], after[path][[0, 2]])
    counts = [a for path, a in after.items() if "count" in jax.tree_util.keystr(path)]
    assert [c.tolist() for c in counts] == [[3, 6, 3, 6]] * 2


@pytest.mark.parametrize("skip", [False, True])
def test_a_member_that_diverges_does_not_disturb_the_others(skip: bool) -> None:
    """A member that diverges stays (stop) or goes on (skip); the others are as without it."""
    clean, other = Together(skip=skip), Together(skip=skip)
    for i in range(6):
        each = [batch(m, i) for m in MEMBERS]
        clean.take(
            [None if index == 1 and i >= 3 and not skip else b for index, b in enumerate(each)]
        )
        if i == 3:
            each[1] = {**each[1], "x": np.full_like(each[1]["x"], np.nan)}
        other.take(each)
    for index in (0, 2, 3):
        got, wanted = other.member(index), clean.member(index)
        close(got, wanted, 0)
    got = other.member(1)
    assert int(got.skipped) == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got.trained))
    if not skip:
        close(got.trained, clean.member(1).trained, 0)


def test_swapped_settings_need_no_compilation() -> None:
    group = Together()
    each = [batch(m, 0) for m in group.members]
    for _ in range(2):  # the second time with the shardings of the outputs
        group.take(each)
    before = group.step._cache_size()
    group.settings = jax.tree.map(lambda x: x[::-1], group.settings)
    group.take(each[::-1])
    assert group.step._cache_size() == before


def test_batches_of_another_kind_are_an_error() -> None:
    one, other = batch(MEMBERS[0], 0), batch(MEMBERS[1], 0)
    del other["mask"]
    with pytest.raises(lora_jax.LoraError, match=r"'a' and 'b' differ in the entry 'mask'"):
        batches.together(["a", "b"], [one, other])


def test_rows_that_the_devices_do_not_divide_are_an_error() -> None:
    made = workload(3)
    place = dataclasses.replace(place_of(made), mesh=mesh.make(MeshConfig()))
    with pytest.raises(lora_jax.LoraError, match="6 rows"):
        batches.placed(place, batches.together(["a"], [batch(MEMBERS[0], 0)]))
