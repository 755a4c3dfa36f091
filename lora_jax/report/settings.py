"""List settings of runs that differ from the defaults, or that all runs share."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from lora_jax.report import formatting
from lora_jax.report.document import Table
from lora_jax.sweeps.comparison import flat
from lora_jax.training.config_json import to_dict
from lora_jax.training.images import ImageConfig
from lora_jax.training.text import TextConfig

# These are shown even if they have their default values.
_ALWAYS = (
    "workload",
    *("model.reference", "data.source", "steps", "data.batch_size", "seed"),
    *("lora.rank", "lora.alpha", "lora.targets", "optimizer.learning_rate"),
)


def table(configs: Sequence[dict[str, Any]]) -> Table:
    """List the shared settings of configs: the main ones, and any that differ from defaults."""
    every = [_counting(config) for config in configs]
    common = {f: v for f, v in every[0].items() if all(c.get(f, ...) == v for c in every)}
    kind = ImageConfig if "data.image_field" in common else TextConfig
    first, known = [field for field in _ALWAYS if field in common], flat(_defaults(kind))
    rest = [f for f, value in common.items() if f not in first and known.get(f, ...) != value]
    defaults = {field: formatting.value(value) for field, value in known.items()}
    rows = tuple(
        (field, formatting.value(common[field]), defaults.get(field, formatting.NONE))
        for field in [*first, *rest]
    )
    shared = " that all runs share" if len(configs) > 1 else ""
    return Table(
        f"Settings{shared}: the main ones, and all others that differ from what lora_jax "
        "takes if neither a config file nor the command line sets them.",
        ("field", "value", "lora_jax's own"),
        rows,
        ("field", "value", "lora_jax's own"),
    )


def in_words(configs: Sequence[dict[str, Any]]) -> str:
    """Describe in one line what all these runs train: "minilm on reviews, rank 8, 300 steps"."""
    every = [_counting(config) for config in configs]

    def common(field: str, text: str) -> str:
        found = every[0].get(field)
        alike = found is not None and all(config.get(field) == found for config in every)
        return text.format(formatting.value(found)) if alike else ""

    model = common("model.reference", "{}") or common("workload", "{}") or "several models"
    parts = [
        model + common("data.source", " on {}"),
        common("start_from", "from {}"),
        *(common(f"lora.{name}", name + " {}") for name in ("rank", "alpha", "targets")),
        common("optimizer.learning_rate", "learning rate {}"),
        common("steps", "{} steps"),
    ]
    return ", ".join(filter(None, parts))


def _counting(config: dict[str, Any]) -> dict[str, Any]:
    """Flatten a config, without the fields that `--from` takes from the earlier adapter."""
    found = flat(config)
    if config.get("start_from") is None:
        return found
    free = ("lora.dropout", "lora.trainable")
    return {f: value for f, value in found.items() if not f.startswith("lora.") or f in free}


def _defaults(kind: Any) -> dict[str, Any]:
    """Return the default of each field of a config class that has one.

    >>> _defaults(TextConfig)["lora"]["rank"], "reference" in _defaults(TextConfig)["model"]
    (8, False)
    """
    hints, found = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            found[field.name] = _defaults(hints[field.name])
        elif field.default is not dataclasses.MISSING:
            found[field.name] = to_dict(field.default)
    return found
