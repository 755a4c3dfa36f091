"""An update with a gain for each output, which multiplies the whole sum `W + update`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import LoraError
from lora_jax.updates.named import Named, wider
from lora_jax.updates.update import Operation, Part, Update, Wrapper, Zero


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputGain(Wrapper):
    """`gain * (W + update)`, where the gain is one number per output (DoRA's magnitude / norm).

    gain: has all axes of W with the roles stack and output, and no others.
    """

    gain: Named

    def product(self, p: Operation) -> Any:
        """Multiply x by the gain along contracted outputs, or the result along the others.

        The product and the gain are in float32. A trained gain is within a few thousandths of 1,
        and multiplying a bfloat16 number by it would round back to the same number.
        """
        x, gain = p.x, self.gain if p.spread is None else p.spread(self.gain)
        if x is not None and any(n not in p.out for n in gain.names):
            return self._transposed(x, p)
        dtype: Any = None

        def base(x: Any) -> Any:
            nonlocal dtype
            dtype = jax.eval_shape(p.base, x).dtype
            wide = wider(dtype, jnp.float32)
            return p.base(x, wide) if p.sums else p.base(x).astype(wide)

        y = self.inner.product(dataclasses.replace(p, base=base))
        return Named(y, p.out).times(gain).array.astype(dtype)

    def _transposed(self, x: Named, p: Operation) -> Any:
        """Return a product over outputs, as in a tied head: the gain multiplies x beforehand."""
        if any(n not in x.names for n in self.gain.names):
            raise LoraError(
                "a product sums over some outputs of a weight that DoRA adapts, and not over "
                "others; its magnitude cannot follow. Use another kind of update for this weight"
            )
        wide = x.astype(wider(x.array.dtype, jnp.float32))
        scaled = Named(wide.times(self.gain).array.astype(x.array.dtype), x.names)
        return self.inner.product(dataclasses.replace(p, x=scaled))

    def merged(self, w: Named) -> Any:
        whole = Named(self.inner.merged(w.astype(jnp.float32)), w.names)
        return whole.times(self.gain).array.astype(w.array.dtype)

    def join(self, parts: Sequence[Part], name: int, size: int) -> Update | None:
        bare = lambda u: u.inner if isinstance(u, OutputGain) else u  # noqa: E731
        inner = [dataclasses.replace(p, update=bare(p.update)) for p in parts]
        whole = inner[0].update.join(inner, name, size)
        if whole is None or any(p.update.role(name) == "input" for p in parts):
            return None
        one: dict[int, int] = {n: self.gain.size(n) for n in self.gain.names if n != name}
        ones = Named(jnp.ones((*one.values(), size), self.gain.array.dtype), (*one, name))
        for p in parts:
            if isinstance(p.update, OutputGain):
                if {*p.update.gain.names} - {name} != {*one}:
                    return None
                gain = p.update.gain.among(ones.names)
                ones = Named(ones.array.at[..., p.start : p.start + p.size].set(gain), ones.names)
        return OutputGain(whole, ones)

    def sums(self, sizes: dict[int, int]) -> bool:
        return self.inner.sums(sizes) and not any(n in self.gain.names for n in sizes)

    def derivatives(self, w: Any, dw: Any, tangent: Any, none: Any) -> list[tuple[Any, Update]]:
        along = super().derivatives(w, dw, tangent, none)
        return [*along, (w, OutputGain(self.inner, tangent.gain))]


def join(parts: Sequence[Part], name: int, size: int) -> Update | None:
    """See `Update.join`. A part with an output gain, if there is one, does it for all."""
    if not parts:
        return Zero()
    gained = (p for p in parts if isinstance(p.update, OutputGain))
    return next(gained, parts[0]).update.join(parts, name, size)
