"""Join the workloads of a group into one with room for every member, and check that they fit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.layout import Layout
from lora_jax.paths import Tree
from lora_jax.sweeps.members import OpenMember, workload_settings
from lora_jax.training.config import ConfigError
from lora_jax.training.workload import Workload
from lora_jax.transform import adapt


def joined(members: Sequence[OpenMember], example: Any) -> tuple[Workload, bool]:
    """Return the workload of all members, and whether their batches must be marked for it.

    They are marked if the parameters differ in shape, or if the plain workloads are not one program
    and can be joined.
    """
    workloads = [member.run.setup.workload for member in members]
    marked = len({str(paths.shapes(workload.params)) for workload in workloads}) > 1
    if marked:
        _check_joinable(members)
    different = list({workload_settings(m.config): m for m in reversed(members)}.values())
    if not marked and all(w.common and w.common.join for w in workloads):
        marked = len({_program(m.run.setup.workload, example) for m in different}) > 1
    whole = _join(workloads) if marked else workloads[0]
    program = _program(whole, example | members[0].marks if marked else example)
    for member in reversed(different):
        own = member.run.setup.workload
        other = _join([own, *workloads]) if marked else own
        batch = example | member.marks if marked else example
        if _program(other, batch) != program:
            raise ConfigError(
                f"the models or the losses of {members[0].name!r} and {member.name!r} are not the "
                "same program; the members of a group may differ in their data, adapters, heads' "
                "classes and settings, but not in what the model computes (pooling, dropout)"
            )
    return whole, marked


def check_padding(
    members: Sequence[OpenMember],
    filled: Mapping[str, np.ndarray],
    workload: Workload,
    marked: bool,
) -> None:
    """Raise `ConfigError` unless the padding of batches has no weight in the loss."""

    @jax.jit
    def weight(batch: Any) -> jax.Array:
        # The weight does not depend on the parameters, so the compiler leaves them out.
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), workload.params)
        outputs = _applied(workload)(params, {}, batch, train=False, key=None)
        return workload.loss(outputs, batch).weight

    for index, member in enumerate(members):
        batch = {name: x[index] for name, x in filled.items()}
        if any(np.shape(x) != batch[name].shape for name, x in member.example.items()):
            marks = member.marks if marked else {}
            found = [float(weight({**rows, **marks})) for rows in (member.example, batch)]
            if not math.isclose(*found, rel_tol=1e-5):
                raise ConfigError(
                    f"the batches of {member.name!r} are smaller than the others' batches, and "
                    f"padding them with zeros changes the weight of its loss from {found[0]:g} to "
                    f"{found[1]:g}. Give all members batches of one size, or give the batches an "
                    "array (weights, a mask) that is zero for rows that do not count"
                )
            return


def _join(workloads: Sequence[Workload]) -> Workload:
    common = workloads[0].common
    assert common is not None and common.join is not None
    return common.join(workloads)


def _check_joinable(members: Sequence[OpenMember]) -> None:
    for member in members:
        common = member.run.setup.workload.common
        if common is None or common.join is None:
            raise ConfigError(
                f"the members' parameters differ in shape ({_unlike(members)}), and the workload "
                f"of {member.name!r} does not say how to join such workloads (Workload.common.join)"
            )


def _unlike(members: Sequence[OpenMember]) -> str:
    own = {m.name: paths.shapes(m.run.setup.workload.params) for m in members}
    first, known = next(iter(own.items()))
    unlike = (
        f"{path!r}: {known.get(path)} in {first!r}, {shape} in {name!r}"
        for name, shapes in own.items()
        for path, shape in shapes.items()
        if known.get(path) != shape
    )
    return next(unlike, "")


def _applied(workload: Workload) -> Callable[..., Any]:
    """Return the workload's function without adapters, which accepts a quantised base."""
    return adapt(Layout(()), workload.apply)


def _program(workload: Workload, batch: Any) -> str:
    """Return the training loss of a workload as the text of a jaxpr."""

    def loss(params: Tree, batch: Any, key: Any) -> Any:
        outputs = _applied(workload)(params, {}, batch, train=True, key=key)
        return workload.loss(outputs, batch)

    text = str(jax.make_jaxpr(loss)(workload.params, batch, jax.random.key(0)))
    return re.sub(r"0x[0-9a-f]+", "", text)  # addresses of Python functions differ
