"""Make the report of one run."""

from __future__ import annotations

from typing import Any

from lora_jax.report import charts, classes, formatting, settings, update_analysis
from lora_jax.report.document import (
    Block,
    Fact,
    Figure,
    Note,
    Panel,
    Paragraph,
    Report,
    Section,
    Table,
)
from lora_jax.report.run_files import SavedRun
from lora_jax.serving.served_adapters import BaseChoice
from lora_jax.training import curves
from lora_jax.training.directory import Summary
from lora_jax.training.sizes import in_units
from lora_jax.training.summary import commands, costs

_BOTH_FALL = (
    "logps/chosen and logps/rejected, the log-probabilities of the answers, may both fall while "
    "rewards/margins rises: the loss asks for a larger distance between them and for nothing else. "
    "This is known of DPO (arXiv 2402.13228, 2410.08847), and no fault of the run. A larger beta "
    "keeps the model nearer to its reference."
)


def report(run: SavedRun, base: BaseChoice) -> Report:
    """Report the scores, curves, settings and costs of a run, and analyse its best adapter."""
    return Report(
        kind="LoRA run",
        title=run.name,
        lead=settings.in_words([run.config]),
        facts=(*_scored(run), *([] if run.summary is None else costed(run.summary))),
        sections=(
            Section("Scores", (_scores(run),)),
            Section("Curves", _curves(run)),
            *classes.sections(run),
            *_samples(run),
            *update_analysis.sections(run.path, base),
            Section("Settings", (settings.table([run.config]),)),
            Section("Time and memory", _costs(run)),
        ),
        notes=unfinished(run),
        verdict="" if run.summary is None else verdict(run.summary),
        command="" if run.summary is None else commands(run.summary)[0],
    )


def verdict(summary: Summary) -> str:
    """Say whether the adapter is better than the base, what it costs, and what to do next."""
    name, before, after = str(summary["select"]), summary["before"], summary["after"]
    split = "test" if "test" in after else "validation"
    old, new = (scores.get(split, {}).get(name) for scores in (before, after))
    found = f"The {split} {name} of the base is not known."
    if old is not None and new is not None:
        gain = (new - old) * (1 if summary["better"] == "higher" else -1)
        what = "better than" if gain > 0 else "no better than"
        found = f"This adapter is {what} the base by {abs(new - old):.4f}: {split} {name} "
        found += f"{formatting.change(old, new)}."
    share = trained(summary) / summary["base_parameters"]
    return (
        f"{found} It costs {in_units(summary['adapter_file_bytes'])} on disk, {share:.2%} of the "
        f"base's parameters and {summary['total_seconds']:,.0f} s of training. Next:"
    )


def trained(summary: Summary) -> int:
    """Return the number of parameters that a run has trained."""
    return int(summary["adapter_parameters"] + summary["trainable_parameters"])


def unfinished(run: SavedRun) -> tuple[Note, ...]:
    """Return a note if the run has not finished."""
    if run.summary is not None:
        return ()
    why = f" It stopped with an error: {run.error}." if run.error else ""
    text = (
        f"{run.name} has not finished: its record ends at step {run.step:,} of {run.steps:,}.{why} "
        "This report shows the run up to there; the command that started the run continues it."
    )
    return (Note(text),)


def select(run: SavedRun) -> str:
    """Return the metric that picks the best adapter; for an unfinished run it may be a guess."""
    if run.summary is not None:
        return str(run.summary["select"])
    known = curves.names(run.lines)
    return str(run.config.get("select") or known[min(1, len(known) - 1)])


def _scored(run: SavedRun) -> list[Fact]:
    name = select(run)
    what = "of the best adapter" if run.summary is not None else "at the last evaluation"
    found = []
    for split in sorted({**run.before, **run.after}, key=lambda s: s != "test"):
        before, after = (scores.get(split, {}).get(name) for scores in (run.before, run.after))
        if before is not None or after is not None:
            value = formatting.change(before, after)
            found.append(Fact(f"{split} {name}", value, f"before and after training, {what}"))
    return found


def costed(summary: Summary) -> list[Fact]:
    """Return the main numbers of a finished run: parameters, disk space, speed, best step."""
    count = trained(summary)
    base, full = summary["base_parameters"], summary["full_checkpoint_bytes"]
    kept = summary["adapter_file_bytes"]
    many = full / kept if kept else 0.0
    times = f", {many:,.{0 if many >= 10 else 1}f} times as much"
    speed = dict(costs(summary))["speed"].split(", ", 1)
    step = summary["best_step"]
    return [
        Fact("trained parameters", f"{count:,}", f"{count / base:.2%} of {base:,}"),
        Fact("adapter on disk", in_units(kept), f"a full checkpoint has {in_units(full)}{times}"),
        Fact("speed", speed[0], f"{speed[1]}; {summary['total_seconds']:,.0f} s in all"),
        Fact("best at step", formatting.NONE if step is None else f"{step:,}",
             f"of {summary['steps']:,}, by validation {summary['select']}"),
    ]  # fmt: skip


def _scores(run: SavedRun) -> Block:
    before, after = run.before, run.after
    rows = []
    for split in dict.fromkeys([*before, *after]):
        old, new = before.get(split, {}), after.get(split, {})
        for name in dict.fromkeys([*old, *new]):
            pair = old.get(name), new.get(name)
            known = None not in pair
            change = f"{pair[1] - pair[0]:+.4f}" if known else formatting.NONE  # type: ignore[operator]
            rows.append((split, name, *map(formatting.score, pair), change))
    if not rows:
        return Note("No evaluation has been made yet.")
    what = "best adapter" if run.summary is not None else "last evaluation"
    return Table(
        f"Scores before the first step, and of the {what}.",
        ("split", "number", "before", "after", "change"),
        tuple(rows),
        ("split", "number"),
    )


def _samples(run: SavedRun) -> list[Section]:
    """Return a section of what the model answered before training, and what it does now."""
    found = [] if run.summary is None else run.summary.get("samples", [])
    if not found:
        return []
    names, what = ("asked", "expected", "before", "after"), "Answers to questions"
    if run.summary is not None and run.summary.get("confusion"):
        what = "Guesses of examples, first the wrong ones,"
        found = sorted(found, key=lambda s: s.get("after", "").startswith(f"{s['expected']} ("))
    rows = [(str(i), *(s.get(n, formatting.NONE) for n in names)) for i, s in enumerate(found, 1)]
    caption = f"{what} of the validation split, before and by the best adapter."
    return [Section("Samples", (Table(caption, ("", *names), tuple(rows), names),))]


def _curves(run: SavedRun) -> tuple[Block, ...]:
    if not run.lines:
        return (Note("metrics.jsonl is missing or empty, so there are no curves."),)
    panels, more = [], ("gradient_norm", "learning_rate")
    recorded = {name for line in run.lines for name in line}
    for number, name in enumerate([*curves.names(run.lines), *more]):
        if name in recorded:
            text = f"{name} over {run.step:,} steps: {_ends(run, name)}"
            panels.append(Panel(f"curve-{number + 1}", text, charts.curve(run.lines, name)))
    figure = Figure("Metrics over the training steps.", tuple(panels))
    return (figure, Paragraph(_BOTH_FALL)) if "logps/chosen" in recorded else (figure,)


def _ends(run: SavedRun, name: str) -> str:
    """Describe the first and the last value of a curve."""
    found = []
    for what in ("training", "validation"):
        lines = [x for x in run.lines if x.get("split", "training") == what]
        if values := [x[name] for x in lines if x.get(name) is not None]:
            first, last = formatting.score(values[0]), formatting.score(values[-1])
            found.append(f"{what} from {first} to {last}")
    return "; ".join(found) or "nothing yet"


def _costs(run: SavedRun) -> tuple[Block, ...]:
    summary = run.summary
    if summary is None:
        return (Note("Time and memory are known when the run has finished."),)
    more: dict[str, Any] = {
        "devices": f"{summary.get('devices', '-')} x {summary.get('device', '-')}",
        "processes": str(summary.get("processes", formatting.NONE)),
        "JAX, Python": f"{summary.get('jax', '-')}, {summary.get('python', '-')}",
    }
    rows = [*costs(summary), *more.items()]
    return (Table("Figures from summary.json.", ("", "value"), tuple(rows), ("", "value")),)
