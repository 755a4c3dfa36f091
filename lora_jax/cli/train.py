"""The command line of train.py: `--config file.py[:name]`, then any field of the config in it.

For a group, these are the group's own fields and each member's: `--<member>.lora.rank 4`.

tyro reads the fields from the dataclasses: it refuses unknown fields and names the nearest, checks
types, and writes `--help` from the docstrings.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated, Any, NoReturn

import tyro

from lora_jax.errors import listed, nearest
from lora_jax.planner.options import PlanOptions
from lora_jax.sweeps.config import GroupConfig, GroupOptions
from lora_jax.sweeps.sweep import SweepConfig
from lora_jax.system.console import read_options, refuse_empty
from lora_jax.system.options_help import Option
from lora_jax.training import processes
from lora_jax.training.config import Config, ConfigError, check_lora_counts, check_start
from lora_jax.training.config_file import blaming

Runnable = Config | GroupOptions


def main(arguments: Sequence[str]) -> NoReturn:
    """Run train.py, and end the process. The wheel has it inside the package, a checkout above."""
    package = pathlib.Path(__file__).resolve().parents[1]
    path = next(p for p in (package / "train.py", package.parent / "train.py") if p.is_file())
    script = _module("train", path)
    processes.end(lambda: script.main(arguments, "lora-jax train"))


def parse(
    arguments: Sequence[str], default: str, root: pathlib.Path, program: str = "train.py"
) -> tuple[str, Config | GroupConfig, PlanOptions]:
    """Return the name of the config, the config as the arguments change it, and the plan's options.

    `default` is the config file if there is no `--config`; `root` is searched for a path that does
    not exist here. A sweep is returned as the group of its members.
    """
    refuse_empty(arguments)  # before its config is run
    arguments, reference = _reference(arguments, default)
    name, config = load(reference, root)
    members = config.members if isinstance(config, GroupConfig) else ()
    asked = bool({"--help", "-h", "--help-all"} & set(arguments))
    shown = members[:1] if asked else members
    fields = [
        ("config", Annotated[str, tyro.conf.arg(help=_HELP)], reference),
        _field("run", "", config),
        _field("plan", "", PlanOptions(), "Before a run: what it would need."),
        *(_field(f"member{i}", member.name, member.config) for i, member in enumerate(shown)),
    ]
    about = f"{_about(reference, [member.name for member in members])}\n{_VARIABLES}"
    kind: Any = dataclasses.make_dataclass("CommandLine", fields)
    brief = functools.partial(_brief, program, config, about.removesuffix(f"\n{_VARIABLES}"))
    given = read_options(kind, program, about, arguments, brief=brief)
    run = given.run
    if members:
        changed = [
            dataclasses.replace(member, config=getattr(given, f"member{i}"))
            for i, member in enumerate(members)
        ]
        run = dataclasses.replace(run, members=tuple(changed))
    for before, after in _pairs(config, run):
        if before.lora != after.lora:
            check_lora_counts(after, "the command line")
            check_start(before, after)
    if not isinstance(run, GroupOptions):
        return name, run, given.plan
    for option, asked in (("--plan", given.plan.plan), ("--dry-run", given.plan.dry_run)):
        if asked:
            raise ConfigError(f"{option} is for one run: give it with the config of one member")
    return name, run.expand(), given.plan


def _pairs(before: Runnable, after: Runnable) -> list[tuple[Config, Config]]:
    """Return each run of the file, with the same run after the changes of the command line."""
    match before, after:
        case Config(), Config():
            return [(before, after)]
        case SweepConfig(), SweepConfig():
            return [(before.base, after.base)]
        case GroupConfig(), GroupConfig():
            both = zip(before.members, after.members, strict=True)
            return [(one.config, two.config) for one, two in both]
    raise TypeError(f"{type(before)} and {type(after)}")


def _field(name: str, prefix: str, value: Any, about: str = "") -> tuple[str, Any, Any]:
    """Return a field of the command line, whose own fields begin with `--<prefix>.`."""
    kind: Any = type(value)
    return (
        name,
        Annotated[kind, tyro.conf.arg(name=prefix, help=about)],
        dataclasses.field(default=value),
    )


def _about(reference: str, members: Sequence[str]) -> str:
    if not members:
        return f"Train with {reference}. Every field of it can be set here."
    return (
        f"Train with {reference}: {', '.join(members)}, together.\n"
        f"Every field of each can be set; those of {members[0]} are listed."
    )


# The short help: `--help-all` has all options, with their whole meaning.
EXAMPLES = """
--steps 50 --lora.rank 4 --run-dir runs/small
--config configs/smollm2_definitions.py
--data.source train=a.csv,validation=b.csv --data.label-field topic
--plan --model llama3-8b"""
MAIN = """
Model:
model.reference   folder, file.gguf, hub:org/name, pypi:name
model.dtype   float32 or bfloat16
model.quantize   nf4, int8, int4, fp8, or as it is stored
Data:
data.source   a name, data/{split}.jsonl or train=a.csv
data.label-field   to classify: the field with the label
data.prompt   to write: the text before, "{word}:"
data.max-length   tokens of the longest example
data.batch-size   rows of a batch
Adapters:
lora.rank   r of B A
lora.alpha   the update is multiplied by alpha / rank
lora.targets   patterns, "**/query/kernel", or all-linear
lora.kind   lora, dora, oft, miss, ... (docs/kinds.md)
Training:
steps   optimizer steps
optimizer.learning-rate   at its peak
evaluate-every   an evaluation each, which picks the best
from   the run or adapter to begin with
run-dir   the same one goes on with its run
Many runs:
grid   the values to combine: lora.rank=1,2,4
only   the members to train
Devices:
mesh.fsdp   devices that share one copy of the weights
mesh.tensor   devices that share each product
Before a run:
dry-run   take one step, and leave no file
plan   what it needs, also on other devices"""


def _brief(program: str, run: Runnable, about: str, found: Sequence[Option], width: int) -> str:
    """Return a help of one screen: examples, and the main options of each group."""
    mine = next(kind for kind in type(run).__mro__ if kind.__module__.startswith("lora_jax."))
    own = {f.name for f in dataclasses.fields(run)} - {f.name for f in dataclasses.fields(mine)}
    known = {one.name.removeprefix("--"): one for one in found}
    text = "".join(
        f"\n{key}   {one.about.split('. ')[0]}"
        for key, one in known.items()
        if key.replace("-", "_") in own
    )
    lines = [about, *(f"  {program} {words}" for words in EXAMPLES.split("\n")[1:]), "", "Own:"]
    for line in f"{text}{MAIN}".split("\n")[1:]:
        name, _, said = line.partition("   ")
        ends = [key for key in known if key == name or key.endswith(f".{name}")]
        if ends:
            key = min(ends, key=len)  # of the sweep, rather than of its members
            value = known[key].value if key == name and len(known[key].value) < 10 else ""
            lines.append(f"  {f'--{key} {value}':33} {said}"[:width])
        elif not said:
            lines[-1:] = [line] if lines[-1].endswith(":") else [lines[-1], line]
    return "\n".join([*lines, "", f"{program} --help-all explains all {len(found)} options."])


_VARIABLES = "`lora-jax --help` lists the environment variables that every command reads."
_HELP = "The config file; `file.py:name` selects the value `name` in it instead of `config`."


def _reference(arguments: Sequence[str], default: str) -> tuple[list[str], str]:
    """Return the arguments, with `--model NAME` as a model's known shape, and the config file.

    >>> _reference(["--plan", "--model", "llama3-8b"], "configs/own.py")
    (['--plan', '--model.reference', 'shape:llama3-8b'], 'configs/known_shape.py')
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    model = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    model.add_argument("--model")
    given, rest = model.parse_known_args(list(arguments))
    if given.model is not None:
        default = "configs/known_shape.py"
        rest += ["--model.reference", f"shape:{given.model}"]
    return rest, parser.parse_known_args(rest)[0].config or default


def load(reference: str, root: pathlib.Path) -> tuple[str, Runnable]:
    """Load the config `path.py` or `path.py:name`, and return its name for the run directory.

    A path that does not exist in the working directory is searched for in `root`.
    """
    text, _, attribute = reference.partition(":")
    path = _find(pathlib.Path(text), root)
    with blaming(str(path)):
        module = _module(f"config_{path.stem}", path)
    config = getattr(module, attribute or "config", None)
    if not isinstance(config, Runnable):
        there = [name for name, value in vars(module).items() if isinstance(value, Runnable)]
        what = "" if config is None else f" (it is of the type {type(config).__name__})"
        raise ConfigError(
            f"{text} has no config named {attribute or 'config'!r}{what}: a config file holds "
            "`config = Config(...)` (lora_jax.training.config), "
            + (f"and this one holds\n{listed(there, 20)}" if there else "and this one holds none")
        )
    stem = pathlib.Path(text).stem
    return (f"{stem}-{attribute}" if attribute else stem), config


def _find(path: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
    for candidate in (path, root / path):
        if candidate.is_file():
            return candidate
    folder = next((p for p in (path.parent, root / path.parent) if p.is_dir()), root)
    files = {p.resolve(): p for p in (*(root / "configs").glob("*.py"), *folder.glob("*.py"))}
    there = sorted(str(p) for p in files.values() if p.name not in ("__init__.py", "train.py"))
    raise ConfigError(
        f"no config file {path}; nearest:\n{listed(nearest(str(path), there, n=1))}\n"
        f"there are:\n{listed(there, limit=20)}"
    )


def _module(name: str, path: pathlib.Path) -> ModuleType:
    """Run a file as a module, and register it so that its dataclasses can be resolved."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
