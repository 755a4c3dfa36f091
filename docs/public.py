"""List the public names of the package: each of them has a page in the API reference.

python -m docs.public        writes them, with their parameters, as the record of this version
"""

from __future__ import annotations

import importlib
import inspect
import pathlib
import re
from collections.abc import Iterator

import flax.linen as nn

import lora_jax

# All names that these modules export are public: `from a import b as b`, or defined in the file.
MODULES = (
    "lora_jax",
    "lora_jax.paths",
    "lora_jax.frozen",
    "lora_jax.base",
    "lora_jax.updates",
    "lora_jax.multi",
    "lora_jax.multi.moe",
    "lora_jax.checkpoint",
    "lora_jax.analysis",
    "lora_jax.exchange.peft",
    "lora_jax.exchange.gguf",
    "lora_jax.exchange.mlx",
    "lora_jax.exchange.loralib",
    "lora_jax.exchange.openpi",
    "lora_jax.foreign",
    "lora_jax.models.hf_module",
    "lora_jax.models",
    "lora_jax.data",
    "lora_jax.planner",
)

# Modules of which only these names are meant for users.
NAMES = {
    "lora_jax.sharding": ("partition_specs", "specs", "place", "automatic", "gathered"),
    "lora_jax.primitives.table": ("register",),
    "lora_jax.primitives.kernel": ("product",),
    "lora_jax.primitives.views": ("of_one",),
    "lora_jax.serving": ("open",),
    "lora_jax.serving.server": ("Server", "Answer"),
    "lora_jax.serving.texts": ("Texts",),
    "lora_jax.serving.sampling": ("Sampling",),
    "lora_jax.training": ("run",),
    "lora_jax.training.finished_run": ("FinishedRun",),
    "lora_jax.training.config": (
        "Config",
        "LoraConfig",
        "OptimizerConfig",
        "MeshConfig",
        "ProcessesConfig",
    ),
    "lora_jax.training.text": ("TextConfig", "ModelConfig", "SamplesConfig"),
    "lora_jax.training.images": ("ImageConfig",),
    "lora_jax.training.workload": ("Workload", "Common"),
    "lora_jax.sweeps.config": ("Member", "GroupConfig"),
    "lora_jax.sweeps.sweep": ("SweepConfig",),
    "lora_jax.sweeps.group": ("Group",),
    "lora_jax.report.document": ("Report", "Section", "Table", "Figure"),
    "lora_jax.report.render": ("write",),
    "lora_jax.system.extras": ("MissingExtraError",),
}

_EXPORT = re.compile(r"^from \S+ import (\w+) as \1$", re.MULTILINE)


def names() -> dict[str, object]:
    """Return every public name, as `module.name`, with its value. Modules are left out."""
    found: dict[str, object] = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        exported = _EXPORT.findall(inspect.getsource(module)) or _defined(module)
        found |= {f"{module_name}.{name}": getattr(module, name) for name in exported}
    for module_name, some in NAMES.items():
        module = importlib.import_module(module_name)
        found |= {f"{module_name}.{name}": getattr(module, name) for name in some}
    return {name: value for name, value in found.items() if not inspect.ismodule(value)}


def _defined(module: object) -> list[str]:
    """Return the public functions and classes that a module defines itself."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__  # type: ignore[attr-defined]
    ]


RECORD = pathlib.Path(__file__).parent / "api" / f"public_{lora_jax.__version__}.txt"


def signatures() -> list[str]:
    """Return a line for each public function, class, method and value, with its parameters.

    A parameter with a default ends with `=`. Neither annotations nor defaults are in a line,
    because their text depends on the versions of Python and of other packages.
    """
    found = {}
    for name, value in names().items():
        found[name] = name + _parameters(value)
        if inspect.isclass(value):
            found |= {f"{name}.{part}": line for part, line in _members(name, value)}
    return sorted(found.values())


def _members(name: str, kind: type) -> Iterator[tuple[str, str]]:
    for part, value in vars(kind).items():
        if part.startswith("_") or part == "parent":
            continue
        if inspect.isfunction(value):
            yield part, f"{name}.{part}{_parameters(value)}"
        elif isinstance(value, property):
            yield part, f"{name}.{part}"


def _parameters(value: object) -> str:
    if not callable(value):
        return ""
    try:
        found = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return "(...)"
    own = ("self", "parent", "name") if _is_module(value) else ("self",)
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    each = [
        f"{stars.get(p.kind, '')}{p.name}{'' if p.default is p.empty else '='}"
        for p in found
        if p.name not in own
    ]
    return f"({', '.join(each)})"


def _is_module(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module)


if __name__ == "__main__":
    RECORD.write_text("\n".join(signatures()) + "\n")
    print(f"wrote {RECORD}")
