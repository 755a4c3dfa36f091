"""Make sixty one-line changes of the library, and check that tests notice each of them.

A test suite is as good as the bugs that it finds. This script makes a copy of the tracked files,
applies one change at a time (a mutant), and runs the test that it names: the mutant is killed if
that test fails, and survives if it passes.

    python -m tests.mutants                   all of them, one after the other
    python -m tests.mutants NAME ...          these
    python -m tests.mutants --jobs 2          two at a time, each in a copy of its own
    python -m tests.mutants --whole           a survivor is then run against the whole suite
    python -m tests.mutants --list            names, places and tests; runs nothing

Before that, the named tests run on the unchanged code and must pass, because otherwise a failure
means nothing; `--unchecked` leaves this out. The exit status is 0 if all mutants were killed.

A change is an expression and the one that takes its place. It is found by its syntax in a room of
the package, and it must be there exactly once (tests/test_mutants.py), so files may be split,
reformatted and moved within the room. A mutant that survives is not replaced: it shows that a test
is missing.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import functools
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMED, WHOLE = 300, 7200  # seconds that the named tests and the whole suite may take


class Mutant(NamedTuple):
    """A change: in `where`, the expression `old` becomes `new`; then `test` must fail.

    where: a room or a file, relative to lora_jax, and after a colon the function or constant, if
      the expression is in the room more than once.
    old: an expression. `if X`, `return X`, `name = X` (also as an argument) and `"key": X` (in a
      dict) are that X alone.
    """

    name: str
    where: str
    old: str
    new: str
    test: str


class Place(NamedTuple):
    """A part of a file, in bytes."""

    file: pathlib.Path
    start: int
    end: int


# fmt: off
MUTANTS = (  # name, where, old, new, test
    # ---- the core
    Mutant("idle-adapter-unsaid", "transform.py",
        "if idle", "False",
        "tests/test_resolve.py"),
    Mutant("head-is-a-target", "resolve.py",
        "if path in known.heads", "False",
        "tests/test_output_head.py::test_the_head_is_left_out_by_name_and_nothing_else_is"),
    Mutant("norms-have-gradients", "updates/dora.py:gains",
        "jax.lax.stop_gradient((w, parameters.a, parameters.b))", "(w, parameters.a, parameters.b)",
        "tests/updates/test_dora.py::test_value_and_gradients_in_float64"),
    Mutant("output-of-zero-is-nan", "updates/dora.py",
        "jnp.where(norms > 0, magnitude / jnp.where(norms > 0, norms, 1), 1)", "magnitude / norms",
        "tests/updates/test_dora.py::test_an_output_of_zero_stays"),
    Mutant("vera-has-other-numbers", "updates/vera.py",
        "bits >> 8", "bits >> 9",
        "tests/updates/test_kinds.py::test_vera_numbers_never_change"),
    Mutant("lokr-does-not-split", "updates/lokr.py",
        "range(math.isqrt(size), 0, -1)", "range(1, math.isqrt(size) + 1)",
        "tests/updates/test_kinds.py"),
    Mutant("dropped-without-scale", "updates/dropped.py",
        "jnp.asarray(1 - self.rate, front.array.dtype)", "jnp.ones((), front.array.dtype)",
        "tests/multi/test_dropout.py::test_value_and_gradients_with_the_mask_by_hand"),
    # ---- bases
    Mutant("second-code-first", "bases/nf4.py",
        "[self.codes >> 4, self.codes & 15]", "[self.codes & 15, self.codes >> 4]",
        "tests/bases/test_nf4.py::test_dense_is_what_bitsandbytes_dequantises"),
    Mutant("largest-without-sign", "bases/nf4.py",
        "jnp.max(jnp.abs(x), axis=-1)", "jnp.max(x, axis=-1)",
        "tests/bases/test_nf4.py::test_bytes_of_bitsandbytes"),
    Mutant("scale-without-rank", "target.py:scale",
        'self.alpha / (self.rank if self.scaling == "alpha/r" else math.sqrt(self.rank))',
        "self.alpha",
        "tests/test_merge.py::test_merge_against_float64_by_hand"),
    # The numbers stay right, but the work is many times as much.
    Mutant("larger-product-first", "updates",
        "if contracted(a) >= contracted(b)", "contracted(a) <= contracted(b)",
        "tests/test_flops.py::test_gradient_flops[minilm]"),
    Mutant("scan-never-reversed", "primitives",
        'reverse = p["reverse"]', "False",
        "tests/test_transform.py"
        "::test_outputs_equal_those_of_the_merged_weights[bare_scan_reversed]"),
    Mutant("frozen-gradients-pass", "frozen.py",
        '"frozen": optax.set_to_zero()', "optax.identity()",
        "tests/test_frozen.py::test_partition_freezes_even_where_gradients_of_w0_exist"),
    Mutant("pattern-matches-a-beginning", "paths.py",
        "regex.fullmatch(p)", "regex.match(p)",
        "tests/test_paths.py::test_match"),
    # ---- many adapters
    Mutant("truncated-without-scale", "multi/combine.py:truncate",
        "target.scale * b.astype(wide)", "b.astype(wide)",
        "tests/multi/test_combine.py::test_truncation_is_the_nearest_and_reports_what_it_cut"),
    Mutant("unknown-slot-is-the-base", "multi",
        'jnp.take(n.array, self.index, axis=axis, mode="fill", fill_value=jnp.nan)',
        'jnp.take(n.array, self.index, axis=axis, mode="clip")',
        "tests/multi/test_stack.py::test_a_number_that_is_no_slot_gives_nan_in_a_compiled_program"),
    Mutant("examples-draw-alike", "multi",
        "jax.random.fold_in(leaves[i], index)", "leaves[i]",
        "tests/multi/test_stack.py::test_examples_draw_apart_from_each_other"),
    Mutant("ranks-filled-in-front", "multi",
        "(0, n - have)", "(n - have, 0)",
        "tests/multi/test_stack.py::test_put_writes_one_slot_and_unstack_reads_it_back"),
    Mutant("balance-of-gates-alone", "multi/moe",
        "(load.share * load.gate).sum(-1)", "(load.gate * load.gate).sum(-1)",
        "tests/moe/test_router.py::test_the_balance_is_of_shares_and_gates"),
    # ---- files
    Mutant("places-do-not-count", "checkpoint/fingerprint.py",
        "words ^ _mix(where ^ jnp.uint32(seed))", "words",
        "tests/checkpoint/test_fingerprint.py::test_the_definition"),
    Mutant("any-base-will-do", "checkpoint/fingerprint.py:check_base",
        "if found", "False",
        "tests/checkpoint/test_fingerprint.py::test_another_base_is_refused_unless_it_is_meant"),
    Mutant("flipped-bits-pass", "exchange/peft.py",
        "saved.get(key) != tensor_file.digest(x)", "False",
        "tests/exchange/test_peft_hostile.py::test_flipped_bits_are_found"),
    Mutant("rows-left-in-order", "exchange/gguf.py",
        "b if order is None else b[..., order, :]", "b",
        "tests/exchange/test_gguf.py::test_llama_cpps_rules_give_the_merged_model"),
    Mutant("layers-uncounted", "exchange/mlx.py",
        "0 < config.layers < max(numbers) - min(numbers) + 1", "False",
        "tests/exchange/test_mlx.py"),
    Mutant("link-out-is-followed", "system/regular_files.py",
        "not target.is_relative_to(folder)", "False",
        "tests/attacks/test_reading.py::test_the_cache_of_the_model_hub_is_read"),
    Mutant("holes-are-read", "system/regular_files.py",
        "found.st_size > max(MOST_BYTES, RATIO * allocated(path))", "False",
        "tests/attacks/test_reading.py::test_reading_does_no_harm"),
    Mutant("hard-link-is-written", "system/whole_files.py",
        "found.st_nlink > 1", "False",
        "tests/attacks/test_writing.py::test_append_opens_only_a_file_of_its_own"),
    Mutant("litter-stays", "system/whole_files.py:write",
        'name.startswith(f"{TEMPORARY}{path.name}-")', "False",
        "tests/attacks/test_writing.py::test_what_a_killed_write_left_is_deleted"),
    Mutant("nesting-without-end", "system/json_file.py:_DEPTH",
        "100", "1000",
        "tests/test_json_file.py::test_depth"),
    # ---- commands
    Mutant("config-option-unread", "cli/train.py",
        "before.lora != after.lora", "False",
        "tests/experiments/test_method_config.py"
        "::test_lora_settings_beside_another_method_are_refused"),
    Mutant("hashes-not-compared", "checkpoint",
        "damaged = manifest.damaged(loaded)", "list[str]()",
        "tests/checkpoint/test_adapter.py::test_an_array_of_another_adapter_is_named"),
    # ---- training
    Mutant("parts-share-a-key", "training/step.py",
        "jax.random.fold_in(key, index)", "key",
        "tests/training/test_step.py::test_each_part_draws_from_a_key_of_its_own"),
    Mutant("lower-is-never-better", "training",
        'if self.setup.workload.better == "higher"', "True",
        "tests/training/test_run.py::test_best_is_kept_when_later_steps_are_worse"),
    Mutant("lost-checkpoint-unsaid", "training/checkpoints.py",
        "isinstance(error, processes.Preempted)", "False",
        "tests/training/test_checkpoints.py::test_a_full_disk_is_an_error_at_the_end"),
    Mutant("first-step-stands-still", "training/optimizer.py",
        "(count + 1) / (hyper.rise + 1)", "count / (hyper.rise + 1)",
        "tests/training/test_optimizer.py::test_the_rates_are_those_of_optax"),
    Mutant("record-not-flushed", "training/metrics.py:sync",
        "self._file.flush()", "None",
        "tests/training/test_metrics.py::test_what_is_synced_is_in_the_file"),
    Mutant("checkpoint-of-unread-steps", "training/loop.py:checkpoint",
        "self.settle()", "None",
        "tests/training/test_run.py::test_a_nonfinite_step_stops_the_run_and_is_named"),
    Mutant("rows-by-data-first", "training:BATCH",
        '("fsdp", "data")', '("data", "fsdp")',
        "tests/training/test_mesh.py"
        "::test_rows_are_divided_in_the_order_that_the_partitioner_gets_right"),
    Mutant("states-may-differ", "training/processes.py",
        "any(state != states[0] for state in states)", "False",
        "tests/training/test_processes.py::test_states_of_two_processes_are_put_together"),
    Mutant("export-without-fingerprint", "training/export.py",
        "fingerprint = fingerprint", "None",
        "tests/serving/test_predict.py::test_texts_of_the_command_line"),
    Mutant("fresh-deletes-anything", "training/directory.py",
        "if foreign", "False",
        "tests/training/test_run.py::test_fresh_does_not_delete_what_no_run_wrote"),
    # ---- data
    Mutant("weights-one-place-late", "data",
        '"loss_weight": marks[1:].astype(np.float32)', "marks[:-1].astype(np.float32)",
        "tests/data/test_language_modelling.py::test_packed_rows_hold_every_example_once_an_epoch"),
    Mutant("streams-count-their-own", "data/packing.py",
        "self._shard.most(self.longest)", "self.longest",
        "tests/data/test_shards.py::test_evaluation_has_every_example_exactly_once"),
    Mutant("filled-row-counts", "data",
        "np.arange(self.batch_size) < len(chosen)", "np.arange(self.batch_size) <= len(chosen)",
        "tests/data/test_classification.py::test_an_epoch_has_every_example_exactly_once"),
    Mutant("lost-records-accepted", "data/builders.py",
        "found != expected", "found > expected",
        "tests/data/test_builders.py::test_lost_records_are_an_error"),
    # ---- sweeps
    Mutant("diverged-member-goes-on", "sweeps",
        "active & (settings.skip | (state.skipped == 0))", "active",
        "tests/sweeps/test_group_step.py"
        "::test_a_member_that_diverges_does_not_disturb_the_others[False]"),
    Mutant("filled-up-with-ones", "sweeps/batches.py",
        "np.zeros((len(arrays), *shape), known[0].dtype)",
        "np.ones((len(arrays), *shape), known[0].dtype)",
        "lora_jax/sweeps/batches.py"),
    Mutant("base-takes-no-memory", "sweeps/memory_fit.py",
        "shared + size * own", "size * own",
        "tests/training/test_fit.py::test_as_few_groups_as_fit"),
    Mutant("worst-run-is-best", "sweeps/comparison.py",
        "max(known, key=lambda row: row.rank)", "min(known, key=lambda row: row.rank)",
        "tests/sweeps/test_results.py::test_what_differs_and_what_is_best"),
    # ---- planner
    Mutant("half-of-an-all-reduce", "planner",
        '"all-reduce": 2 * (n - 1) / n', "(n - 1) / n",
        "tests/planner/test_plan.py::test_seconds_of_a_ring"),
    Mutant("loops-count-once", "planner/hlo.py",
        "(instruction.trips or 1) if loop else 1", "1",
        "tests/planner/test_hlo.py::test_collectives_in_a_loop_count_as_often_as_it_runs"),
    # ---- models
    Mutant("rotation-backwards", "models/rope.py",
        "[-sin, sin]", "[sin, -sin]",
        "tests/models/test_golden.py::test_decoder_as_transformers[llama-False]"),
    Mutant("window-one-too-wide", "models/sight.py",
        "distance < reach", "distance <= reach",
        "tests/models/test_laws.py::test_causality[3]"),
    Mutant("pairs-left-adjacent", "models/weights",
        "pairs.swapaxes(1, 2)", "pairs",
        "tests/models/weights/test_gguf_models.py::test_gguf_is_the_folder"),
    # ---- serving
    Mutant("token-of-nan", "serving/sampling.py",
        "jnp.where(sound, jnp.argmax(logits, axis=-1), -1)", "jnp.argmax(logits, axis=-1)",
        "tests/serving/test_generation.py::test_numbers_that_are_not_finite_are_no_token"),
    Mutant("lines-not-flushed", "serving/jsonl.py:write",
        "self._file.flush()", "None",
        "tests/serving/test_jsonl.py::test_what_is_written_is_read_again"),
    Mutant("rows-draw-alike", "serving",
        'jax.random.fold_in(jax.random.key(numbers["seed"]), row)',
        'jax.random.key(numbers["seed"])',
        "tests/serving/test_generation.py::test_draws_have_the_probabilities[sampling0-kept0]"),
    # ---- analysis, experiments, report
    Mutant("phi-by-the-larger-side", "analysis",
        "np.minimum(rows[:, None], columns)", "np.maximum(rows[:, None], columns)",
        "lora_jax/analysis/subspaces.py"),
    Mutant("bottleneck-without-residual", "../experiments/methods",
        'x + _dense(params["up"], h)', '_dense(params["up"], h)',
        "tests/experiments/test_bottleneck.py::test_a_layer_is_the_formula"),
    Mutant("seeds-that-differ-in-more", "report",
        '_differences(*pair, ()) == ["seed"]', '"seed" in _differences(*pair, ())',
        "tests/report/test_pieces.py::test_seeds_that_differ_in_nothing_else_are_compared"),
)
# fmt: on


class Result(NamedTuple):
    """A mutant's verdict (killed, SURVIVED, or why there is none) and its first failed test."""

    mutant: Mutant
    verdict: str
    seconds: float
    failed: str


def same(one: object, other: ast.AST) -> bool:
    """Return whether two pieces of syntax are equal."""
    return type(one) is type(other) and ast.dump(one) == ast.dump(other)


def occurrences(tree: ast.AST, old: str) -> Iterator[ast.expr]:
    """Yield each expression of the tree that `old` describes."""
    word, _, rest = old.partition(" ")
    if word in ("if", "return"):
        wanted: ast.AST = ast.parse(rest, mode="eval").body
        for node in ast.walk(tree):
            if word == "if" and isinstance(node, ast.If | ast.IfExp) and same(node.test, wanted):
                yield node.test
            if word == "return" and isinstance(node, ast.Return) and same(node.value, wanted):
                yield node.value
        return
    if re.match(r'"[\w-]+": ', old):
        wanted = ast.parse("{" + old + "}", mode="eval").body
        key, value = wanted.keys[0], wanted.values[0]
        for node in ast.walk(tree):
            pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
            yield from (x for name, x in pairs if same(name, key) and same(x, value))
        return
    (wanted,) = ast.parse(old).body
    for node in ast.walk(tree):
        if isinstance(wanted, ast.Expr) and same(node, wanted.value):
            yield node
        elif isinstance(wanted, ast.Assign):
            named = same(node, wanted)
            if isinstance(node, ast.keyword) and same(node.value, wanted.value):
                named = node.arg == ast.unparse(wanted.targets[0])
            if named:
                yield node.value


@functools.cache
def parsed(file: pathlib.Path) -> ast.Module:
    """Return the syntax of a file."""
    return ast.parse(file.read_text())


def scopes(tree: ast.Module, name: str) -> Iterator[ast.AST]:
    """Yield the functions, classes and constants of this name; the whole file for no name."""
    if not name:
        yield tree
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else ()
        if name and (getattr(node, "name", "") == name or name in map(ast.unparse, targets)):
            yield node


def places(mutant: Mutant, tree: pathlib.Path) -> list[Place]:
    """Return where the mutant's expression is."""
    room, _, scope = mutant.where.partition(":")
    top, found = tree / "lora_jax" / room, set[Place]()
    words = [scope, *re.findall(r"\w+", mutant.old.removeprefix("if ").removeprefix("return "))]
    for file in [top] if top.is_file() else sorted(top.rglob("*.py")):
        lines = file.read_bytes().splitlines(keepends=True)
        if not all(word in file.read_text() for word in words):
            continue
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line))
        for part in scopes(parsed(file), scope):
            for node in occurrences(part, mutant.old):
                start = starts[node.lineno - 1] + node.col_offset
                found.add(Place(file, start, starts[node.end_lineno - 1] + node.end_col_offset))
    return sorted(found)


def misplaced(mutants: Sequence[Mutant], tree: pathlib.Path) -> list[str]:
    """Return a line for each mutant that is not exactly once in the tree, or without its test."""
    lines = []
    for mutant in mutants:
        if len(found := places(mutant, tree)) != 1:
            lines.append(f"{mutant.name}: {len(found)} times in {mutant.where}: {mutant.old}")
        file, _, test = mutant.test.partition("::")
        function = f"def {test.partition('[')[0]}("
        if not (tree / file).is_file() or (test and function not in (tree / file).read_text()):
            lines.append(f"{mutant.name}: there is no {mutant.test}")
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


def pytest(tree: pathlib.Path, tests: Sequence[str], timeout: float) -> tuple[str, str]:
    """Return the result of the copy's tests ("passed", "failed", ...), and the first failure."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
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
    """Apply the mutant in `tree`, run its test, and undo the change."""
    ((file, start, end),), began = places(mutant, tree), time.monotonic()
    text = file.read_bytes()
    file.write_bytes(text[:start] + mutant.new.encode() + text[end:])
    try:
        word, failed = pytest(tree, [mutant.test], NAMED)
        if word == "passed" and whole:
            word, failed = pytest(tree, (), WHOLE)
    finally:
        file.write_bytes(text)
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
            tests = list(dict.fromkeys(mutant.test for mutant in mutants))
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
            print(f"{mutant.name:28} {mutant.where}", mutant.test, sep="\n    ")
        return 0
    return run(mutants, options.jobs, options.whole, not options.unchecked)


if __name__ == "__main__":
    sys.exit(main())
