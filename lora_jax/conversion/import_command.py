"""Make a PEFT folder a run that predict, generate, report and train.py --from take.

    lora-jax import adapter --base hub:org/name --out runs/imported
    lora-jax import adapter --base models/bert --out runs/imported --labels negative positive

The folder is one that PEFT (or `lora-jax export --format peft`) wrote. What it says is applied, or
is an error that names the key. Its classification head comes with it; a base that the folder alone
names is opened if it is a folder of this machine, and not fetched.

The run's path goes to stdout. Exit status: 0 done, 1 an error that was printed, 2 a command line
that cannot be read, 130 stopped by Ctrl-C; nothing half-written is left.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro
from rich.console import Console

from lora_jax.adapters import count
from lora_jax.console import guarded, say
from lora_jax.conversion import peft_run
from lora_jax.errors import LoraError, listed

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """The command line."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """A PEFT folder: adapter_config.json and adapter_model.safetensors."""
    out: str
    """The run directory that is made."""
    base: str | None = None
    """The model, in the form of model.reference. None: the one that the folder names, if it is a
    folder of this machine."""
    labels: tuple[str, ...] = ()
    """Classifiers: the names of the classes in order. Empty: those of the base, or LABEL_0 and so
    on."""
    text_fields: tuple[str, ...] = ()
    """Classifiers: the field with the text, or the two fields of a pair. Empty: text."""
    lengths: tuple[int, ...] = ()
    """Classifiers: lengths of batches in tokens; a text is cut to the last one. Empty: 32 to 512,
    doubling."""
    pooling: Literal["mean", "cls", "roberta_head"] | None = None
    """Classifiers: what the head reads. None: as the tensors tell."""
    scan_layers: bool = False
    """Read the base with its layers in a stack, for runs with model.scan_layers."""
    dtype: Dtype = "float32"
    """Of the computation."""
    param_dtype: Dtype = "float32"
    """Of the base's parameters; the adapter stays in float32."""
    overwrite: bool = False
    """Replace what an earlier import has written to RUN."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = tyro.cli(
        ImportOptions,
        prog="lora-jax import",
        description=__doc__,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return guarded(lambda: run(options, Console(stderr=True)))


def run(options: ImportOptions, console: Console) -> None:
    """Read, check and write; what was found goes to `console`, the run's path to stdout.

    Raises:
      LoraError, models.ModelError, OSError: a user's error; nothing is written then.
    """
    out = pathlib.Path(options.out).expanduser()
    _check_out(out, options.overwrite)
    model = {name: getattr(options, name) for name in ("scan_layers", "dtype", "param_dtype")}
    with console.status("opening the base ..."):
        found = peft_run.read(
            options.folder,
            peft_run.Said(
                options.base,
                model,
                options.pooling,
                options.labels,
                options.text_fields,
                options.lengths,
            ),
        )
        peft_run.write(out, found)
    layout, parameters, trainable = found.adapter
    trained = f", and {count(dict(trainable)):,} trained in full" if trainable else ""
    say(
        console,
        "\n".join(
            [
                f"{options.folder} on {found.reference}: {len(layout.targets)} adapted parameters "
                f"with {count(parameters):,} numbers{trained}",
                *found.notes,
            ]
        ),
    )
    say(Console(), str(out))


def _check_out(out: pathlib.Path, overwrite: bool) -> None:
    """Raise unless the run directory is free, or holds an import that may be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise LoraError(f"{out} is a file; choose another --out")
    inside = sorted(p.name for p in out.iterdir())
    if not inside:
        return
    adapters = out / "adapters"
    saved = {p.name.partition(".")[0] for p in adapters.iterdir()} if adapters.is_dir() else {""}
    if not set(inside) <= {"adapters", "report"} or not saved <= {"best"}:
        raise LoraError(
            f"{out} holds what no import wrote; choose another --out. It has:\n{listed(inside, 10)}"
        )
    if not overwrite:
        raise LoraError(f"{out} exists; choose another --out, or give --overwrite to replace it")
