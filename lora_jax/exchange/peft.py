"""PEFT's adapters, read and written for any model.

adapter = peft.load(folder, names, f, params, *args)
print(peft.save(folder, names, adapter, base="org/name", profile="portable"))
print(*peft.check(adapter, "vllm", names), sep="\\n")
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lora_jax.adapters import Adapter
from lora_jax.errors import LoraError, listed, naming
from lora_jax.exchange import consumers, experts, peft_config, peft_keys, profiles, tensor_file
from lora_jax.exchange.into_adapter import into_adapter
from lora_jax.exchange.names import NameTable
from lora_jax.exchange.out_of_adapter import out_of_adapter
from lora_jax.models.hf_module import HfNames
from lora_jax.system.whole_files import write_together
from lora_jax.updates import kind_of

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ABOUT = "lora_jax.about"  # the key of `about` in the metadata of the tensors
FolderPath = str | os.PathLike[str]


class Saved(NamedTuple):
    """The folder that was written, and notes for its users.

    Attributes:
      folder: the path of the folder.
      rank: the largest rank of any module.
      notes: sentences about the settings that a server needs.
    """

    folder: pathlib.Path
    rank: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"wrote {self.folder}", *self.notes])


class Description(NamedTuple):
    """The contents of a PEFT folder, without the model that it belongs to.

    Attributes:
      settings: adapter_config.json.
      shapes: `{key: shape}` of the tensors.
      about: the values that were passed to `save` as `about`; {} if there were none.
      ours: whether `save` wrote the folder.
    """

    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    about: dict[str, Any]
    ours: bool


def describe(folder: FolderPath) -> Description:
    """Read a PEFT folder without a model. The values are not checked: check the ones you use.

    Args:
      folder: as for `load`.

    Returns:
      Its settings, the shapes of its tensors, and the values that `save` added.

    Raises:
      LoraError: not a PEFT folder, or a damaged one.
    """
    place = _find(pathlib.Path(folder))
    file = tensor_file.read(place / TENSORS)
    about = tensor_file.parse_json(place / TENSORS, file.metadata.get(ABOUT, "{}").encode())
    shapes = {key: x.shape for key, x in file.tensors.items()}
    settings = tensor_file.read_json(place / CONFIG)
    return Description(settings, shapes, about, tensor_file.DIGESTS in file.metadata)


def load(
    folder: FolderPath,
    names: HfNames | None,
    f: Callable[..., Any],
    params: Any,
    *args: Any,
    verify: bool = True,
) -> Adapter:
    """Read an adapter that PEFT, or `save`, wrote.

    Every setting in the folder is applied, or is an error that names the file and the key. No code
    in it is run (pickles are refused), and no memory is allocated for a size that it merely
    declares.

    Args:
      folder: a folder with adapter_config.json and adapter_model.safetensors, or with one
        sub-folder that has them, as PEFT writes adapters with other names than "default".
      names: `{path: module}` (`models.hf_module`), `lora_jax.models.hf_names(config)` for the
        built-in models, or None for a tree whose paths are Hugging Face's names.
      f, params, *args: the model, its base parameters and an example of its other arguments, as
        for `lora_jax.resolve`.
      verify: compare the arrays and the settings with the hashes that `save` wrote into the file.
        Pass False for a folder that was edited on purpose. Files that PEFT wrote have no hashes.

    Returns:
      The adapter, with its factors in float32. PEFT's modules_to_save and biases are in
      `trainable`.

    Raises:
      LoraError: a damaged or hostile folder, an unknown key or setting, a module that the model
        does not have, or factors that do not fit it.
    """
    place = _find(pathlib.Path(folder))
    tensors = tensor_file.read(place / TENSORS)
    settings = tensor_file.read_json(place / CONFIG)
    if verify:
        _verify(place, tensors, settings)
    with naming(place / CONFIG):
        config = peft_config.parse(settings)
    with naming(place / TENSORS):
        table = NameTable.of(names, params)
        single = experts.expand(tensors.tensors, config, table, f, params, args)
        modules = peft_keys.parse(single.tensors, config)
        modules = modules._replace(updates={**modules.updates, **single.updates})
        adapter = into_adapter(modules, table, f, params, args)
        return _of_kind("alora", adapter) if config.alora_invocation_tokens else adapter


def save(
    folder: FolderPath,
    names: HfNames | None,
    adapter: Adapter,
    *,
    base: str,
    profile: Literal["faithful", "portable"] = "faithful",
    params: Any = None,
    task_type: str | None = None,
    about: Mapping[str, Any] | None = None,
    invocation: Sequence[int] = (),
    overwrite: bool = False,
) -> Saved:
    """Write an adapter as a PEFT folder.

    Args:
      folder: the folder for adapter_config.json and adapter_model.safetensors, which are all that
        is written.
      names: as for `load`.
      adapter: an `Adapter`, or a tuple of its first fields. LoHa, LoKr, VeRA, MiSS and parts are
        written as the LoRA that they are equal to, (IA)3 and OFT as PEFT's folders of these.
      base: the base's name on the hub, or its folder. Tools that load the adapter load this base.
      profile: "faithful" writes ranks and scales as they are, as PEFT does. "portable" writes what
        vLLM, SGLang, llama.cpp, LoRAX and Ollama all read in the same way: one rank, scales folded
        into B, an integer alpha, float32, and no other option.
      params: the base parameters. They are needed for biases and for modules that were trained in
        part. With them, modules get short names where these are exact.
      task_type: PEFT's task type, such as "CAUSAL_LM" or "SEQ_CLS".
      about: JSON values for readers that use lora_jax (`describe`), such as the `about` of
        `lora_jax.save`. They are in the metadata of the tensors, which other tools ignore.
      invocation: the tokens that switch an adapter of the kind "alora" on.
      overwrite: replace an adapter in the folder.

    Returns:
      A `Saved`, which prints the settings that a server needs.

    Raises:
      LoraError: an adapter that the profile cannot express, or a folder that holds one already.
    """
    folder = pathlib.Path(folder)
    if (folder / CONFIG).exists() and not overwrite:
        raise LoraError(f"{folder} holds an adapter; choose another, or pass overwrite=True")
    if invocation:
        adapter, task_type = _of_kind("lora", Adapter(*adapter)), "CAUSAL_LM"
    settings, tensors = _spelled(names, adapter, base, profile, params, task_type)
    settings |= {"alora_invocation_tokens": [*invocation]} if invocation else {}
    _write(folder, settings, tensors, about)
    return Saved(folder, consumers.largest_rank(settings), consumers.notes(settings, tensors))


def check(
    adapter: Adapter | FolderPath,
    consumer: str,
    names: HfNames | None = None,
    *,
    profile: Literal["faithful", "portable"] = "faithful",
    params: Any = None,
) -> tuple[str, ...]:
    """Return a sentence for each setting that a consumer refuses, misreads or needs.

    Args:
      adapter: an adapter that is about to be saved with this profile, or a folder.
      consumer: "vllm", "sglang", "llama.cpp", "lorax" or "ollama".
      names, profile, params: as for `save`.

    Returns:
      The sentences; () if there are none.

    Raises:
      LoraError: an unknown consumer, or an adapter that cannot be saved.
    """
    if isinstance(adapter, str | os.PathLike):
        place = _find(pathlib.Path(adapter))
        shapes = {k: x.shape for k, x in tensor_file.read(place / TENSORS).tensors.items()}
        settings = tensor_file.read_json(place / CONFIG)
        with naming(place / CONFIG):
            peft_config.check_values(settings)
        return consumers.findings(consumer, settings, shapes)
    settings, tensors = _spelled(names, adapter, "", profile, params, None)
    return consumers.findings(consumer, settings, {k: x.shape for k, x in tensors.items()})


def _of_kind(kind: str, adapter: Adapter) -> Adapter:
    """Return the same arrays as LoRA, or as activated LoRA."""
    layout, whole = adapter.layout, adapter.trainable
    other = [t.path for t in layout.targets if not kind_of(t).is_plain]
    if other or whole:
        raise LoraError(
            "an adapter that tokens switch on has plain factors alone, and this one has more:\n"
            f"{listed([*other, *whole])}"
        )
    targets = (dataclasses.replace(target, kind=kind) for target in layout.targets)
    return adapter._replace(layout=dataclasses.replace(layout, targets=tuple(targets)))


def _spelled(
    names: HfNames | None,
    adapter: Adapter,
    base: str,
    profile: str,
    params: Any,
    task_type: str | None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    adapter = Adapter(*adapter)
    table, modules = out_of_adapter(names, adapter, params)
    settings, tensors = profiles.spelled(profile, modules, table, adapter.layout, params)
    if task_type in ("SEQ_CLS", "TOKEN_CLS") and settings["modules_to_save"]:
        # PEFT adds these names itself, and would then wrap a module inside one of them twice.
        heads = {"classifier", "score"}
        firsts = {name: name.partition(".")[0] for name in settings["modules_to_save"]}
        whole = {first if first in heads else name for name, first in firsts.items()}
        settings["modules_to_save"] = sorted(whole)
    settings |= {"base_model_name_or_path": base, "task_type": task_type}
    return dict(sorted(settings.items())), tensors


def _find(folder: pathlib.Path) -> pathlib.Path:
    """Return the folder with the two files: this one, or its only sub-folder that has them."""
    if not folder.is_dir():
        raise LoraError(f"no folder {folder}")
    found = [p for p in (folder, *sorted(folder.iterdir())) if (p / CONFIG).is_file()]
    if not found or (len(found) > 1 and found[0] != folder):
        there = sorted(p.name for p in folder.iterdir())
        raise LoraError(
            f"{folder} has {len(found)} adapters in sub-folders, and no {CONFIG}; it has:\n"
            f"{listed(there, 10)}\nName the folder of one adapter."
        )
    place = found[0]
    if (place / TENSORS).is_file():
        return place
    if (place / PICKLE).is_file():
        raise tensor_file.pickle_error(place / PICKLE, TENSORS)
    raise LoraError(f"{place} has no {TENSORS}")


def _write(
    folder: pathlib.Path,
    settings: Mapping[str, Any],
    tensors: Any,
    about: Mapping[str, Any] | None,
) -> None:
    """Write both files, the arrays with the hashes that `_verify` compares."""
    digests = {key: tensor_file.digest(x) for key, x in tensors.items()}
    marks = {"settings": profiles.digest(settings), "tensors": digests}
    metadata = {"format": "pt", tensor_file.DIGESTS: json.dumps(marks)}
    metadata |= {ABOUT: json.dumps(about)} if about else {}
    writers = tensor_file.folder_writers(TENSORS, tensors, metadata, CONFIG, settings)
    write_together(folder, writers)


def _verify(place: pathlib.Path, file: tensor_file.TensorFile, settings: Mapping[str, Any]) -> None:
    """Raise `LoraError` unless the arrays and settings are as `save` wrote them."""
    if tensor_file.DIGESTS not in file.metadata:
        return
    try:
        text = file.metadata[tensor_file.DIGESTS].encode()
        marks = tensor_file.parse_json(place / TENSORS, text)
        saved, of_settings = dict(marks["tensors"]), marks["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise LoraError(f"{place / TENSORS}: {tensor_file.DIGESTS} is damaged") from error
    for key in {**saved, **file.tensors}:
        x = file.tensors.get(key)
        if x is None or saved.get(key) != tensor_file.digest(x):
            raise LoraError(f"{place / TENSORS}: {key} is not what was saved; fetch it again")
    if of_settings != profiles.digest(settings):
        raise LoraError(
            f"{place / CONFIG} is not what was saved, by its hash in {TENSORS}: one of "
            f"{', '.join(profiles.DECISIVE)} has another value. If it was changed on purpose, "
            "pass verify=False"
        )
