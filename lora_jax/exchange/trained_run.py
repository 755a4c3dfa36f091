"""One run to export: its adapter and its base, of which no weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax import models, paths
from lora_jax.adapters import Adapter
from lora_jax.checkpoint import adapter_path
from lora_jax.errors import LoraError
from lora_jax.models.weights.names import table_of
from lora_jax.serving.served_adapters import (
    OpenedBase,
    ServedAdapter,
    begun_how,
    open_base,
    quantised_how,
    read,
)


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run, or an adapter that `lora_jax.save` wrote.

    Attributes:
      member: the adapter, and the notes of its training.
      opened: the base.
      head: the classification head that was trained with it; None for a decoder.
      labels: the names of the classes; () for a decoder, or for real numbers.
      quantised: the recipe by which the base was quantised (`bases.recipe`), or None.
      begun: the method by which the base was changed before the first step, or None.
    """

    member: ServedAdapter
    opened: OpenedBase
    head: models.Head | None
    labels: tuple[str, ...]
    quantised: Mapping[str, Any] | None
    begun: Any

    @property
    def adapter(self) -> Adapter:
        """The adapter as `lora_jax.restore` returns it."""
        return Adapter(self.member.layout, self.member.adapters, dict(self.member.base))

    @property
    def root(self) -> str:
        """The prefix of the base's parameters in the paths of the run."""
        if self.head is None:
            return ""
        return "vit/" if isinstance(self.opened.config, models.VitConfig) else "bert/"

    @property
    def trained_on(self) -> str:
        """A description of the weights on which the adapter was trained."""
        if self.quantised is None:
            found = f"{jnp.dtype(self.opened.config.param_dtype)} weights"
        else:
            scheme = self.quantised["scheme"]
            found = f"weights that were quantised ({scheme}), as the floats that they stand for"
        return found if self.begun is None else f"{found}, changed before training by {self.begun}"

    def shapes(self) -> Any:
        """Return the shapes of the run's parameters, before they are quantised."""
        return models.shapes(self.opened.config, self.head)


def open_run(path: str, base: str | None = None, trust_base: bool = False) -> TrainedRun:
    """Open a run."""
    member = read(*adapter_path.find_one(path))
    opened = open_base([member], base, trust_base)
    labels = tuple(member.about.get("labels") or ())
    run = TrainedRun(
        member,
        opened,
        _head(member, opened, labels),
        labels,
        quantised_how([member]),
        begun_how([member]),
    )
    member.layout.check_params(paths.flatten(run.shapes()))
    return run


def _head(member: ServedAdapter, opened: OpenedBase, labels: tuple[str, ...]) -> models.Head | None:
    if isinstance(opened.config, models.DecoderConfig):
        return None
    kernel = member.base.get("classifier/out/kernel")
    if kernel is None or kernel.shape[-1] != (len(labels) or 1):
        got = "none" if kernel is None else f"one of {kernel.shape[-1]} outputs"
        raise LoraError(
            f"{member.path} has {len(labels)} labels, so its adapter needs "
            f"a head with as many outputs; it has {got}"
        )
    poolings = table_of(opened.config).heads
    usual = "cls" if isinstance(opened.config, models.VitConfig) else "mean"
    pooling = member.about.get("model", {}).get("pooling", usual)
    if pooling not in poolings:
        raise LoraError(f"{member.path} says model.pooling is {str(pooling)[:80]!r}")
    return models.Head(pooling, kernel.shape[-1])
