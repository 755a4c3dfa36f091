"""A file of a package that is fetched without its dependencies, with no network involved."""

import hashlib
import importlib.metadata
import os
import zipfile
from pathlib import Path

import pytest

from lora_jax.models import packages

TEXT = b"forty-two\n"
SHA256 = hashlib.sha256(TEXT).hexdigest()


def _wheel(folder: Path, version: str = "1.0") -> None:
    """A wheel that carries one file, and needs a package that no registry has."""
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
    """A registry that is a folder; the cache is empty."""
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
    # The second call finds it in the cache: the registry is empty by then.
    next(registry.iterdir()).unlink()
    again = packages.locate("Lora_Jax.Test-Asset", "1.0", "test_asset/data/answer.txt", SHA256)
    assert again == path
    assert [entry.name for entry in (packages.cache() / "packages").iterdir()] == [
        "lora-jax-test-asset-1.0"
    ]


def test_only_the_named_version(registry: Path) -> None:
    _wheel(registry, "1.0")
    packages.locate("lora-jax-test-asset", "1.0", "test_asset/data/answer.txt")
    with pytest.raises(packages.PackageError, match=r"lora-jax-test-asset==1\.1"):
        packages.locate("lora-jax-test-asset", "1.1", "test_asset/data/answer.txt")


def test_installed_package_is_not_fetched(registry: Path) -> None:
    version = importlib.metadata.version("numpy")
    path = packages.locate("numpy", version, "numpy/__init__.py")
    assert path.is_file()
    assert not (packages.cache() / "packages").exists()


def test_another_installed_version_is_not_taken(registry: Path) -> None:
    with pytest.raises(packages.PackageError, match=r"numpy==0\.0\.1 could not be fetched"):
        packages.locate("numpy", "0.0.1", "numpy/__init__.py")


def test_failed_fetch_says_the_cure_and_leaves_nothing(registry: Path) -> None:
    with pytest.raises(packages.PackageError) as failure:
        packages.locate("lora-jax-test-asset", "1.0", "test_asset/data/answer.txt")
    assert "pip install --no-deps lora-jax-test-asset==1.0" in str(failure.value)
    assert "LORA_JAX_CACHE" in str(failure.value)
    assert list((packages.cache() / "packages").iterdir()) == []


def test_missing_file_names_the_nearest(registry: Path) -> None:
    _wheel(registry)
    with pytest.raises(packages.PackageError, match=r"nearest: test_asset/data/answer\.txt"):
        packages.locate("lora-jax-test-asset", "1.0", "test_asset/answer.txt")


def test_wrong_sum_is_an_error_with_both_sums(registry: Path) -> None:
    _wheel(registry)
    wrong = "0" * 64
    with pytest.raises(packages.PackageError) as failure:
        packages.locate("lora-jax-test-asset", "1.0", "test_asset/data/answer.txt", wrong)
    assert wrong in str(failure.value) and SHA256 in str(failure.value)


def test_remembered_sum_dies_with_the_file(registry: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(TEXT)
    packages.verify(file, SHA256.upper())
    file.write_bytes(TEXT[::-1])
    os.utime(file, ns=(0, 0))
    with pytest.raises(packages.PackageError, match="not the one"):
        packages.verify(file, SHA256)
