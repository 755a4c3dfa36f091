"""Show what a classifier takes each class for, from the counts in the record of a run."""

from __future__ import annotations

import numpy as np

from lora_jax.checkpoint import adapter_path
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.errors import LoraError
from lora_jax.report import charts, formatting
from lora_jax.report.document import Figure, Panel, Paragraph, Section, Table
from lora_jax.report.run_files import SavedRun

_COLUMNS = ("class", "examples", "guesses", "precision", "recall", "F1", "most taken for")


def sections(run: SavedRun) -> list[Section]:
    """Return a section with the confusion matrix and the scores by class, if there are counts."""
    every = {} if run.summary is None else run.summary.get("confusion", {})
    if not every:
        return []
    split = "test" if "test" in every else next(iter(every))
    labels = _labels(run, len(every[split]))
    counts = np.asarray(every[split], float)[: len(labels), : len(labels)]
    own, guessed, right = counts.sum(1), counts.sum(0), counts.diagonal()
    others = np.where(np.eye(len(labels), dtype=bool), 0, counts)
    most = [labels[row.argmax()] if row.any() else formatting.NONE for row in others]
    sizes = [[f"{x:,.0f}" for x in each] for each in (own, guessed)]
    scores = [
        [formatting.score(x / y) if y else formatting.NONE for x, y in zip(*pair, strict=True)]
        for pair in ((right, guessed), (right, own), (2 * right, own + guessed))
    ]
    rows = tuple(zip(labels, *sizes, *scores, most, strict=True))
    shares = counts / np.maximum(own, 1)[:, None]
    drawn = charts.heat(shares, labels, labels, "share of a class", ("class", "guess"))
    text = f"Heat map of guesses by class: {right.sum():,.0f} of {own.sum():,.0f} are right"
    more = (
        "The record has counts and no texts. To see the wrong examples, give a file of the split "
        f"to lora-jax predict --adapter {run.name} --file FILE: it writes each line again with "
        "its prediction."
    )
    caption = f"Guesses for the examples of each class, {split} split."
    figure = Figure(caption, (Panel("confusion", text, drawn),))
    table = Table(f"Scores by class, {split} split.", _COLUMNS, rows, ("class", _COLUMNS[-1]))
    return [Section("Classes", (figure, table, Paragraph(more)))]


def _labels(run: SavedRun, count: int) -> list[str]:
    """Return the names of the classes, as the adapter has them, or else their numbers."""
    try:
        _, folder = adapter_path.find(str(run.path))[0]
        known = SavedAdapter.open(folder).labels
    except LoraError:
        known = ()
    if 1 < len(known) <= count:
        return [label[:40] for label in known]
    return [str(i) for i in range(count)]
