"""The training step and the evaluation step, as pure functions that the caller compiles."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lora_jax import paths
from lora_jax.adapters import init as init_adapters
from lora_jax.errors import LoraError
from lora_jax.frozen import join
from lora_jax.layout import Layout
from lora_jax.multi.dropout import dropout
from lora_jax.multi.stack import Scaled
from lora_jax.paths import Tree
from lora_jax.primitives.flops import of_products
from lora_jax.training.config import require
from lora_jax.training.mesh import Placement
from lora_jax.training.state import State, Trained
from lora_jax.training.workload import Loss, Workload
from lora_jax.transform import adapt

_DROPOUT = 0x10A  # folded into the key of a step; the model uses the key itself


def create(
    layout: Layout,
    base: dict[str, Any],
    tx: optax.GradientTransformation,
    key: jax.Array,
    place: Placement,
    init: str = "gaussian",
    weights: Mapping[str, Any] | None = None,
    adapters: Tree | None = None,
) -> State:
    """Return the state before the first step, placed on its devices.

    The adapters are sharded like their weights, and the optimizer state like the adapters. One
    compiled program computes it, so that no device ever holds more than its part. The state shares
    no memory with `base` (path -> array, the parameters trained in full). `weights` are
    `adapted_weights`, for kinds of update that start from W; `adapters` come in place of new ones.
    """
    where = jax.tree.map(lambda x: x.sharding, shapes(layout, base, tx, key, place, weights))
    begin = jax.jit(fresh(layout, tx, init), out_shardings=where)
    return begin(base, key, weights, adapters)


def adapted_weights(layout: Layout, params: Tree) -> dict[str, Any]:
    """Return the parameters that the layout adapts, by path."""
    leaves = paths.flatten(params)
    layout.check_params(leaves)
    return {target.path: leaves[target.path] for target in layout.targets}


def shapes(
    layout: Layout,
    base: dict[str, Any],
    tx: optax.GradientTransformation,
    key: Any,
    place: Placement,
    weights: Mapping[str, Any] | None = None,
) -> State:
    """Return the shapes, dtypes and shardings of the state that `create` makes.

    Nothing is computed.
    """
    state = jax.eval_shape(fresh(layout, tx, "gaussian"), base, key, weights)
    where = place.following(state, state.trained, place.trained(layout, base))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, where
    )


@functools.lru_cache(maxsize=16)
def fresh(layout: Layout, tx: optax.GradientTransformation, init: str) -> Callable[..., State]:
    """Return `begin(base, key, weights, adapters)`, which returns the state before the first step.

    Equal arguments give the same function, so that JAX compiles it once for many runs.
    """

    def begin(
        base: dict[str, Any], key: jax.Array, weights: Any = None, adapters: Any = None
    ) -> State:
        if adapters is None:
            adapters = init_adapters(key, layout, params=weights, method=init)
        trained = {"adapters": adapters, "base": jax.tree.map(jnp.copy, base)}
        return State(trained, tx.init(trained), jnp.int32(0), jnp.int32(0), key)

    return begin


def compilation(state: State, place: Placement) -> dict[str, Any]:
    """Return arguments of `jax.jit` for the step: it donates the state and keeps its placement."""
    kept = jax.tree.map(lambda x: x.sharding, state)
    return {"donate_argnums": 0, "out_shardings": (kept, place.whole)}


def check_apart(layout: Layout, base: dict[str, Any]) -> None:
    """Raise `LoraError` if a parameter is both adapted and trained in full.

    An adapter adds nothing if W itself is trained.
    """
    both = [target.path for target in layout.targets if target.path in base]
    if both:
        raise LoraError(
            f"{both[0]!r} is both adapted (lora.targets) and trained in full (lora.trainable), as "
            f"are {len(both) - 1} more; narrow one of the two, for instance --lora.targets to the "
            "encoder's part of the tree"
        )


def train_step(
    workload: Workload,
    layout: Layout,
    tx: optax.GradientTransformation,
    on_nonfinite: Literal["stop", "skip"],
    parts: int = 1,
    scales: Mapping[str, jax.Array] | None = None,
    rate: float = 0.0,
) -> Callable[[State, Tree, Any], tuple[State, dict[str, jax.Array]]]:
    """Return the training step, `step(state, frozen, batch) -> (state, metrics)`.

    The gradient is taken with respect to `state.trained` only. `frozen` is another argument, so it
    gets no gradient. A step whose loss or gradient is not finite changes no parameter and no
    optimizer state. With "stop", no later step does either: the host may read the metrics late and
    still finds the state from before the step that `metrics["finite"]` names.

    A batch is split into `parts`, each with its own random key. Sums are kept in float32 and
    divided once by the total weight, so that parts of unequal weight (tokens) count as in the whole
    batch.
    `scales` (path -> [] float32) are used in place of the layout's if the adapters are padded to
    `layout` (`lora_jax.multi.Scaled`). `rate` is the rate of the adapters' dropout, whose masks
    depend on the run's key and on the step only.
    """
    adapted = adapt(layout, workload.apply)

    def objective(trained: Trained, frozen: Tree, batch: Any, key: jax.Array) -> Any:
        params = join(trained["base"], frozen)
        adapters: Any = trained["adapters"]
        if scales is not None:  # inside, so that the gradient is that of the factors only
            adapters = Scaled(adapters, dict(scales))
        adapters = dropout(adapters, jax.random.fold_in(key, _DROPOUT), rate)
        outputs = adapted(params, adapters, batch, train=True, key=key)
        loss = workload.loss(outputs, batch)
        return loss.total.astype(jnp.float32), loss.weight.astype(jnp.float32)

    gradient = jax.value_and_grad(objective, has_aux=True)

    def summed(trained: Trained, frozen: Tree, batch: Any, key: jax.Array) -> Any:
        """Return ((total, weight), gradient of the total) of the whole batch."""
        if parts == 1:
            return gradient(trained, frozen, batch, key)

        def add(sums: Any, part: Any) -> Any:
            batch, index = part
            new = gradient(trained, frozen, batch, jax.random.fold_in(key, index))
            return jax.tree.map(lambda x, y: x + y.astype(x.dtype), sums, new), None

        # The gradients are summed in float32 at least.
        wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
        zeros = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(wide, trained))
        return jax.lax.scan(add, zeros, (batch_parts(batch, parts), jnp.arange(parts)))[0]

    def step(state: State, frozen: Tree, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        (total, weight), grads = summed(state.trained, frozen, batch, key)
        share = 1 / jnp.where(weight > 0, weight, 1)  # a batch without weight has no gradient
        loss = total * share
        grads = jax.tree.map(lambda g: g * share.astype(g.dtype), grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        go = finite if on_nonfinite == "skip" else finite & (state.skipped == 0)
        updates, optimizer = tx.update(grads, state.optimizer, state.trained)
        taken = (optax.apply_updates(state.trained, updates), optimizer)
        kept = (state.trained, state.optimizer)
        # The optimizer computes in float32; its state of a bfloat16 array stays bfloat16.
        chosen = jax.tree.map(lambda x, old: jnp.where(go, x.astype(old.dtype), old), taken, kept)
        skipped = state.skipped + ~finite
        metrics = {"loss": loss, "weight": weight, "gradient_norm": norm, "finite": finite}
        return State(chosen[0], chosen[1], state.step + 1, skipped, state.key), metrics

    return step


def batch_parts(batch: Any, parts: int) -> Any:
    """Split a batch [B, ...] into parts [parts, B / parts, ...]; scalars are repeated.

    Part i takes the rows i, i + parts, i + 2 parts, ... If B is sharded over devices, each of them
    has an equal share of every part, so that no row has to move.

    >>> import numpy as np
    >>> batch_parts({"x": np.arange(4)}, 2)["x"].tolist()
    [[0, 2], [1, 3]]
    """

    def entry(x: Any) -> Any:
        if jnp.ndim(x) == 0:
            return jnp.broadcast_to(x, (parts,))
        rows = len(x)
        require(rows % parts == 0, "accumulate", parts, f"a divisor of the {rows} rows of a batch")
        return x.reshape(rows // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(entry, batch)


def evaluation_step(
    workload: Workload, layout: Layout
) -> Callable[[Mapping[str, Any], Tree, Any], Loss]:
    """Return the evaluation step, `evaluate(trained, frozen, batch) -> Loss`, without dropout."""
    adapted = adapt(layout, workload.apply)

    def evaluate(trained: Mapping[str, Any], frozen: Tree, batch: Any) -> Loss:
        params = join(trained["base"], frozen)
        outputs = adapted(params, trained["adapters"], batch, train=False, key=None)
        return workload.loss(outputs, batch)

    return evaluate


def reference_step(
    workload: Workload, layout: Layout
) -> Callable[[Mapping[str, Any], Tree, Any], Any]:
    """Return `refer(start, frozen, batch)`, the reference by `start`."""
    adapted = adapt(layout, workload.apply)

    def refer(start: Mapping[str, Any], frozen: Tree, batch: Any) -> Any:
        assert workload.reference is not None
        params = join(start["base"], frozen)
        outputs = adapted(params, start["adapters"], batch, train=False, key=None)
        return workload.reference(outputs, batch)

    return refer


def with_reference(
    take: Callable[[State, Tree, Any], Any], workload: Workload, layout: Layout
) -> Callable[[State, Tree, Any], Any]:
    """Return the training step `take` as a run begins: its own parameters are the reference."""
    if workload.reference is None:
        return take
    refer = reference_step(workload, layout)

    def taken(state: State, frozen: Tree, batch: Any) -> Any:
        own = refer(state.trained, frozen, batch)
        return take(state, frozen, {**batch, "reference": own})

    return taken


class Compiled:
    """A jitted function that times its first call for each batch shape, which compiles."""

    def __init__(
        self,
        function: Callable[..., Any],
        report: Callable[[float], None],
        around: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext,
        **options: Any,
    ) -> None:
        """Jit `function` with `options`.

        `report` gets the seconds of each compilation, which runs inside the context that `around`
        returns for the shape of the batch's largest array, such as "32 x 48".
        """
        self._call, self._report, self._around = jax.jit(function, **options), report, around
        self._seen, self._flops = set[Any](), dict[Any, float]()

    def __call__(self, *arguments: Any) -> Any:
        """Call the function; its last argument is the batch."""
        shapes = self._shapes(arguments[-1])
        if shapes in self._seen:
            return self._call(*arguments)
        self._seen.add(shapes)
        start = time.monotonic()
        largest = max((shape for _, shape in shapes), key=math.prod, default=())
        with self._around(" x ".join(map(str, largest))):
            out = self._call(*arguments)
        self._report(time.monotonic() - start)
        return out

    def flops(self, *arguments: Any) -> float:
        """Return the FLOPs of the products of a call, which JAX traces here if it has not yet."""
        shapes = self._shapes(arguments[-1])
        if shapes not in self._flops:
            self._flops[shapes] = of_products(self._call.trace(*arguments).jaxpr)
        return self._flops[shapes]

    def knows(self, batch: Mapping[str, Any]) -> bool:
        """Return whether the function is compiled for the shapes of a batch."""
        return self._shapes(batch) in self._seen

    @staticmethod
    def _shapes(batch: Mapping[str, Any]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return tuple((name, value.shape) for name, value in sorted(batch.items()))
