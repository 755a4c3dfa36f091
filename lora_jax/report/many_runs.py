"""Make the report that compares several runs: a sweep, tasks, or runs given one by one."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from lora_jax.report import (
    charts,
    formatting,
    settings,
    single_run,
    subspace_similarity,
    svg,
    update_analysis,
)
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
from lora_jax.sweeps import member_names, plots, results
from lora_jax.sweeps.comparison import ComparedRun, Results, flat, gather
from lora_jax.training.sizes import in_units
from lora_jax.training.summary import commands

_TASKS = 8  # at most this many tasks get a number of their own at the top
_VALUES = 8  # at most this many values of a field are listed
_NOTES = 4  # at most this many unfinished runs get a note; the table has them all


def report(
    title: str, runs: Sequence[SavedRun], base: BaseChoice, kind: str = "LoRA sweep"
) -> Report:
    """Compare runs: their scores, the directions that they share, and the best run's update.

    `kind` is what the runs are called unless they are tasks, or none has finished.
    """
    finished = [run for run in runs if run.summary is not None]
    if not finished:
        return Report(
            kind="LoRA runs",
            title=title,
            lead=_lead(runs),
            facts=(Fact("runs", str(len(runs)), "no run has finished"),),
            sections=(_progress(runs), subspace_similarity.section(runs), _settings(runs)),
            notes=_unfinished(runs),
        )
    found = gather([run.summary for run in finished if run.summary is not None])
    best = found.best
    there = {str(run.path): run for run in finished}
    ordered = sorted(found.rows, key=lambda row: -row.rank)
    saved = [there[row.summary["run"]] for row in ordered]
    waiting = [run for run in runs if run.summary is None]
    return Report(
        kind="LoRA tasks" if found.tasks else kind,
        title=title,
        lead=_lead(runs),
        facts=_of_tasks(found) if best is None else _of_best(found, best),
        sections=(
            Section("Results", _results(found)),
            *([] if best is None else _curves(runs, best.select)),
            *([_progress(runs)] if waiting else []),
            subspace_similarity.section([*saved, *waiting]),
            *_best(best, base),
            _settings(runs),
        ),
        notes=_unfinished(runs),
        verdict="" if best is None else f"{best.name} is best. {single_run.verdict(best.summary)}",
        command="" if best is None else commands(best.summary)[0],
    )


def _curves(runs: Sequence[SavedRun], select: str) -> list[Section]:
    """Return the loss and the score of each run at its evaluations, if they are not many."""
    ways = [run.path.as_posix() for run in runs]
    names = (member_names.shortest(way, ways, "/") for way in ways)
    lines = {
        name: [line for line in run.lines if line.get("split") == "validation"]
        for name, run in zip(names, runs, strict=True)
    }
    if not 1 < len(lines) <= plots.LINES or not all(lines.values()):
        return []
    panels = list[Panel]()
    for name in dict.fromkeys(["loss", select]):
        text = f"Validation {name} of {len(lines)} runs over the steps"
        panels.append(Panel(f"each-{len(panels)}", text, charts.compared(lines, name)))
    return [Section("Curves", (Figure("Validation scores of each run.", tuple(panels)),))]


def _lead(runs: Sequence[SavedRun]) -> str:
    """Describe the settings that the runs share, and list the values of the others."""
    configs = [flat(run.config) for run in runs]
    fields = dict.fromkeys(field for config in configs for field in config)
    varied = [f for f in fields if any(c.get(f) != configs[0].get(f) for c in configs)]
    each = []
    for field in varied:
        values = sorted({config.get(field) for config in configs}, key=_order)
        said = [member_names.label(value) for value in values[:_VALUES]]
        more = f" and {len(values) - _VALUES} more" if len(values) > _VALUES else ""
        each.append(f"{member_names.shortest(field, varied)} {', '.join(said)}{more}")
    what = f"They vary {'; '.join(each)}." if each else "Their settings are the same."
    return f"{len(runs)} runs of {settings.in_words([run.config for run in runs])}. {what}"


def _order(value: Any) -> tuple[bool, float, str]:
    """Return a sort key that puts numbers first, by size, and then the rest as text."""
    number = isinstance(value, int | float)
    return (not number, value if number else 0.0, str(value))


def _results(found: Results) -> tuple[Block, ...]:
    listing = results.listing(found)
    table = Table(listing.title, listing.columns, listing.rows, listing.texts, listing.best)
    with svg.style():
        drawn = plots.figures_of(found)
    pictures = tuple(
        Panel(f"results-{number + 1}", f"{what}: {_range(found, what)}", drawing)
        for number, (what, drawing) in enumerate(drawn)
    )
    if found.tasks:
        return table, Figure("Validation score of each task over the steps.", pictures)
    mean = " The mean over seeds, and their range." if "seed" in found.varied else ""
    star = " The star is the run that the validation split picks."
    return Figure(f"Score of each run.{mean}{star}", pictures), table


def _range(found: Results, what: str) -> str:
    """Describe the scores in one picture: of a split over all runs, or of one task's run."""
    for row in found.rows if found.tasks else ():
        if row.name == what:
            scores = formatting.change(row.score("validation", "before"), row.score("validation"))
            return f"validation {row.select} {scores}"
    splits = [what] if what in found.splits else found.splits
    known = [s for row in found.rows for split in splits if (s := row.score(split)) is not None]
    return f"{found.rows[0].select} of {len(found.rows)} runs, {formatting.span(known)}"


def _of_tasks(found: Results) -> tuple[Fact, ...]:
    """Show the score of each task, and how many parameters the tasks train together."""
    facts = []
    for row in found.rows[:_TASKS]:
        split = "test" if row.score("test") is not None else "validation"
        scores = formatting.change(row.score(split, "before"), row.score(split))
        facts.append(Fact(row.name, scores, f"{split} {row.select}, before and after training"))
    trained = sum(single_run.trained(row.summary) for row in found.rows)
    base = found.rows[0].summary["base_parameters"]
    note = f"by {len(found.rows)} tasks, on one base of {base:,}"
    return (*facts, Fact("trained parameters", f"{trained:,}", note))


def _of_best(found: Results, best: ComparedRun) -> tuple[Fact, ...]:
    values = ", ".join(
        f"{member_names.shortest(path, found.varied)} {member_names.label(best.values[path])}"
        for path in found.varied
    )
    facts = [Fact(f"best of {len(found.rows)} runs", values or best.name,
                  f"picked by validation {best.select}")]  # fmt: skip
    for split in sorted(found.splits, key=lambda s: s != "test"):
        scores = formatting.change(best.score(split, "before"), best.score(split))
        known = [s for row in found.rows if (s := row.score(split)) is not None]
        least, most = formatting.score(min(known)), formatting.score(max(known))
        note = f"the best run; over all runs {least} to {most}"
        facts.append(Fact(f"{split} {best.select}", scores, note))
    trained = sorted(single_run.trained(row.summary) for row in found.rows)
    own, base = single_run.trained(best.summary), best.summary["base_parameters"]
    note = f"{own / base:.2%} of {base:,}; all runs: {trained[0]:,} to {trained[-1]:,}"
    facts.append(Fact("trained by the best", f"{own:,}", note))
    kept, full = (in_units(best.summary[f"{x}_bytes"]) for x in ("adapter_file", "full_checkpoint"))
    facts.append(Fact("its adapter on disk", kept, f"a full checkpoint has {full}"))
    speed = f"{best.summary['steps_per_second']:.2f} steps/s"
    return (*facts, Fact("speed", speed, "the best run; runs of a group step together"))


def _best(best: ComparedRun | None, base: BaseChoice) -> tuple[Section, ...]:
    """Analyse the best run's update. Tasks have no best run; each has a report of its own."""
    if best is None:
        text = "Each task has its own update: lora-jax report GROUP/TASK shows it."
        return (Section("What the updates are made of", (Paragraph(text),)),)
    return update_analysis.sections(pathlib.Path(best.summary["run"]), base)


def _progress(runs: Sequence[SavedRun]) -> Section:
    rows = []
    for run in runs:
        state = "finished" if run.summary is not None else run.error or "not finished"
        score = run.after.get("validation", {}).get(single_run.select(run))
        rows.append((run.name, f"{run.step:,}", f"{run.steps:,}", formatting.score(score), state))
    table = Table(
        "The last step of each run, and its last validation score.",
        ("run", "step", "of", "validation", "state"),
        tuple(rows),
        ("run", "state"),
    )
    return Section("Progress", (table,))


def _settings(runs: Sequence[SavedRun]) -> Section:
    return Section("Settings", (settings.table([run.config for run in runs]),))


def _unfinished(runs: Sequence[SavedRun]) -> tuple[Note, ...]:
    notes = [note for run in runs for note in single_run.unfinished(run)]
    if len(notes) <= _NOTES:
        return tuple(notes)
    text = f"{len(notes)} of {len(runs)} runs have not finished; see Progress."
    return (Note(text),)
