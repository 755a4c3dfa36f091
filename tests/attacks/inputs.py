"""The kinds of input that may come from a stranger: their files, and how the package reads them.

A new format gets every attack of `tests.attacks.attacks` for a line in `INPUTS`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import lora_jax
from lora_jax import data
from lora_jax.checkpoint import storage
from lora_jax.exchange import loralib, mlx, peft, tensor_file
from lora_jax.models.weights.folder import Folder
from lora_jax.models.weights.gguf_file import GgufFile
from lora_jax.models.weights.preprocessing import FILE
from lora_jax.models.weights.preprocessing import read as read_preprocessing
from lora_jax.report import run_files, single_run
from lora_jax.serving import jsonl, prompts
from lora_jax.serving.served_adapters import BaseChoice
from lora_jax.sweeps.group_checkpoints import GroupCheckpoints
from lora_jax.system.console import USER_ERRORS
from tests.formats import SWEEP
from tests.fuzz import adapters, model_files, user_files
from tests.fuzz.kind import FORMATS, Files, stored

CHAT = {"tokenizer_config.json": json.dumps({"chat_template": "{{ x }}"}).encode()}


@dataclasses.dataclass(frozen=True)
class Input:
    """A kind of input.

    files: returns the files of a good folder.
    read: reads the folder as the package does.
    named: whether users name the file itself, so that it may be a link.
    """

    files: Callable[[], Files]
    read: Callable[[pathlib.Path], object]
    named: bool = False
    errors: tuple[type[BaseException], ...] = USER_ERRORS


def _only(folder: pathlib.Path) -> pathlib.Path:
    (file,) = folder.iterdir()
    return file


def _model(name: str, **more: bytes) -> Callable[[], Files]:
    kept = (".json", ".safetensors")
    files = stored(model_files.FOLDERS / name)
    return lambda: {**{n: x for n, x in files.items() if n.endswith(kept)}, **more}


def _text_model() -> Files:
    return {**_model("llama")(), "tokenizer.json": model_files.tokenizer_files()[1], **CHAT}


def _read_text_model(folder: pathlib.Path) -> None:
    source = Folder(folder)
    assert source.chat_template is not None
    source.tokenizer()
    source.load()


def _read_images(folder: pathlib.Path) -> None:
    source = Folder(folder)
    read_preprocessing(folder, source.config)  # type: ignore[arg-type]
    source.load()


def _read_checkpoint(folder: pathlib.Path) -> None:
    manifest = storage.read_manifest(storage.absolute(folder), None, "state")
    assert manifest.arrays


def _checkpoint() -> Files:
    steps = user_files.RUN / "checkpoints"
    return dict(stored(next(path for path in sorted(steps.iterdir()) if path.name.isdecimal())))


def _run() -> Files:
    names = ("config.json", "metrics.jsonl", "summary.json")
    return {**{name: stored(user_files.RUN)[name] for name in names}, "error.txt": b"stopped\n"}


def _report(folder: pathlib.Path) -> None:
    (run,) = run_files.read(folder)
    if run.summary is None or run.error is None or not run.lines:
        raise lora_jax.LoraError("the report says that the run lacks a file")
    single_run.report(run, BaseChoice())


def _sweep(folder: pathlib.Path) -> None:
    if GroupCheckpoints(folder).newest({"rank=1": range(99), "rank=2": range(99)}) is None:
        raise lora_jax.LoraError("each member goes on from its own checkpoint")


@functools.cache
def _loralib() -> Files:
    tensors = {"layers.0.v.lora_A": (2, 5), "layers.0.v.lora_B": (4, 2)}
    folder = pathlib.Path(adapters.tempfile.mkdtemp())
    arrays = {name: adapters.np.ones(shape, "float32") for name, shape in tensors.items()}
    tensor_file.write(folder / "state.safetensors", arrays, {})
    return dict(stored(folder))


_ARGUMENTS: Any = (adapters.NAMES, adapters.model, adapters.PARAMS, adapters.IDS)


def _read_loralib(folder: pathlib.Path) -> None:
    loralib.load(_only(folder), *_ARGUMENTS, alpha=1.0)


def _read_data(folder: pathlib.Path) -> None:
    config = data.DataConfig(str(_only(folder)), buckets=(4,), max_length=8)
    assert data.classification(config, user_files.tokenizer(), "train", 2).facts().examples


_ROWS = b'{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'
INPUTS = {
    "adapter": Input(lambda: adapters.checkpoints_files()[2], lora_jax.restore),
    "adapter-with-a-bias": Input(lambda: dict(stored(FORMATS / "v1" / "adapter")),
                                 lora_jax.restore),
    "checkpoint": Input(_checkpoint, _read_checkpoint),
    "run": Input(_run, _report),
    "sweep": Input(lambda: {"checkpoints.json": stored(SWEEP)["checkpoints.json"]}, _sweep),
    "base": Input(_text_model, _read_text_model),
    "base-in-shards": Input(_model("bert"), lambda folder: Folder(folder).load()),
    "base-in-nf4": Input(_model("llama_nf4"), lambda folder: Folder(folder).load()),
    "chat-template": Input(lambda: {"chat_template.jinja": b"{{ x }}"},
                           lambda folder: Folder(folder).chat_template),
    "images": Input(_model("vit", **{FILE: json.dumps(model_files.IMAGES).encode()}),
                    _read_images),
    "peft": Input(lambda: adapters.peft_folders()[0],
                  lambda folder: peft.load(folder, *_ARGUMENTS)),
    "mlx": Input(lambda: adapters.mlx_folders()[0], lambda folder: mlx.load(folder, *_ARGUMENTS)),
    "loralib": Input(_loralib, _read_loralib),
    "gguf": Input(lambda: {"model.gguf": model_files.ggufs()[0].dump()},
                  lambda folder: GgufFile(_only(folder)).load(), named=True),
    "jsonl": Input(lambda: {"a.jsonl": _ROWS * 9}, _read_data,
                   named=True),
    "csv": Input(lambda: {"a.csv": b"text,label\na,0\nb,1\n"}, _read_data, named=True),
    "lines": Input(lambda: {"a.jsonl": b'{"text": "a"}\n'},
                   lambda folder: list(jsonl.read(str(_only(folder)))), named=True),
    "prompts": Input(lambda: {"a.txt": b"once upon\n"},
                     lambda folder: list(prompts.read(str(_only(folder)))), named=True),
}  # fmt: skip
