"""Convert images from the bytes of a file to the numbers that a model reads, with Pillow.

The steps and the rounding are as in transformers' ViTImageProcessor with Pillow. torchvision's
own filters, which transformers may use instead, differ from Pillow's by up to 1 of 255.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pathlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_jax.errors import DataError
from lora_jax.models.weights.preprocessing import Preprocessing
from lora_jax.system import regular_files
from lora_jax.system.extras import require

require("images", __name__)

import PIL.Image
import PIL.ImageOps
from PIL.Image import Image

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels of the image

_MODES = {1: "L", 3: "RGB"}
# Modes with 8 bits a channel. Pillow would clip the numbers of other modes at 255.
_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_TRIES = 10  # attempts to find a part that fits into the image


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes of an image in training.

    flip: mirror a random half of the images, left to right.
    crop: cut out a part with at least this share of the area (Szegedy et al., arXiv 1409.4842).
        1: use the whole image.
    """

    flip: bool = False
    crop: float = 1.0

    def box(self, size: tuple[int, int], random: np.random.Generator) -> Box | None:
        """Return a random part of an image of the size (width, height), or None for all of it.

        Its share of the area is uniform, and so is the logarithm of its ratio of width to height.
        """
        if self.crop == 1:
            return None
        wide, high = size
        for _ in range(_TRIES):
            area = wide * high * random.uniform(self.crop, 1)
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= wide and h <= high:
                left, upper = random.uniform(0, wide - w), random.uniform(0, high - h)
                return left, upper, left + w, upper + h
        return None

    def flips(self, random: np.random.Generator) -> bool:
        """Return at random whether an image is mirrored."""
        return self.flip and random.random() < 0.5


NO_AUGMENTATION = Augmentation()


def decode(value: Any, channels: int, where: str) -> Image:
    """Decode an image file, upright, to 3 channels of colour or 1 of grey with 8 bits each.

    `value` is the bytes of a PNG, a JPEG or another file that Pillow reads, or its path.
    Transparency is dropped, as transformers does.
    """
    if isinstance(value, str):
        value = _content(value, where)
    if not isinstance(value, bytes):
        raise DataError(
            f"{where}: expected an encoded image or the path of one, got a {type(value).__name__}; "
            "data.image_field names the field with the image"
        )
    try:
        with PIL.Image.open(io.BytesIO(value)) as image:
            upright = PIL.ImageOps.exif_transpose(image)
            mode = upright.mode
            converted = upright.convert(_MODES[channels])
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise DataError(
            f"{where}: {len(value):,} bytes that Pillow cannot read as an image: {error}"
        ) from error
    if mode not in _EIGHT_BITS:
        raise DataError(f"{where}: an image of mode {mode!r}; expected 8 bits a channel")
    return converted


def _content(path: str, where: str) -> bytes:
    try:
        return regular_files.read(pathlib.Path(path).expanduser(), DataError, given=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: the image {path!r} cannot be read: {error}") from error


def pixels(
    image: Image, how: Preprocessing, box: Box | None = None, flip: bool = False
) -> NDArray[np.float32]:
    """Resize the part of an image in `box` (all of it, if None), and return the numbers that a
    model reads: float32 [height, width, channels]."""
    high, wide = how.size
    resized = image.resize((wide, high), PIL.Image.Resampling(how.resample), box=box)
    numbers = np.asarray(resized).reshape(high, wide, how.channels)
    if flip:
        numbers = numbers[:, ::-1]
    scaled = (numbers.astype(np.float64) * how.scale).astype(np.float32)
    mean, std = np.array(how.mean, np.float32), np.array(how.std, np.float32)
    found: NDArray[np.float32] = (scaled - mean) / std
    return found
