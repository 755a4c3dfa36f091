"""Settings of all tests: strict rules that users do not have, and less time for each test.

- There are eight simulated CPU devices, so that sharding is tested on any machine.
- Rank promotion raises, because an accidental `[B, T, D] * [D]` can hide a wrong shape.
- Dtype promotion is strict: where a float32 adapter meets a bfloat16 weight, our code must cast it.
  Flax and Optax do not work under that rule (Flax's norms in bfloat16 multiply by float32
  statistics, Optax's schedules divide an integer step). The tests that use them run under the
  standard rule: the folders below, and tests with `@pytest.mark.standard_promotion`.
- Grain's worker processes read absl flags. pytest does not parse them, so this file does.
- XLA skips its expensive optimisations of machine code, because compiling programs that run once on
  small arrays took most of the suite's time. The HLO is the same without them, and the tests read
  products, FLOPs, collectives and memory from the HLO. Processes that tests start inherit the
  settings, so a run in such a process equals a run in this process bit for bit.
- All workers share compiled programs on disk until the tests end. Many tests build the same program
  again, and loading it takes half as long as compiling it. A worker cannot read an entry that
  another worker is still writing; JAX then warns and compiles (see pyproject.toml).
- Runs draw no curves, because the picture would take longer than the steps.
- Workers and the processes that tests start return freed memory (system/host_memory.py): keeping it
  saves nothing when arrays are small. The processes keep their compiled programs in the shared
  folder and not in the user's.
- A worker drops its compiled programs when it uses more than 1.3 gigabytes.
- Python collects garbage less often. Tracing makes many small objects, and with the default
  thresholds an eighth of the time was spent on searching them and all imported modules.
- The longest files run first, so that the last worker does not end with one of them.
"""

import collections
import contextlib
import ctypes
import gc
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from absl import flags

STANDARD_PROMOTION = ("models", "data", "training", "sweeps", "planner", "experiments")
STANDARD_PROMOTION += ("serving", "report", "foreign", "conversion")

# The slowest files by seconds, waits included, slowest first. Each other file takes less than 20 s.
LONGEST = (
    "test_models", "test_kinds_and_bases", "test_kills", "test_processes", "test_stack",
    "test_group_runs", "test_mesh", "test_bases_and_kinds", "test_consumers",
    "test_quantised_plan", "test_text", "test_transform", "test_checkpoints", "test_router",
    "test_group", "test_report", "test_resume", "test_generation", "test_built_in_models",
    "test_adapter", "test_predict",
    "test_peft_round_trip", "test_peft_golden", "test_from", "test_import",
)  # fmt: skip

MOST_RESIDENT = 1_300_000_000  # bytes; a worker without compiled programs has about 0.4e9
gc.set_threshold(50_000, 20, 20)

if jax.__version_info__[:2] == (0, 10):
    # The older of XLA's two generators of CPU code takes half the time. It fuses other operations,
    # so the HLO is XLA's usual one only with a newer JAX, which no longer knows this flag.
    FLAGS = (os.environ.get("XLA_FLAGS", ""), "--xla_cpu_use_fusion_emitters=false")
    FLAGS += ("--xla_cpu_parallel_codegen_split_count=1",)  # for one core, not for 32
    os.environ["XLA_FLAGS"] = " ".join(FLAGS)  # read when the backend starts
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process compiles all source files
sys.dont_write_bytecode = False
jax.config.update("jax_traceback_in_locations_limit", 0)  # few tests read source lines
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # other processes read it; here JAX is imported
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
PROGRAMS = "LORA_JAX_TEST_PROGRAMS"  # workers inherit it from the process that starts them
FIRST = PROGRAMS not in os.environ
if FIRST:
    os.environ[PROGRAMS] = tempfile.mkdtemp(prefix="lora-jax-programs-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ[PROGRAMS]  # for other processes
os.environ["LORA_JAX_KEEP_MEMORY"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ[PROGRAMS])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

if not flags.FLAGS.is_parsed():
    flags.FLAGS(["pytest"])


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return one worker more than cores, because a worker often waits for a test's processes."""
    return (os.cpu_count() or 1) + 1


def pytest_configure(config: pytest.Config) -> None:
    """Make pytest-xdist keep the order of files; by default it starts with the largest ones."""
    config.option.loadscopereorder = False


def pytest_unconfigure() -> None:
    """Delete the compiled programs once, when the workers have ended."""
    if FIRST:
        shutil.rmtree(os.environ.pop(PROGRAMS), ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark most of each matrix and of each long table as slow, and put the longest files first."""
    tables = collections.defaultdict[str, list[pytest.Item]](list)
    for item in items:
        if item.get_closest_marker("matrix") or item.get_closest_marker("few"):
            tables[item.nodeid.partition("[")[0]].append(item)
    for table in tables.values():
        few = table[0].get_closest_marker("few")
        quick = spread(table, *few.args) if few else quick_part(table)
        for item in table:
            if item.nodeid not in quick:
                item.add_marker(pytest.mark.slow)
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
    gc.collect()
    gc.freeze()


def names_of(mark: pytest.Mark) -> list[str]:
    """Return the parameters that a mark sets together."""
    names = mark.args[0]
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else [*names]


def spread(table: list[pytest.Item], count: int) -> set[str]:
    """Return the names of `count` tests of a table, at equal distances from its first to its last.

    Tests that are slow in any case are not counted.
    """
    names = [item.nodeid for item in table if not item.get_closest_marker("slow")]
    last = max(count - 1, 1)
    return {names[place * (len(names) - 1) // last] for place in range(min(count, len(names)))}


def quick_part(matrix: list[pytest.Item]) -> set[str]:
    """Return the names of a few tests of a matrix, in which each value of each axis occurs."""
    values = {}
    for item in matrix:
        axes = [names_of(mark) for mark in item.iter_markers("parametrize")]
        found = item.callspec.params
        values[item.nodeid] = {(str(axis), repr([found[n] for n in axis])) for axis in axes}
    chosen, seen = set[str](), set[tuple[str, str]]()
    for fresh in (2, 1):  # first the ones with two new values: the diagonal
        for name, pair in values.items():
            if len(pair - seen) >= fresh:
                chosen.add(name)
                seen |= pair
    return chosen


@pytest.fixture(scope="session", autouse=True)
def draw_curves() -> Iterator[Callable[[pathlib.Path], bytes] | None]:
    """Give the real function that draws curves.png; runs of tests write an empty file instead."""
    curves = sys.modules.get("lora_jax.training.curves")
    with pytest.MonkeyPatch.context() as patch:
        if curves is None:
            yield None
            return
        draw = curves.draw
        patch.setattr(curves, "draw", lambda run: b"")
        yield draw


@pytest.fixture(autouse=True)
def small_worker() -> Iterator[None]:
    """Drop all compiled programs after a test that leaves the process too large."""
    yield
    with contextlib.suppress(OSError):  # no /proc, or another libc: nothing is dropped
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        if pages * os.sysconf("SC_PAGE_SIZE") > MOST_RESIDENT:
            jax.clear_caches()
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # glibc keeps what is freed


@pytest.fixture(autouse=True)
def promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make dtype promotion strict for the test, unless its folder or its marker relaxes it."""
    folders = request.path.relative_to(request.config.rootpath).parts
    relaxed = not {*folders}.isdisjoint(STANDARD_PROMOTION)
    relaxed = relaxed or request.node.get_closest_marker("standard_promotion") is not None
    with jax.numpy_dtype_promotion("standard" if relaxed else "strict"):
        yield


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The names of JAX's compilation events during the test."""
    found: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 400 kB; the test is skipped if this process may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
