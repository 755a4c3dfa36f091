"""Strict in tests, free at run time.

- Eight simulated CPU devices, so that sharding is tested on any machine.
- Rank promotion raises: `[B, T, D] * [D]` by accident is a bug that a wrong shape hides behind.
- Dtype promotion is strict: a float32 adapter that meets a bfloat16 weight must be cast by us, on
  purpose. Two libraries cannot live under that rule (Flax's norms in bfloat16 multiply by float32
  statistics, Optax's schedules divide an integer step), so the tests that go through them run under
  the standard rule: the folders below, and whatever carries `@pytest.mark.standard_promotion`.
- Grain's worker processes read absl flags, which nobody parses under pytest: it is done here.
- XLA leaves out its expensive optimisations of machine code: most of the suite's time was spent
  compiling programs that run once, on small arrays. The HLO, which tests read products, FLOPs,
  collectives and memory from, is the same without them. Processes that tests start inherit the
  settings, so that a run in one of them can be compared with one in this process bit for bit.
- A worker stays small: compiled programs are dropped when it passes a gigabyte.
- The files that take longest go first, so that no worker is left with one of them at the end.
"""

import contextlib
import ctypes
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from absl import flags

STANDARD_PROMOTION = ("models", "baselines", "data", "training", "groups", "planner")
STANDARD_PROMOTION += ("serving", "report", "foreign")

# Files by seconds (waits count too), longest first; the others take less than 20 seconds each.
LONGEST = (
    "test_models", "test_kinds_and_bases", "test_kills", "test_processes", "test_stack",
    "test_group_runs", "test_mesh",
    "test_text", "test_transform", "test_checkpoints", "test_router", "test_group", "test_report",
    "test_resume", "test_generation", "test_built_in_models", "test_adapter", "test_predict",
    "test_peft_round_trip", "test_peft_golden",
)  # fmt: skip

MOST_RESIDENT = 10**9  # bytes; without programs a worker has about 0.4e9

if jax.__version_info__[:2] == (0, 10):
    # The older of two generators of CPU code, in half the time. It fuses other operations, so that
    # the HLO is XLA's usual one only with a newer JAX, which does not know the flag any more.
    FLAGS = (os.environ.get("XLA_FLAGS", ""), "--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(FLAGS)  # read when the backend starts
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of other processes: here JAX is imported
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

if not flags.FLAGS.is_parsed():
    flags.FLAGS(["pytest"])


def pytest_configure(config: pytest.Config) -> None:
    """Have pytest-xdist keep the order of the files; it would take those with most tests first."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def small_worker() -> Iterator[None]:
    """Drop all compiled programs after a test that leaves the process too large."""
    yield
    with contextlib.suppress(OSError):  # no /proc, or another libc: nothing is dropped
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        if pages * os.sysconf("SC_PAGE_SIZE") > MOST_RESIDENT:
            jax.clear_caches()
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # glibc keeps what is freed


@pytest.fixture(autouse=True)
def promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Strict dtype promotion for the test, unless its folder or its marker says otherwise."""
    folders = request.path.relative_to(request.config.rootpath).parts
    relaxed = not {*folders}.isdisjoint(STANDARD_PROMOTION)
    relaxed = relaxed or request.node.get_closest_marker("standard_promotion") is not None
    with jax.numpy_dtype_promotion("standard" if relaxed else "strict"):
        yield


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The names of the events of compilation while the test runs."""
    found: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)
