"""A finished run in Python: its folder, its numbers and its adapters."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from lora_jax.adapters import Adapter
from lora_jax.checkpoint import restore
from lora_jax.training import export, metrics


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run, which `lora_jax.training.run` returns.

    Attributes:
      path: the run directory.
      summary: the values of summary.json.
    """

    path: pathlib.Path
    summary: dict[str, Any]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: one of each step, and of each evaluation of a "split"."""
        return metrics.read(self.path)

    @property
    def best(self) -> dict[str, Any] | None:
        """The step and the validation scores of the best adapter; None without evaluations."""
        step = self.summary["best_step"]
        return None if step is None else {"step": step, **self.summary["after"]["validation"]}

    def adapter(self, name: str | None = None) -> Adapter:
        """Read an adapter of the run.

        Args:
          name: "best" or "last". None: the best, or the last if no evaluation picked a best.

        Returns:
          The layout, the adapters and the parameters that were trained in full.
        """
        picked = name or ("last" if self.summary["best_step"] is None else "best")
        return restore(export.folder(self.path, picked))
