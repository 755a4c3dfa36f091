"""The parameters that a run trains next to the adapters: the extension point of the text configs.

A config may train by another method than LoRA: `TextConfig.method_for` then returns a subclass of
`Method`, as the methods that LoRA is compared with do (`experiments/methods`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from lora_jax.checkpoint.saved_adapter import EXTRA
from lora_jax.paths import Tree

HEAD = "classifier/**"  # the new head of an encoder, which every method trains


@dataclasses.dataclass(frozen=True)
class Method:
    """The base parameters that a run trains in full, and what it adds to the model.

    This class adds nothing. A subclass that does overrides `init` and `apply`.

    Attributes:
      trained: patterns (`lora_jax.paths`) of the trained parameters, including the method's own.
        The new head of an encoder is always trained and is not listed.
      about: JSON values that are saved with the adapters.
    """

    trained: tuple[str, ...] = ()
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def init(self, key: jax.Array) -> Tree:
        """Return fresh parameters to add to the model's: `{EXTRA: ...}`, or `{}`."""
        return {}

    def fresh(self, seed: int) -> Tree:
        """Return `init` with the key of a run. The new head has the key folded with 1."""
        return self.init(jax.random.fold_in(jax.random.key(seed), 2))

    def shapes(self) -> Tree:
        return jax.eval_shape(self.init, jax.random.key(0))

    def placement(self) -> tuple[tuple[str, PartitionSpec], ...]:
        """Return a sharding rule for the method's own parameters: replicated, as they are few."""
        return ((f"{EXTRA}/**", PartitionSpec()),) if self.shapes() else ()

    def apply(self, model: nn.Module, params: Tree, *args: Any, **kwargs: Any) -> Any:
        """Call `model.apply({"params": ...}, *args, **kwargs)` with the method's additions."""
        return model.apply({"params": params}, *args, **kwargs)


LORA = Method()
"""LoRA alone, whose factors are not parameters of the model."""
