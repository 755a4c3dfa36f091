"""Archives from strangers: what is refused, and that nothing is written outside of the folder."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from lora_jax.models.weights import archive
from lora_jax.models.weights.archive import ArchiveError, unpack


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
    names = ("a/b.txt", "a-1.data/purelib/a/c.txt", "a-1.data/scripts/run", "empty/")
    unpack(wheel(tmp_path / "a.whl", *names, mode=stat.S_IFREG | 0o777), tmp_path / "out")
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in tmp_path.glob("out/**/*.*"))
    assert found == ["a-1.data", "a/b.txt", "a/c.txt"]
    assert not (tmp_path / "out/a-1.data/scripts/run").stat().st_mode & 0o111  # nothing to run
    unpack(source(tmp_path / "a.tar.gz", "a-1/a/b.txt"), tmp_path / "other")
    assert (tmp_path / "other/a/b.txt").read_bytes() == b"x"


BAD = ["../x", "a/../../x", "/x", "a//x", "./x", "a\\..\\x", "C:x", "a/.."]


@pytest.mark.parametrize("name", BAD)
def test_paths_out_of_the_folder(tmp_path: Path, name: str) -> None:
    for path in (
        wheel(tmp_path / "a.whl", "ok", name),
        wheel(tmp_path / "b.whl", f"a.data/purelib/{name}"),
        source(tmp_path / "a.tar.gz", f"top/{name}"),
    ):
        with pytest.raises(ArchiveError, match="could lead out of its folder"):
            unpack(path, tmp_path / f"{path.name}-out")
        assert not list((tmp_path / f"{path.name}-out").iterdir())
    assert not (tmp_path / "x").exists()


def test_links_and_special_files(tmp_path: Path) -> None:
    paths = [wheel(tmp_path / "a.whl", "a", mode=stat.S_IFLNK | 0o777, data=b"/etc/passwd")]
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
    paths += [source(tmp_path / f"{i}.tar.gz", "top/a", kind) for i, kind in enumerate(kinds)]
    for path in paths:
        with pytest.raises(ArchiveError, match="a link or a special file"):
            unpack(path, tmp_path / f"{path.name}-out")


def test_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red if sizes are believed without a limit."""
    bomb = wheel(tmp_path / "bomb.whl", *(f"{i}" for i in range(6)), data=bytes(2**26))
    with pytest.raises(ArchiveError, match=r"declares 402,653,184 unpacked; the limit is 268,435"):
        unpack(bomb, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(archive, "FILES", 5)
    with pytest.raises(ArchiveError, match="6 files; the limit is 5"):
        unpack(bomb, tmp_path / "other")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [("a", "a"), ("a", "a/b")])
def test_one_path_twice(tmp_path: Path, names: tuple[str, str]) -> None:
    with pytest.raises(ArchiveError, match="twice"):
        unpack(wheel(tmp_path / "a.whl", *names), tmp_path / "out")


@pytest.mark.parametrize("name", ["a.whl", "a.tar.gz"])
def test_damaged(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK" + bytes(100))
    with pytest.raises(ArchiveError, match=r"a\.(whl|tar\.gz) is damaged"):
        unpack(tmp_path / name, tmp_path / "out")
    good = wheel(tmp_path / "b.whl", "a", data=bytes(range(256)) * 100)
    data = bytearray(good.read_bytes())
    data[60] ^= 255
    good.write_bytes(data)
    with pytest.raises(ArchiveError, match="is damaged"):
        unpack(good, tmp_path / "other")
