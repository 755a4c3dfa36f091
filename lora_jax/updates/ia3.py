"""(IA)3: a trained gain for each output of W, or for each input."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.base import Array, Leaf, W, wide_dtype
from lora_jax.spec import Target
from lora_jax.updates.factors import Factors, Gains, no_factors
from lora_jax.updates.kind import Initializer, Kind


class Gain(NamedTuple):
    """The array of an (IA)3 target.

    Attributes:
      gain: [*stack, *outputs]; of the kind "ia3_inputs" [*stack, *inputs].
    """

    gain: Leaf


class Ia3(Kind):
    """Infused adapter by inhibiting and amplifying inner activations ((IA)3, arXiv 2205.05638).

        W' = W diag(gain)        for keys and values

    The gains start at one; there is no rank and no alpha. PEFT's (IA)3 multiplies the bias of the
    layer too: `exchange.peft` says this by a difference of the bias (the kind "bias").

    >>> target = Target("w", (3, 2), (), (0,), (1,), rank=1, alpha=1.0, kind="ia3")
    >>> Ia3().merged(target, Gain(jnp.array([2.0, 1.0])), jnp.ones((3, 2)))[0]
    Array([2., 1.], dtype=float32)
    """

    name = "ia3"
    fields = Gain
    zero_at_first = ""
    of_inputs: ClassVar[bool] = False

    def axes(self, target: Target) -> Gain:
        return Gain((*target.stack, *(target.inputs if self.of_inputs else target.outputs)))

    def rank_limit(self, target: Target) -> None:
        return None

    def init(
        self, key: Array, target: Target, dtype: DTypeLike, a_init: Initializer, w: W | None = None
    ) -> Gain:
        return Gain(jnp.ones(self.shapes(target).gain, dtype))

    def factors(self, target: Target, parameters: Gain) -> Factors:
        return no_factors(target, jnp.result_type(parameters.gain))

    def gains(
        self, target: Target, parameters: Gain, w: W, scale: Array | float | None = None
    ) -> Gains:
        gain = jnp.asarray(parameters.gain, wide_dtype(w.dtype))
        return Gains(inputs=gain) if self.of_inputs else Gains(gain)


class Ia3Inputs(Ia3):
    """(IA)3 of the inputs: `W' = diag(gain) W`, for the second product of an MLP."""

    name = "ia3_inputs"
    of_inputs = True
