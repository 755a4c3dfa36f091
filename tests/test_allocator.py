"""Page faults with and without the allocator, counted in other processes; never time."""

from __future__ import annotations

import os
import pathlib
import platform
import subprocess
import sys

import jax
import pytest

from lora_jax.errors import LoraError
from lora_jax.system import allocator

ROOT = pathlib.Path(__file__).resolve().parents[1]
GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
PAGES = 16_384  # of the buffer that a step needs: the sine of 4096 x 4096 numbers

# Print whether memory is kept, and the page faults of the median step: the median, because the heap
# still grows now and then. argv: whether to keep memory, and seconds to wait after that.
PROGRAM = """
import resource, statistics, sys, time
import jax, jax.numpy as jnp
from lora_jax.system import allocator, console
kept = allocator.keep() if sys.argv[1] == "keep" else None
x = jnp.ones((4096, 4096))
step = jax.jit(lambda x: jnp.sin(x) @ x[:, :8])
for _ in range(8):
    step(x).block_until_ready()
time.sleep(float(sys.argv[2]))
step(x).block_until_ready()
faults = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, statistics.median(faults))
"""

# Name -> the two arguments, and the value of LORA_JAX_KEEP_MEMORY.
SIDES = {
    "kept": ("keep", "0", ""),
    "off": ("keep", "0", "0"),
    "imported": ("import", "0", ""),
    "bounded": ("keep", "1", "1e-9"),
}


@pytest.fixture(scope="module")
def faults() -> dict[str, tuple[str, int]]:
    """The value that `keep` returned, and the page faults of a step, by side."""
    if not GLIBC:
        pytest.skip("the allocator is not glibc's")
    named = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    named |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    running = {
        side: subprocess.Popen(
            [sys.executable, "-c", PROGRAM, what, wait],
            env={**named, allocator.VARIABLE: share},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for side, (what, wait, share) in SIDES.items()
    }
    found = {}
    for side, process in running.items():
        out, error = process.communicate()
        assert process.returncode == 0, error
        assert ("more than the" in error) == (side == "bounded"), error
        kept, count = out.split()
        found[side] = (kept, int(count))
    return found


@pytest.mark.slow
def test_steps_have_no_page_faults(faults: dict[str, tuple[str, int]]) -> None:
    """Steps cause no page faults where memory is kept.

    Red without M_ARENA_MAX, M_MMAP_MAX or M_TRIM_THRESHOLD.
    """
    kept, count = faults["kept"]
    assert kept == "True"
    assert count < PAGES / 20


@pytest.mark.parametrize(("side", "kept"), [("off", "False"), ("imported", "None")])
def test_nothing_is_kept_unasked(faults: dict[str, tuple[str, int]], side: str, kept: str) -> None:
    """Memory is not kept unless `keep` is called and the variable allows it."""
    assert faults[side][0] == kept
    assert faults[side][1] > PAGES / 2


def test_a_process_above_its_bound_gives_memory_back(faults: dict[str, tuple[str, int]]) -> None:
    """A process that uses more than its bound returns freed memory.

    Red without the thread that watches the bound.
    """
    assert faults["bounded"][0] == "True"
    assert faults["bounded"][1] > PAGES / 2


@pytest.mark.parametrize("text", ["yes", "-1", "2", "nan"])
def test_a_share_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(allocator.VARIABLE, text)
    with pytest.raises(LoraError, match=f"LORA_JAX_KEEP_MEMORY must be .* 0 to 1, got '{text}'"):
        allocator.keep()


@pytest.mark.parametrize("reason", ["musl", "accelerator", "tunables"])
def test_nothing_is_done_elsewhere(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is set under another libc, with an accelerator, or with the user's own tunables."""
    monkeypatch.setenv(allocator.VARIABLE, "0.5")
    monkeypatch.setattr(allocator, "_set", lambda values: pytest.fail("mallopt was called"))
    if reason == "musl":
        monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    elif reason == "tunables":
        monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=8")
    else:
        monkeypatch.setattr(type(jax.config), "jax_platforms", "cuda,cpu", raising=False)
    assert not allocator.keep()
