"""The summary of a finished run: the table that is printed, and the values of summary.json."""

from __future__ import annotations

import platform
import resource
import shlex
import sys
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.adapters import count
from lora_jax.bases.quantise import bytes_of
from lora_jax.errors import listed
from lora_jax.system.console import Console, say, say_table
from lora_jax.training import export
from lora_jax.training.directory import Summary
from lora_jax.training.evaluation import first_batch
from lora_jax.training.open_run import BatchLoss, Run, Setup
from lora_jax.training.sizes import in_units, is_quantised, on_each_device, parameters
from lora_jax.training.state import State, Trained
from lora_jax.training.workload import Batch

# The activities whose seconds a summary has -> their names for readers.
ACTIVITIES = {
    "open": "opening the model and the data",
    "compile": "compiling",
    "train": "training",
    "evaluate": "evaluating",
    "checkpoint": "saving",
    "compare": "comparing with merged weights",
}


def conclude(
    run: Run,
    state: State,
    batch_loss: Callable[[Trained], BatchLoss],
    difference: Callable[[Trained, Any], float],
    example: Batch,
) -> Summary:
    """Write the files of a run that has taken its steps; the summary is the last.

    `batch_loss` returns the loss function of trained parameters, and `difference` the largest
    |merged - unmerged| output of some on a placed batch.
    """
    setup = run.setup
    run.export("last", state.trained)
    best = run.best(state.trained)
    tested = run.evaluate_best(int(state.step), batch_loss(best))
    found = None
    if not is_quantised(setup.frozen):  # merged weights are floats, which may not fit
        batch = setup.place.batch(first_batch(setup.workload, setup.place, example))
        with run.notes.clock("compare"):
            found = difference(best, batch)
    finished = summarise(run, state, tested, found)
    run.finish(finished)
    return finished


def summarise(
    run: Run, state: State, tested: dict[str, dict[str, float]], difference: float | None
) -> Summary:
    notes, path, peak = run.notes, run.setup.path, run.setup.place.peak
    spent = {name: round(value, 3) for name, value in notes.seconds.items()}
    train = max(notes.seconds.get("train", 0.0), 1e-9)
    best = {k: v for k, v in (notes.best or {}).items() if k != "step"}
    after = {"validation": best} if best else {}
    return {
        "run": str(path),
        "steps": int(state.step),
        "skipped_steps": int(state.skipped),
        **sizes(run.setup, state),
        "steps_per_second": round(int(state.step) / train, 4),
        f"{run.setup.workload.unit}_per_second": round(notes.units / train, 2),
        "mfu": round(notes.flops / train / peak, 4) if peak else None,
        "before": notes.before,
        "after": {**after, **tested},
        "select": run.setup.workload.select,
        "better": run.setup.workload.better,
        "best_step": None if notes.best is None else notes.best["step"],
        "last_validation": notes.last,
        "stopped_early": run.is_over,
        "history": notes.history,
        "samples": notes.samples,
        "confusion": notes.confusion,
        "merged_difference": difference,
        **{f"{name}_seconds": spent.get(name, 0.0) for name in ACTIVITIES},
        "total_seconds": round(run.seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "device_peak_bytes": device_peak(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "mesh": dict(run.setup.place.mesh.shape),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def opening(run: Run, state: State) -> str:
    """Return the text that a run prints before its first step."""
    setup, found = run.setup, sizes(run.setup, state)
    facts = setup.workload.facts(setup.place.shard)
    text = (
        f"{setup.path}: {len(setup.layout.targets)} adapted parameters with "
        f"{found['adapter_parameters']:,} numbers, {found['trainable_parameters']:,} trained in "
        f"full, base {found['base_parameters']:,}"
    )
    whole = setup.layout.dequantised
    more = f", and {len(whole) - 1} more weights" if len(whole) > 1 else ""
    dequantised = f"Dequantised: {whole[0].path}, {whole[0].reason}{more}" if whole else ""
    going_on = f"Continuing from the checkpoint of step {run.start}." if run.start else ""
    return "\n".join(filter(None, (facts, text, dequantised, going_on, run.changed)))


def sizes(setup: Setup, state: State) -> dict[str, int]:
    """Count the parameters of the base and of the trained arrays, and their bytes on disk."""
    frozen, path = setup.frozen, setup.path
    trainable = state.trained["base"]
    return {
        "base_parameters": parameters(frozen) + count(trainable),
        "adapter_parameters": count(state.trained["adapters"]),
        "trainable_parameters": count(trainable),
        "adapter_file_bytes": export.size(export.folder(path, "last")),
        "full_checkpoint_bytes": bytes_of(frozen) + bytes_of(trainable),
        "base_bytes_per_device": on_each_device(frozen) + on_each_device(trainable),
        "optimizer_bytes": bytes_of(state.optimizer),
    }


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def device_peak() -> int | None:
    """Return the peak memory of the first device in bytes, or None if the device does not count."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def show(summary: Summary, console: Console) -> None:
    """Print the summary as a table, and the commands that go on with the run."""
    say(console, summary["run"])
    say_table(console, rows(summary), (0, 1))
    say(console, f"next:\n{listed(commands(summary))}")


def commands(summary: Summary) -> list[str]:
    """Return the commands that use the adapter of a finished run."""
    run = shlex.quote(summary["run"])
    scores = summary["before"].values()
    export = f"lora-jax export {run} --format peft --out adapter"
    found = [f"lora-jax report {run}"]
    if any({"perplexity", "rewards/accuracies", "kl"} & {*one} for one in scores):
        return [f"lora-jax generate --adapter {run} --prompt TEXT", export, *found]
    if "tokens_per_second" in summary:
        return [f"lora-jax predict --adapter {run} --text TEXT", export, *found]
    if "images_per_second" in summary:
        return [f"lora-jax predict --adapter {run} --image FILE", export, *found]
    return found


def rows(summary: Summary) -> list[tuple[str, str]]:
    """Return the name and the text of each line of the table."""
    found = costs(summary)
    if (step := summary["best_step"]) is not None:
        early = ", after which it stopped early" if summary.get("stopped_early") else ""
        found.append(("best", f"step {step:,}, by validation {summary['select']}{early}"))
    for split, before in summary["before"].items():
        after = summary["after"].get(split, {})
        for name, value in before.items():
            then = f"{after[name]:.4f}" if name in after else "-"
            found.append((f"{split} {name}", f"{value:.4f} -> {then}"))
    return found


def costs(summary: Summary) -> list[tuple[str, str]]:
    """Return name and text of each cost of a run: parameters, bytes and time."""
    base, adapters = summary["base_parameters"], summary["adapter_parameters"]
    trained, difference = adapters + summary["trainable_parameters"], summary["merged_difference"]
    speed = next(name for name in summary if name.endswith("_per_second") and name[:6] != "steps_")
    unit = speed.removesuffix("_per_second")
    mfu = summary.get("mfu")  # not in the summaries of earlier versions
    return [
        ("steps", f"{summary['steps']:,} ({summary['skipped_steps']} skipped)"),
        ("base parameters", f"{base:,}"),
        ("adapter parameters", f"{adapters:,}"),
        ("trained in full", f"{summary['trainable_parameters']:,}"),
        ("trained, of the base", f"{trained / base:.2%}"),
        ("adapter on disk", in_units(summary["adapter_file_bytes"])),
        ("full checkpoint", in_units(summary["full_checkpoint_bytes"])),
        ("base on each device", in_units(summary["base_bytes_per_device"])),
        ("optimizer state", in_units(summary["optimizer_bytes"])),
        ("peak memory", in_units(summary["peak_memory_bytes"])),
        ("speed", f"{summary['steps_per_second']:.2f} steps/s, {summary[speed]:,.0f} {unit}/s"),
        *([] if mfu is None else [("model FLOPs utilisation", f"{mfu:.1%}")]),
        ("merged - unmerged", "-" if difference is None else
                              f"{difference:.1e}, the largest difference of outputs: rounding"),
        ("seconds", seconds(summary)),
    ]  # fmt: skip


def seconds(summary: Summary) -> str:
    """Return the seconds of a run, and what they were spent on."""
    spent = {what: summary.get(f"{name}_seconds", 0.0) for name, what in ACTIVITIES.items()}
    spent["other"] = summary["total_seconds"] - sum(spent.values())
    parts = [f"{what} {value:,.0f}" for what, value in spent.items() if round(value) > 0]
    return ": ".join(filter(None, (f"{summary['total_seconds']:,.0f}", ", ".join(parts))))
