"""Compare LoRA with other methods at matched parameters: the paper's Tables 2 and 3, Figure 2."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence

from experiments.paper import published, seed_scatter, settings, sweeps
from experiments.paper.experiments import Task
from experiments.paper.settings import Setting
from experiments.shared import spreads
from lora_jax.report import formatting
from lora_jax.report.document import Block, Figure, Panel, Paragraph, Section, Table
from lora_jax.sweeps import member_names

METHODS = (
    "full",
    "top_layers",
    "bitfit",
    "head",
    "houlsby",
    "pfeiffer",
    "adapter_drop",
    "lin",
    "prefix_embedding",
    "prefix_layer",
    "lora",
)
LORA = "lora"
FILE = "experiments/paper/configs/methods.py"
_RATE = "optimizer.learning_rate"
# Column of the paper's tables -> its name in our tables, with the models.
_PAPER = {"SST-2": "SST-2, RoBERTa", "BLEU": "BLEU, GPT-2 medium"}


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A method at each of its learning rates.

    rates: all rates that were tried, ascending, including those without a finished run.
    settings: rate -> the finished runs.
    """

    method: str
    rates: tuple[float, ...]
    settings: dict[float, Setting]

    @property
    def rate(self) -> float:
        """The learning rate with the best mean validation score.

        Only rates with the most seeds count; of two equal ones it is the lower.
        """
        most = max(len(one.runs) for one in self.settings.values())
        whole = [rate for rate in sorted(self.settings) if len(self.settings[rate].runs) == most]
        return max(whole, key=lambda rate: _known(self.settings[rate].mean("validation")))

    @property
    def best(self) -> Setting:
        """The finished runs at `rate`."""
        return self.settings[self.rate]

    @property
    def edge(self) -> str:
        """Whether `rate` is the "lowest" or "highest" that was tried; "" if it is neither."""
        if len(self.rates) < 2 or self.rate not in (self.rates[0], self.rates[-1]):
            return ""
        return "lowest" if self.rate == self.rates[0] else "highest"

    @property
    def test(self) -> list[float]:
        """The test score of each seed at `rate`."""
        return self.best.scores("test")


def tasks(folder: pathlib.Path) -> Sequence[Task]:
    """Return one command for each method, which runs a group of nine runs."""
    return sweeps.tasks(folder, FILE, METHODS)


def sections(folder: pathlib.Path) -> Sequence[Section]:
    """Return the section about the runs in the folder; none if there are no runs."""
    runs = sweeps.runs(folder, METHODS)
    notes = sweeps.notes(tasks(folder), runs)
    found = tuned(runs)
    blocks: list[Block] = []
    if found:
        blocks = [*_results(found), *_differences(found), _rates(found)]
    return (Section("LoRA and other methods", (*blocks, *notes)),) if runs else ()


def tuned(runs: sweeps.Runs) -> list[Tuned]:
    """Return every method that has a finished run, in the order of the runs."""
    found = []
    for method, lefts in runs.items():
        rates = sorted({float(left.config["optimizer"]["learning_rate"]) for left in lefts})
        done = {float(one.config[_RATE]): one for one in settings.settings(lefts)}
        if done:
            found.append(Tuned(method, tuple(rates), done))
    return found


def _known(value: float) -> float:
    """Replace NaN by minus infinity, so that it is never the largest."""
    return value if math.isfinite(value) else -math.inf


def _results(found: Sequence[Tuned]) -> list[Block]:
    rows = tuple(
        (
            one.method,
            f"{one.best.trained:,}",
            member_names.number(one.rate) + (f" ({one.edge})" if one.edge else ""),
            spreads.text(one.best.scores("validation")),
            spreads.text(one.test),
            str(len(one.best.runs)),
            *(_of_paper(one.method, column) for column in _PAPER),
        )
        for one in found
    )
    columns = ("method", "trained", "learning rate", "validation", "test", "seeds")
    paper = tuple(f"paper: {name}" for name in _PAPER.values())
    marked = next((i for i, one in enumerate(found) if one.method == LORA), None)
    table = Table(
        "Each method at the learning rate with the best mean validation accuracy: accuracy in per "
        "cent, mean ± standard deviation over the seeds. The trained parameters include the new "
        "head. The last columns have the paper's scores (its Tables 2 and 3), with the paper's "
        "numbers of trained parameters in millions.",
        (*columns, *paper),
        rows,
        ("method", "learning rate", *paper),
        marked,
    )
    points = [
        seed_scatter.NamedPoint(one.method, one.best.trained, 100 * spreads.mean(one.test),
                      100 * _finite(spreads.spread(one.test)))
        for one in found
        if one.test
    ]  # fmt: skip
    blocks: list[Block] = [table]
    if points:
        said = "; ".join(f"{p.name} {p.trained:,}: {p.height:.1f}" for p in points)
        panel = Panel(
            "methods",
            f"Test accuracy in per cent by trained parameters: {said}",
            seed_scatter.draw(points, "trained parameters", "test accuracy in per cent"),
        )
        caption = (
            "Test accuracy over trained parameters, mean and standard deviation over the seeds "
            "(the paper's Figure 2). Points with nearly equal numbers are moved apart."
        )
        blocks.append(Figure(caption, (panel,)))
    edges = [f"{one.method} (the {one.edge})" for one in found if one.edge]
    if edges:
        blocks.append(
            Paragraph(
                f"The best learning rate of {', '.join(edges)} is at the end of the rates that "
                "were tried, so a better one may exist outside of them."
            )
        )
    return blocks


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _of_paper(method: str, column: str) -> str:
    """Format the paper's scores: 94.8 (base, 125M), 96.4 (large, 355M)."""
    rows = [row for row in published.METHODS.get(method, ()) if column in row.scores]
    return ", ".join(f"{row.scores[column]:.1f} ({_size(row)})" for row in rows) or formatting.NONE


def _size(row: published.Scored) -> str:
    """Return the millions of parameters, with the model if the column has several."""
    model = row.model.removeprefix("RoBERTa ") + ", " if row.model.startswith("RoBERTa") else ""
    return f"{model}{row.millions:g}M"


def _of_paper_to_lora(method: str, column: str) -> list[tuple[float, published.Scored]]:
    """Return the paper's differences to its LoRA on the same model, in the paper's units."""
    lora = {row.model: row.scores for row in published.METHODS[LORA]}
    return [
        (round(row.scores[column] - lora[row.model][column], 2), row)
        for row in published.METHODS.get(method, ())
        if column in row.scores and column in lora.get(row.model, {})
    ]


def _differences(found: Sequence[Tuned]) -> list[Block]:
    """Return the differences to LoRA as a table and in words, with the paper's differences."""
    lora = next((one for one in found if one.method == LORA), None)
    if lora is None or not lora.test:
        return []
    others = [one for one in found if one.method != LORA and one.test]
    if not others:
        return []
    known = {one.method: spreads.difference(one.test, lora.test) for one in others}
    ordered = sorted(known.items(), key=lambda item: -item[1].value)
    rows = tuple(
        (
            method,
            f"{100 * one.value:+.1f}",
            f"{100 * one.error:.1f}" if math.isfinite(one.error) else formatting.NONE,
            *(
                ", ".join(f"{d:+.1f} ({_size(row)})" for d, row in _of_paper_to_lora(method, name))
                or formatting.NONE
                for name in _PAPER
            ),
        )
        for method, one in ordered
    )
    paper = tuple(f"paper: {name}" for name in _PAPER.values())
    limit = lora.best.config.get("data.test_limit")
    table = Table(
        "Test accuracy minus LoRA's, in points, and the standard error of this difference of "
        "means, from the spread over the seeds. The last columns have the paper's differences, "
        "each to its LoRA on the same model. All methods are tested on the same "
        f"{'' if limit is None else f'{limit:,} '}rows of the test split; the error does not "
        "include the choice of these rows.",
        ("method", "minus LoRA", "standard error", *paper),
        rows,
        ("method", *paper),
    )
    return [table, Paragraph(_agreement(known))]


def _agreement(known: dict[str, spreads.Difference]) -> str:
    """Describe how many differences are clear, and how many have the sign of the paper's."""
    below = [m for m, one in known.items() if one.beyond and one.value < 0]
    above = [m for m, one in known.items() if one.beyond and one.value > 0]
    single = [m for m, one in known.items() if not math.isfinite(one.error)]
    within = [m for m in known if m not in (*below, *above, *single)]
    text = (
        f"More than {spreads.BEYOND:g} standard errors below LoRA: {_listed(below)}; above LoRA: "
        f"{_listed(above)}; closer than that: {_listed(within)}"
    )
    text += f"; with too few seeds for an error: {_listed(single)}." if single else "."
    for column, name in _PAPER.items():
        theirs = [(m, d) for m in known for d, _ in _of_paper_to_lora(m, column)]
        clear = [(m, d) for m, d in theirs if known[m].beyond]
        if theirs:
            text += f" The paper has {len(theirs)} of these differences on {name}: "
            text += f"{_signs(theirs, known)}"
            text += f"; where our difference is clear, {_signs(clear, known)}." if clear else "."
    return text


def _listed(methods: Sequence[str]) -> str:
    return f"{len(methods)} ({', '.join(methods)})" if methods else "none"


def _signs(theirs: Sequence[tuple[str, float]], known: dict[str, spreads.Difference]) -> str:
    """Count the paper's differences that have the same sign as ours."""
    products = [d * known[method].value for method, d in theirs]
    same, other = (sum(p > 0 for p in products), sum(p < 0 for p in products))
    zero = len(products) - same - other
    return f"{same} with our sign, {other} with the other" + (f", {zero} are zero" if zero else "")


def _rates(found: Sequence[Tuned]) -> Table:
    """Return the table of the validation accuracy at every learning rate."""
    most = max(len(one.rates) for one in found)
    rows = []
    for one in found:
        cells = []
        for rate in one.rates:
            scores = one.settings[rate].scores("validation") if rate in one.settings else []
            cells.append(f"{member_names.number(rate)}: {spreads.text(scores)}")
        cells += [formatting.NONE] * (most - len(cells))
        rows.append((one.method, *cells))
    heads = {3: ("lowest", "middle", "highest")}.get(most, tuple(map(str, range(1, most + 1))))
    return Table(
        "Validation accuracy in per cent at every learning rate that was tried, mean ± standard "
        "deviation over the seeds.",
        ("method", *heads),
        tuple(rows),
        ("method",),
    )
