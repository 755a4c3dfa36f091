"""Adapters whose `a` starts with the main directions of each weight's real inputs: EVA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Adapters, init
from lora_jax.analysis import matrices
from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.primitives import jaxprs
from lora_jax.spec import Target
from lora_jax.transform import Several, adapt
from lora_jax.updates.factors import Factors, named
from lora_jax.updates.gating import counted
from lora_jax.updates.lowrank import LowRank
from lora_jax.updates.named import EXTRA, MEMBER, RANK, Named, Names

WIDEST = 2**15  # with more inputs, the second moment of one weight takes more than 4 GiB


def init_from_inputs(
    key: jax.Array,
    layout: Layout,
    f: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    *,
    dtype: Any = jnp.float32,
) -> Adapters:
    """Return adapters whose `a` spans the main directions of the inputs of each weight (EVA).

    In "explained variance adaptation" (arXiv 2410.07170), the columns of `a` are the first `rank`
    right singular vectors of the inputs X [rows, in] that a weight meets in real batches. `b` is
    zero, so the first output is the base's. The vectors are the eigenvectors of X^T X, which is
    summed over the batches in float32, slice by slice of a stack. X is not centred.

    Every row counts, including padding. In a `ragged_dot`, all experts get the directions of all
    rows. The layout decides the ranks: EVA's redistribution of ranks among the targets is not done.

    Args:
      key: as for `lora_jax.init`, for the other arrays of an adapter.
      layout, f, params: as in `lora_jax.adapt(layout, f)`. The kinds of the targets must have a
        factor `a` of the inputs ("lora", "dora", "loha"), or no factors ("bias").
      batches: tuples of the arguments of `f` after the parameters, all of the same shapes. One
        program is compiled. Each batch costs a forward and a backward pass, with three products
        for each target instead of one.
      dtype: of the adapters.

    Returns:
      An adapter tree like that of `lora_jax.init`.

    Raises:
      LoraError: no batches, a function without a floating output, a target that no product
        reaches, one with more than 32,768 inputs (an embedding), one of another kind, or one whose
        inputs cannot be seen (inside a `custom_jvp`, or folded).

    >>> import lora_jax
    >>> f = lambda params, x: x @ params["w"]
    >>> params, x = {"w": jnp.ones((3, 4))}, jnp.array([[0.0, 5.0, 0.0], [0.1, 0.0, 0.0]])
    >>> layout = lora_jax.resolve(lora_jax.LoraSpec(1, targets="w"), f, params, x)
    >>> adapters = init_from_inputs(jax.random.key(0), layout, f, params, [(x,)])
    >>> [round(abs(float(a)), 5) for a in adapters["w"].a[:, 0]]
    [0.0, 1.0, 0.0]
    """
    found = input_moments(layout, f, params, batches)
    used: set[str] = set()

    def a_init(key: jax.Array, target: Target, dtype: Any) -> jax.Array:
        del key
        used.add(target.path)
        return jnp.asarray(_main(target, found[target.path]), dtype)

    adapters = init(key, layout, method=a_init, params=params, dtype=dtype)
    for path in found:
        if path not in used:
            raise LoraError(
                f"{path!r}: an update of the kind {layout[path].kind!r} has no factor `a` of all "
                "inputs that could begin with their directions; use lora_jax.init for it"
            )
    return adapters


def input_moments(
    layout: Layout, f: Callable[..., Any], params: Any, batches: Iterable[tuple[Any, ...]]
) -> dict[str, Any]:
    """Return the second moment X^T X of the inputs of each target, `{path: [*stack, in, in]}`.

    A bias has no inputs and no entry. For the arguments see `init_from_inputs`.
    """
    layout = Layout(tuple(t for t in layout.targets if t.inputs))
    for target in layout.targets:
        if target.fan_in > WIDEST:
            raise LoraError(
                f"{target.path!r} has {target.fan_in} inputs, whose second moment is too large "
                "(is it an embedding?); leave it out of the layout, and begin it with lora_jax.init"
            )
    one = jax.jit(lambda params, args: _of_batch(layout, f, params, args))
    total = None
    for args in batches:
        new = one(params, tuple(args))
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    if total is None:
        raise LoraError("EVA needs batches, tuples of the arguments of f, and got none")
    for path, moment in total.items():
        if not bool(jnp.any(moment)):
            raise LoraError(
                f"{path!r}: no product with it reaches a floating output of the function, so its "
                "inputs are not known; pass a function that returns the loss or the logits"
            )
    return total


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Moments(LowRank):
    """A low-rank update whose `a` is the identity of the inputs, and whose `b` is zero.

    So `x a`, which every rule passes to `scaled`, is x itself as the weight sees it: rows
    [rows, in], the patches of a convolution, the rows of an expert. The sum of x^T x comes back as
    the gradient of `probe`, [*stack, in, in]; see `lora_jax.updates.gating.counted`.
    """

    probe: Named | None = None

    needs_input = (
        "where the inputs of the weight cannot be seen. Leave it out of the layout, and begin it "
        "with lora_jax.init"
    )

    def scaled(self, h: Named) -> Named:
        assert self.probe is not None
        return counted(h, RANK, self.probe, _square)


def _square(rows: Any) -> Any:
    """Return rows^T rows in float32, from [*stack, rows, in]."""
    return jnp.einsum(
        "...ri,...rj->...ij", rows, rows, precision="highest", preferred_element_type=jnp.float32
    )


@dataclasses.dataclass(frozen=True)
class _Probed(Several):
    """Updates that see the inputs; `probes` are float32 zeros `{path: [*stack, in, in]}`."""

    probes: dict[str, Any]

    def run(
        self, layout: Layout, run: Callable[..., Any], args: Any, kwargs: Any, axes: Any
    ) -> Any:
        return run(self._update, False, *args, **kwargs)

    def _update(self, target: Target, w: Any, names: Names) -> LowRank:
        sizes, fan_in = target.sizes, target.fan_in
        unit = jnp.eye(fan_in, dtype=jnp.bfloat16)  # 0 and 1 are exact
        unit = jnp.broadcast_to(
            unit.reshape(*sizes(target.inputs), fan_in),
            (*sizes(target.stack), *sizes(target.inputs), fan_in),
        )
        zero = jnp.zeros((*sizes(target.stack), fan_in, *sizes(target.outputs)), unit.dtype)
        a, b = named(target, Factors(unit, zero), names)
        stack = tuple(names[i] for i in target.stack)
        return _Moments(a, b, probe=Named(self.probes[target.path], (*stack, EXTRA, MEMBER)))


def _of_batch(layout: Layout, f: Callable[..., Any], params: Any, args: tuple[Any, ...]) -> Any:
    def outputs(probes: dict[str, Any]) -> list[Any]:
        out = adapt(layout, f)(params, _Probed(probes), *args)
        return [x for x in jax.tree.leaves(out) if jaxprs.is_float(jnp.asarray(x).dtype)]

    zeros = {
        t.path: jnp.zeros((*t.sizes(t.stack), t.fan_in, t.fan_in), jnp.float32)
        for t in layout.targets
    }
    outs, backward = jax.vjp(outputs, zeros)
    if not outs:
        raise LoraError(
            "the inputs are seen in a backward pass, and the function has no floating output to "
            "go back from; pass a function that returns the logits, say"
        )
    (found,) = backward(jax.tree.map(jnp.zeros_like, outs))
    return found


def _main(target: Target, moment: Any) -> Any:
    """Return the main directions of every slice of a second moment, as the factor `a`."""
    moment = matrices.host(moment)
    stack = moment.shape[:-2]
    a = np.zeros((*stack, target.fan_in, target.rank))
    for at in np.ndindex(stack):
        a[at] = matrices.top_svd(moment[at], target.rank).right
    return a.reshape(target.a_shape)
