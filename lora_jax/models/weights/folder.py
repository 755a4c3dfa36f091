"""Load a model from a Hugging Face folder: config.json, *.safetensors, tokenizer.json."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lora_jax.base import QuantisedMatrix
from lora_jax.errors import (
    ModelConfigError,
    TokenizerError,
    WeightsError,
    is_failure,
    shown,
)
from lora_jax.models.config import StoredConfig
from lora_jax.models.weights import bitsandbytes_tensors, chat_files, tokenizer_limits
from lora_jax.models.weights.assemble import Source
from lora_jax.models.weights.bitsandbytes_tensors import QuantisedTensor
from lora_jax.models.weights.disk_arrays import Index
from lora_jax.models.weights.families import FAMILIES, parse
from lora_jax.models.weights.stored import Stored
from lora_jax.models.weights.tensor_names import TensorName
from lora_jax.system import json_file, regular_files, safetensors_reader
from lora_jax.system.safetensors_reader import StoredTensor

SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_NAME = 200  # characters of a file's name; systems have 255 bytes


@dataclasses.dataclass(frozen=True)
class Folder(Source):
    """A model in a folder. No weight is read before `load`."""

    path: Path

    @functools.cached_property
    def json(self) -> dict[str, Any]:
        return _object(self.path / "config.json", ModelConfigError)

    @functools.cached_property
    def config(self) -> StoredConfig:
        """The config that config.json describes."""
        return parse(self.json, str(self.path / "config.json"))

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Return the tokenizer of tokenizer.json, without its padding and truncation."""
        path = self.path / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing. Write it once with\n"
                "    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(regular_files.read(path, TokenizerError))
        except TokenizerError:
            raise
        except BaseException as error:  # the package raises nothing narrower
            if not is_failure(error):
                raise
            raise TokenizerError(
                f"{path} is damaged, or is not a tokenizer that the tokenizers package "
                f"{tokenizers.__version__} reads: {shown(error)}\n"
                "Fetch the file again, or write it with the package that made it."
            ) from error
        tokenizer_limits.check(tokenizer, str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """See `Source`."""
        return chat_files.templates(self.path)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """See `Source`."""
        return chat_files.special_tokens(self.path)

    def stored(self, config: StoredConfig | None = None) -> Stored:
        """Return the tensors of the folder without reading them; they do not depend on `config`."""
        table = FAMILIES[self.json["model_type"]].names
        plain, quantised = bitsandbytes_tensors.split(_tensors(self.path))
        method = (self.json.get("quantization_config") or {}).get("quant_method")
        for name, tensor in plain.items():
            if not table.skips(table.clean(name)):
                bitsandbytes_tensors.check_floats(tensor, method)

        def read(name: str, row: TensorName, index: Index) -> np.ndarray:
            if name not in plain:
                return _numbers(quantised[name])[index]
            bitsandbytes_tensors.check_floats(plain[name], method)
            return plain[name].part(index)

        def keep(name: str, row: TensorName, dtype: np.dtype) -> QuantisedMatrix | None:
            return quantised[name].base(row.transposed, dtype) if name in quantised else None

        shapes = {name: tensor.shape for name, tensor in plain.items()}
        shapes |= {name: tensor.shape for name, tensor in quantised.items()}
        return Stored(str(self.path), table, "hf", shapes, read, keep)


@functools.lru_cache(maxsize=1)
def _numbers(tensor: QuantisedTensor) -> np.ndarray:
    """Return the floats of a quantised tensor, cached because its parts are read one by one."""
    return tensor.numbers()


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the single file, or of the files that the index names."""
    single, index = folder / SINGLE, folder / _INDEX
    if single.exists():
        return safetensors_reader.read(single, WeightsError).tensors
    if not index.exists():
        found = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(
            f"{folder} has neither {SINGLE} nor {_INDEX}; it has {', '.join(found)}.\n"
            "Weights in another format are converted once with\n"
            "    transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)"
        )
    places = _weight_map(index)
    files = [folder / name for name in sorted(set(places.values()))]
    absent = [path.name for path in files if not path.exists()]
    if absent:
        raise FileNotFoundError(f"{index} names files that do not exist: {', '.join(absent)}")
    held: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in safetensors_reader.read(path, WeightsError).tensors.items():
            if name in held:
                raise WeightsError(f"{name} is in {held[name].path} and in {path}")
            held[name] = tensor
    unheld = sorted(places.keys() - held)
    if unheld:
        raise WeightsError(f"{index} lists tensors that no file holds: {', '.join(unheld)}")
    return held


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor -> the file, in the folder of the index, that holds it."""
    found = _object(index, WeightsError).get("weight_map")
    if not isinstance(found, dict):
        raise WeightsError(f"{index}: weight_map is {type(found).__name__}, expected an object")
    for name, file in found.items():
        # The index may come from a stranger, so it may only name files of its own folder.
        known = isinstance(file, str) and file.endswith(".safetensors") and len(file) <= _NAME
        if not known or Path(file).name != file:
            raise WeightsError(
                f"{index}: {shown(name)} is in {shown(repr(file))}, expected a .safetensors file "
                "in the same folder"
            )
    return found


def _object(path: Path, error: json_file.MakeError) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; a model's folder needs it")
    return json_file.read(path, error, cure="fetch the file again, from someone you trust")
