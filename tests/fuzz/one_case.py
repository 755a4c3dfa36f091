"""Run one case within its bounds."""

from __future__ import annotations

import pathlib
import shutil
import warnings
from random import Random

from tests.attacks.attacks import ATTACKS
from tests.fuzz import adapters, kind, mutate
from tests.fuzz.bounds import BrokenError, bounded, check_message
from tests.fuzz.kinds import KINDS

REFUSED, READ = "refused", "read"


def generator(kind: str, seed: int, number: int) -> Random:
    return Random(f"{kind}/{seed}/{number}")


def run(name: str, random: Random, root: pathlib.Path) -> str:
    """Make one case of a kind and read it; return how it ended."""
    one, folder = KINDS[name], root / "case"
    secret = (folder / mutate.SECRET).resolve()
    if not secret.exists():
        secret.write_bytes(adapters.peft_folders()[0]["adapter_model.safetensors"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files = one.make(random)
    kind.write(folder, files)
    errors = one.errors
    # The files of these two are made and read by the fuzzer alone.
    if name not in ("layout", "line") and random.random() < 0.04:  # a link, a FIFO, ...
        attacked, errors = random.choice(sorted(files)), (*errors, OSError)
        ATTACKS[random.choice(sorted(ATTACKS))].do(folder / attacked, secret)
    before = sorted(root.rglob("*"))
    try:
        with warnings.catch_warnings(), bounded(secret):
            warnings.simplefilter("ignore")
            one.read(random, folder)
    except BrokenError:
        raise
    except errors as error:
        check_message(error)
        return REFUSED
    if more := [str(p) for p in sorted(root.rglob("*")) if p not in before]:
        raise BrokenError(f"left {more[:5]}")
    return READ
