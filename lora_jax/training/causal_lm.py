"""The workload of a decoder that learns to continue prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import models
from lora_jax.data.catalogue import open_data
from lora_jax.data.example_reader import Words, form_of
from lora_jax.data.forms import Judged, Preference
from lora_jax.data.language_modelling import language_modelling as batches_of
from lora_jax.models.cross_entropy import cross_entropy
from lora_jax.models.text.conversation import Conversation
from lora_jax.models.weights import chat_files
from lora_jax.paths import Tree
from lora_jax.training import pretrained, samples, scores, text
from lora_jax.training.method import LORA, Method
from lora_jax.training.pretrained import Pretrained
from lora_jax.training.text import TextConfig
from lora_jax.training.workload import Batch, Loss, Workload, check_select

_PACKING = ("segment_ids", "positions")


def causal_lm(config: TextConfig) -> Workload:
    """Make the workload of a decoder that learns the answers to prompts, in packed rows."""
    source, model_config, method = text.opened(
        config,
        models.DecoderConfig,
        "a causal language model is a decoder, and lora_jax.training.classification takes encoders",
    )
    select = config.select or "loss"
    own = samples.functions(config.samples)
    check_select(select, [*scores.names(scores.token_scores), *own])
    words = words_of(source, config.data.template, config.day)
    model = models.DecoderModel(model_config)
    return pretrained.workload(
        config,
        Pretrained(source, model_config, method=method),
        lambda: pretrained.open_batches(
            config, functools.partial(batches_of, config.data, words())
        ),
        {},
        of_data=functools.partial(about_data, config, source),
        apply=apply_of(model, config.model.loss_chunk, method, config.label_smoothing),
        loss=token_loss,
        example=batch_shapes(config.data.batch_size, config.data.max_length),
        scores=scores.token_scores,
        select=select,
        better="lower" if select in ("loss", "perplexity") else "higher",
        size=real_tokens,
        unit="tokens",
        samples=samples.samples_of(config, words, model_config),
    )


def words_of(
    source: models.Source, template: str | None = None, day: str | None = None
) -> Callable[[], Words]:
    """Return a function that opens what a decoder makes of text; a plan does not call it.

    The template is that of a file, or the model's own, on a day.
    """

    @functools.cache
    def words() -> Words:
        return Words(
            source.tokenizer(),
            source.config.vocab_size,  # type: ignore[union-attr]  # `open_model` checks it
            functools.partial(chat_files.open_template, source, template, day),
            source.special_tokens.get("eos_token"),
        )

    return words


def about_data(config: TextConfig, source: models.Source) -> dict[str, Any]:
    """Return what generation needs to ask and to stop as the examples do: see
    `lora_jax.serving.prompts`."""
    data = config.data
    eos = source.special_tokens.get("eos_token") if data.eos is None else data.eos
    if data.prompt is not None:
        return {"prompt": data.prompt, "eos": eos}
    opened = open_data(data, set_apart=True)
    first = opened.examples(data.train_split)[0]
    said = form_of(data, first, opened.name).of(first, opened.name)
    template = None if data.template is None else chat_files.read_text(data.template)
    said = said.judged[0][0] if isinstance(said, Preference | Judged) else said
    chat = isinstance(said, Conversation)
    return {"prompt": None, "eos": eos, "chat": chat, "template": template}


def batch_shapes(rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    whole = ("input_ids", "targets", "segment_ids", "positions")
    shapes = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in whole}
    return {**shapes, "loss_weight": jax.ShapeDtypeStruct((rows, length), jnp.float32)}


def apply_of(
    model: models.DecoderModel,
    chunk: int | None = None,
    method: Method = LORA,
    smoothing: float = 0.0,
) -> Any:
    """Return the model as a `Workload.apply` for packed rows, which gives logits [B, T, V].

    With a chunk (tokens whose cross entropy is computed at a time), and in training with label
    smoothing, it gives the cross entropy of each token, float32 [B, T].
    """

    def apply(params: Tree, batch: Any, *, train: bool, key: Any) -> Any:
        smoothed = smoothing if train else 0.0
        inputs = {name: batch[name] for name in _PACKING}
        if chunk is not None:
            inputs |= {"targets": batch["targets"], "chunk": chunk, "smoothing": smoothed}
            inputs |= {"method": model.loss}
        inputs |= pretrained.dropout(model.config, train, key, model.config.neftune)
        outputs = method.apply(model, params, batch["input_ids"], **inputs)
        if chunk is not None or not smoothed:
            return outputs
        return cross_entropy(outputs, batch["targets"], smoothed)

    return apply


def token_loss(outputs: jax.Array, batch: Any) -> Loss:
    """Return the cross entropy of each token that has a loss weight."""
    weight, each = batch["loss_weight"], outputs
    if outputs.ndim == 3:
        each = cross_entropy(outputs, batch["targets"])
    total = jnp.sum(each * weight)
    return Loss(total, jnp.sum(weight), {"nll": total})


def real_tokens(batch: Batch) -> int:
    """Count the tokens of a batch, without padding."""
    return int((batch["segment_ids"] > 0).sum())
