"""The choice among many adapters that `adapt` takes in place of one adapter.

`adapt` knows no kind of choice by name. Every choice derives from `Choosing` and defines two
things: the part that differs from one example to the next (`choice`), and the low-rank update that
such a choice stands for (`blend`).
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.adapters import Adapters
from lora_jax.layout import Layout
from lora_jax.multi.chosen import Chosen
from lora_jax.target import Target
from lora_jax.updates.dropped import Dropped
from lora_jax.updates.gated import Gated
from lora_jax.updates.kind import kind_of
from lora_jax.updates.lowrank import LowRank
from lora_jax.updates.named import MEMBER, RANK, TALLY, Named, Names
from lora_jax.updates.output_gain import OutputGain
from lora_jax.updates.update import Update


class Choice(NamedTuple):
    """The number of one example's adapter, among `examples` that run under one `vmap`.

    index: [] int along the leading axis of the factors; a number out of range gives NaN.
    examples: the number of examples.
    """

    index: Any
    examples: int


class Drop(NamedTuple):
    """Dropout of the inputs of all updates.

    key: a PRNG key.
    rate: the fraction of elements set to zero.
    """

    key: Any
    rate: float


@dataclasses.dataclass(frozen=True)
class Blend:
    """The update of every target, in the form in which the interpreter takes it.

    factors: `{path: Factors(a [*stack, *inputs, rank], b [*stack, rank, *outputs])}`. The rank is
      that of all blended adapters together. With gates, the last n columns of `a` are the router's.
    gains: `{path: [] or [rank]}`, the factor of each rank: scales times weights. gates: `{path:
    Gate}`, for a router per token (`lora_jax.updates.gating`). choice: the number of the adapter,
    if it is not selected yet. Every array then has a leading axis
      of adapters.
    drop: None, or the dropout of the inputs of all updates.
    """

    factors: Adapters
    gains: dict[str, Any] = dataclasses.field(default_factory=dict)
    gates: dict[str, Any] = dataclasses.field(default_factory=dict)
    choice: Choice | None = None
    drop: Drop | None = None

    def of(self, target: Target, w: Any, names: Names) -> Update | None:
        """Return the running update of a target whose axes have these names.

        None: its kind has no factors, so it runs merged.
        """
        kind, parameters = kind_of(target), self.factors[target.path]
        factors = kind.factors(target, parameters)
        if factors is None:
            return None
        several = () if self.choice is None else (MEMBER,)
        stack, inputs, outputs = (
            tuple(names[i] for i in axes) for axes in (target.stack, target.inputs, target.outputs)
        )
        gain = self.gains.get(target.path)
        update: Update = self._low_rank(
            target,
            Named(factors.a, (*several, *stack, *inputs, RANK)),
            Named(factors.b, (*several, *stack, RANK, *outputs)),
            None if gain is None else Named(gain, several or (RANK,) * jnp.ndim(gain)),
            (*stack, TALLY, MEMBER),
        )
        if kind.rescales:
            # The planner counts the scope "lora" as adapters; JAX writes the outermost scope as
            # `jvp(output_gain)`, so "lora" is the inner one.
            with jax.named_scope("output_gain"), jax.named_scope("lora"):
                rescaling = self._output_gain(target, parameters, w)
            update = OutputGain(update, Named(rescaling, (*several, *stack, *outputs)))
        if self.choice is not None:
            update = Chosen(update, self.choice.index, self.choice.examples)
        if self.drop is not None:
            key, rate, sizes = self.drop.key, self.drop.rate, target.sizes(target.stack)
            update = Dropped.start(update, target.path, key, rate, stack, sizes)
        return update

    def _low_rank(
        self, target: Target, a: Named, b: Named, gain: Named | None, probed: Names
    ) -> LowRank:
        gate, scale = self.gates.get(target.path), kind_of(target).scale(target)
        if gate is None:
            return LowRank(a, b, scale, gain)
        if gate.probe is not None:
            gate = dataclasses.replace(gate, probe=Named(gate.probe, probed))
        return Gated(a, b, scale, gain, gate)

    def _output_gain(self, target: Target, parameters: Any, w: Any) -> Any:
        """Return the output gain of one adapter, or of each of several; 1 where the scale is 0."""
        kind, scales = kind_of(target), self.gains.get(target.path)
        if scales is None:
            return kind.output_gain(target, parameters, w)

        def one(parameters: Any, scale: Any) -> Any:
            gain = kind.output_gain(target, parameters, w, scale=scale * kind.scale(target))
            return jnp.where(scale == 0, jnp.ones_like(gain), gain)

        if self.choice is None:
            return one(parameters, scales)
        return jax.vmap(one)(parameters, scales)


class Choosing(abc.ABC):
    """Adapters chosen among many, in a form that `adapt` takes in place of one adapter."""

    @property
    @abc.abstractmethod
    def per_example(self) -> bool:
        """Whether each example has a choice of its own."""

    @abc.abstractmethod
    def choice(self, layout: Layout) -> Any:
        """Return the choice: a pytree, with a leading axis of examples if `per_example`.

        Args:
          layout: the layout that was passed to `adapt`.

        Raises:
          LoraError: the adapters do not fit the layout.
        """

    @abc.abstractmethod
    def blend(self, layout: Layout, choice: Any) -> Blend:
        """Return the update that the choice of one example, or of all examples, stands for.

        Args:
          layout: the layout that was passed to `adapt`.
          choice: from `choice`; if `per_example`, the entry of one example.
        """
