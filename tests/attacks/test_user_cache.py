"""The cache of compiled programs, packages and data is used only if nobody else can change it."""

from __future__ import annotations

import os
import pathlib
import stat
from collections.abc import Iterator

import jax
import pytest

from lora_jax.data import builders
from lora_jax.models.weights import packages
from lora_jax.system import program_cache, user_cache


@pytest.fixture
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """Return a cache folder that does not exist, below a folder that does."""
    (tmp_path / "home").mkdir(mode=0o755)
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "home" / "cache"))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "home" / "cache"
    jax.config.update("jax_compilation_cache_dir", before)


def give_away(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let another user own a folder, or let this process be another user."""
    if os.getuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)


def others(cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch, attack: str) -> None:
    """Make the cache one that others can change."""
    if attack == "owner":
        cache.mkdir(mode=0o755)
        give_away(cache, monkeypatch)
    elif attack == "owner of a parent":
        cache.mkdir(mode=0o700)
        give_away(cache.parent, monkeypatch)
    elif attack == "everyone":
        cache.mkdir()
        cache.chmod(0o777)
    elif attack == "everyone, in a folder of programs":
        (cache / "programs").mkdir(parents=True)
        (cache / "programs").chmod(0o777)
    elif attack == "group":
        cache.mkdir()
        if os.getuid() == 0:
            os.chown(cache, 0, 12345)
        monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid)
        cache.chmod(0o2775)
        if os.getuid() == cache.stat().st_gid:
            pytest.skip("a group with the user's own number")
    elif attack == "parent":
        cache.mkdir(mode=0o700)
        cache.parent.chmod(0o777)
    else:
        real = cache.parent.parent / "real"
        real.mkdir(mode=0o700)
        (real / "programs").mkdir(mode=0o700)
        real.chmod(0o777)
        cache.symlink_to(real)


ATTACKS = ("owner", "owner of a parent", "everyone", "everyone, in a folder of programs")
ATTACKS += ("group", "parent", "link")


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_program_comes_from_others(
    attack: str, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others(cache, monkeypatch, attack)
    said: list[str] = []
    assert program_cache.enable(said.append) is None
    assert jax.config.jax_compilation_cache_dir is None
    (line,) = said
    assert "LORA_JAX_CACHE" in line and str(cache) in line


@pytest.mark.parametrize("attack", [a for a in ATTACKS if "programs" not in a])
def test_no_package_and_no_data_comes_from_others(
    attack: str, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"changed")
    others(cache, monkeypatch, attack)
    with pytest.raises(user_cache.CacheError, match="chmod"):
        packages.locate("lora-jax-test-asset", "1.0", "test_asset/data/answer.txt")
    with pytest.raises(user_cache.CacheError, match="LORA_JAX_CACHE"):
        builders.folder(None)
    assert builders.folder(str(tmp_path)) == tmp_path  # the user's own choice
    with pytest.raises(packages.PackageError, match="not the expected one"):
        packages.verify(file, "0" * 64)


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_it_is_private_whatever_the_umask(umask: int, cache: pathlib.Path) -> None:
    """Every folder that is made has the mode 0700."""
    old = os.umask(umask)
    try:
        folder = user_cache.folder("programs", "x")
    finally:
        os.umask(old)
    for each in (folder, folder.parent, cache):
        assert stat.S_IMODE(each.stat().st_mode) == 0o700


def test_a_private_cache_is_used(cache: pathlib.Path) -> None:
    cache.parent.chmod(0o1777)
    said: list[str] = []
    assert program_cache.enable(said.append) == cache / "programs" / program_cache.machine()
    assert not said
    assert user_cache.folder("programs").is_dir()
