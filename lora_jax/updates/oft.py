"""OFT: a rotation of W's inputs, in blocks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.base import Array, Leaf, W, wide_dtype
from lora_jax.errors import LoraError
from lora_jax.spec import Target
from lora_jax.updates.factors import Factors, Gains, no_factors
from lora_jax.updates.kind import Initializer, Kind


class Rotation(NamedTuple):
    """The array of an OFT target.

    Attributes:
      rotation: [*stack, in / rank, rank (rank - 1) / 2], the entries of each block's skew-symmetric
        matrix above its diagonal, row by row.
    """

    rotation: Leaf


class Oft(Kind):
    """Orthogonal fine-tuning (OFT, arXiv 2306.07280; with rotated inputs, arXiv 2506.19847).

        W' = R W        R = diag(R_1, R_2, ...), each [rank, rank]

    The rank is the size of a block, and divides the number of inputs. A block is the Cayley
    transform of a skew-symmetric S, (1 + S) / (1 - S), by its series as in PEFT:

        R_k = 1 + 2 S + 2 S^2 + 2 S^3 + S^4

    which is a rotation up to terms of S^4. `OftCayley` has an exact one. S starts at zero. The
    program multiplies x by R before it multiplies it by W, so W is only read: a quantised base
    stays as it is. There is no alpha.

    >>> target = Target("w", (4, 1), (), (0,), (1,), rank=2, alpha=1.0, kind="oft")
    >>> w = jnp.array([[1.0], [0.0], [0.0], [0.0]])
    >>> turned = Oft().merged(target, Rotation(jnp.array([[0.1], [0.0]])), w)  # by 2 atan(0.1)
    >>> [round(float(x), 4) for x in turned[:, 0]]
    [0.9801, -0.198, 0.0, 0.0]
    """

    name = "oft"
    fields = Rotation
    zero_at_first = "rotation"
    pads = False

    def axes(self, target: Target) -> Rotation:
        return Rotation((*target.stack, None, None))

    def shapes(self, target: Target) -> Rotation:
        size = target.rank
        blocks = target.fan_in // size
        return Rotation((*target.sizes(target.stack), blocks, size * (size - 1) // 2))

    def rank_limit(self, target: Target) -> tuple[int, str]:
        return target.fan_in, "the number of inputs"

    def check(self, target: Target) -> None:
        super().check(target)
        if target.rank < 2 or target.fan_in % target.rank:
            every = [n for n in range(2, target.fan_in + 1) if target.fan_in % n == 0]
            near = min(every, key=lambda n: (abs(n - target.rank), n), default=None)
            raise LoraError(
                f"{target.path!r}: the rank of an update of the kind {self.name!r} is the size of "
                f"a block, which divides the {target.fan_in} inputs and is at least 2; got "
                f"{target.rank}. The nearest: Rule({target.path!r}, rank={near})"
            )

    def init(
        self, key: Array, target: Target, dtype: DTypeLike, a_init: Initializer, w: W | None = None
    ) -> Rotation:
        return Rotation(jnp.zeros(self.shapes(target).rotation, dtype))

    def factors(self, target: Target, parameters: Rotation) -> Factors:
        return no_factors(target, jnp.result_type(parameters.rotation))

    def gains(
        self, target: Target, parameters: Rotation, w: W, scale: Array | float | None = None
    ) -> Gains:
        above = jnp.asarray(parameters.rotation, wide_dtype(w.dtype))
        size = target.rank
        rows, columns = np.triu_indices(size, 1)
        half = jnp.zeros((*above.shape[:-1], size, size), above.dtype)
        half = half.at[..., rows, columns].set(above)
        with jax.default_matmul_precision("highest"):
            return Gains(rotation=self.cayley(half - half.mT))

    def cayley(self, s: Array) -> Array:
        """Return the rotations of skew-symmetric matrices [..., rank, rank].

        Args:
          s: the matrices.
        """
        square = s @ s
        return _one(s) + 2 * (s + square + square @ s) + square @ square


class OftCayley(Oft):
    """OFT with exact rotations: PEFT's `use_cayley_neumann=False`, at the cost of an inverse.

    R_k = (1 - S) / (1 + S), the other sign of S, as in PEFT.

    >>> target = Target("w", (2, 1), (), (0,), (1,), rank=2, alpha=1.0, kind="oft_cayley")
    >>> w = jnp.array([[1.0], [0.0]])
    >>> turned = OftCayley().merged(target, Rotation(jnp.array([[0.7]])), w)
    >>> round(float(jnp.linalg.norm(turned)), 5)
    1.0
    """

    name = "oft_cayley"

    def cayley(self, s: Array) -> Array:
        return jnp.linalg.solve(_one(s) - s, _one(s) + s).mT


def _one(s: Array) -> Array:
    return jnp.broadcast_to(jnp.eye(s.shape[-1], dtype=s.dtype), s.shape)
