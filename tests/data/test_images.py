"""Images: the pixels are the same as in transformers, and an unreadable file is an error."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from lora_jax.data import DataError
from lora_jax.data.images import Augmentation, decode, pixels
from lora_jax.models import ModelConfigError, VitConfig
from lora_jax.models.weights import preprocessing
from lora_jax.models.weights.preprocessing import Preprocessing
from tests import npz

GOLDEN = npz.read(Path(__file__).parents[1] / "golden/golden_images.npz")
CASES = json.loads(str(GOLDEN["settings"]))
SIZES = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_size": 8}
SMALL = VitConfig(image_size=(16, 20), patch_size=(4, 4), **SIZES)
HOW = Preprocessing((4, 4), 3, 2, 1 / 255, (0.5,) * 3, (0.5,) * 3)


def said(folder: Path, found: Any) -> Path:
    (folder / preprocessing.FILE).write_text(json.dumps(found))
    return folder


@pytest.mark.parametrize("number", range(len(CASES)))
def test_pixels_are_those_of_transformers(number: int, tmp_path: Path) -> None:
    how = preprocessing.read(said(tmp_path, CASES[number]), SMALL)
    image = decode(GOLDEN[f"file_{number}"].tobytes(), 3, "here")
    np.testing.assert_array_equal(pixels(image, how), GOLDEN[f"pixels_{number}"])


def test_an_old_file_says_the_size_as_one_number(tmp_path: Path) -> None:
    old = {"do_normalize": True, "do_resize": True, "image_mean": 0.5, "image_std": [0.5] * 3}
    old |= {"feature_extractor_type": "ViTFeatureExtractor", "resample": 2, "size": 16}
    how = preprocessing.read(said(tmp_path, old), dataclasses.replace(SMALL, image_size=(16, 16)))
    assert how == Preprocessing((16, 16), 3, 2, 1 / 255, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"shortest_edge": 16}}, r"size must be .*the image_size of config\.json"),
        ({"size": {"height": 20, "width": 16}}, "size must be"),
        ({"do_center_crop": True}, "do_center_crop must be left out"),
        ({"do_resize": False}, "do_resize must be true"),
        ({"image_processor_type": "DeiTImageProcessor"}, "image_processor_type must be one of"),
        ({"image_mean": [0.5]}, "image_mean must be 3 finite numbers"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std must be 3 finite numbers"),
        ({"image_std": [0.5, 0.5, float("nan")]}, "image_std must be 3 finite numbers"),
        ({"image_mean": [0.5, 0.5, 10**400]}, "image_mean must be 3 finite numbers"),
        ({"rescale_factor": 10**400}, "rescale_factor must be a number above 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor must be a number above 0"),
        ({"resample": 9}, "resample must be from 0 to 5"),
    ],
)
def test_what_is_not_followed_is_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelConfigError, match=message):
        preprocessing.read(said(tmp_path, CASES[0] | change), SMALL)


def test_a_folder_without_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"(?s)preprocessor_config.*ViTImageProcessor\("):
        preprocessing.read(tmp_path, SMALL)


def encoded(image: PIL.Image.Image, form: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_kind_of_eight_bit_image_becomes_colour_or_grey(mode: str) -> None:
    image = PIL.Image.new("RGB", (3, 2), (200, 10, 10)).convert(mode)
    file = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    assert decode(file, 3, "here").mode == "RGB"
    grey = pixels(decode(file, 1, "here"), Preprocessing((4, 4), 1, 2, 1.0, (0.0,), (1.0,)))
    assert grey.shape == (4, 4, 1)


def test_an_image_comes_upright() -> None:
    image = PIL.Image.new("RGB", (6, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # the orientation: to be turned by 90 degrees
    assert decode(encoded(image, "JPEG", exif=exif), 3, "here").size == (2, 6)


def test_a_path_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(PIL.Image.new("RGB", (3, 2), (1, 2, 3))))
    assert decode(str(tmp_path / "a.png"), 3, "here").getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"no image", "Pillow cannot read as an image"),
        (encoded(PIL.Image.new("RGB", (30, 20), (9, 9, 9)))[:60], "Pillow cannot read"),
        ("/nowhere/a.png", r"'/nowhere/a\.png' cannot be read"),
        (7, "got a int"),
        (encoded(PIL.Image.new("I;16", (3, 2))), "mode 'I;16'; expected 8 bits"),
    ],
)
def test_what_is_no_image_names_the_example(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"split 'x', example 3: .*{message}"):
        decode(value, 3, "split 'x', example 3")


def test_a_flip_mirrors_and_a_box_cuts() -> None:
    numbers = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    image = PIL.Image.fromarray(numbers)
    whole = pixels(image, HOW)
    np.testing.assert_array_equal(pixels(image, HOW, flip=True), whole[:, ::-1])
    nearest = dataclasses.replace(HOW, resample=0)  # the others use pixels around a box
    corner = PIL.Image.fromarray(np.ascontiguousarray(numbers[:2, 1:3]))
    cut = pixels(image, nearest, box=(1, 0, 3, 2))
    np.testing.assert_array_equal(cut, pixels(corner, nearest))


def test_boxes_have_the_share_and_the_form_they_should_have() -> None:
    random, augmentation = np.random.default_rng(0), Augmentation(crop=0.25)
    boxes = [augmentation.box((40, 30), random) for _ in range(200)]
    found = np.array([box for box in boxes if box is not None])
    assert len(found) > 190
    wide, high = found[:, 2] - found[:, 0], found[:, 3] - found[:, 1]
    assert found.min() >= 0
    assert found[:, 2].max() <= 40 and found[:, 3].max() <= 30
    share, ratio = wide * high / (40 * 30), wide / high
    assert 0.25 <= share.min() < 0.3 and 0.8 < share.max() <= 1
    assert 3 / 4 <= ratio.min() < 0.8 and 1.25 < ratio.max() <= 4 / 3
    assert Augmentation(crop=1.0).box((40, 30), random) is None
    flips = [Augmentation(flip=True).flips(random) for _ in range(200)]
    assert 60 < sum(flips) < 140 and not Augmentation().flips(random)
