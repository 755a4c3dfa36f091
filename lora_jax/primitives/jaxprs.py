"""One call of the user's function as a flat program (a jaxpr), and the differences of JAX versions.

All code that reads JAX's intermediate language through names that changed between releases is in
this file. The rules elsewhere see one form.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax import paths
from lora_jax.base import Base, is_base
from lora_jax.errors import LoraError

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr

Program = Any  # a Jaxpr or a ClosedJaxpr

ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, Base)  # others are static


class Aval(Protocol):
    """The shape and dtype of a variable."""

    shape: tuple[int, ...]
    dtype: Any


class Eqn(Protocol):
    """An equation of a jaxpr: `outvars = primitive[params](invars)`."""

    primitive: Any
    params: dict[str, Any]
    invars: list[Any]
    outvars: list[Any]
    effects: Any
    source_info: Any


@functools.cache
def jax_core() -> Any:
    """Return `jax.extend.core`, imported late: it takes a fifth of `import lora_jax`."""
    from jax.extend import core

    return core


def is_literal(atom: Any) -> bool:
    """Return whether an operand of an equation is a constant and not a variable."""
    return isinstance(atom, jax_core().Literal)


def variables(eqn: Eqn) -> list[Any]:
    """Return the variables that an equation reads, in order."""
    literal = jax_core().Literal
    return [v for v in eqn.invars if not isinstance(v, literal)]


def read(env: dict[Any, Any], atoms: Sequence[Any], default: Any = None) -> list[Any]:
    """Return the values of operands; a literal has its own, or the default if there is one."""
    literal = jax_core().Literal
    return [
        env[v] if not isinstance(v, literal) else v.val if default is None else default
        for v in atoms
    ]


def prepared(closed: Program) -> tuple[Jaxpr, Sequence[Any], list[list[Any]], dict[Any, int]]:
    """Return the jaxpr, its constants, the variables of each equation, and their last readers.

    A last reader is the index of an equation; outputs come after the last one.
    """
    jaxpr, consts = opened(closed)
    reads = [variables(eqn) for eqn in jaxpr.eqns]
    last = {v: i for i, each in enumerate(reads) for v in each}
    outs = (v for v in jaxpr.outvars if not is_literal(v))
    return jaxpr, consts, reads, {**last, **dict.fromkeys(outs, len(reads))}


def sources(closed: Program, through: Sequence[str]) -> list[int | None]:
    """Return, for each output, the index of the input that it is, or None if it was changed.

    `through`: primitives with a program inside that may pass an input on unchanged.
    """
    jaxpr, _ = opened(closed)
    source = {v: i for i, v in enumerate(jaxpr.invars)}

    def of(atom: Any) -> int | None:
        return None if is_literal(atom) else source.get(atom)

    for eqn in jaxpr.eqns:
        if eqn.primitive.name in through:
            for v, i in zip(eqn.outvars, sources(called(eqn), through), strict=True):
                which = None if i is None else of(eqn.invars[i])
                if which is not None:
                    source[v] = which
    return [of(v) for v in jaxpr.outvars]


@dataclasses.dataclass(frozen=True)
class TracedCall:
    """A traced call `f(params, *args, **kwargs)`.

    The program's inputs are the array leaves of the call, parameters first. Every other leaf
    (`train=True`, `mutable=["batch_stats"]`, ...) is part of the program, as in a direct call.
    """

    jaxpr: Jaxpr
    consts: Sequence[Any]
    param_paths: tuple[str, ...]  # the paths of the first inputs, in order
    inputs: tuple[Any, ...]  # the array leaves, parameters first
    out_tree: Any

    @property
    def avals(self) -> list[Any]:
        """The shape and dtype of each input."""
        return [v.aval for v in self.jaxpr.invars]


def trace(f: Callable[..., Any], params: Any, args: Any = (), kwargs: Any = None) -> TracedCall:
    """Trace `f(params, *args, **kwargs)`; arrays may be `jax.ShapeDtypeStruct`s."""
    keyed, treedef = jax.tree_util.tree_flatten_with_path(
        (params, tuple(args), kwargs or {}), is_leaf=is_base
    )
    leaves = [leaf for _, leaf in keyed]
    dynamic = [i for i, leaf in enumerate(leaves) if isinstance(leaf, ARRAYS)]
    keys = [key[1:] for i in dynamic if (key := keyed[i][0])[0].idx == 0]
    param_paths = tuple(map(paths.path_of, keys))
    out_tree = None

    def flat(*arrays: jax.Array) -> list[Any]:
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
    # The program is traced as if a quantised base were the float array that it stands for.
    floats = [jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, Base) else x for x in inputs]
    jaxpr, consts = opened(jax.make_jaxpr(flat)(*floats))
    return TracedCall(jaxpr, consts, param_paths, inputs, out_tree)


def opened(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Return the jaxpr and its constants.

    Up to JAX 0.11 these are parts of a ClosedJaxpr; later versions have a Jaxpr with `.consts`.
    """
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def run(
    eqns: Sequence[Eqn], invars: Sequence[Any], outvars: Sequence[Any], ins: Sequence[Any]
) -> list[Any]:
    """Evaluate some equations unchanged, without knowing their primitives."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    debug_info = _empty_debug_info()._replace(arg_names=("",) * len(invars))
    piece = jax_core().Jaxpr((), invars, outvars, eqns, effects, debug_info)
    return jax.core.eval_jaxpr(piece, (), *ins)


def run_one(eqn: Eqn, ins: Sequence[Any]) -> list[Any]:
    """Evaluate one equation on other inputs of the same shapes and dtypes."""
    values = {v: x for v, x in zip(eqn.invars, ins, strict=True) if not is_literal(v)}
    return run([eqn], list(values), eqn.outvars, list(values.values()))


@functools.cache
def _empty_debug_info() -> Any:
    """Return an empty origin: a jaxpr must carry one, and ours is only a piece of a program."""
    return opened(jax.make_jaxpr(lambda: ())())[0].debug_info._replace(result_paths=None)


def origin(eqn: Eqn) -> AbstractContextManager[None]:
    """Give new equations inside the block the source position of `eqn`.

    Profiles, HLO dumps and error messages then name the user's modules and lines. An equation
    inside one of JAX's own functions has no such line; it gets the position where that function is
    called.
    """
    from jax.extend import source_info_util

    info = eqn.source_info
    known = _line(info) is not None
    stack = source_info_util.current_name_stack() + info.name_stack
    traceback = info.traceback if known else source_info_util.current().traceback
    return source_info_util.user_context(traceback, name_stack=stack)


def binder(eqn: Eqn, dtype: DTypeLike | None = None) -> Callable[..., jax.Array]:
    """Return the function that a first-order equation with one output applies to its inputs.

    `dtype` is the dtype of the output, for a product that can return its sums in another one.
    """
    other = {} if dtype is None else {"preferred_element_type": jnp.dtype(dtype)}
    return functools.partial(eqn.primitive.bind, **{**eqn.params, **other})


def scan_arity(eqn: Eqn) -> tuple[int, int]:
    """Return the numbers of constants and carries of a scan."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def jvp_of(eqn: Eqn) -> tuple[Any, list[int]]:
    """Return the forward derivative of one equation, by the rule of that equation.

    Returns:
      The jaxpr of `(*inputs, *tangents) -> (*outputs, *output tangents)`, and the indices of the
      inputs that have a tangent (the floating ones).
    """
    floating = [i for i, v in enumerate(eqn.invars) if is_float(v.aval.dtype)]
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]

    def jvp(ins: list[Any], tangents: list[Any]) -> Any:
        def primal(*moving: jax.Array) -> list[Any]:
            whole = list(ins)
            for i, x in zip(floating, moving, strict=True):
                whole[i] = x
            return run_one(eqn, whole)

        return jax.jvp(primal, [ins[i] for i in floating], tangents)

    return jax.make_jaxpr(jvp)(shapes, [shapes[i] for i in floating]), floating


def called(eqn: Eqn) -> Program:
    """Return the jaxpr that a call-like equation enters."""
    return eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]


def contains(eqn: Eqn, name: str) -> bool:
    """Return whether an equation, or some equation inside of it, has this primitive."""
    parts = [x for p in eqn.params.values() for x in (p if isinstance(p, tuple | list) else (p,))]
    bodies = [body for body, _ in map(opened, parts) if isinstance(body, jax_core().Jaxpr)]
    inside = any(contains(e, name) for body in bodies for e in body.eqns)
    return inside or eqn.primitive.name == name


def function_name(eqn: Eqn) -> str:
    """Return the name of the user's function that a `custom_vjp` equation calls."""
    return str(opened(called(eqn))[0].debug_info.func_name)


def shard_map(eqn: Eqn, body: Callable[..., Any], in_specs: Sequence[Any]) -> Callable[..., Any]:
    """Map `body`, a function of one list, over the mesh axes of a `shard_map` equation."""
    p = eqn.params
    mapped = jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=(in_specs,),
        out_specs=list(p["out_specs"]),
        axis_names=set(p["newly_manual_axes"]),
        check_vma=p["check_vma"],
    )
    return jax.jit(mapped)  # JAX cannot run it op by op if it maps over only some axes


def reshape_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the smallest groups of axes of equal size that a reshape maps to each other.

    >>> reshape_groups((4, 6), (4, 2, 3))
    [((0,), (0,)), ((1,), (1, 2))]
    >>> reshape_groups((2, 1, 3), (6,))
    [((0, 1, 2), (0,))]
    """
    groups: list[Any] = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        if i < len(old) and j < len(new):
            i, j = i + 1, j + 1
            while (p := math.prod(old[i0:i])) != (q := math.prod(new[j0:j])):
                i, j = (i + 1, j) if p < q else (i, j + 1)
        else:  # one side has only axes of size 1 left: they join the last group
            i, j = len(old), len(new)
            i0, j0 = (axes[0] for axes in groups.pop()) if groups else (i0, j0)
        groups.append((tuple(range(i0, i)), tuple(range(j0, j))))
    return groups


def is_float(dtype: DTypeLike) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def where(eqn: Eqn | None) -> str:
    """Return the line of the user's code that an equation comes from, or "an unknown line".

    None stands for the result of the function.
    """
    if eqn is None:
        return "the end of the function"
    from jax.extend import source_info_util

    return _line(eqn.source_info) or _line(source_info_util.current()) or "an unknown line"


def _line(info: Any) -> str | None:
    from jax.extend import source_info_util

    text = source_info_util.summarize(info)
    return text if text and text != "unknown" else None


def operand_name(eqn: Eqn | None) -> str:
    """Return a name for messages: `dot_general at model.py:12 (f)`."""
    return where(eqn) if eqn is None else f"`{eqn.primitive.name}` at {where(eqn)}"


def cures(path: str, kind: str) -> str:
    """Return what to do about an operation that takes an adapted weight and has no rule."""
    what = "function='ITS NAME'" if kind == "custom_vjp_call" else f"primitive={kind!r}"
    return (
        "has no low-rank rule. Leave it out of the targets, or allow W + scale * a @ b to be "
        f"formed there: LoraSpec(..., fold=({path!r},)), or write a rule (docs/extending.md): "
        f"lora_jax.primitives.table.register(rule, {what})"
    )
