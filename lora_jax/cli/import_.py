"""Turn a PEFT folder into a run, for predict, generate, report and train.py --from.

    lora-jax import adapter --base hub:org/name --out runs/imported
    lora-jax import adapter --base models/bert --out runs/imported --labels negative positive

PEFT or `lora-jax export --format peft` wrote the folder. Every setting in it is applied, or is an
error that names the key. Its classification head is imported too. Without --base, the base that the
folder names is opened if it is a folder on this machine; it is never fetched.

The run's path goes to stdout. After a kill or a full disk, the run has its adapter whole or not at
all; the same command deletes what is incomplete and goes on.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from lora_jax import checkpoint
from lora_jax.adapters import count
from lora_jax.checkpoint import adapter_path, storage
from lora_jax.errors import LoraError, listed
from lora_jax.exchange import peft_run
from lora_jax.system import run_lock
from lora_jax.system.console import Console, command, say
from lora_jax.system.whole_files import check_links

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """The options of the command line."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """A PEFT folder: adapter_config.json and adapter_model.safetensors."""
    out: str
    """The run directory to write."""
    base: str | None = None
    """The base model, in the form of model.reference. None: the base that the folder names, if it
    is a folder on this machine."""
    labels: tuple[str, ...] = ()
    """Classifiers: the names of the classes in order. Empty: the base's own, or LABEL_0 and so
    on."""
    text_fields: tuple[str, ...] = ()
    """Classifiers: the field with the text, or the two fields of a pair. Empty: text."""
    lengths: tuple[int, ...] = ()
    """Classifiers: lengths of batches in tokens; a text is truncated to the last one. Empty: 32 to
    512, doubling."""
    pooling: Literal["mean", "cls", "roberta_head"] | None = None
    """Classifiers: the input of the head. None: inferred from the tensors."""
    scan_layers: bool = False
    """Stack the layers of the base, for runs with model.scan_layers."""
    dtype: Dtype = "float32"
    """The dtype of the computation."""
    param_dtype: Dtype = "float32"
    """The dtype of the base's parameters; the adapter stays in float32."""
    overwrite: bool = False
    """Replace the result of an earlier import."""


def run(options: ImportOptions, console: Console, aside: Console) -> None:
    """Read, check and write. Findings go to `aside`, the run's path to `console`."""
    out = pathlib.Path(options.out).expanduser()
    if min(options.lengths, default=1) < 1:
        raise LoraError(f"--lengths must be at least 1, got {options.lengths}")
    _check_out(out, options.overwrite)  # before the base is opened, which takes long
    model = {name: getattr(options, name) for name in ("scan_layers", "dtype", "param_dtype")}
    texts = options.labels, options.text_fields, options.lengths
    settings = peft_run.ImportSettings(options.base, model, options.pooling, *texts)
    with aside.status("opening the base ..."):
        found = peft_run.read(options.folder, settings)
        busy = LoraError(f"another process is writing {out}; wait for it or choose another --out")
        with run_lock.hold(out, busy):
            _check_out(out, options.overwrite)
            best, notes = out / "adapters/best", {"fingerprint": found.fingerprint}
            checkpoint.save(best, found.adapter, about=found.about, overwrite=True, **notes)
    reference = found.about["model"]["reference"]
    layout, parameters, trainable = found.adapter
    trained = f", and {count(dict(trainable)):,} trained in full" if trainable else ""
    text = (
        f"{options.folder} on {reference}: {len(layout.targets)} adapted parameters with "
        f"{count(parameters):,} numbers{trained}"
    )
    say(aside, "\n".join([text, *found.notes]))
    say(console, str(out))


def _check_out(out: pathlib.Path, overwrite: bool) -> None:
    """Raise `LoraError` unless the run directory is free or holds a replaceable import."""
    if not out.exists():
        return
    if not out.is_dir():
        raise LoraError(f"{out} is a file; choose another --out")
    check_links(out, ["adapters"])
    inside = sorted(p.name for p in out.iterdir())
    if inside in ([], ["lock"]):
        return
    adapters = out / "adapters"
    saved = {p.name.partition(".")[0] for p in adapters.iterdir()} if adapters.is_dir() else {""}
    if not set(inside) <= {"adapters", "report", "lock"} or not saved <= {"best"}:
        raise LoraError(
            f"{out} holds what no import wrote; choose another --out. It has:\n{listed(inside, 10)}"
        )
    whole = adapter_path.adapter_in(storage.folder_at(out)) is not None  # else of a killed import
    if whole and not overwrite:
        raise LoraError(f"{out} exists; choose another --out, or give --overwrite to replace it")


main = command("import", ImportOptions, __doc__, run)
