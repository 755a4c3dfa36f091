"""Page faults with and without memory that is kept, counted in other processes; never time."""

from __future__ import annotations

import os
import pathlib
import platform
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from lora_jax.errors import LoraError
from lora_jax.system import host_memory

ROOT = pathlib.Path(__file__).resolve().parents[1]
GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
PAGES = 16_384  # of the buffer that a step needs: the sine of 4096 x 4096 numbers

# Print whether memory is kept, and the page faults of the median step: the median, because the heap
# still grows now and then. argv: whether to keep memory, and seconds to wait after that.
PROGRAM = """
import resource, statistics, sys, time
import jax, jax.numpy as jnp
from lora_jax.system import console, host_memory
kept = host_memory.keep() if sys.argv[1] == "keep" else None
x = jnp.ones((4096, 4096))
step = jax.jit(lambda x: jnp.sin(x) @ x[:, :8])
for _ in range(4):
    step(x).block_until_ready()
time.sleep(float(sys.argv[2]))
step(x).block_until_ready()
faults = []
for _ in range(5):
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


def faults(side: str) -> tuple[str, int]:
    """Return what `keep` returned in a new process, and the page faults of a step there."""
    if not GLIBC:
        pytest.skip("the C library is not glibc")
    what, wait, share = SIDES[side]
    named = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    named |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), host_memory.VARIABLE: share}
    words = [sys.executable, "-c", PROGRAM, what, wait]
    done = subprocess.run(words, env=named, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("more than the" in done.stderr) == (side == "bounded"), done.stderr
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "kept"),
    [("kept", "True"), ("imported", "None"), ("off", "False"), ("bounded", "True")],
)
def test_page_faults_of_a_step(side: str, kept: str) -> None:
    """A step has no page faults where memory is kept, which only `keep` does, up to its bound."""
    found, count = faults(side)
    assert found == kept
    assert count < PAGES / 20 if side == "kept" else count > PAGES / 2


def test_a_process_above_its_bound_gives_memory_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`keep` sets the allocator, and the thread that watches the bound sets it back."""
    found: list[object] = []
    monkeypatch.setattr(host_memory, "_set", found.append)
    monkeypatch.setattr(host_memory, "_WATCH", "watch of a test")
    monkeypatch.setattr(host_memory, "_is_glibc", lambda: True)
    monkeypatch.setattr(host_memory, "_is_set_by_user", lambda: False)
    monkeypatch.setenv(host_memory.VARIABLE, "1e-9")
    held = [np.ones(1 << 20)]  # above the bound, which is a billionth of what was free
    assert host_memory.keep()
    while watch := [t for t in threading.enumerate() if t.name == "watch of a test"]:
        held.append(np.ones(1 << 20))
        watch[0].join(1)
    assert found == [host_memory._KEEP, host_memory._GIVE_BACK]
    assert "more than the" in caplog.text


@pytest.mark.parametrize("text", ["yes", "-1", "2", "nan"])
def test_a_share_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(host_memory.VARIABLE, text)
    with pytest.raises(LoraError, match=f"LORA_JAX_KEEP_MEMORY must be .* 0 to 1, got '{text}'"):
        host_memory.keep()


@pytest.mark.parametrize("reason", ["musl", "accelerator", "tunables"])
def test_nothing_is_done_elsewhere(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is set under another libc, with an accelerator, or with the user's own tunables."""
    monkeypatch.setenv(host_memory.VARIABLE, "0.5")
    monkeypatch.setattr(host_memory, "_set", lambda values: pytest.fail("mallopt was called"))
    if reason == "musl":
        monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    elif reason == "tunables":
        monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=8")
    else:
        monkeypatch.setattr(type(jax.config), "jax_platforms", "cuda,cpu", raising=False)
    assert not host_memory.keep()
