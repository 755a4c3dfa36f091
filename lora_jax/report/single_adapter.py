"""Make the report of an adapter that has no run: it was imported, or saved by hand."""

from __future__ import annotations

import math
import pathlib
from typing import Any

from lora_jax.checkpoint import adapter_path
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.layout import Layout
from lora_jax.report import formatting, update_analysis
from lora_jax.report.document import Block, Fact, Note, Report, Section, Table
from lora_jax.serving.served_adapters import BaseChoice
from lora_jax.updates.kind import kind_of


def report(path: pathlib.Path, base: BaseChoice) -> Report:
    """Report the origin of an adapter, its layout, and what its update is made of."""
    _, folder = adapter_path.find_one(str(path))
    saved = SavedAdapter.open(folder)
    layout, trainable = saved.layout, saved.trainable_shapes
    full = f"{sum(map(math.prod, trainable.values())):,}"
    return Report(
        kind="LoRA adapter",
        title=path.resolve().name,
        lead=_origin(saved.about),
        facts=(
            Fact("adapter parameters", f"{layout.size:,}", f"of {len(layout.targets)} parameters"),
            Fact("trained in full", full, ", ".join(list(trainable)[:4])),
        ),
        sections=(*update_analysis.sections(path, base), Section("Layout", _layout(layout))),
        notes=(Note("It has no record of its training, so there are no scores and no curves."),),
    )


def _origin(about: Any) -> str:
    """Describe where the adapter comes from, if it says so."""
    imported, model = (_texts(about.get(name)) for name in ("imported", "model"))
    found = "An adapter that was saved by hand"
    if imported:
        by = f" (PEFT {imported['peft_version']})" if imported.get("peft_version") else ""
        found = f"Imported from {imported.get('folder', 'a PEFT folder')}{by}"
    on = f", on {model['reference']}" if model.get("reference") else ""
    own = imported.get("base")
    named = f"; the folder names the base {own}" if own and own != model.get("reference") else ""
    return f"{found}{on}{named}."


def _texts(values: Any) -> dict[str, str]:
    if not isinstance(values, dict):
        return {}
    return {name: x[:300] for name, x in values.items() if isinstance(x, str)}


def _layout(layout: Layout) -> tuple[Block, ...]:
    if not layout.targets:
        return (Note("No parameter is adapted."),)
    rows = tuple(
        (
            t.path,
            " x ".join(map(str, t.shape)),
            t.kind,
            str(t.rank),
            formatting.column([kind_of(t).scale(t)])[0],
            f"{Layout((t,)).size:,}",
        )
        for t in layout.targets
    )
    columns = ("parameter", "shape", "kind", "rank", "scale", "numbers")
    return (Table("The adapted parameters.", columns, rows, ("parameter", "kind")),)
