"""Write golden_images.npz: images, and their pixels by transformers' ViTImageProcessor.

Run it in an environment with transformers 5.24.0 and Pillow 13.0.0 (torch is not needed):

    python tests/golden/make_images.py

Each case has the bytes of an image file, a preprocessor_config.json, and the pixels [height, width,
channels]. The processor is the one that computes with Pillow.
"""

import io
import json
import pathlib

import numpy as np
import PIL.Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SIZES = ((37, 29), (9, 7), (20, 16))  # (width, height): the first is reduced, the second enlarged
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SETTINGS = (
    {},
    {"resample": 3, **IMAGENET},
    {"resample": 1, "do_normalize": False},
    {"resample": 0, "do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
    {"rescale_factor": 1 / 127.5},
)
SIZE = {"height": 16, "width": 20}


def main() -> None:
    random, arrays, cases = np.random.default_rng(0), {}, []
    for number, settings in enumerate(SETTINGS):
        wide, high = SIZES[number % len(SIZES)]
        image = PIL.Image.fromarray(random.integers(0, 256, (high, wide, 3), np.uint8))
        file = io.BytesIO()
        image.save(file, "PNG")
        processor = ViTImageProcessorPil(size=SIZE, **settings)
        found = processor(image, return_tensors="np")["pixel_values"][0]
        arrays[f"file_{number}"] = np.frombuffer(file.getvalue(), np.uint8)
        arrays[f"pixels_{number}"] = np.moveaxis(found, 0, -1).astype(np.float32)
        cases.append(json.loads(processor.to_json_string()))
    arrays["settings"] = np.array(json.dumps(cases))
    np.savez_compressed(pathlib.Path(__file__).with_name("golden_images.npz"), **arrays)


if __name__ == "__main__":
    main()
