"""Read how a model's images are preprocessed: preprocessor_config.json of transformers' ViT."""

import dataclasses
from pathlib import Path
from typing import Any

from lora_jax.errors import ModelConfigError, shown
from lora_jax.models.config import VitConfig
from lora_jax.system import json_file

FILE = "preprocessor_config.json"
_TYPES = ("ViTImageProcessor", "ViTImageProcessorFast", "ViTFeatureExtractor")
# These fields say how the file was made, or what a call returns; they change no pixel here.
_SILENT = {"processor_class", "auto_map", "data_format", "input_data_format", "return_tensors"}
_SILENT |= {"device", "disable_grouping", "image_seq_length", "crop_size", "pad_size"}
_SILENT |= {"size_divisor", "default_to_square"}
_READ = {"image_processor_type", "feature_extractor_type", "do_resize", "size", "resample"}
_READ |= {"do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"}
_READ |= {"do_convert_rgb"}

_MOST = 1e30  # an integer of a stranger may be larger than any float


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The steps from an image to a model's input: resizing, scaling, normalising by channel.

    size: (height, width) of the result.
    channels: 3 for red, green and blue, 1 for grey.
    resample: the number of a filter in Pillow; 2 is bilinear.
    scale: the factor of the numbers 0 to 255.
    mean, std: for each channel; the result is (scaled - mean) / std.
    """

    size: tuple[int, int]
    channels: int
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read(folder: Path, config: VitConfig) -> Preprocessing:
    """Read the preprocessing that a model's folder describes.

    `ModelConfigError`: there are steps other than resizing, scaling and normalising, or images have
    another size than the model's.
    """
    path = folder / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; a model of images needs it. If the model was trained as ViT "
            "usually is, write it with\n"
            f'    transformers.ViTImageProcessor(size={{"height": {config.image_size[0]}, "width": '
            f"{config.image_size[1]}}}).save_pretrained(folder)"
        )
    found = json_file.read(path, ModelConfigError, finite=False)
    _check(found, config, str(path))
    normalised = found.get("do_normalize", True)
    return Preprocessing(
        size=config.image_size,
        channels=config.channels,
        resample=_filter(found, str(path)),
        scale=_number(found, "rescale_factor", str(path)) if found.get("do_rescale", True) else 1.0,
        mean=_channels(found, "image_mean", 0.0, normalised, config, str(path)),
        std=_channels(found, "image_std", 1.0, normalised, config, str(path)),
    )


def _check(found: dict[str, Any], config: VitConfig, where: str) -> None:
    kind = found.get("image_processor_type", found.get("feature_extractor_type", _TYPES[0]))
    _require(kind in _TYPES, where, "image_processor_type", kind, f"one of {', '.join(_TYPES)}")
    for field, value in found.items():
        known = field in _READ | _SILENT or field.startswith("_") or value in (False, None)
        _require(known, where, field, value, "left out: ViT's images have no such step")
    _require(found.get("do_resize", True) is True, where, "do_resize", False, "true")
    high, wide = config.image_size
    size = found.get("size", 224)
    size = {"height": size, "width": size} if isinstance(size, int) else size
    wanted = {"height": high, "width": wide}
    _require(size == wanted, where, "size", size, f"{wanted}, the image_size of config.json")
    _require(config.channels in (1, 3), "config.json", "num_channels", config.channels, "1 or 3")


def _filter(found: dict[str, Any], where: str) -> int:
    value = found.get("resample", 2)
    _require(type(value) is int and 0 <= value <= 5, where, "resample", value, "from 0 to 5")
    return int(value)


def _number(found: dict[str, Any], field: str, where: str) -> float:
    value = found.get(field, 1 / 255)
    fits = type(value) in (int, float) and 0 < value <= _MOST
    _require(fits, where, field, value, "a number above 0")
    return float(value)


def _channels(
    found: dict[str, Any], field: str, without: float, used: bool, config: VitConfig, where: str
) -> tuple[float, ...]:
    """Return one number for each channel; `without` if there is no normalisation."""
    value: Any = found.get(field, 0.5) if used else without
    values: Any = [value] * config.channels if type(value) in (int, float) else value
    fits = (
        isinstance(values, list)
        and len(values) == config.channels
        and all(type(x) in (int, float) and abs(x) <= _MOST for x in values)
        and (field == "image_mean" or all(x > 0 for x in values))
    )
    _require(fits, where, field, value, f"{config.channels} finite numbers")
    return tuple(map(float, values))


def _require(condition: bool, where: str, field: str, got: Any, expected: str) -> None:
    if not condition:
        raise ModelConfigError(f"{where}: {field} must be {expected}, got {shown(got)}")
