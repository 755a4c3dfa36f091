"""The members of a group, opened: each its own run over the base that all share."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax import paths
from lora_jax.errors import listed
from lora_jax.fingerprint import Fingerprint, differences
from lora_jax.training import mesh, optimizer, step
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.config import Config, ConfigError, OptimizerConfig, to_dict
from lora_jax.training.group import batches
from lora_jax.training.group.padded import Form, Host, only_trained
from lora_jax.training.group.step import Settings
from lora_jax.training.run import Run, Setup
from lora_jax.training.step import State, Trained
from lora_jax.training.workload import Batch, Workload

Tree = Any  # a pytree

# The state of the optimizer has one structure, whatever the settings.
TX = optimizer.adamw(optimizer.hyper(OptimizerConfig(), 1))


@dataclasses.dataclass(eq=False)
class Member:
    """A member under way.

    form: of its state, in its own shapes.
    host: its state while no group holds it.
    example: its first batch.
    step: the steps it has taken.
    paused: it waits.
    error: why it has stopped, if it has.
    """

    name: str
    run: Run
    form: Form
    host: Host
    example: Batch
    step: int
    paused: bool = False
    error: str | None = None

    @property
    def config(self) -> Config:
        """Of its run."""
        return self.run.setup.config

    @property
    def left(self) -> int:
        """Steps that it will still take."""
        return 0 if self.error is not None else self.config.steps - self.step

    @property
    def live(self) -> bool:
        """Whether it takes part in the next step."""
        return self.left > 0 and not self.paused

    @property
    def marks(self) -> dict[str, Any]:
        """What its batches have in a group that is joined."""
        common = self.run.setup.workload.common
        return {} if common is None else dict(common.marks)

    def settings(self, layout: lora_jax.Layout) -> Settings:
        """Its settings, as scalars on the host, for the common layout."""
        own = {t.path: t.scale for t in self.run.setup.layout.targets}
        return Settings(
            optimizer.hyper(self.config.optimizer, self.config.steps),
            {t.path: np.float32(own.get(t.path, 0)) for t in layout.targets},
            np.bool_(self.config.on_nonfinite == "skip"),
        )

    def trained_host(self, trained: Trained) -> Host:
        """Trained parameters of this member as arrays on the host."""
        return self.form.host(only_trained(trained))


@dataclasses.dataclass(frozen=True)
class Base:
    """What the first member has brought, and all share.

    beside: the first's parameters that are trained beside the adapters.
    """

    name: str
    workload: Workload
    beside: dict[str, Any]
    frozen: Tree
    fingerprint: Fingerprint


class Opener:
    """Opens members, the first of which brings the base; it closes them as its block ends."""

    def __init__(self, grid: jax.sharding.Mesh, report: Callable[[str], None]) -> None:
        self._grid, self._report, self._stack = grid, report, contextlib.ExitStack()
        self._begin: dict[Any, Callable[..., State]] = {}
        self.base: Base | None = None

    def __enter__(self) -> Opener:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def open(
        self, name: str, config: Config, path: pathlib.Path, newest: int | None = None
    ) -> Member:
        """The member in the run directory `path`, at its newest checkpoint or its beginning.

        Args:
          newest: checkpoints of later steps than this are deleted first.

        Raises:
          ConfigError: it does not go together with the first.
        """
        began = time.monotonic()
        workload = config.workload(config)
        data = workload.train(mesh.shard_of(self._grid))
        beginning = data.get_state()
        example = next(data)
        data.set_state(beginning)
        place = mesh.place(workload, config.mesh, self._grid, example)
        patterns = workload.beside if config.lora.beside is None else config.lora.beside
        beside = self._beside(name, workload, place, patterns)
        assert self.base is not None
        key = jax.random.key(config.seed)
        layout = lora_jax.resolve(
            config.lora.spec, workload.apply, workload.params, example, train=True, key=key
        )
        step.check_apart(layout, beside)
        form = Form(step.shapes(layout, beside, TX, key, place))
        base = self.base
        setup = Setup(config, workload, place, layout, base.frozen, base.fingerprint, path, began)
        checkpoints = self._stack.enter_context(
            Checkpoints(path / "checkpoints", report=self._report)
        )
        if newest is not None:
            checkpoints.forget_after(newest)
        run = Run(setup, data, checkpoints)
        self._stack.callback(run.close)
        state = run.begin(
            self._fresh(setup, form, beside, key) if checkpoints.latest is None else form.like
        )
        return Member(name, run, form, form.host(state), example, run.start)

    def _fresh(self, setup: Setup, form: Form, beside: dict[str, Any], key: jax.Array) -> State:
        """Compiled once for members that differ in settings and seed alone."""
        init = setup.config.lora.init
        known = (setup.layout, init, tuple((p, x.shape) for p, x in beside.items()))
        if known not in self._begin:
            where = jax.tree.map(lambda x: x.sharding, form.like)
            self._begin[known] = jax.jit(step.fresh(setup.layout, TX, init), out_shardings=where)
        return self._begin[known](beside, key)

    def _beside(
        self, name: str, workload: Workload, place: mesh.Placement, patterns: Sequence[str]
    ) -> dict[str, Any]:
        """The parameters that the member trains beside its adapters; the first brings the base."""
        base = self.base
        if base is None:
            params = workload.arrays(place.params)
            beside, frozen = lora_jax.frozen.split(params, patterns)
            found = lora_jax.fingerprint(frozen)
            self.base = Base(name, workload, beside, frozen, found)
            return beside
        shapes, frozen = lora_jax.frozen.split(workload.params, patterns)
        _check_alike(base, name, shapes, frozen)
        common, first = workload.common, base.workload.common
        if common is None or first is None:
            beside, frozen = lora_jax.frozen.split(workload.arrays(place.params), patterns)
            if changed := differences(base.fingerprint, lora_jax.fingerprint(frozen)):
                raise ConfigError(
                    f"{base.name!r} and {name!r} have not the same base: {len(changed)} of its "
                    f"parameters differ:\n{listed(changed)}\na group trains over one base"
                )
            return beside
        if common.base != first.base:
            raise ConfigError(
                f"{base.name!r} and {name!r} have not the same base: {first.base} and "
                f"{common.base}; a group trains over one base"
            )
        drawn = common.fresh()
        return {p: drawn[p] if p in drawn else base.beside[p] for p in shapes}


def _check_alike(base: Base, name: str, beside: dict[str, Any], frozen: Tree) -> None:
    """Raise unless the frozen parameters have the paths and shapes of the first's."""

    def forms(tree: Tree) -> dict[str, str]:
        return {p: f"{x.dtype}{list(x.shape)}" for p, x in paths.flatten(tree).items()}

    if list(beside) != list(base.beside):
        raise ConfigError(
            f"{base.name!r} and {name!r} train different parameters beside their adapters "
            f"(lora.beside): {list(base.beside)} and {list(beside)}; in a group they are the same"
        )
    ours, theirs = forms(base.frozen), forms(frozen)
    for path in dict.fromkeys([*ours, *theirs]):
        if ours.get(path) != theirs.get(path):
            raise ConfigError(
                f"{base.name!r} and {name!r} have not the same base: {path!r} is "
                f"{ours.get(path, 'not there')} and {theirs.get(path, 'not there')}"
            )


def joined(members: Sequence[Member], example: Any) -> tuple[Workload, bool]:
    """The workload of all members, and whether their batches have to be marked for it.

    Args:
      example: a batch in the members' common shapes, without marks.

    Raises:
      ConfigError: their models or losses are not the same.
    """
    workloads = [member.run.setup.workload for member in members]
    marked = len({str(_shapes(workload)) for workload in workloads}) > 1
    if marked:
        _check_joinable(members)
    whole = _join(workloads) if marked else workloads[0]
    known = {_essence(members[0].config): None}
    for member in members[1:]:
        if _essence(member.config) in known:
            continue
        known[_essence(member.config)] = None
        own = member.run.setup.workload
        other = _join([own, *workloads]) if marked else own
        batch = example | member.marks if marked else example
        if _program(other, batch) != _program(whole, batch):
            raise ConfigError(
                f"the models or the losses of {members[0].name!r} and {member.name!r} are not the "
                "same program; the members of a group may differ in their data, adapters, heads' "
                "classes and settings, and in nothing that the model computes (pooling, dropout)"
            )
    return whole, marked


def check_padding(members: Sequence[Member], workload: Workload, marked: bool) -> None:
    """Raise unless what fills up a batch has no weight in the loss.

    Args:
      workload, marked: as `joined` gives them.
    """
    names = [member.name for member in members]
    filled = batches.together(names, [member.example for member in members])

    @jax.jit
    def weight(batch: Any) -> jax.Array:
        # Nothing reads the parameters: the weight is of the batch, and the compiler finds it out.
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), workload.params)
        outputs = workload.apply(params, batch, train=False, key=None)
        return workload.loss(outputs, batch).weight

    for index, member in enumerate(members):
        batch = {name: x[index] for name, x in filled.items()}
        if any(np.shape(x) != batch[name].shape for name, x in member.example.items()):
            marks = member.marks if marked else {}
            found = [float(weight({**rows, **marks})) for rows in (member.example, batch)]
            if found[0] != found[1]:
                raise ConfigError(
                    f"the batches of {member.name!r} are smaller than those of others, and filling "
                    f"them up with zeros changes the weight of its loss from {found[0]:g} to "
                    f"{found[1]:g}. Give all members batches of one size, or the batches an entry "
                    "(weights, a mask) that is zero for what does not count"
                )
            return


def _join(workloads: Sequence[Workload]) -> Workload:
    common = workloads[0].common
    assert common is not None and common.join is not None
    return common.join(workloads)


def _check_joinable(members: Sequence[Member]) -> None:
    for member in members:
        common = member.run.setup.workload.common
        if common is None or common.join is None:
            raise ConfigError(
                f"the members' parameters differ in shape ({_unlike(members)}), and the workload "
                f"of {member.name!r} does not say how such go together (Workload.common.join)"
            )


def _unlike(members: Sequence[Member]) -> str:
    first = _shapes(members[0].run.setup.workload)
    for member in members[1:]:
        for path, shape in _shapes(member.run.setup.workload).items():
            if first.get(path) != shape:
                return (
                    f"{path!r}: {first.get(path)} in {members[0].name!r}, {shape} in "
                    f"{member.name!r}"
                )
    return ""


def _shapes(workload: Workload) -> dict[str, tuple[int, ...]]:
    return {path: tuple(x.shape) for path, x in paths.flatten(workload.params).items()}


def _essence(config: Config) -> str:
    """What of a config may change the model's program: all but settings of the training."""
    values = to_dict(config)
    for field in dataclasses.fields(config):
        settings = ("lora", "optimizer", "seed", "steps", "evaluate_every")
        if field.metadata.get("incidental") or field.name in settings:
            del values[field.name]
    return str(values)


def _program(workload: Workload, batch: Any) -> str:
    """What the workload computes in training, as text."""

    def loss(params: Tree, batch: Any, key: Any) -> Any:
        return workload.loss(workload.apply(params, batch, train=True, key=key), batch)

    text = str(jax.make_jaxpr(loss)(workload.params, batch, jax.random.key(0)))
    return re.sub(r"0x[0-9a-f]+", "", text)  # addresses of Python functions
