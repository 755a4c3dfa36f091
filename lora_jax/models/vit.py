"""ViT (Dosovitskiy et al., arXiv 2010.11929): an encoder of images, and its classifier."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lora_jax.models.config import VitConfig, check_choice
from lora_jax.models.layers import ACTIVATIONS, INITIAL, ClassifierHead, by_rows
from lora_jax.models.pre_norm import PreNormEncoder


class _Patches(nn.Module):
    """Multiplies every patch with one kernel.

    Parameters: `kernel` [width, height, channels, D], which has all axes of the kernel in the files
    in reverse order, and `bias`.
    """

    config: VitConfig

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        config = self.config
        (high, wide), channels = config.patch_size, config.channels
        rows, columns = config.grid
        shape = (wide, high, channels, config.hidden_size)
        kernel = self.param("kernel", INITIAL, shape, config.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:], config.param_dtype)
        cut = pixels.astype(config.dtype).reshape(-1, rows, high, columns, wide, channels)
        out = jnp.einsum("brhqwc,whcd->brqd", cut, kernel.astype(config.dtype))
        out = out.reshape(out.shape[0], rows * columns, -1)
        return out + jnp.expand_dims(bias.astype(config.dtype), (0, 1))


class _Embeddings(nn.Module):
    config: VitConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        config = self.config
        patches = _Patches(config, name="patch")(pixels)
        token = (1, 1, config.hidden_size)
        first = self.param("class_token", INITIAL, token, config.param_dtype)
        first = jnp.broadcast_to(first.astype(config.dtype), (len(patches), *token[1:]))
        x = jnp.concatenate([first, patches], axis=1)
        position = self.param("position", INITIAL, (1, *x.shape[1:]), config.param_dtype)
        x = by_rows(x + position.astype(config.dtype))
        return nn.Dropout(config.dropout, deterministic=self.deterministic)(x)


class Vit(nn.Module):
    """The encoder of images, which computes hidden states, the class token first.

    Parameters: `embeddings/{patch/{kernel,bias},class_token,position}`, `encoder/layer_0/...` and
    `encoder/norm` as in `lora_jax.models.pre_norm`.

    Attributes:
      config: the config of the encoder.
    """

    config: VitConfig

    @nn.compact
    def __call__(self, pixels: Array, deterministic: bool = True) -> Array:
        """Compute the hidden states.

        Args:
          pixels: float [B, height, width, channels], normalised as in the training of the model.
          deterministic: False applies dropout as in `config`, with the rng named "dropout".

        Returns:
          [B, 1 + patches, D] in `config.dtype`.

        Raises:
          ValueError: the images have another size than in the config; the activation is unknown.
        """
        config = self.config
        check_choice("activation", config.activation, ACTIVATIONS)
        wanted = (*config.image_size, config.channels)
        if pixels.shape[1:] != wanted:
            raise ValueError(f"pixels: got images {pixels.shape[1:]}, but the model's are {wanted}")
        x = _Embeddings(config, deterministic, name="embeddings")(pixels)
        encoder = PreNormEncoder(config, config.pre_norm, deterministic, name="encoder")
        return encoder(x, None, None, None)


class VitClassifier(nn.Module):
    """The encoder with a classification head; parameters `vit/...` and `classifier/out`.

    Attributes:
      config: the config of the encoder.
      num_classes: the number of classes.
    """

    config: VitConfig
    num_classes: int

    @nn.compact
    def __call__(self, pixels: Array, deterministic: bool = True) -> Array:
        """Return the logits of the class token, float32 [B, num_classes].

        The arguments are the same as in `Vit`.
        """
        hidden = Vit(self.config, name="vit")(pixels, deterministic)
        return ClassifierHead(self.config, self.num_classes, name="classifier")(hidden[:, 0])
