"""Many adapters as one: stacked along a leading axis, and selected by a number.

    layout, stacked = stack([Adapter(layout_0, adapters_0), Adapter(layout_1, adapters_1), ...])
    g = lora_jax.adapt(layout, f)
    g(params, select(stacked, 1), x)              adapter 1 for all of x
    g(params, select(stacked, [0, 1, BASE]), x)   one for each example of x; BASE: no adapter

The members may differ in rank, alpha and targets. LoHa, LoKr and VeRA become plain factors; DoRA
keeps its magnitudes. Ranks are padded with exact zeros, a target that a member does not adapt is
zero in it, and each member's scale (alpha / rank) is an array too. So all selections have arrays of
the same shapes: **one compiled program serves all of them**, and the base is not copied. The last
slot holds zeros and stands for the base, which is why its number is -1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Adapter, Adapters, as_factors, check, factors_alone
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.layout import Layout
from lora_jax.multi.selected import Choice, Mixed, Stack
from lora_jax.spec import Target
from lora_jax.transform import UpdateOf
from lora_jax.updates.kind import kind_of

BASE = -1
"""The number that selects the base model without an adapter."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(Choice):
    """One adapter in the shapes of a common layout, with its scales as arrays.

    Attributes:
      factors: `{path: Factors(a, b)}`, padded with zeros to the common ranks.
      scales: `{path: alpha / rank}`, [] float32 each; 0 if the adapter does not adapt the path.
    """

    factors: Adapters
    scales: dict[str, Any]

    def updates(self, layout: Layout, choice: Any) -> UpdateOf:
        check(layout, self.factors)
        return Mixed(self.factors, self.scales)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection(Choice):
    """Adapters chosen from a stack, as `lora_jax.adapt` takes them; nothing is copied yet.

    Attributes:
      stack: the stack.
      ids: [] or [B] int, from 0 to n - 1, or BASE.
    """

    stack: Stack
    ids: Any

    @property
    def per_example(self) -> bool:
        """Whether each example has an adapter of its own."""
        return jnp.ndim(self.ids) == 1

    def choice(self, layout: Layout) -> Any:
        check(layout, jax.tree.map(_without_first, self.stack.factors))
        return slot(self.stack, self.ids) if self.per_example else self.ids

    def updates(self, layout: Layout, choice: Any) -> UpdateOf:
        if not self.per_example:
            return take(self.stack, choice).updates(layout, None)
        factors, scales = self.stack.factors, self.stack.scales
        return Mixed(factors, scales, index=choice, examples=len(self.ids))


def union(layouts: Iterable[Layout]) -> Layout:
    """Return a layout that adapters of all these layouts fit into.

    It has every target with its largest rank. Alpha equals the rank, so that the scale is 1: the
    members' own scales are arrays of the stack.

    Args:
      layouts: the layouts of the members.

    Returns:
      The common layout.

    Raises:
      LoraError: two of them disagree about a parameter's shape, the roles of its axes, or whether
        its update is plain factors.
    """
    found: dict[str, Target] = {}
    for index, layout in enumerate(layouts):
        for target in layout.targets:
            known = found.setdefault(target.path, target)
            if known.form != target.form:
                raise LoraError(
                    f"{target.path!r} differs among the adapters: adapter {index} has "
                    f"(shape, stack, inputs, outputs) = {target.form}, one before it has "
                    f"{known.form}; they were made for different models"
                )
            if known.kind != target.kind:
                raise LoraError(
                    f"{target.path!r} is adapted by the kind {target.kind!r} in adapter {index}, "
                    f"and by {known.kind!r} in one before it; a path of a stack is of one kind "
                    "(LoHa, LoKr, VeRA and parts become plain factors, and count as 'lora')"
                )
            if known.rank != target.rank and not kind_of(target).pads:
                raise LoraError(
                    f"{target.path!r} has rank {target.rank} in adapter {index}, and {known.rank} "
                    f"in one before it; in a stack, the kind {target.kind!r} has one rank"
                )
            rank, fold = max(known.rank, target.rank), known.fold or target.fold
            found[target.path] = dataclasses.replace(known, rank=rank, fold=fold)
    return Layout(tuple(dataclasses.replace(t.plain(t.rank), kind=t.kind) for t in found.values()))


def stack(adapters: Sequence[Adapter], *, size: int | None = None) -> tuple[Layout, Stack]:
    """Return one layout and one stack that hold all of `adapters`.

    Args:
      adapters: in the order of their numbers, 0, 1, ... All factors of a path have one dtype. Of
        hundreds of adapters, pass NumPy arrays: nothing is compiled for them.
      size: the number of slots, if `put` is to fill some later. Empty slots hold zeros, like the
        base. None: as many as there are adapters.

    Returns:
      `(layout, stack)`: the layout for `adapt`, and the arrays.

    Raises:
      LoraError: no adapters, adapters that do not fit their layout or each other or that have
        trainable base parameters, or a size that is too small.

    >>> import lora_jax
    >>> f = lambda params, x: x @ params["w"]
    >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    >>> def adapter(rank, value):
    ...     layout = lora_jax.resolve(lora_jax.LoraSpec(rank, targets="w"), f, params, x)
    ...     ones = lora_jax.Factors(jnp.ones((4, rank)), jnp.ones((rank, 3)))
    ...     return layout, {"w": jax.tree.map(lambda x: value * x, ones)}
    >>> layout, stacked = lora_jax.multi.stack([adapter(1, 0.5), adapter(3, 2.0)])
    >>> stacked.factors["w"].a.shape  # two adapters of rank 3 at most, and the base
    (3, 4, 3)
    >>> g = lora_jax.adapt(layout, f)
    >>> g(params, select(stacked, jnp.array([1, BASE])), x)[:, 0].tolist()
    [260.0, 4.0]
    """
    if not adapters:
        raise LoraError("no adapters to stack: pass at least one Adapter(layout, adapters)")
    count = len(adapters) if size is None else size
    if count < len(adapters):
        raise LoraError(f"{len(adapters)} adapters do not fit into size={count} slots")
    given = [_plain(adapter, "stacked") for adapter in adapters]
    layout = union(adapter.layout for adapter in given)
    members = [pad(layout, adapter.layout, adapter.parameters) for adapter in given]
    _check_dtypes(members)
    empty = count + 1 - len(adapters)
    stacked = jax.tree.map(lambda *xs: _stacked(xs, empty), *members)
    return layout, Stack(stacked.factors, stacked.scales, count)


def _stacked(xs: Sequence[Any], empty: int) -> Any:
    """Stack arrays, followed by `empty` slots of zeros.

    Arrays on the host are stacked there. For others XLA compiles a program, which takes seconds for
    hundreds of them.
    """
    numpy: Any = np if all(isinstance(x, np.ndarray) for x in xs) else jnp
    return jnp.asarray(numpy.stack([*xs, *[numpy.zeros_like(xs[0])] * empty]))


def _plain(adapter: Adapter, doing: str) -> Adapter:
    """Return the adapter as a stack holds it: plain factors, unless the kind means more."""
    layout, adapters, _ = factors_alone(adapter, doing)
    check(layout, adapters)
    kept = {t.path: t for t in layout.targets if kind_of(t).rescales or kind_of(t).activated}
    for target in kept.values():
        if target.scale == 0 and kind_of(target).rescales:
            raise LoraError(
                f"{target.path!r} has alpha = 0; in a stack a scale of 0 means no adapter at all, "
                f"which an update of the kind {target.kind!r} is not. Give it another alpha"
            )
    rest = Layout(tuple(t for t in layout.targets if t.path not in kept))
    rest, plain = as_factors(rest, {t.path: adapters[t.path] for t in rest.targets})
    found = {t.path: t for t in (*rest.targets, *kept.values())}
    order = [t.path for t in layout.targets]
    parameters = {path: plain.get(path, adapters[path]) for path in order}
    return Adapter(Layout(tuple(found[path] for path in order)), parameters)


def pad(layout: Layout, own: Layout, adapters: Adapters) -> Scaled:
    """Return an adapter of the layout `own` in the shapes of `layout`, which has room for it.

    The padding stays zero in training: if a's column and b's row of some rank are both zero, so are
    their gradients.

    Args:
      layout: the layout of the stack.
      own: the adapter's layout.
      adapters: `{path: Factors(a, b)}` of `own`.

    Returns:
      The padded factors and the scales.

    Raises:
      LoraError: the adapters do not fit `own`, or `own` does not fit into `layout`.
    """
    check(own, adapters)
    known = {t.path: t for t in layout.targets}
    for target in own.targets:
        room = known.get(target.path)
        if room is None:
            raise LoraError(
                f"the stack has no room for the target {target.path!r}; nearest in it:\n"
                f"{listed(nearest(target.path, known))}\nstack the adapters anew, with this one"
            )
        fits = room.form == target.form and room.kind == target.kind
        if not fits or target.rank > room.rank:
            raise LoraError(
                f"{target.path!r} does not fit into the stack: it has kind {target.kind!r}, rank "
                f"{target.rank} and (shape, stack, inputs, outputs) = {target.form}; the stack has "
                f"room for {room.kind!r}, rank {room.rank} and {room.form}. Stack the adapters "
                "anew, with this one"
            )
    dtype = next((x.dtype for x in jax.tree.leaves(adapters)), jnp.float32)
    factors = {t.path: _padded(t, adapters.get(t.path), dtype) for t in layout.targets}
    scales = {t.path: 0.0 for t in layout.targets} | {t.path: t.scale for t in own.targets}
    return Scaled(factors, {path: np.array(scale, np.float32) for path, scale in scales.items()})


def _padded(room: Target, parameters: Any, dtype: Any) -> Any:
    kind = kind_of(room)
    shapes = kind.shapes(room)
    if parameters is None:
        return kind.fields(*(np.zeros(shape, dtype) for shape in shapes))

    def fill(x: Any, shape: tuple[int, ...]) -> Any:
        pad = np.pad if isinstance(x, np.ndarray) else jnp.pad
        return pad(x, [(0, n - have) for n, have in zip(shape, jnp.shape(x), strict=True)])

    return kind.fields(*map(fill, parameters, shapes))


def unpad(own: Layout, factors: Mapping[str, Any]) -> Adapters:
    """Return the adapter of the layout `own` from padded factors, bit for bit.

    Args:
      own: the adapter's layout.
      factors: `{path: Factors(a, b)}` in the shapes of a larger layout.
    """
    out = {}
    for t in own.targets:
        if t.path not in factors:
            raise LoraError(
                f"the factors hold no {t.path!r}; nearest:\n{listed(nearest(t.path, factors))}"
            )
        kind = kind_of(t)
        pairs = zip(factors[t.path], kind.shapes(t), strict=True)
        out[t.path] = kind.fields(*(x[tuple(map(slice, shape))] for x, shape in pairs))
        kind.check_parameters(t, out[t.path])
    return out


def put(layout: Layout, stacked: Stack, index: int, adapter: Adapter) -> Stack:
    """Return the stack with another adapter in the slot `index`, for a server that swaps adapters.

    The given stack is used up (its arrays are donated), and only the slot is written. So it takes
    as long for the thousandth adapter as for the first, and programs that were compiled for the
    stack serve the new one.

    Args:
      layout: the layout of the stack.
      stacked: the stack.
      index: the slot, from 0.
      adapter: the new adapter.

    Raises:
      LoraError: no such slot, or the adapter does not fit the stack's layout or has trainable base
        parameters.
    """
    if not 0 <= index < stacked.size:
        raise LoraError(f"no slot {index} in a stack of {stacked.size}; they count from 0")
    own, adapters, _ = _plain(adapter, "put into a stack")
    # Padding on the device would compile a program for every new rank, so it is done on the host.
    member = pad(layout, own, jax.tree.map(_on_host, adapters))
    _check_dtypes([member, stacked])
    return _put(stacked, member, jnp.int32(index))


def _on_host(x: Any) -> Any:
    whole = not isinstance(x, jax.Array) or x.is_fully_addressable
    return np.asarray(x) if whole else x


@functools.partial(jax.jit, donate_argnums=0)
def _put(stacked: Stack, member: Scaled, index: Any) -> Stack:
    new = Stack(member.factors, member.scales, stacked.size)
    return jax.tree.map(lambda all, one: all.at[index].set(one), stacked, new)


def unstack(own: Layout, stacked: Stack, index: int) -> Adapters:
    """Return adapter `index` as it was before it was stacked, bit for bit.

    Args:
      own: the adapter's layout.
      stacked: the stack.
      index: the slot, from 0.
    """
    if not 0 <= index < stacked.size:
        raise LoraError(f"no slot {index} in a stack of {stacked.size}; they count from 0")
    return unpad(own, jax.tree.map(lambda x: x[index], stacked.factors))


def select(stacked: Stack, ids: Any) -> Selection:
    """Return adapters of a stack, for the place of one in the function that `adapt` returns.

    Args:
      stacked: from `stack`.
      ids: one integer for all examples, or [B] integers, one for each; BASE selects no adapter.
        They may be traced: one compiled program serves all ids. An id out of range gives NaN there,
        since a compiled program cannot raise an error; outside of one it is an error.

    Raises:
      LoraError: ids that are not integers, have another rank, or are out of range.
    """
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim > 1:
        raise LoraError(
            f"ids must be an integer or a vector of integers, one for each example; got "
            f"{ids.dtype}{list(ids.shape)}"
        )
    if not isinstance(ids, jax.core.Tracer) and ids.size:
        found = np.asarray(ids)
        if found.min() < BASE or found.max() >= stacked.size:
            bad = int(found.min() if found.min() < BASE else found.max())
            raise LoraError(
                f"no adapter {bad} in a stack of {stacked.size}: numbers go from 0 to "
                f"{stacked.size - 1}, and {BASE} is the base"
            )
    return Selection(stacked, ids)


def take(stacked: Stack, index: Any) -> Scaled:
    """Return one adapter by its number, [] int, which may be traced; NaN if it is out of range."""
    row = slot(stacked, index)

    def one(x: Any) -> Any:
        return x.at[row].get(mode="fill", fill_value=jnp.nan)

    return Scaled(jax.tree.map(one, stacked.factors), jax.tree.map(one, stacked.scales))


def slot(stacked: Stack, ids: Any) -> Any:
    """Return the rows of the stack's arrays: 0 to n, or n + 1 for an id that is out of range."""
    nowhere = stacked.size + 1
    known = (ids >= BASE) & (ids < stacked.size)
    return jnp.where(ids == BASE, stacked.size, jnp.where(known, ids, nowhere))


def _without_first(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def _check_dtypes(members: Sequence[Scaled | Stack]) -> None:
    kinds = [{p: tuple(x.dtype for x in f) for p, f in m.factors.items()} for m in members]
    for index, kind in enumerate(kinds):
        for path, dtypes in kind.items():
            if dtypes != kinds[0][path]:
                raise LoraError(
                    f"{path!r} has dtypes {[d.name for d in dtypes]} in adapter {index}, and "
                    f"{[d.name for d in kinds[0][path]]} in the first; cast them to one: "
                    "jax.tree.map(lambda x: x.astype(...), adapters)"
                )
