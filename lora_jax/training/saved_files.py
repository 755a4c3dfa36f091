"""Read config.json and summary.json of a run, which may be damaged or edited by hand."""

from __future__ import annotations

import math
import pathlib
from typing import Any

from lora_jax.errors import LoraError
from lora_jax.system import json_file

_CONFIG_CURE = "train.py wrote it: restore it from a copy, or start the run again with --fresh"
_SUMMARY_CURE = (
    "delete it and start the command of the run again: the run continues from its last checkpoint "
    "and writes a new one"
)

# The fields of summary.json that are read -> their types.
_NUMBER = (int, float)
_SUMMARY: dict[str, Any] = {
    **dict.fromkeys(("steps", "skipped_steps", "base_parameters", "adapter_parameters"), _NUMBER),
    **dict.fromkeys(("trainable_parameters", "adapter_file_bytes", "optimizer_bytes"), _NUMBER),
    **dict.fromkeys(("full_checkpoint_bytes", "base_bytes_per_device"), _NUMBER),
    **dict.fromkeys(("peak_memory_bytes", "steps_per_second"), _NUMBER),
    "merged_difference": (*_NUMBER, type(None)),  # None for a quantised base
    **dict.fromkeys(("compile_seconds", "total_seconds"), _NUMBER),
    **dict.fromkeys(("before", "after"), dict),
    **dict.fromkeys(("select", "better"), str),
    "best_step": (int, type(None)),
}


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / "config.json"
    found = json_file.read(file, LoraError, cure=_CONFIG_CURE, finite=False)
    if not isinstance(found.get("steps"), int) or not isinstance(found.get("lora"), dict):
        raise LoraError(
            f"{file} is not a config of train.py: it has no steps and lora; {_CONFIG_CURE}"
        )
    return found


def read_summary(folder: pathlib.Path) -> dict[str, Any]:
    """Return summary.json of the run in `folder`, with every field that the package reads."""
    file = folder / "summary.json"
    found = json_file.read(file, LoraError, cure=_SUMMARY_CURE, finite=False)
    for name, kind in _SUMMARY.items():
        if name not in found:
            raise LoraError(f"{file} has no {name!r}; {_SUMMARY_CURE}")
        if not _fits(found[name], kind) or (name == "base_parameters" and found[name] < 1):
            raise LoraError(f"{file}: {name!r} is {str(found[name])[:80]!r}; {_SUMMARY_CURE}")
    for when in ("before", "after"):
        if not all(_are_scores(scores) for scores in found[when].values()):
            raise LoraError(f"{file}: {when!r} holds values other than numbers; {_SUMMARY_CURE}")
    samples = found.get("samples", [])
    whole = isinstance(samples, list) and all(isinstance(sample, dict) for sample in samples)
    if not whole or not all(isinstance(x, str) for s in samples for x in s.values()):
        raise LoraError(f"{file}: 'samples' holds values other than texts; {_SUMMARY_CURE}")
    confusion = found.get("confusion", {})
    if not isinstance(confusion, dict) or not all(map(_is_confusion, confusion.values())):
        raise LoraError(f"{file}: 'confusion' is no square of counts; {_SUMMARY_CURE}")
    speeds = (n for n in found if n.endswith("_per_second") and not n.startswith("steps_"))
    if not any(isinstance(found[name], _NUMBER) for name in speeds):
        raise LoraError(f"{file} has no speed except steps_per_second; {_SUMMARY_CURE}")
    return found


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value has the type of its field; a number is finite."""
    if not isinstance(value, kind) or _too_large(value):
        return False
    return kind is not _NUMBER or math.isfinite(value)


def _is_confusion(rows: Any) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == len(rows) and all(_fits(x, _NUMBER) for x in row)
        for row in rows
    )


def _too_large(value: Any) -> bool:
    """Whether it is an integer that no float holds, so that nothing can be computed with it."""
    return isinstance(value, int) and abs(value) > 10**18


def _are_scores(scores: Any) -> bool:
    return isinstance(scores, dict) and all(
        value is None or (isinstance(value, _NUMBER) and not _too_large(value))
        for value in scores.values()
    )
