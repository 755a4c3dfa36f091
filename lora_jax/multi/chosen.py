"""One of several updates, chosen by a number: in a mixed batch each example has its own."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.multi import segmented_matmul
from lora_jax.updates.lowrank import LowRank, is_matrix_product
from lora_jax.updates.named import MEMBER, RANK, Named, without
from lora_jax.updates.update import Operation, Update, Wrapper


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen(Wrapper):
    """One of several updates; all arrays of `inner` have the axis MEMBER.

    index: [] int along MEMBER; a number out of range gives NaN.
    examples: the number of examples that run under one `vmap`, each with an index of its own.
    """

    index: Any
    examples: int = dataclasses.field(metadata={"static": True})

    def chosen(self) -> Update:
        def take(n: Named) -> Named:
            if MEMBER not in n.names:
                return n
            axis = n.names.index(MEMBER)
            array = jnp.take(n.array, self.index, axis=axis, mode="fill", fill_value=jnp.nan)
            return Named(array, without(n.names, (MEMBER,)))

        return self.inner.map(take)

    def product(self, p: Operation) -> Any:
        u = self.inner
        if type(u) is LowRank and p.x is not None and self._groups(u, p.x, p):
            return self._grouped(u, p)
        return self.chosen().product(p)

    def merged(self, w: Named) -> Any:
        return self.chosen().merged(w)

    def _groups(self, u: LowRank, x: Named, p: Operation) -> bool:
        """Return whether this is a plain product whose examples should be grouped by adapter."""
        if not p.matrix or u.a.names[0] != MEMBER or u.b.names[0] != MEMBER:
            return False
        a, b = (Named(n.array[0], n.names[1:]) for n in (u.a, u.b))
        whole = set(p.out) == {*x.names, *b.names} - set(a.names)
        if not (whole and is_matrix_product(x, a, b, p.out)):
            return False
        rows = math.prod(x.size(n) for n in x.names if n in p.out)
        return segmented_matmul.pays(self.examples, u.a.size(MEMBER), rows, u.a.size(RANK))

    def _grouped(self, u: LowRank, p: Operation) -> Any:
        x = p.dropped
        assert u.gain is not None and p.x is not None and x is not None
        base = p.base(p.x.array)
        (inner,), (outer,) = (without(f.names, (MEMBER, RANK)) for f in (u.a, u.b))
        rows = tuple(n for n in x.names if n in p.out)
        dtype = x.array.dtype
        a, b = u.a.moved((MEMBER, inner, RANK)).astype(dtype), u.b.moved((MEMBER, RANK, outer))
        gain = u.gain.astype(dtype).array * u.scale
        with jax.named_scope("lora"):
            y = segmented_matmul.product(
                x.matrix((), rows, (inner,)), a.array, b.astype(dtype).array, gain, self.index,
                p.precision,
            )  # fmt: skip
            named = Named(y.reshape(*map(x.size, rows), u.b.size(outer)), (*rows, outer))
            return base + named.moved(p.out).array.astype(base.dtype)
