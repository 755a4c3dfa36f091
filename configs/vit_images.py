"""LoRA on ViT-B/16 (arXiv 2010.11929), pretrained on ImageNet-21k, for image data sets of TFDS.

Command:   python train.py --config configs/vit_images.py:flowers102
           (beans, flowers102, food101 or cifar10; without a name it is beans)
Hardware:  one GPU of 16 GB; needs `pip install 'lora-jax[train,images,hub]'`, and the
           network for the weights (hub) and for the images (TFDS)
Minutes:   not measured: the machine on which this was written could not reach the hub and TFDS.
           The shapes are tested with drawn images and a tiny random ViT
Result:    not measured, for the same reason

The adapters are on q and v, as in the LoRA paper, which has no experiments on images. Rank, dropout
and learning rate are from PEFT's image classification example.
"""

import math

from lora_jax.data.config import ImageDataConfig
from lora_jax.training.config import LoraConfig, OptimizerConfig
from lora_jax.training.image_classification import image_classification
from lora_jax.training.images import ImageConfig
from lora_jax.training.pretrained import PretrainedModelConfig


def dataset(
    name: str,
    size: int,
    epochs: int,
    train: str = "train",
    evaluation: str = "validation",
    test: str = "test",
) -> ImageConfig:
    """Return the config of the TFDS data set `name`, which has `size` training images."""
    batch_size = 64
    epoch = math.ceil(size / batch_size)
    return ImageConfig(
        workload=image_classification,
        model=PretrainedModelConfig(reference="hub:google/vit-base-patch16-224-in21k"),
        data=ImageDataConfig(
            source=f"tfds:{name}",
            flip=True,
            crop=0.5,
            batch_size=batch_size,
            train_split=train,
            eval_split=evaluation,
            test_split=test,
        ),
        lora=LoraConfig(
            rank=16,
            alpha=16.0,
            dropout=0.1,
            targets=("vit/encoder/layer*/attention/{query,value}/kernel",),
        ),
        optimizer=OptimizerConfig(learning_rate=5e-3, schedule="linear", warmup=0.1),
        steps=epochs * epoch,
        evaluate_every=epoch,
        checkpoint_every=min(500, epoch),
    )


beans = dataset("beans", 1_034, epochs=20)
flowers102 = dataset("oxford_flowers102", 1_020, epochs=40)
# These have only two splits, for training and test, so a part of the first is used for validation.
food101 = dataset("food101", 71_962, 5, "train[:95%]", "train[95%:]", "validation")
cifar10 = dataset("cifar10", 47_500, 5, "train[:95%]", "train[95%:]")

config = beans
