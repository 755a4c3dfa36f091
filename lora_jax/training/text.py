"""The config of a run of a pretrained language model on text, and the code its workloads share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import tyro

from lora_jax import models
from lora_jax.data.config import DataConfig
from lora_jax.models.config import BuiltInConfig
from lora_jax.system.checked import Checked
from lora_jax.training.config import require
from lora_jax.training.method import LORA, Method
from lora_jax.training.pretrained import PretrainedConfig, PretrainedModelConfig, open_model


@dataclasses.dataclass(frozen=True)
class ModelConfig(PretrainedModelConfig):
    """The pretrained model."""

    _bounds: ClassVar = {
        "at least 1": ("loss_chunk",),
        "in [0, 1)": ("head_dropout",),
        "above 0": ("neftune",),
    }

    pooling: Literal["mean", "cls", "roberta_head"] = "mean"
    """Classification by an encoder: the input of the head, which is the mean of the tokens, the
    first token (cls), or the first token after RoBERTa's dense layer. A decoder's is its last
    token."""
    loss_chunk: int | None = None
    """Decoders: the number of positions of a row whose loss is computed at a time, so that the
    logits of a large vocabulary never exist all at once. It costs one more product with the output
    head. None: all positions at once."""
    head_dropout: float | None = None
    """Dropout rate before an encoder's head. None: the same as `dropout`."""

    neftune: float | None = None
    """Noise on the embeddings in training (NEFTune, arXiv 2310.05914): uniform within
    neftune / sqrt(length of a row x width of the model). The paper takes 5 to 15. None: none."""

    def apply_to(self, config: Any) -> Any:
        config, head, chunk = super().apply_to(config), self.head_dropout, self.loss_chunk
        config = dataclasses.replace(config, neftune=self.neftune or 0.0)
        if not isinstance(config, models.BertConfig):
            require(head is None, "model.head_dropout", head, "None for a decoder")
            return config
        require(chunk is None, "model.loss_chunk", chunk, "None for an encoder")
        return dataclasses.replace(config, head_dropout=head)


@dataclasses.dataclass(frozen=True)
class SamplesConfig(Checked):
    """Texts that a decoder writes at each evaluation (`lora_jax.training.samples`), or the classes
    that a classifier guesses (`lora_jax.training.guesses`)."""

    _path = "samples."
    _bounds: ClassVar = {"at least 0": ("prompts",), "at least 1": ("new_tokens",)}

    prompts: int = 0
    """The number of questions, the first ones of the validation split. Answers are compared with
    the expected ones (exact_match, rouge_l); the record and the report show answers or guesses."""
    new_tokens: int = 64
    """The largest number of tokens of an answer."""
    score: tyro.conf.Suppress[Callable[[str, str], float] | None] = None
    """A function of a text and the expected one, whose mean is a score by the function's name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(PretrainedConfig):
    """A run that trains a pretrained language model on text."""

    _bounds: ClassVar = {"in [0, 1)": ("label_smoothing",)}

    model: ModelConfig
    """The pretrained model."""
    data: DataConfig
    """The data."""
    label_smoothing: float = 0.0
    """Decoders: share of each label that is spread over the whole vocabulary in training."""
    samples: SamplesConfig = SamplesConfig()
    """Decoders: texts that are written at each evaluation."""

    def method_for(self, model: BuiltInConfig, length: int) -> Method:
        """Return what is trained next to the adapters and the new head: nothing.

        Args:
          model: the config of the model.
          length: the number of tokens of the longest row.
        """
        return LORA


class TextModel(NamedTuple):
    """A model of text, its config with the settings of a run, and what the run adds to it."""

    source: Any
    config: Any
    method: Method


def opened(config: TextConfig, kind: Any, wanted: str) -> TextModel:
    """Open the model of a run, whose config must be of a kind; `wanted` ends the error message.

    Raise if it has learned positions and rows may be longer than these. Otherwise the first batch
    with such a long text would stop the run, perhaps hours later.
    """
    source, length = open_model(config.model.reference, kind, wanted), config.data.max_length
    model, most = source.config, source.config.max_positions
    table = isinstance(model, models.BertConfig) or model.positions == "learned"
    expected = f"at most {most}, the positions of {config.model.reference}"
    require(not table or length <= most, "data.max_length", length, expected)
    model = config.model.apply_to(model)
    return TextModel(source, model, config.method_for(model, length))
