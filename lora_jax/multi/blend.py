"""What `adapt` is given in the place of one adapter: a choice among many, and what it stands for.

`adapt` knows no kind of choice by name. Whatever is given to it derives from `Choosing`, and says
two things: what differs from one example to the next (`choice`), and which low-rank update one such
choice means (`blend`).
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax

from lora_jax.adapters import Adapters
from lora_jax.layout import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """The number of the adapter of one example, among `examples` that run under one `vmap`.

    index: [] int along the leading axis of the factors; a number outside of it gives NaN.
    """

    index: Any
    examples: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drop:
    """Dropout of the inputs of all updates: a PRNG key, and the share of numbers set to zero."""

    key: Any
    rate: float = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blend:
    """The update of every target, as the interpreter takes it.

    factors: `{path: Factors(a [*stack, *inputs, rank], b [*stack, rank, *outputs])}`; the rank is
      that of all blended adapters together. With gates, `a` has the router's n columns at its end.
    gains: `{path: [] or [rank]}`, what each rank is multiplied with: scales times weights.
    gates: `{path: Gate}`, for a router per token (`lora_jax.updates.gating`).
    choice: which adapter it is, where that is not chosen yet; then every array has a leading axis
      of adapters.
    drop: None, or the dropout of the inputs of all updates.
    """

    factors: Adapters
    gains: dict[str, Any] = dataclasses.field(default_factory=dict)
    gates: dict[str, Any] = dataclasses.field(default_factory=dict)
    choice: Choice | None = None
    drop: Drop | None = None


class Choosing(abc.ABC):
    """Adapters chosen among many, in a form that `adapt` takes in the place of one adapter."""

    @property
    @abc.abstractmethod
    def per_example(self) -> bool:
        """Whether each example has a choice of its own."""

    @abc.abstractmethod
    def choice(self, layout: Layout) -> Any:
        """Return what is chosen: a pytree, with a leading axis of examples if `per_example`.

        Raises:
          LoraError: the adapters do not fit the layout.
        """

    @abc.abstractmethod
    def blend(self, layout: Layout, choice: Any) -> Blend:
        """Return the update that the choice of one example, or of all, stands for."""
