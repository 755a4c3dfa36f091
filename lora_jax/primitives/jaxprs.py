"""One call of the user's function as a flat program (a jaxpr), and what JAX versions differ in.

Everything that reads JAX's intermediate language through names that have changed between
releases is in this file; the rules elsewhere see one form.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.base import Base, is_base
from lora_jax.errors import LoraError

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr


@functools.cache
def jax_core() -> Any:
    """`jax.extend.core`, imported at the first trace: a fifth of the time of `import lora_jax`."""
    from jax.extend import core

    return core


def is_literal(atom: Any) -> bool:
    """Whether an operand of an equation is a constant and not a variable."""
    return isinstance(atom, jax_core().Literal)


@dataclasses.dataclass(frozen=True)
class TracedCall:
    """A traced call `f(params, *args, **kwargs)`.

    The program's inputs are the array leaves of the call, parameters first; every other leaf
    (`train=True`, `mutable=["batch_stats"]`, ...) is part of the program, as in a direct call.
    """

    jaxpr: Jaxpr
    consts: Sequence[Any]
    param_paths: tuple[str, ...]  # of the first inputs, in order
    inputs: tuple[Any, ...]  # the array leaves, parameters first
    out_tree: Any

    @property
    def param_avals(self) -> dict[str, Any]:
        """Shape and dtype of each parameter."""
        return dict(zip(self.param_paths, self.avals, strict=False))

    @property
    def avals(self) -> list[Any]:
        """Shape and dtype of each input."""
        return [v.aval for v in self.jaxpr.invars]


def trace(f: Callable[..., Any], params: Any, args: Any = (), kwargs: Any = None) -> TracedCall:
    """Trace `f(params, *args, **kwargs)`; arrays may be `jax.ShapeDtypeStruct`s."""
    keyed, treedef = jax.tree_util.tree_flatten_with_path(
        (params, tuple(args), kwargs or {}), is_leaf=is_base
    )
    leaves = [leaf for _, leaf in keyed]
    dynamic = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    param_paths = tuple(paths.path_of(key[1:]) for i in dynamic if (key := keyed[i][0])[0].idx == 0)
    out_tree = None

    def flat(*arrays: Any) -> list[Any]:
        nonlocal out_tree
        full = list(leaves)
        for i, array in zip(dynamic, arrays, strict=True):
            full[i] = array
        p, a, k = jax.tree.unflatten(treedef, full)
        outs, out_tree = jax.tree.flatten(f(p, *a, **k))
        return outs

    twice = [path for path, n in collections.Counter(param_paths).items() if n > 1]
    if twice:
        raise LoraError(
            f"two leaves of the parameters have the path {twice[0]!r}: a key may not contain '/' "
            "where another tree of the same name exists; rename one of them"
        )
    inputs = tuple(leaves[i] for i in dynamic)
    jaxpr, consts = opened(jax.make_jaxpr(flat)(*map(_float_form, inputs)))
    return TracedCall(jaxpr, consts, param_paths, inputs, out_tree)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct | Base)


def _float_form(leaf: Any) -> Any:
    """A quantised base as the program sees it: the shape and dtype of the weight it stands for."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, Base) else leaf


def opened(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """The jaxpr and its constants: a ClosedJaxpr up to JAX 0.11, a Jaxpr with `.consts` after."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def run(eqns: Sequence[Any], invars: Any, outvars: Any, ins: Any) -> list[Any]:
    """Evaluate some equations as they stand, needing no knowledge of them."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    debug_info = _empty_debug_info()._replace(arg_names=("",) * len(invars))
    piece = jax_core().Jaxpr((), invars, outvars, eqns, effects, debug_info)
    return jax.core.eval_jaxpr(piece, (), *ins)


def run_one(eqn: Any, ins: Sequence[Any]) -> list[Any]:
    """Evaluate one equation on other inputs, of the same shapes and dtypes."""
    values = {v: x for v, x in zip(eqn.invars, ins, strict=True) if not is_literal(v)}
    return run([eqn], list(values), eqn.outvars, list(values.values()))


@functools.cache
def _empty_debug_info() -> Any:
    """A jaxpr must carry its origin; ours are pieces of one, so it says nothing."""
    return opened(jax.make_jaxpr(lambda: ())())[0].debug_info._replace(result_paths=None)


def origin(eqn: Any) -> AbstractContextManager[None]:
    """While this is entered, new equations say that they come from where `eqn` comes from.

    Profiles, HLO dumps and error messages then name the user's modules and lines. An equation of
    a function of JAX's own has no such line, and comes from where that function is called.
    """
    from jax.extend import source_info_util

    info = eqn.source_info
    known = _line(info) is not None
    stack = source_info_util.current_name_stack() + info.name_stack
    traceback = info.traceback if known else source_info_util.current().traceback
    return source_info_util.user_context(traceback, name_stack=stack)


def bind(eqn: Any, *ins: Any, dtype: Any = None) -> Any:
    """Apply a first-order equation with one output to other inputs.

    `dtype`: None, or that of the output, for a product that can give its sums in another.
    """
    other = {} if dtype is None else {"preferred_element_type": jnp.dtype(dtype)}
    return eqn.primitive.bind(*ins, **{**eqn.params, **other})


def scan_arity(eqn: Any) -> tuple[int, int]:
    """How many constants and carries a scan has."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def jvp_of(eqn: Any) -> tuple[Jaxpr, Sequence[Any], list[int]]:
    """The forward derivative of one equation, by whatever rule the equation brings.

    Returns the jaxpr of `(*inputs, *tangents) -> (*outputs, *output tangents)`, its constants,
    and which inputs have a tangent (the floating ones).
    """
    floating = [i for i, v in enumerate(eqn.invars) if is_float(v.aval.dtype)]
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]

    def jvp(ins: list[Any], tangents: list[Any]) -> Any:
        def primal(*moving: Any) -> list[Any]:
            whole = list(ins)
            for i, x in zip(floating, moving, strict=True):
                whole[i] = x
            return run_one(eqn, whole)

        return jax.jvp(primal, [ins[i] for i in floating], tangents)

    traced = jax.make_jaxpr(jvp)(shapes, [shapes[i] for i in floating])
    return (*opened(traced), floating)


CALLS = {  # primitives that call one jaxpr with their operands: name -> its parameter
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
REMATS = ("remat", "remat2", "checkpoint")


def called(eqn: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """The jaxpr (and constants) that a call-like equation enters."""
    return opened(eqn.params[CALLS[eqn.primitive.name]])


def inner(eqn: Any) -> Jaxpr | None:
    """The jaxpr that an equation calls with its own operands, if it is such a call."""
    if eqn.primitive.name == "custom_vjp_call":
        return opened(eqn.params["call_jaxpr"])[0]
    return called(eqn)[0] if eqn.primitive.name in CALLS else None


def contains(eqn: Any, name: str) -> bool:
    """Whether an equation is of this primitive, or some equation inside of it is."""
    parts = [x for p in eqn.params.values() for x in (p if isinstance(p, tuple | list) else (p,))]
    bodies = [body for body, _ in map(opened, parts) if isinstance(body, jax_core().Jaxpr)]
    inside = any(contains(e, name) for body in bodies for e in body.eqns)
    return inside or eqn.primitive.name == name


def function_name(eqn: Any) -> str:
    """The name of the user's function that a `custom_vjp` equation calls."""
    return str(opened(eqn.params["call_jaxpr"])[0].debug_info.func_name)


class ShardMap(NamedTuple):
    """A `shard_map` equation: its body, the placement of its operands, and how to write it anew."""

    jaxpr: Jaxpr
    consts: Sequence[Any]
    in_specs: Sequence[Any]
    call: Callable[[Callable[..., Any], Any], Callable[..., Any]]


def shard_map_form(eqn: Any) -> ShardMap:
    """`call(body, in_specs)` maps `body`, a function of one list, over the equation's mesh axes."""
    p = eqn.params
    jaxpr, consts = opened(p["jaxpr"])

    def call(body: Callable[..., Any], in_specs: Any) -> Callable[..., Any]:
        mapped = jax.shard_map(
            body,
            mesh=p["mesh"],
            in_specs=(in_specs,),
            out_specs=list(p["out_specs"]),
            axis_names=set(p["newly_manual_axes"]),
            check_vma=p["check_vma"],
        )
        return jax.jit(mapped)  # JAX cannot run it op by op where it maps over some axes only

    return ShardMap(jaxpr, consts, p["in_specs"], call)


def forwarded(jaxpr: Jaxpr) -> list[int | None]:
    """For each output, the number of the input that it is, if it is one that nothing changed."""
    source = {v: i for i, v in enumerate(jaxpr.invars)}

    def of(atom: Any) -> int | None:
        return None if is_literal(atom) else source.get(atom)

    for eqn in jaxpr.eqns:
        if eqn.primitive.name in CALLS and eqn.primitive.name != "custom_jvp_call":
            for v, i in zip(eqn.outvars, forwarded(called(eqn)[0]), strict=True):
                which = None if i is None else of(eqn.invars[i])
                if which is not None:
                    source[v] = which
    return [of(v) for v in jaxpr.outvars]


def invariant_carry(body: Jaxpr, n_consts: int, n_carry: int) -> list[bool]:
    """Which carries a loop body hands on unchanged: they are constants in all but name."""
    return [i == n_consts + j for j, i in enumerate(forwarded(body)[:n_carry])]


class Ragged(NamedTuple):
    """Axes of the right operand of a `ragged_dot`."""

    group: tuple[int, ...]
    contract: tuple[int, ...]


def ragged_form(eqn: Any) -> Ragged | None:
    """The right operand's axes where rows of the left are ragged (a bank of experts)."""
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (lhs_contract, rhs_contract), (lhs_batch, _) = dims.dot_dimension_numbers
    ragged = dims.lhs_ragged_dimensions[0]
    if ragged in (*lhs_contract, *lhs_batch) or lhs_batch or eqn.params.get("group_offset"):
        return None
    return Ragged(tuple(dims.rhs_group_dimensions), tuple(rhs_contract))


def is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def where(eqn: Any) -> str:
    """The line of the user's code that an equation comes from, or "an unknown line"."""
    from jax.extend import source_info_util

    return _line(eqn.source_info) or _line(source_info_util.current()) or "an unknown line"


def _line(info: Any) -> str | None:
    from jax.extend import source_info_util

    text = source_info_util.summarize(info)
    return text if text and text != "unknown" else None


def operand_name(eqn: Any) -> str:
    """`dot_general at model.py:12 (f)`, for messages."""
    return f"`{eqn.primitive.name}` at {where(eqn)}"
