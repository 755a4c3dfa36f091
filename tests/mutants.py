"""Make forty one-line changes of the library, and check that tests notice each of them.

A test suite is as good as the bugs that it finds. This script makes a copy of the tracked files,
applies one change at a time (a mutant), and runs the few tests that it names: the mutant is
killed if one of them fails, and survives if all of them pass.

    python -m tests.mutants                   all of them, one after the other
    python -m tests.mutants NAME ...          these
    python -m tests.mutants --jobs 2          two at a time, each in a copy of its own
    python -m tests.mutants --whole           a survivor is then run against the whole suite
    python -m tests.mutants --list            names, files and tests; runs nothing

All forty take a minute and a quarter with `--jobs 2` on two quiet cores. Before that, the named
tests run on the unchanged code and must pass, because otherwise a failure means nothing;
`--unchecked` leaves this out. With --whole, each survivor costs a run of the suite. The exit status
is 0 if all mutants were killed.

Before anything runs, every `old` text must be found exactly once in its file, and every file with
tests must exist; otherwise there is an error that names it. So if code is moved, renamed or
rewritten, change the list as well: the path, or the same mistake in the new code. A mutant that
survives is not replaced: it shows that a test is missing.

pytest does not collect this file, because it contains no test.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMED, WHOLE = 300, 7200  # seconds that the named tests and the whole suite may take


class Mutant(NamedTuple):
    """A change: `old`, which is once in `file`, becomes `new`; then one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


# fmt: off
MUTANTS = (  # name and file, old, new, tests
    # ---- the core
    Mutant("scale-without-rank", "lora_jax/target.py",
        'self.alpha / (self.rank if self.scaling == "alpha/r" else math.sqrt(self.rank))',
        "self.alpha",
        ("tests/test_merge.py::test_merge_against_float64_by_hand",)),
    # A tied embedding gets the axes of its product.
    Mutant("product-before-lookup", "lora_jax/resolve.py",
        '"ragged_dot_general", "gather")',
        '"ragged_dot_general", "dot_general", "gather")',
        ("tests/test_transform.py"
         "::test_outputs_equal_those_of_the_merged_weights[linen_embed_tied]",)),
    Mutant("unknown-slot-is-the-base", "lora_jax/multi/chosen.py",
        'jnp.take(n.array, self.index, axis=axis, mode="fill", fill_value=jnp.nan)',
        'jnp.take(n.array, self.index, axis=axis, mode="clip")',
        ("tests/multi/test_stack.py::test_a_number_that_is_no_slot_gives_nan_in_a_compiled_program",)),
    # The numbers stay right, but the work is many times as much.
    Mutant("larger-product-first", "lora_jax/updates/lowrank.py",
        "if contracted(a) >= contracted(b)",
        "if contracted(a) <= contracted(b)",
        ("tests/test_flops.py::test_gradient_flops[minilm]",)),
    Mutant("scan-never-reversed", "lora_jax/primitives/control.py",
        'reverse=p["reverse"]',
        "reverse=False",
        ("tests/test_transform.py"
         "::test_outputs_equal_those_of_the_merged_weights[bare_scan_reversed]",)),
    Mutant("examples-draw-alike", "lora_jax/multi/per_example.py",
        "jax.random.fold_in(leaves[i], index)",
        "leaves[i]",
        ("tests/multi/test_stack.py::test_examples_draw_apart_from_each_other",)),
    Mutant("ranks-filled-in-front", "lora_jax/multi/stack.py",
        "[(0, n - have) for n, have in",
        "[(n - have, 0) for n, have in",
        ("tests/multi/test_stack.py::test_put_writes_one_slot_and_unstack_reads_it_back",)),
    Mutant("balance-of-gates-alone", "lora_jax/multi/moe/statistics.py",
        "(load.share * load.gate).sum(-1)",
        "(load.gate * load.gate).sum(-1)",
        ("tests/moe/test_router.py::test_the_balance_is_of_shares_and_gates",)),
    Mutant("b-follows-the-inputs", "lora_jax/updates/lora.py",
        "else i for i in target.outputs]",
        "else i for i in target.inputs]",
        ("tests/test_sharding.py::test_adapters_follow_the_weights",)),
    Mutant("frozen-gradients-pass", "lora_jax/frozen.py",
        '"frozen": optax.set_to_zero()',
        '"frozen": optax.identity()',
        ("tests/test_frozen.py::test_partition_freezes_even_where_gradients_of_w0_exist",)),
    Mutant("hashes-not-compared", "lora_jax/checkpoint/storage.py",
        'damaged = manifest.damaged(loaded)',
        "damaged = list[str]()",
        ("tests/checkpoint/test_adapter.py::test_an_array_of_another_adapter_is_named",)),
    Mutant("pattern-matches-a-beginning", "lora_jax/paths.py",
        "return [p for p in paths if regex.fullmatch(p)]",
        "return [p for p in paths if regex.match(p)]",
        ("tests/test_paths.py::test_match",)),
    # ---- training
    Mutant("parts-share-a-key", "lora_jax/training/step.py",
        "gradient(trained, frozen, batch, jax.random.fold_in(key, index))",
        "gradient(trained, frozen, batch, key)",
        ("tests/training/test_step.py::test_each_part_draws_from_a_key_of_its_own",)),
    Mutant("lower-is-never-better", "lora_jax/training/run.py",
        'sign = 1 if self.setup.workload.better == "higher" else -1',
        "sign = 1",
        ("tests/training/test_run.py::test_best_is_kept_when_later_steps_are_worse",)),
    Mutant("lost-checkpoint-unsaid", "lora_jax/training/checkpoints.py",
        "if not isinstance(error, Exception) or isinstance(error, processes.Preempted):",
        "if not isinstance(error, Exception):",
        ("tests/training/test_checkpoints.py::test_a_full_disk_is_an_error_at_the_end",)),
    Mutant("first-step-stands-still", "lora_jax/training/optimizer.py",
        "rising = (count + 1) / (hyper.rise + 1)",
        "rising = count / (hyper.rise + 1)",
        ("tests/training/test_optimizer.py::test_the_rates_are_those_of_optax",)),
    Mutant("record-not-flushed", "lora_jax/training/metrics.py",
        "self._file.flush()",
        "pass",
        ("tests/training/test_metrics.py::test_what_is_synced_is_in_the_file",)),
    Mutant("checkpoint-of-unread-steps", "lora_jax/training/loop.py",
        'every step up to this one is known good."""\n        self._settle()',
        'every step up to this one is known good."""',
        ("tests/training/test_run.py::test_a_nonfinite_step_stops_the_run_and_is_named",)),
    Mutant("rows-by-data-first", "lora_jax/training/mesh.py",
        'BATCH = P(("fsdp", "data"))',
        'BATCH = P(("data", "fsdp"))',
        ("tests/training/test_mesh.py"
         "::test_rows_are_divided_in_the_order_that_the_partitioner_gets_right",)),
    Mutant("states-may-differ", "lora_jax/training/processes.py",
        "if any(state != states[0] for state in states):",
        "if False:",
        ("tests/training/test_processes.py::test_states_of_two_processes_are_put_together",)),
    Mutant("export-without-fingerprint", "lora_jax/training/export.py",
        "fingerprint=fingerprint,",
        "fingerprint=None,",
        ("tests/serving/test_predict.py::test_texts_of_the_command_line",)),
    Mutant("fresh-deletes-anything", "lora_jax/training/directory.py",
        "if foreign:",
        "if False:",
        ("tests/training/test_run.py::test_fresh_does_not_delete_what_no_run_wrote",)),
    # ---- data
    Mutant("weights-one-place-late", "lora_jax/data/packing.py",
        '"loss_weight": marks[1:]',
        '"loss_weight": marks[:-1]',
        ("tests/data/test_language_modelling.py"
         "::test_packed_rows_hold_every_example_once_an_epoch",)),
    Mutant("streams-count-their-own", "lora_jax/data/packing.py",
        "self._shard.most(self.longest)",
        "self.longest",
        ("tests/data/test_shards.py::test_evaluation_has_every_example_exactly_once",)),
    Mutant("filled-row-counts", "lora_jax/data/epochs.py",
        "(np.arange(self.batch_size) < len(chosen))",
        "(np.arange(self.batch_size) <= len(chosen))",
        ("tests/data/test_classification.py"
         "::test_an_epoch_has_every_example_exactly_once",)),
    Mutant("lost-records-accepted", "lora_jax/data/builders.py",
        "if found != expected:",
        "if found > expected:",
        ("tests/data/test_builders.py::test_lost_records_are_an_error",)),
    # ---- groups
    Mutant("diverged-member-goes-on", "lora_jax/sweeps/step.py",
        "go = active & (settings.skip | (state.skipped == 0))",
        "go = active",
        ("tests/sweeps/test_group_step.py"
         "::test_a_member_that_diverges_does_not_disturb_the_others[False]",)),
    Mutant("filled-up-with-ones", "lora_jax/sweeps/batches.py",
        "out = np.zeros((len(arrays), *shape), known[0].dtype)",
        "out = np.ones((len(arrays), *shape), known[0].dtype)",
        ("lora_jax/sweeps/batches.py",)),
    Mutant("base-takes-no-memory", "lora_jax/sweeps/memory_fit.py",
        "return shared + size * own",
        "return size * own",
        ("tests/training/test_fit.py::test_as_few_groups_as_fit",)),
    Mutant("worst-run-is-best", "lora_jax/sweeps/comparison.py",
        "return max(known, key=lambda row: row.rank)",
        "return min(known, key=lambda row: row.rank)",
        ("tests/sweeps/test_results.py::test_what_differs_and_what_is_best",)),
    # ---- planner
    Mutant("half-of-an-all-reduce", "lora_jax/planner/measure.py",
        '"all-reduce": 2 * (n - 1) / n,',
        '"all-reduce": (n - 1) / n,',
        ("tests/planner/test_plan.py::test_seconds_of_a_ring",)),
    Mutant("loops-count-once", "lora_jax/planner/hlo.py",
        "trips = (instruction.trips or 1) if loop else 1",
        "trips = 1",
        ("tests/planner/test_hlo.py::test_collectives_in_a_loop_count_as_often_as_it_runs",)),
    # ---- models
    Mutant("rotation-backwards", "lora_jax/models/rope.py",
        "jnp.concatenate([-sin, sin], -1)",
        "jnp.concatenate([sin, -sin], -1)",
        ("tests/models/test_golden.py::test_decoder_as_transformers[llama-False]",)),
    Mutant("window-one-too-wide", "lora_jax/models/attention.py",
        "(distance < window)[None, None]",
        "(distance <= window)[None, None]",
        ("tests/models/test_laws.py::test_causality[3]",)),
    Mutant("pairs-left-adjacent", "lora_jax/models/weights/gguf_file.py",
        "return pairs.swapaxes(1, 2).reshape(shape)",
        "return pairs.reshape(shape)",
        ("tests/models/weights/test_gguf_models.py::test_gguf_is_the_folder",)),
    # ---- serving
    Mutant("lines-not-flushed", "lora_jax/serving/jsonl.py",
        "self._file.flush()",
        "pass",
        ("tests/serving/test_jsonl.py::test_what_is_written_is_read_again",)),
    Mutant("rows-draw-alike", "lora_jax/serving/sampling.py",
        'jax.random.fold_in(jax.random.fold_in(jax.random.key(numbers["seed"]), row), step)',
        'jax.random.fold_in(jax.random.key(numbers["seed"]), step)',
        ("tests/serving/test_generation.py::test_draws_have_the_probabilities[sampling0-kept0]",)),
    # ---- analysis, experiments, report
    Mutant("phi-by-the-larger-side", "lora_jax/analysis/subspaces.py",
        "np.minimum(rows[:, None], columns)",
        "np.maximum(rows[:, None], columns)",
        ("lora_jax/analysis/subspaces.py",)),
    Mutant("bottleneck-without-residual", "experiments/methods/bottleneck.py",
        'return x + _dense(params["up"], h)',
        'return _dense(params["up"], h)',
        ("tests/experiments/test_bottleneck.py::test_a_layer_is_the_formula",)),
    Mutant("seeds-that-differ-in-more", "lora_jax/report/subspace_similarity.py",
        'if _differences(*pair, ()) == ["seed"]',
        'if "seed" in _differences(*pair, ())',
        ("tests/report/test_pieces.py::test_seeds_that_differ_in_nothing_else_are_compared",)),
)
# fmt: on


class Result(NamedTuple):
    """A mutant's verdict (killed, SURVIVED, or why there is none) and its first failed test."""

    mutant: Mutant
    verdict: str
    seconds: float
    failed: str


def misplaced(mutants: Sequence[Mutant], tree: pathlib.Path) -> list[str]:
    """A line for each mutant whose files are missing, or whose `old` is not there exactly once."""
    lines = []
    for mutant in mutants:
        file = tree / mutant.file
        if not file.is_file():
            lines.append(f"{mutant.name}: there is no {mutant.file}")
        elif (count := file.read_text().count(mutant.old)) != 1:
            lines.append(f"{mutant.name}: {count} times in {mutant.file}: {mutant.old!r}")
        files = dict.fromkeys(test.partition("::")[0] for test in mutant.tests)
        lines += [f"{mutant.name}: there is no {f}" for f in files if not (tree / f).is_file()]
    return lines


def copied(folder: pathlib.Path) -> pathlib.Path:
    """Copy the tracked files, as they are in the working tree, into `folder`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def pytest(
    tree: pathlib.Path, tests: Sequence[str], timeout: float, *options: str
) -> tuple[str, str]:
    """Return the result of the copy's tests ("passed", "failed", ...), and the first failure."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *tests]
    # Bytecode is off: a file that changes twice in a second may keep the older bytecode.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {timeout:.0f} s", ""
    first = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    word = {0: "passed", 1: "failed"}.get(done.returncode)
    if word is None:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        word = f"pytest ended with {done.returncode}: {''.join(last)}"
    return word, first[1] if first else ""


def tried(mutant: Mutant, tree: pathlib.Path, whole: bool) -> Result:
    """Apply the mutant in `tree`, run its tests, and undo the change."""
    file, began = tree / mutant.file, time.monotonic()
    text = file.read_text()
    file.write_text(text.replace(mutant.old, mutant.new))
    try:
        word, failed = pytest(tree, mutant.tests, NAMED, "-x")
        if word == "passed" and whole:
            word, failed = pytest(tree, (), WHOLE, "-x")
    finally:
        file.write_text(text)
    verdict = {"passed": "SURVIVED", "failed": "killed"}.get(word, word)
    return Result(mutant, verdict, time.monotonic() - began, failed)


def run(mutants: Sequence[Mutant], jobs: int, whole: bool, checked: bool) -> int:
    """Try the mutants, print their verdicts, and return the exit status."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = [copied(pathlib.Path(folder, str(number))) for number in range(jobs)]
        if lines := misplaced(mutants, trees[0]):
            print("the list does not fit the code:", *lines, sep="\n  ")
            return 2
        if checked:
            tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
            began = time.monotonic()
            word, failed = pytest(trees[0], tests, WHOLE)
            print(f"unchanged code: {word} {failed} {time.monotonic() - began:.0f} s", flush=True)
            if word != "passed":
                return 2
        free = queue.SimpleQueue[pathlib.Path]()
        for tree in trees:
            free.put(tree)

        def one(mutant: Mutant) -> Result:
            tree = free.get()
            try:
                return tried(mutant, tree, whole)
            finally:
                free.put(tree)

        killed = 0
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            for found in pool.map(one, mutants):
                killed += found.verdict == "killed"
                line = f"{found.mutant.name:28} {found.verdict:8} {found.seconds:4.0f} s"
                print(f"{line}  {found.failed}", flush=True)
    print(f"{killed} of {len(mutants)} killed")
    return 0 if killed == len(mutants) else 1


def main() -> int:
    """Run the command and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutants; none: all")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--whole", action="store_true", help="survivors against the whole suite")
    parser.add_argument("--unchecked", action="store_true", help="not on the unchanged code first")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    options = parser.parse_args()
    unknown = set(options.names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"no mutant {', '.join(sorted(unknown))}; --list shows them")
    mutants = [m for m in MUTANTS if not options.names or m.name in options.names]
    if options.list:
        for mutant in mutants:
            print(f"{mutant.name:28} {mutant.file}", *mutant.tests, sep="\n    ")
        return 0
    return run(mutants, options.jobs, options.whole, not options.unchecked)


if __name__ == "__main__":
    sys.exit(main())
