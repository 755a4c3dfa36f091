"""Classify texts or images with adapters that train.py has trained, many in one batch.

    lora-jax predict --adapter runs/reviews --text "A warm, funny film."
    lora-jax predict --adapter runs/reviews --file in.jsonl --out out.jsonl
    lora-jax predict --adapter runs/reviews --adapter topics=other/best --file in.jsonl
    lora-jax predict --adapter runs/flowers --image a.jpg --image b.png

A line of the file is {"text": "...", "adapter": "reviews"}. If there is only one adapter, a line
need not name it. The text is in the fields that the adapter was trained on. An image is given by
the path of its file, in the field "image" or the one that the adapter was trained on. Each line is
written again, in the same order, with its own fields and

    adapter          the adapter that was used
    prediction       the predicted class, or the predicted number
    probabilities    the probability of every class

A line that cannot be classified ends the command. With --skip-broken it is written again with the
reason as its "error", so that there is still one line for each.

Lines written before an error or a stop are complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Annotated

import tyro

from lora_jax.cli.adapter_options import AdapterOptions, FileBar, opening, skipped
from lora_jax.errors import LoraError
from lora_jax.serving import jsonl
from lora_jax.serving.classifier import Classifier, adapter_of, predict
from lora_jax.serving.jsonl import JsonLine
from lora_jax.serving.served_adapters import Served
from lora_jax.serving.server import Server
from lora_jax.system.console import Console, command, say


@dataclasses.dataclass(frozen=True)
class PredictOptions(AdapterOptions):
    """The options of `lora-jax predict`."""

    text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")] = ()
    """A text to classify with every adapter."""
    image: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH")] = ()
    """An image file to classify with every adapter."""
    out: str = jsonl.STANDARD
    """The file for the predictions; - is stdout."""
    batch_size: int = 64
    """Texts or images in a batch."""
    window: int = 1024
    """Lines that are read ahead and sorted by length. A prediction may wait for this many lines."""


def run(options: PredictOptions, _: Console, console: Console) -> None:
    """Read examples, classify them and write the predictions; print messages to `console`."""
    source, faults = options.source(("text", "image"), ("batch_size", "window")), list[str]()
    if not options.adapter:
        raise LoraError("no adapter: give --adapter PATH, a run directory of train.py")
    read = jsonl.read(source, keep_broken=options.skip_broken) if source else iter(())
    with jsonl.Writer(options.out, reading=source) as writer:
        with _advice(source, writer):
            window = list(islice(read, options.window))  # before the model: its errors come at once
        served = options.served("predict", console)
        classifier = Server(served, batch_size=options.batch_size).classifier
        tasks = classifier.tasks.values()
        kinds = [f"{len(task.labels)} classes" if task.labels else "a number" for task in tasks]
        each = [f"{name}: {kind}" for name, kind in zip(served.names, kinds, strict=True)]
        say(console, opening(served, each))
        window, began = window if source else _typed(options, served, classifier), time.monotonic()
        with FileBar(console, source, classifier.unit) as bar, _advice(source, writer):
            while window:
                broken = _broken(window, served, classifier) if options.skip_broken else {}
                faults += broken.values()
                good = [line for line in window if line.where not in broken]
                answers = predict(served, classifier, good, bar.count) if good else iter(())
                for line in window:
                    error = broken.get(line.where)
                    writer.write([{**line.value, "error": error} if error else next(answers)])
                    writer.last = line.where
                window = list(islice(read, options.window))
    if faults:
        say(console, skipped(faults, writer.count, options.out))
    if writer.count == len(faults):
        raise LoraError(f"{source} has no line that can be classified")
    say(console, _closing(classifier, writer.count - len(faults), time.monotonic() - began))


@contextlib.contextmanager
def _advice(source: str | None, writer: jsonl.Writer) -> Iterator[None]:
    """Add to an error in a line of the block what is written, and how to go on."""
    try:
        yield
    except LoraError as error:
        if source is None:
            raise
        done = f"{writer.count:,} rows, up to {writer.last}, are" if writer.count else "Nothing is"
        raise LoraError(
            f"{error}\n{done} written to {writer.path}. Mend it and go on after these rows, into "
            "another --out; or start again with --skip-broken, which goes on after a broken line"
        ) from error


def _broken(window: Sequence[JsonLine], served: Served, classifier: Classifier) -> dict[str, str]:
    """Return place -> error of the lines that cannot be classified."""
    found = {}
    for line in window:
        try:
            if line.fault is not None:
                raise line.fault
            example = classifier.example_of(line, classifier.tasks[adapter_of(line, served)])
            if classifier.unit == "images":  # which are opened only then
                classifier.arrays([example])
        except LoraError as error:
            found[line.where] = str(error)
    return found


def _typed(options: PredictOptions, served: Served, classifier: Classifier) -> list[JsonLine]:
    """Return the examples of the command line, each for every adapter."""
    flag, given = ("--text", options.text) if options.text else ("--image", options.image)
    if flag != f"--{classifier.unit[:-1]}":
        raise LoraError(
            f"the adapters classify {classifier.unit}: give --{classifier.unit[:-1]}, not {flag}"
        )
    for name, task in zip(served.names, classifier.tasks.values(), strict=True):
        if len(task.fields) > 1:
            raise LoraError(
                f"adapter {name!r} takes two texts, {task.fields[0]!r} and {task.fields[1]!r}; "
                "give them as fields of a line: --file FILE"
            )
    return [
        JsonLine({task.fields[0]: one, "adapter": name}, f"{flag} {one[:40]!r}")
        for one in given
        for name, task in zip(served.names, classifier.tasks.values(), strict=True)
    ]


def _closing(classifier: Classifier, count: int, seconds: float) -> str:
    compiling, programs = sum(classifier.compiled.values()), len(classifier.compiled)
    first, *more = classifier.facts(count)
    said = [
        f"{first}, in {seconds:.1f} s, "
        f"of which {compiling:.1f} s to compile {programs} program{'s' * (programs != 1)}"
    ]
    if count > classifier.batch_size:
        rate = count / max(seconds - compiling, 1e-9)
        said.append(f"{rate:,.0f} {classifier.unit}/s when compiled")
    return "\n".join([*said, *more])


main = command("predict", PredictOptions, __doc__, run, adding=True)
