"""A classifier's guesses for the first examples of the validation split, for record and report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tokenizers

from lora_jax.data.process_slice import Shard
from lora_jax.layout import Layout
from lora_jax.training.workload import Batch, Workload
from lora_jax.transform import adapt


@dataclasses.dataclass(frozen=True)
class Guesses:
    """Guesses the classes of a few texts: the `samples` of a classifier's workload.

    Attributes:
      count: the number of texts.
      names: the names of the classes.
      tokenizer: turns tokens into the text again.
      workload: the model and the validation split.
    """

    count: int
    names: tuple[str, ...]
    tokenizer: tokenizers.Tokenizer
    workload: Workload

    def __call__(
        self, layout: Layout, params: Any, adapters: Any
    ) -> tuple[list[dict[str, str]], dict[str, float]]:
        """Return the guesses of the base `params` with `adapters`, and no score."""
        run = functools.partial(self.workload.apply, train=False, key=None)
        logits, found = jax.jit(adapt(layout, run)), list[dict[str, str]]()
        for batch in self._batches():
            chances = np.asarray(jax.nn.softmax(logits(params, adapters, batch)))
            for i in np.flatnonzero(batch["weight"])[: self.count - len(found)]:
                text = self.tokenizer.decode(batch["input_ids"][i][batch["mask"][i]].tolist())
                guess = chances[i, : len(self.names)].argmax()
                said = f"{self.names[guess]} ({chances[i, guess]:.0%})"
                expected = self.names[batch["label"][i]]
                found.append({"asked": text, "expected": expected, "text": said})
        return found, {}

    def _batches(self) -> Iterator[Batch]:
        left = self.count
        for batch in self.workload.evaluation["validation"](Shard()):
            yield batch
            left -= int(np.count_nonzero(batch["weight"]))
            if left <= 0:
                return
