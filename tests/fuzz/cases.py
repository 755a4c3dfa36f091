"""The kinds of input that are fuzzed, by name, and one case of a kind, run within its bounds."""

from __future__ import annotations

import pathlib
import shutil
import warnings
from random import Random

from lora_jax.errors import LoraError, ModelError
from lora_jax.system.console import USER_ERRORS
from tests.attacks.attacks import ATTACKS
from tests.fuzz import adapters, kind, model_files, mutate, user_files
from tests.fuzz.bounds import BrokenError, bounded, check_message
from tests.fuzz.kind import Kind

REFUSED, READ = "refused", "read"
ADAPTER, MODEL = (LoraError,), (ModelError, FileNotFoundError)
KINDS = {
    "layout": Kind(adapters.make_layout, adapters.read_layout, ADAPTER, 240),
    "manifest": Kind(adapters.make_manifest, adapters.read_checkpoint, USER_ERRORS, 160),
    "orbax": Kind(adapters.make_orbax, adapters.read_orbax, ADAPTER, 80),
    "peft": Kind(adapters.make_peft, adapters.read_peft, ADAPTER, 160),
    "mlx": Kind(adapters.make_mlx, adapters.read_mlx, ADAPTER, 60),
    "import": Kind(adapters.make_import, adapters.read_import, USER_ERRORS, 60),
    "safetensors": Kind(model_files.make_safetensors, model_files.read_safetensors,
                        (LoraError, ModelError), 200),
    "folder": Kind(model_files.make_folder, model_files.read_folder, MODEL, 100),
    "config": Kind(model_files.make_config, model_files.read_config, MODEL, 250),
    "gguf": Kind(model_files.make_gguf, model_files.read_gguf, (*MODEL, LoraError), 200),
    "gguf-adapter": Kind(model_files.make_gguf_adapter, model_files.read_gguf_adapter,
                         ADAPTER, 80),
    "tokenizer": Kind(model_files.make_tokenizer, model_files.read_tokenizer,
                      (*MODEL, LoraError), 120),
    "data": Kind(user_files.make_data, user_files.read_data, ADAPTER, 140),
    "run": Kind(user_files.make_run, user_files.read_run, ADAPTER, 100),
    "line": Kind(user_files.make_line, user_files.read_line, (LoraError, SystemExit, OSError), 50),
}  # fmt: skip
assert sum(kind.cases for kind in KINDS.values()) == 2_000


def run(name: str, seed: int, number: int, root: pathlib.Path) -> str:
    """Make one case of a kind and read it; return how it ended.

    `root` is a folder in which a case that is read may leave no more files than it had.
    `BrokenError` if it breaks a rule of `tests.fuzz.bounds`; errors that the kind does not document
    are raised as they are.
    """
    one, folder, random = KINDS[name], root / "case", Random(f"{name}/{seed}/{number}")
    secret = (folder / mutate.SECRET).resolve()
    if not secret.exists():
        secret.write_bytes(adapters.peft_folders()[0]["adapter_model.safetensors"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files, errors = one.make(random), one.errors
    kind.write(folder, files)
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
