"""The choice of the base model to open for adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from lora_jax.serving.served_adapters import Served, open_adapters


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseChoice:
    """Which base model may be opened for adapters. The commands have these fields as options."""

    base: str | None = None
    """The base model, in the form of model.reference. None: the one that the adapter names."""
    trust_base: bool = False
    """Download the base that the adapter names even if lora_jax does not know its checksum."""
    allow_other_base: bool = False
    """Accept a base model other than the one that the adapter was trained on."""

    def open(
        self,
        adapters: Sequence[str],
        task: Literal["predict", "generate"] | None = None,
        opened: Callable[[int, int], None] = lambda number, total: None,
    ) -> Served:
        """Open adapters with this base, as `open_adapters` does."""
        return open_adapters(
            adapters,
            task,
            base=self.base,
            trust_base=self.trust_base,
            allow_other_base=self.allow_other_base,
            opened=opened,
        )
