"""Find the folder of one adapter, or of several, from a command's `[NAME=]PATH`."""

from __future__ import annotations

from lora_jax.checkpoint import storage
from lora_jax.checkpoint.storage import RemotePath
from lora_jax.errors import LoraError, listed, nearest


def find(given: str) -> list[tuple[str, RemotePath]]:
    """Return (name, folder) of each adapter that `[NAME=]PATH` stands for.

    PATH is a folder that `lora_jax.save` wrote; or a run directory, which stands for its
    adapters/best, or its adapters/last if there is no best; or a directory of run directories.
    """
    name, path = _name_of(given)
    found = _at(path)
    if name is None:
        return found
    if len(found) > 1:
        raise LoraError(
            f"{path} holds {len(found)} runs, which cannot all be called {name!r}; leave the name "
            f"out, or open one of them:\n{listed(f'{name}={folder}' for folder in _runs(found))}"
        )
    return [(name, found[0][1])]


def find_one(path: str) -> tuple[str, RemotePath]:
    """Return (name, folder) of the one adapter at a path."""
    found = _at(path)
    if len(found) > 1:
        raise LoraError(
            f"{path} holds {len(found)} runs; name one of them:\n{listed(_runs(found))}"
        )
    return found[0]


def is_there(path: str) -> bool:
    """Return whether there is an adapter at a path, or a run that will have one."""
    folder = storage.folder_at(path)
    return bool(_found(folder)) or (folder / "checkpoints").exists()


def _at(path: str) -> list[tuple[str, RemotePath]]:
    folder = storage.folder_at(path)
    if not (found := _found(folder)):
        raise LoraError(f"no adapter at {path}: {_there(folder)}")
    return found


def _found(folder: RemotePath) -> list[tuple[str, RemotePath]]:
    own = adapter_in(folder)
    if own is not None:
        return [(_own_name(own), own)]
    runs = sorted(folder.iterdir()) if folder.is_dir() else []
    return [(run.name, own) for run in runs if (own := adapter_in(run)) is not None]


def _runs(found: list[tuple[str, RemotePath]]) -> list[str]:
    """Return the run directories in which adapters were found."""
    return [str(place if place.name == name else place.parent.parent) for name, place in found]


def _name_of(given: str) -> tuple[str | None, str]:
    """Split `[NAME=]PATH`.

    >>> _name_of("reviews=runs/a"), _name_of("runs/lr=1e-3")
    (('reviews', 'runs/a'), (None, 'runs/lr=1e-3'))
    """
    name, equals, path = given.partition("=")
    if not equals or "/" in name:
        return None, given
    if not name or not path:
        raise LoraError(f"an adapter is given as PATH or NAME=PATH, got {given!r}")
    return name, path


def adapter_in(folder: RemotePath) -> RemotePath | None:
    """Return `folder` if it is an adapter, else the best or last adapter of the run, or None.

    A run that was killed between two renames may have left its best adapter as best.old.
    """
    names = ("best", "best.old", "last", "last.old")
    places = (folder, *(folder / "adapters" / name for name in names))
    return next((place for place in places if (place / "meta").exists()), None)


def _own_name(folder: RemotePath) -> str:
    """Return `run` for run/adapters/best, and else the folder's own name."""
    resolved = folder.resolve()
    own = resolved.name.removesuffix(".old")
    inside = resolved.parent.name == "adapters" and own in ("best", "last")
    return resolved.parent.parent.name if inside else resolved.name


def _there(folder: RemotePath) -> str:
    wanted = (
        "expected a folder that lora_jax.save wrote, or a run directory of train.py with "
        "adapters/best or adapters/last in it"
    )
    if not folder.exists():
        around = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = nearest(folder.name, around)
        hint = f"\nnearest in {folder.parent.resolve()}:\n{listed(near)}" if near else ""
        return f"there is no such folder; {wanted}{hint}"
    if not folder.is_dir():
        return f"it is a file; {wanted}"
    inside = sorted(p.name for p in folder.iterdir())
    if "adapter_config.json" in inside:
        return (
            "it is a PEFT folder; make it a run with\n"
            f"  lora-jax import {folder} --base REFERENCE --out RUN"
        )
    if "config.json" in inside and "checkpoints" in inside:
        return "the run has not exported one yet; it does at its first evaluation"
    return f"the folder holds {', '.join(inside[:10]) or 'nothing'}; {wanted}"
