"""The number of members that fit in memory, computed from the figures of a compiled step."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import pytest

from lora_jax.sweeps.memory_fit import StepMemory, available, fit, of_step
from lora_jax.system import host_memory
from lora_jax.training.config import ConfigError


@pytest.mark.parametrize(
    ("memory", "groups", "size"),
    [
        (17.0, 1, 16),  # 1 is shared, and each member needs 1
        (16.9, 2, 8),
        (9.0, 2, 8),
        (8.9, 3, 6),  # 7 would fit, but 6, 6 and 4 are as few groups, and smaller
        (2.0, 16, 1),
    ],
)
def test_as_few_groups_as_fit(memory: float, groups: int, size: int) -> None:
    found = fit(StepMemory(17.0), shared=1.0, members=16, memory=memory)
    assert (found.groups, found.size) == (groups, size)
    assert found.bytes == 1 + size <= memory


def test_not_even_one() -> None:
    with pytest.raises(ConfigError, match=r"(?s)needs 2\.00 GB, and there are 1\.50 GB.*--memory"):
        fit(StepMemory(17e9), 1e9, members=16, memory=1.5e9)


def test_the_line() -> None:
    assert (
        str(fit(StepMemory(1.2e9), 0.1e9, 16, 20e9)) == "16 members in 1 group: 1.20 GB of 20.00 GB"
    )
    assert str(fit(StepMemory(1.0), 1.0, 1, 5.0)) == "1 member in 1 group: 1 B of 5 B"
    assert "16 members in 2 groups of at most 8: 9 B of 9 B at a time" in str(
        fit(StepMemory(17), 1, 16, 9)
    )


def test_bytes_of_a_step() -> None:
    """A step needs the base once, and for each member a state, a row and intermediate results."""
    base = jax.ShapeDtypeStruct((256, 256), jnp.float32)

    def needed(members: int) -> StepMemory:
        state = jax.ShapeDtypeStruct((members, 256, 256), jnp.float32)

        def step(state: jax.Array, base: jax.Array) -> jax.Array:
            return jax.vmap(lambda x: jnp.sin(x @ base) @ base)(state)

        return of_step(jax.jit(step, donate_argnums=0).lower(state, base).compile())

    one, many, array = needed(1), needed(16), 256 * 256 * 4
    assert many.bytes - one.bytes == pytest.approx(15 * 2 * array, rel=0.05)  # state and temporary
    assert many.between == pytest.approx(16 * array, rel=0.05)
    assert one.bytes > 2 * array
    assert fit(many, array, 16, memory=one.bytes).size == 1


def test_what_is_in_between_is_there_for_the_members_at_once() -> None:
    """Intermediate results count only for the members that run at once.

    1 is shared, each member needs 1, and the intermediate results of 4 members need 8, so that 1, 2
    and 4 members need 4, 7 and 13.
    """
    needed = StepMemory(25.0, 8.0)
    for size, memory in ((16, 25.0), (8, 17.0), (4, 13.0), (2, 7.0), (1, 4.0)):
        found = fit(needed, 1.0, 16, memory, at_once=4)
        assert (found.size, found.bytes) == (size, memory)
    with pytest.raises(ConfigError, match="one member needs 4 B"):
        fit(needed, 1.0, 16, 3.9, at_once=4)


def machine(root: pathlib.Path, free: int, **files: str) -> pathlib.Path:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:  {free} kB\n")
    (root / "sys/fs/cgroup/memory").mkdir(parents=True)
    for name, text in files.items():
        folder = "sys/fs/cgroup/memory" if name.endswith("in_bytes") else "sys/fs/cgroup"
        (root / folder / f"memory.{name}").write_text(text + "\n")
    (root / "sys/fs/cgroup/memory.stat").write_text("anon 5\ninactive_file 300\n")
    (root / "sys/fs/cgroup/memory/memory.stat").write_text("total_inactive_file 40\n")
    return root


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8192),
        ({"max": "max", "current": "5000"}, 8192),
        ({"max": "6000", "current": "5000"}, 1300),
        ({"max": "600000", "current": "5000"}, 8192),
        ({"limit_in_bytes": "6000", "usage_in_bytes": "5000"}, 1040),
        ({"max": "6000", "current": "9000"}, 0),
    ],
)
def test_free_memory(tmp_path: pathlib.Path, files: dict[str, str], free: int) -> None:
    assert host_memory.free(machine(tmp_path, 8, **files)) == free


def test_available_on_a_cpu_counts_what_is_held_and_is_shared_by_its_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lora_jax.system.host_memory.free", lambda: 8e9)
    assert jax.local_device_count() == 8
    assert available(5e8) == 1.5e9
