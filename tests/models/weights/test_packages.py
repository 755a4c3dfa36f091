"""A file of a package is downloaded without the package's dependencies; no network is involved.

No code of a package is run. The archives have their tests in tests/models/weights/test_archive.py.
"""

import errno
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from lora_jax import models
from lora_jax.models.weights import download, packages, source
from lora_jax.system import user_cache

TEXT = b"forty-two\n"
SHA256 = hashlib.sha256(TEXT).hexdigest()


def _wheel(folder: Path, version: str = "1.0") -> None:
    """Write a wheel with one file, which needs a package that no registry has."""
    info = f"lora_jax_test_asset-{version}.dist-info"
    files = {
        "test_asset/data/answer.txt": TEXT,
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: lora-jax-test-asset\nVersion: {version}\n"
            "Requires-Dist: lora-jax-test-no-such-package\n"
        ).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    names = [*files, f"{info}/RECORD"]
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in names).encode()
    with zipfile.ZipFile(folder / f"lora_jax_test_asset-{version}-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for the registry; the cache is empty."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    for tool in ("PIP", "UV"):
        monkeypatch.setenv(f"{tool}_NO_INDEX", "1")
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(wheels))
    return wheels


def test_fetches_once_without_dependencies(registry: Path) -> None:
    _wheel(registry)
    path = packages.locate("lora-jax-test-asset", "1.0", "test_asset/data/answer.txt", SHA256)
    assert path.read_bytes() == TEXT
    # The second call finds the file in the cache: the registry is empty by then.
    next(registry.iterdir()).unlink()
    again = packages.locate("Lora_Jax.Test-Asset", "1.0", "test_asset/data/answer.txt", SHA256)
    assert again == path
    kept = [entry.name for entry in user_cache.folder("packages").iterdir()]
    assert kept == ["lora-jax-test-asset-1.0"]
    with pytest.raises(packages.PackageError, match=r"nearest: test_asset/data/answer\.txt"):
        packages.locate("lora-jax-test-asset", "1.0", "test_asset/answer.txt")
    wrong = "0" * 64
    with pytest.raises(packages.PackageError, match=f"(?s){wrong}.*{SHA256}"):
        packages.locate("lora-jax-test-asset", "1.0", "test_asset/data/answer.txt", wrong)


def test_a_fetch_deletes_what_a_killed_one_left(registry: Path) -> None:
    _wheel(registry)
    left = user_cache.folder("packages") / ".writing-lora-jax-test-asset-1.0-0a1b2c3d"
    left.mkdir()
    packages.locate("lora-jax-test-asset", "1.0", "test_asset/data/answer.txt", SHA256)
    assert [p.name for p in left.parent.iterdir()] == ["lora-jax-test-asset-1.0"]


def test_installed_package_is_not_fetched(registry: Path) -> None:
    version = importlib.metadata.version("numpy")
    path = packages.locate("numpy", version, "numpy/__init__.py")
    assert path.is_file()
    assert not list(user_cache.folder("packages").iterdir())


def test_another_installed_version_is_not_taken(registry: Path) -> None:
    with pytest.raises(packages.PackageError, match=r"numpy==0\.0\.1 could not be fetched"):
        packages.locate("numpy", "0.0.1", "numpy/__init__.py")


def test_failed_fetch_says_the_cure_and_leaves_nothing(registry: Path) -> None:
    with pytest.raises(packages.PackageError) as failure:
        packages.locate("lora-jax-test-asset", "1.0", "test_asset/data/answer.txt")
    assert "pip install --only-binary=:all: --no-deps lora-jax-test-asset==1.0" in str(
        failure.value
    )
    assert "LORA_JAX_CACHE" in str(failure.value)
    assert list(user_cache.folder("packages").iterdir()) == []


def test_remembered_sum_dies_with_the_file(registry: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(TEXT)
    packages.verify(file, SHA256.upper())
    file.write_bytes(TEXT[::-1])
    os.utime(file, ns=(0, 0))
    with pytest.raises(packages.PackageError, match="not the expected one"):
        packages.verify(file, SHA256)


def _source(folder: Path, mark: Path) -> Path:
    """Write a source distribution that leaves a mark if it is built, or only asked for its name."""
    top = folder / "lora_jax_test_asset-1.0"
    (top / "test_asset" / "data").mkdir(parents=True)
    (top / "test_asset" / "data" / "answer.txt").write_bytes(TEXT)
    (top / "setup.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    (top / "PKG-INFO").write_text(
        "Metadata-Version: 2.1\nName: lora-jax-test-asset\nVersion: 1.0\n"
    )
    path = folder / "lora_jax_test_asset-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(top, top.name)
    shutil.rmtree(top)
    return path


def test_a_source_distribution_is_not_built(registry: Path, tmp_path: Path) -> None:
    _source(registry, tmp_path / "mark")
    with pytest.raises(packages.PackageError, match="Only wheels are fetched"):
        models.open("pypi:lora-jax-test-asset==1.0/test_asset/data")
    assert not (tmp_path / "mark").exists()


def test_a_listed_source_distribution_is_unpacked_and_not_built(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _source(registry, tmp_path / "mark")
    for sum_of in (TEXT, path.read_bytes()):
        sha256 = hashlib.sha256(sum_of).hexdigest()
        monkeypatch.setitem(download._SOURCES, "lora-jax-test-asset==1.0", sha256)
        arguments = ("Lora_Jax.test-asset", "1.0", "test_asset/data/answer.txt", SHA256)
        if sum_of == TEXT:
            with pytest.raises(packages.PackageError, match="not the expected file"):
                packages.locate(*arguments)
        else:
            assert packages.locate(*arguments).read_bytes() == TEXT
    assert not (tmp_path / "mark").exists()


_OTHERS = "NO_BINARY=:all: ONLY_BINARY=:none: EDITABLE={here}/evil TARGET={here}/no DEST={here}/no"
_OTHERS += (
    " REQUIREMENT={here}/requirements.txt CONSTRAINT={here}/constraints.txt PYTHON_VERSION=2.7"
)
_OTHERS += " REQUIRE_VIRTUALENV=1 PLATFORM=win32 DRY_RUN=1 BUILD_CONSTRAINT={here}/constraints.txt"


def test_variables_of_pip_change_only_the_index(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _wheel(registry)
    evil = tmp_path / "evil"
    evil.mkdir()
    made = tmp_path / "made"
    (evil / "setup.py").write_text(
        f"import pathlib; pathlib.Path({str(made)!r}).touch()\n"
        "from setuptools import setup\nsetup(name='lora-jax-test-asset', version='1.0')\n"
    )
    (tmp_path / "requirements.txt").write_text(f"{evil}\n")
    (tmp_path / "constraints.txt").write_text(f"lora-jax-test-asset @ file://{evil}\n")
    for tool in ("PIP", "UV"):
        for name, _, value in (one.partition("=") for one in _OTHERS.format(here=tmp_path).split()):
            monkeypatch.setenv(f"{tool}_{name}", value)
    path = packages.locate("lora-jax-test-asset", "1.0", "test_asset/data/answer.txt", SHA256)
    assert path.is_relative_to(tmp_path / "cache") and path.read_bytes() == TEXT
    assert not made.exists() and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "reference",
    ["-r==x/y", "--index-url==1.0/y", "a==x/y", "a==-r/y", "a==1.0;b/y", "a==1.0 -r x/y",
     "a-==1/y", "a==1.0.zip/y", "a==1.0/../y", "a==1.0//etc/passwd", "a==1.0/./y"],
)  # fmt: skip
def test_what_is_no_package_is_an_error_before_anything_starts(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: started.append(args))
    with pytest.raises((packages.PackageError, source.ModelReferenceError)) as failure:
        models.open(f"pypi:{reference}")
    assert reference.partition("/")[0][:10] in str(failure.value)
    assert not started


@pytest.mark.parametrize(
    "version", ["0", "1.0", "2!1.0rc1", "1.0.post1.dev2", "2024.01.05", "1+a.1"]
)
def test_versions_of_the_registry(
    version: str, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*arguments: object) -> None:
        raise packages.PackageError("no network")

    monkeypatch.setattr(packages, "download", download)
    with pytest.raises(packages.PackageError, match="could not be fetched"):
        packages.locate("lora-jax-test-asset", version, "x")


def test_files_of_the_working_directory_are_not_read(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _wheel(registry)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "pip.py").write_text("open('mark', 'w').close()\n")
    monkeypatch.chdir(tmp_path / "work")
    packages.locate("lora-jax-test-asset", "1.0", "test_asset/data/answer.txt", SHA256)
    assert not (tmp_path / "work" / "mark").exists()


def test_a_full_disk_is_not_a_lack_of_network(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extractall(self: zipfile.ZipFile, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _wheel(registry)
    monkeypatch.setattr(zipfile.ZipFile, "extractall", extractall)
    with pytest.raises(packages.PackageError, match="The disk is full: make room below") as failure:
        packages.locate("lora-jax-test-asset", "1.0", "test_asset/data/answer.txt")
    assert "without a network" not in str(failure.value).lower()
    assert "damaged" not in str(failure.value)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disks_are_told_by_their_words_too(code: int) -> None:
    said = packages.PackageError(f"  | ERROR: OSError: [Errno {code}] {os.strerror(code)}")
    assert packages.is_full(said) and packages.is_full(OSError(code, os.strerror(code)))
    assert not packages.is_full(OSError(errno.EACCES, os.strerror(errno.EACCES)))
