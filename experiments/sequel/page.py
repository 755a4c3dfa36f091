"""The report: what the papers say, what was measured here, and the verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from experiments.sequel import claims, grids, tables, verdicts
from experiments.sequel.cells import Size
from experiments.sequel.claims import Claim
from experiments.sequel.formats import Lost
from experiments.sequel.results import Results
from experiments.sequel.tables import Table, Tuned
from experiments.shared import charts
from experiments.shared.spreads import mean, text
from lora_jax.report import formatting
from lora_jax.report.document import Block, Fact, Figure, Note, Panel, Paragraph, Report, Section
from lora_jax.report.document import Table as Rows
from lora_jax.sweeps.member_names import number

NOT_RUN = (
    "DoRA's figure of magnitude and direction; learning against forgetting; capacity; bits after a "
    "merge into the original base; cost against separate runs; rewards (`experiments/rewards` is "
    "there); and every table with a decoder."
)


def make(results: Results, size: Size, lost: Sequence[Lost]) -> Report:
    """Make the report of the results there are."""
    found = [(table, _tuned(table, results, size)) for table in tables.TABLES]
    every = [one for _, own in found for one in own]
    counted = {id(x): x for one in every for own in one.found.values() for x in own}
    seconds = sum(x.seconds for x in counted.values())
    return Report(
        kind="What came after LoRA",
        title="The sequel's claims, with a tuned rate for every method",
        lead=(
            f"MiniLM learns movie reviews: {size.steps} steps of 8 reviews of at most 32 tokens. "
            "Every method has its own grid of learning rates, which goes on until the best is "
            "inside, and three seeds. The validation loss picks the rate, the test loss is the "
            f"result, on {size.test} reviews. A difference is of pairs of seeds, with a 95 % "
            "interval. These are small runs of a small model: a claim that cannot be told here "
            "may still be true of large ones."
        ),
        facts=(
            Fact("cells", f"{len(counted):,}", "runs with a method, a rate and a seed"),
            Fact("time", f"{seconds / 60:,.0f} minutes", "on a machine with other work"),
        ),
        sections=(
            *_first(every),
            _verdicts(found),
            *(Section(t.asks, tuple(_blocks(t, own))) for t, own in found if len(own) > 1),
            *_formats(lost),
            Section("Not run yet", (Paragraph(NOT_RUN),)),
        ),
        notes=tuple(
            Note(f"Table {table.name} has no results: `python -m experiments.sequel {table.name}`.")
            for table, own in found
            if not own
        ),
    )


def _tuned(table: Table, results: Results, size: Size) -> list[Tuned]:
    found = (tables.tuned(arm, results, size) for arm in table.arms)
    return [one for one in found if one is not None]


def _first(every: Sequence[Tuned]) -> Iterator[Section]:
    """Yield the section that answers which adapter, with which rate: the ten lowest losses."""
    unique = {tuple(sorted(map(str, one.arm.changes.items()))): one for one in reversed(every)}
    whole = [one for one in unique.values() if not grids.edge(one.losses)]
    ordered = sorted(whole, key=lambda one: mean([x.test for x in one.best]))[:10]
    if not ordered:
        return
    caption = (
        "The methods of all tables with the lowest test losses, of those whose best rate is inside "
        "its grid: mean ± standard deviation of three seeds."
    )
    blocks: list[Block] = [_rows(ordered, caption)]
    if len(ordered) > 1:
        ends = [mean([x.test for x in one.best]) for one in ordered]
        apart = [_span(one) for one in ordered]
        blocks.append(
            Paragraph(
                "Between these methods, each at its best rate, the mean loss differs by at most "
                f"{max(ends) - min(ends):.3f}. Between the rates of one method, one step of three "
                f"away from the best, it differs by up to {min(apart):.3f} to {max(apart):.3f}."
            )
        )
    yield Section("Which adapter, with which rate?", tuple(blocks))


def _span(one: Tuned) -> float:
    """Return the largest difference of the test loss between the best rate and its neighbours."""
    rates = list(one.found)
    at = rates.index(one.rate)
    means = {
        rate: mean([x.test for x in one.found[rate]]) for rate in rates[max(at - 1, 0) : at + 2]
    }
    return max(abs(x - means[one.rate]) for x in means.values())


def _verdicts(found: Sequence[tuple[Table, list[Tuned]]]) -> Section:
    rows = []
    for table, own in found:
        arms = {one.arm.name: one for one in own}
        for claim in table.claims:
            rows.append((claim.text, claim.number, *_verdict(claim, arms)))
    columns = ("claim", "paper", "ours: difference of the test losses", "verdict")
    return Section(
        "Claims and verdicts",
        (
            Rows(
                "Each claim compares two methods at their own best rates; below zero, the first is "
                "better. Of a claim that two are equal, the bound is a difference of 0.01.",
                columns,
                tuple(rows),
                columns,
            ),
        ),
    )


def _verdict(claim: Claim, arms: dict[str, Tuned]) -> tuple[str, str]:
    if claim.better not in arms or claim.than not in arms:
        return formatting.NONE, "not run yet"
    two = arms[claim.better], arms[claim.than]
    ours = verdicts.paired(*([x.test for x in one.best] for one in two))
    shown = f"{claim.better} minus {claim.than}: {ours}"
    edges = [f"{one.arm.name} at its {edge}" for one in two if (edge := grids.edge(one.losses))]
    said = verdicts.verdict(claim, ours)
    return shown, f"{said} ({', '.join(edges)} rate)" if edges else said


def _blocks(table: Table, own: Sequence[Tuned]) -> Iterator[Block]:
    yield _rows(own, "Each method at the rate with the lowest mean validation loss.")
    lines = {
        one.arm.name: {round(1e6 * rate): [x.test for x in xs] for rate, xs in one.found.items()}
        for one in own
    }
    drawing = charts.lines(lines, "learning rate, in millionths", "test loss", table.name)
    told = "; ".join(f"{one.arm.name}: {_by_rate(one)}" for one in own)
    panel = Panel(f"sequel-{table.name}", f"Test loss over the learning rate. {told}", drawing)
    yield Figure("Test loss over the learning rate, with the spread of the seeds.", (panel,))
    edges = [f"{one.arm.name} ({edge})" for one in own if (edge := grids.edge(one.losses))]
    if edges:
        yield Paragraph(
            f"The best rate is still at the edge of what has run for {', '.join(edges)}: its "
            "grid has not finished."
        )
    rates = {one.arm.name: one.rate for one in own}
    if {"all r2", "full"} <= set(rates):
        ratio = rates["all r2"] / rates["full"]
        yield Paragraph(
            f"LoRA's best rate is {ratio:.3g} times full fine-tuning's; LoRA Without Regret has "
            "9.8 (checked). The rates are a factor of 3 apart."
        )
    if table.name == "rslora":
        yield Paragraph(_common(own))


def _rows(own: Sequence[Tuned], caption: str) -> Rows:
    return Rows(
        caption,
        (
            "method",
            "trained",
            "rate",
            "test loss",
            "accuracy, %",
            "gradient norm",
            "as one program",
        ),
        tuple(
            (
                one.arm.name,
                f"{one.best[0].trained:,}",
                number(one.rate) + (f" ({edge})" if (edge := grids.edge(one.losses)) else ""),
                text([x.test for x in one.best], 1.0, 4),
                text([x.accuracy for x in one.best]),
                text([x.gradient for x in one.best], 1.0, 2),
                str(one.best[0].together),
            )
            for one in own
        ),
        ("method",),
    )


def _by_rate(one: Tuned) -> str:
    cells = (f"{number(r)} {text([x.test for x in xs], 1.0, 3)}" for r, xs in one.found.items())
    return ", ".join(cells)


def _common(own: Sequence[Tuned]) -> str:
    """Say whether one rate is good for every rank: the claim of rsLoRA that can fail."""
    said = []
    for scaling in ("rslora", "lora"):
        good = [(one.arm.name, _good(one)) for one in own if one.arm.name.split()[0] == scaling]
        common = set.intersection(*(rates for _, rates in good)) if good else set()
        each = "; ".join(f"{name}: {', '.join(map(number, sorted(x)))}" for name, x in good)
        shared = ", ".join(map(number, sorted(common))) or "none"
        said.append(f"{scaling}: {each}. Good for every rank: {shared}.")
    return "Rates whose loss cannot be told from the best one's. " + " ".join(said)


def _good(one: Tuned) -> set[float]:
    """Return the rates whose validation losses cannot be told from the best one's."""
    best = one.losses[one.rate]
    apart = {rate: verdicts.paired(own, best) for rate, own in one.losses.items()}
    return {rate for rate, x in apart.items() if rate == one.rate or x.value - x.half <= 0}


def _formats(lost: Sequence[Lost]) -> Iterator[Section]:
    if not lost:
        return
    by = {x.name: x for x in lost}
    nf4, double, pissa = by["nf4"], by["nf4 double"], by["nf4, pissa r8"]
    saved, ratio = nf4.bits - double.bits, pissa.nuclear / nf4.nuclear
    rows = (
        (
            "double quantisation saves bits",
            "0.373 a number (2305.14314; remembered, not checked)",
            f"{saved:.3f} for matrices of 384 x 384",
            _holds(saved > 0),
        ),
        (
            "NF4 loses less than int4",
            claims.NF4_INT4.number,
            f"Frobenius error {nf4.frobenius:.4f} against {by['int4'].frobenius:.4f}",
            _holds(nf4.frobenius < by["int4"].frobenius),
        ),
        (
            "PiSSA on NF4 loses less than NF4",
            "nuclear error 265.8 against 324.8, 0.82 of it (2404.02948)",
            f"{ratio:.2f} of it, at rank 8 of 384",
            _holds(ratio < 1),
        ),
    )
    columns = ("claim", "paper", "ours", "verdict")
    yield Section(
        "What a format loses before any training",
        (
            Rows(
                "MiniLM's q and v of every layer, rank 8: norms of W minus what is stored (with "
                "the factors of a start), and of the change of the encoder's outputs on random "
                "tokens, all as shares.",
                ("format", "bits", "Frobenius", "nuclear", "outputs"),
                tuple(
                    (
                        x.name,
                        f"{x.bits:.3f}",
                        *(f"{y:.4f}" for y in (x.frobenius, x.nuclear, x.outputs)),
                    )
                    for x in lost
                ),
                ("format",),
            ),
            Rows("These numbers have no seeds and no spread.", columns, rows, columns),
        ),
    )


def _holds(true: bool) -> str:
    return verdicts.HOLDS if true else verdicts.NOT
