"""The members of a group, opened: each its own run over the base that all share."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import paths
from lora_jax.checkpoint.fingerprint import Fingerprint, differences
from lora_jax.checkpoint.fingerprint import fingerprint as fingerprint_of
from lora_jax.errors import listed
from lora_jax.frozen import split
from lora_jax.groups.padded_state import Form, Host, only_trained
from lora_jax.groups.step import Settings
from lora_jax.layout import Layout
from lora_jax.resolve import resolve
from lora_jax.spec import LoraSpec
from lora_jax.training import mesh, optimizer, step
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.config import Config, ConfigError, OptimizerConfig, to_dict
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

    def settings(self, layout: Layout) -> Settings:
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


@dataclasses.dataclass(frozen=True)
class Source:
    """Where members that differ in their adapters and settings alone have it all from.

    example: the first training batch.
    layouts: by their specs, as far as they were asked for.
    """

    workload: Workload
    place: mesh.Placement
    example: Batch
    layouts: dict[LoraSpec, Layout] = dataclasses.field(default_factory=dict)


class Opener:
    """Opens members, the first of which brings the base; it closes them as its block ends."""

    def __init__(self, grid: jax.sharding.Mesh, report: Callable[[str], None]) -> None:
        self._grid, self._report, self._stack = grid, report, contextlib.ExitStack()
        self._begin: dict[Any, Callable[..., State]] = {}
        self._sources: dict[Any, Source] = {}
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
        source = self._source(config)
        workload, place, example = source.workload, source.place, source.example
        lora = config.adaptation
        patterns = workload.beside if lora.beside is None else lora.beside
        beside = self._beside(name, workload, place, patterns)
        assert self.base is not None
        key, spec = jax.random.key(config.seed), lora.spec
        if spec not in source.layouts:
            source.layouts[spec] = resolve(
                spec, workload.apply, workload.params, example, train=True, key=key
            )
        layout = source.layouts[spec]
        step.check_apart(layout, beside)
        form = Form(step.shapes(layout, beside, TX, key, place))
        base = self.base
        setup = Setup(config, workload, place, layout, base.frozen, base.fingerprint, path, began)
        checkpoints = self._stack.enter_context(
            Checkpoints(path / "checkpoints", report=self._report)
        )
        if newest is not None:
            checkpoints.forget_after(newest)
        run = Run(setup, workload.train(mesh.shard_of(self._grid)), checkpoints)
        self._stack.callback(run.close)
        state = run.begin(
            self._fresh(setup, form, beside, key) if checkpoints.latest is None else form.like
        )
        return Member(name, run, form, form.host(state), example, run.start)

    def _source(self, config: Config) -> Source:
        """Opened once for members that differ in their adapters and settings alone."""
        known = (essence(config), config.seed)
        if known in self._sources:
            return self._sources[known]
        workload = config.workload(config)
        example = next(workload.train(mesh.shard_of(self._grid)))
        source = Source(workload, mesh.place(workload, config.mesh, self._grid, example), example)
        if workload.common is not None:
            self._sources[known] = source
        return source

    def _fresh(self, setup: Setup, form: Form, beside: dict[str, Any], key: jax.Array) -> State:
        """Compiled once for members that differ in settings and seed alone."""
        init = setup.config.adaptation.init
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
            beside, frozen = split(params, patterns)
            found = fingerprint_of(frozen)
            self.base = Base(name, workload, beside, frozen, found)
            return beside
        shapes, frozen = split(workload.params, patterns)
        _check_alike(base, name, shapes, frozen)
        common, first = workload.common, base.workload.common
        if common is None or first is None:
            beside, frozen = split(workload.arrays(place.params), patterns)
            if changed := differences(base.fingerprint, fingerprint_of(frozen)):
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
        drawn, known = common.fresh(), paths.flatten(base.frozen)
        for path in drawn:
            if path in known and not np.array_equal(drawn[path], known[path]):
                raise ConfigError(
                    f"{base.name!r} and {name!r} have not the same base: {path!r} is drawn from "
                    "the seed and is not trained; train it (lora.beside), or give both one seed"
                )
        return {p: drawn[p] if p in drawn else base.beside[p] for p in shapes}


def _check_alike(base: Base, name: str, beside: dict[str, Any], frozen: Tree) -> None:
    """Raise unless the frozen parameters have the paths and shapes of the first's."""

    def forms(tree: Tree) -> dict[str, str]:
        return {p: f"{x.dtype}{list(x.shape)}" for p, x in paths.flatten(tree).items()}

    if list(beside) != list(base.beside):
        raise ConfigError(
            f"{base.name!r} and {name!r} train different parameters beside their adapters "
            f"(lora.beside, or the method): {list(base.beside)} and {list(beside)}; in a group "
            "they are the same"
        )
    ours, theirs = forms(base.frozen), forms(frozen)
    for path in dict.fromkeys([*ours, *theirs]):
        if ours.get(path) != theirs.get(path):
            raise ConfigError(
                f"{base.name!r} and {name!r} have not the same base: {path!r} is "
                f"{ours.get(path, 'not there')} and {theirs.get(path, 'not there')}"
            )


def essence(config: Config) -> str:
    """What of a config may change its model, data and loss: all but settings of the training."""
    values = to_dict(config)
    for field in dataclasses.fields(config):
        settings = ("lora", "optimizer", "seed", "steps", "evaluate_every")
        if field.metadata.get("incidental") or field.name in settings:
            del values[field.name]
    return str(values)
