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

Exit status: 0 done, 1 an error that was printed, 2 a command line that cannot be read, 130 stopped
by Ctrl-C. Lines written before an error or a stop are complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from lora_jax import models
from lora_jax.errors import LoraError, listed
from lora_jax.serving import jsonl
from lora_jax.serving.classifier import Classifier, ClassifierTask
from lora_jax.serving.jsonl import JsonLine, LineError
from lora_jax.serving.served_adapters import BASE_NAME, Served, open_adapters
from lora_jax.serving.text_classifier import TextClassifier
from lora_jax.system.console import Console, FileBar, OpeningBar, command, say


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """The options of `lora-jax predict`."""

    adapter: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]PATH")] = ()
    """A run directory of train.py, a folder of run directories, or a folder of lora_jax.save."""
    text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")] = ()
    """A text to classify with every adapter."""
    image: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH")] = ()
    """An image file to classify with every adapter."""
    file: str | None = None
    """JSONL to classify; - is stdin. None: stdin if something is piped in."""
    out: str = jsonl.STANDARD
    """The file for the predictions; - is stdout."""
    base: str | None = None
    """The base model, in the form of model.reference. None: the one that the adapters name."""
    trust_base: bool = False
    """Download the base that the adapters name even if lora_jax does not know its checksum."""
    allow_other_base: bool = False
    """Use adapters on another base than the one that they were trained on."""
    batch_size: int = 64
    """Texts or images in a batch."""
    skip_broken: bool = False
    """Go on after a line that cannot be classified, and write the reason in its place."""
    window: int = 1024
    """Lines that are read ahead and sorted by length. A prediction may wait for this many lines."""


def run(options: PredictOptions, console: Console) -> None:
    """Read examples, classify them and write the predictions; print messages to `console`.

    Args:
      options: the options of the command.
      console: prints the messages.

    Raises:
      LoraError, OSError, ...: an error of the user.
    """
    source, faults = _check(options), list[str]()
    read = jsonl.read(source, keep_broken=options.skip_broken) if source else iter(())
    with jsonl.Writer(options.out, reading=source) as writer:
        with _advice(source, writer):
            window = list(islice(read, options.window))  # before the model: its errors come at once
        with OpeningBar(console) as opening:
            served = open_adapters(
                options.adapter,
                (models.BertConfig, models.VitConfig),
                base=options.base,
                trust_base=options.trust_base,
                allow_other_base=options.allow_other_base,
                opened=opening.count,
            )
            classifier = _classifier(served, options.batch_size)
        say(console, _opening(served, classifier.tasks))
        window, began = window if source else _typed(options, served, classifier), time.monotonic()
        with FileBar(console, source, classifier.unit) as bar, _advice(source, writer):
            while window:
                broken = _broken(window, served, classifier) if options.skip_broken else {}
                faults += broken.values()
                good = [line for line in window if line.where not in broken]
                answers = predict(served, classifier, good, bar.advance) if good else iter(())
                for line in window:
                    error = broken.get(line.where)
                    writer.write([{**line.value, "error": error} if error else next(answers)])
                    writer.last = line.where
                window = list(islice(read, options.window))
    if faults:
        said = f"{len(faults):,} of {writer.count:,} lines are broken"
        say(console, f'{said}, with an "error" in {options.out}:\n{listed(faults)}')
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
            example = classifier.example_of(line, classifier.tasks[_adapter_of(line, served)])
            if classifier.unit == "images":  # which are opened only then
                classifier.arrays([example])
        except LoraError as error:
            found[line.where] = str(error)
    return found


def predict(
    served: Served,
    classifier: Classifier,
    window: Sequence[JsonLine],
    done: Callable[[int], None] = lambda size: None,
) -> Iterator[dict[str, Any]]:
    """Classify lines, and yield each with its answer, in the order of the lines.

    Args:
      served: the adapters and their base.
      classifier: runs them.
      window: the lines; they are sorted by length and put into batches.
      done: called with the size of each line when its scores are there, in any order.

    Yields:
      The fields of a line and its answer.

    Raises:
      LineError: a line names no adapter or an unknown one, or it has no text or image; scores are
        not finite.
      DataError: an image cannot be read.
    """
    ids = [_adapter_of(line, served) for line in window]
    examples = [
        classifier.example_of(line, classifier.tasks[i])
        for line, i in zip(window, ids, strict=True)
    ]

    def found() -> Iterator[tuple[int, NDArray[np.float32]]]:
        for number, scores in classifier.scores(ids, examples):
            done(window[number].size)
            yield number, scores

    for line, i, scores in zip(window, ids, jsonl.in_order(found()), strict=True):
        name = served.names[i]
        if not np.isfinite(scores).all():
            raise LineError(
                f"{line.where}: adapter {name!r} gives scores that are not finite: "
                f"{scores[:5].tolist()}"
            )
        yield {**line.value, "adapter": name, **answer_of(classifier.tasks[i], scores)}


def answer_of(task: ClassifierTask, scores: NDArray[np.float32]) -> dict[str, Any]:
    """Return the fields that are added to a line.

    >>> answer_of(ClassifierTask(("no", "yes"), ("text",), (32,)), np.zeros(2, np.float32))
    {'prediction': 'no', 'probabilities': {'no': 0.5, 'yes': 0.5}}
    >>> answer_of(ClassifierTask((), ("text",), (32,)), np.ones(1, np.float32))
    {'prediction': 1.0}
    """
    if not task.labels:
        return {"prediction": round(float(scores[0]), 6)}
    powers = np.exp((scores - scores.max()).astype(np.float64))
    shares = (powers / powers.sum()).round(6).tolist()
    best = task.labels[int(scores.argmax())]
    return {"prediction": best, "probabilities": dict(zip(task.labels, shares, strict=True))}


def _check(options: PredictOptions) -> str | None:
    """Return the file to read, or None if the examples are on the command line."""
    if not options.adapter:
        raise LoraError("no adapter: give --adapter PATH, a run directory of train.py")
    for flag, value in (("--batch-size", options.batch_size), ("--window", options.window)):
        if value < 1:
            raise LoraError(f"{flag} must be at least 1, got {value}")
    given = [name for name in ("text", "image", "file") if getattr(options, name)]
    if len(given) > 1:
        raise LoraError(f"--{given[0]} and --{given[1]} exclude each other: drop one")
    if given:
        return options.file
    if sys.stdin.isatty():
        raise LoraError(
            "nothing to classify: give --text TEXT, --image PATH or --file FILE, or pipe JSONL in"
        )
    return jsonl.STANDARD


def _classifier(served: Served, batch_size: int) -> Classifier:
    """Return the classifier for this kind of base."""
    if isinstance(served.config, models.VitConfig):
        from lora_jax.serving.image_classifier import ImageClassifier  # needs an extra

        return ImageClassifier(served, batch_size)
    return TextClassifier(served, batch_size)


def _typed(options: PredictOptions, served: Served, classifier: Classifier) -> list[JsonLine]:
    """Return the examples of the command line, each for every adapter."""
    flag, given = ("--text", options.text) if options.text else ("--image", options.image)
    if flag != f"--{classifier.unit[:-1]}":
        raise LoraError(
            f"the adapters classify {classifier.unit}: give --{classifier.unit[:-1]}, not {flag}"
        )
    for name, task in zip(served.names, classifier.tasks, strict=True):
        if len(task.fields) > 1:
            raise LoraError(
                f"adapter {name!r} takes two texts, {task.fields[0]!r} and {task.fields[1]!r}; "
                "give them as fields of a line: --file FILE"
            )
    return [
        JsonLine({task.fields[0]: one, "adapter": name}, f"{flag} {one[:40]!r}")
        for one in given
        for name, task in zip(served.names, classifier.tasks, strict=True)
    ]


def _adapter_of(line: JsonLine, served: Served) -> int:
    name = line.get("adapter", str, "")
    if name == BASE_NAME:
        raise LineError(
            f"{line.where}: {name!r} stands for no adapter, and the base has no head to classify "
            f"with. There are:\n{listed(served.names, 10)}"
        )
    return served.id_of(name or None, line.where)


def _opening(served: Served, tasks: Sequence[ClassifierTask]) -> str:
    kinds = [f"{len(task.labels)} classes" if task.labels else "a number" for task in tasks]
    each = [f"{name}: {kind}" for name, kind in zip(served.names, kinds, strict=True)]
    return f"{len(each)} adapter{'s' * (len(each) > 1)} on {served.reference}\n{listed(each, 10)}"


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


main = command(
    PredictOptions,
    "lora-jax predict",
    __doc__,
    lambda given: run(given, Console(stderr=True)),
    adding=True,
)
