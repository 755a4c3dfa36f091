"""The program cache: a command loads the programs that an earlier command compiled."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import filelock
import jax
import pytest

from lora_jax.system import program_cache, user_cache
from tests.training import forks, tiny

# `lora-jax generate` in another process; argv: the cache, the base, the file for the counts.
PROGRAM = """
import collections, json, os, pathlib, sys
import jax
from lora_jax import __main__ as command
from lora_jax.system import program_cache
cache, base, out = sys.argv[1:]
os.environ["LORA_JAX_CACHE"] = cache
jax.config.update("jax_compilation_cache_dir", None)  # that of the tests
program_cache.SHORTEST = 0
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.split("/")[-1]]))
status = command.main(
    ["generate", "--base", base, "--prompt", "word1 word2", "--max-new-tokens", "2"]
)
found = {"status": status, "most": jax.config.jax_compilation_cache_max_size, **events}
pathlib.Path(out).write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_a_second_command_compiles_nothing(tmp_path: pathlib.Path) -> None:
    base = tiny.write_model(tmp_path / "base", tiny.LLAMA)
    script, cache = tmp_path / "generate.py", tmp_path / "cache"
    script.write_text(PROGRAM)

    def generate(name: str) -> dict[str, Any]:
        log, out = tmp_path / f"{name}.log", tmp_path / f"{name}.json"
        status = forks.python([str(script), str(cache), str(base), str(out)], log)
        assert status == 0, log.read_text()
        assert "persistent compilation cache" not in log.read_text()
        found: dict[str, Any] = json.loads(out.read_text())
        assert found["status"] == 0, log.read_text()
        assert found["most"] == program_cache.MOST
        return found

    with concurrent.futures.ThreadPoolExecutor() as pool:
        both = list(pool.map(generate, ("one", "two")))
    assert sum(found.get("cache_misses", 0) for found in both) > 0
    programs = list((cache / "programs" / program_cache.machine()).glob("*-cache"))
    third = generate("three")
    assert third.get("cache_misses", 0) == 0
    assert third["cache_hits"] == third["compile_requests_use_cache"] == len(programs)


@pytest.fixture
def no_cache() -> Iterator[None]:
    """Turn JAX's cache off, as it is when a command begins."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_enable_compilation_cache", True)


def test_a_cache_of_the_user_is_left_alone() -> None:
    """A cache that the user has chosen stays as it is."""
    folder = jax.config.jax_compilation_cache_dir
    assert folder
    assert program_cache.enable(print) is None
    assert jax.config.jax_compilation_cache_dir == folder


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("trouble", ["off", "home", "lock", "disk"])
def test_commands_run_without_it(
    trouble: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path))
    folder = user_cache.folder() / "programs" / program_cache.machine()
    lock = filelock.FileLock(folder / program_cache._LOCK)
    if trouble == "home":
        (tmp_path / "programs").write_text("a file")
    elif trouble == "lock":
        folder.mkdir(parents=True)
        lock.acquire()
    elif trouble == "disk":
        monkeypatch.setattr(pathlib.Path, "touch", _full)
    jax.config.update("jax_enable_compilation_cache", trouble != "off")
    assert program_cache.enable(print) is None
    lock.release()
    assert jax.config.jax_compilation_cache_dir is None


def _full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_what_a_killed_process_left_is_deleted(tmp_path: pathlib.Path) -> None:
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (tmp_path / name).write_text("x")
    program_cache._drop_unfinished(tmp_path)
    left = {path.name for path in tmp_path.iterdir()} - {program_cache._LOCK}
    assert left == {"whole-cache", "whole-atime"}


def test_machines_have_folders_of_their_own(tmp_path: pathlib.Path) -> None:
    def named(flags: str, mhz: int = 2000, model: str = "EPYC") -> str:
        text = f"model name\t: {model}\ncpu MHz\t: {mhz}\nflags\t: {flags}\n"
        (tmp_path / "cpuinfo").write_text(text * 2)
        return program_cache.machine(tmp_path / "cpuinfo")

    names = [named("avx2"), named("avx2 avx512f"), named("avx2", model="Xeon")]
    assert len(set(names)) == 3
    assert named("avx2", mhz=3000) == names[0]
