"""Compile the training step of train.py on one device, for full fine-tuning and for LoRA."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lora_jax
from lora_jax import models
from lora_jax.bases.quantise import bytes_of
from lora_jax.paths import Tree
from lora_jax.sweeps import memory_fit
from lora_jax.training import causal_lm, classification, export, optimizer, step
from lora_jax.training.config import OptimizerConfig
from lora_jax.training.method import HEAD
from lora_jax.training.workload import Loss, Workload
from measuring.published_models import MINILM, SMOLLM2, normal

SIDES = ("full", "lora")
_STEPS = 1000  # of the learning-rate schedule; any number gives the same times


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and the shape of its batches.

    targets: the pattern of the weights with adapters, query and value.
    trainable: the patterns that LoRA trains in full, which is a new head.
    """

    name: str
    config: models.BertConfig | models.DecoderConfig
    rows: int
    length: int
    targets: str
    trainable: tuple[str, ...] = ()
    rank: int = 4

    @property
    def tokens(self) -> int:
        """The number of tokens in a batch."""
        return self.rows * self.length


CASES = {
    "minilm": Case(
        "MiniLM", MINILM, 32, 48, "bert/encoder/layer_*/attention/{query,value}/kernel",
        (HEAD,),
    ),
    "smollm2": Case("SmolLM2", SMOLLM2, 8, 48, "layers_*/attention/{q,v}/kernel"),
}  # fmt: skip


class TrainingSide(NamedTuple):
    """One of `SIDES`, ready to take its steps.

    layout: the layout of LoRA, without targets for full fine-tuning.
    state: the state before the first step. The program donates it, so use the returned one
      afterwards.
    frozen: the parameters that are not trained.
    program: the step, `program(state, frozen, batch) -> (state, metrics)`.
    """

    layout: lora_jax.Layout
    state: step.State
    frozen: Tree
    batch: Mapping[str, jax.Array]
    program: jax.stages.Compiled


def sides(case: Case) -> dict[str, Callable[[], TrainingSide]]:
    """Return a function that makes each side; they share the random parameters and the batch."""
    workload, batch = _workload(case), _batch(case)
    spec = lora_jax.LoraSpec(case.rank, 2.0 * case.rank, (case.targets,))
    key = jax.random.key(0)
    layout = lora_jax.resolve(
        spec, workload.apply, workload.params, batch, train=True, key=jax.random.key(0)
    )
    trained = {"full": (lora_jax.Layout(()), ("**",)), "lora": (layout, case.trainable)}

    def make(layout: lora_jax.Layout, trainable: tuple[str, ...]) -> TrainingSide:
        base, frozen = lora_jax.frozen.split(workload.params, trainable)
        tx = optimizer.adamw(optimizer.hyper(OptimizerConfig(), _STEPS))
        state = jax.jit(step.fresh(layout, tx, "gaussian"))(base, key)
        take = step.train_step(workload, layout, tx, "stop")
        program = jax.jit(take, donate_argnums=0).lower(state, frozen, batch).compile()
        return TrainingSide(layout, state, frozen, batch, program)

    return {name: (lambda name=name: make(*trained[name])) for name in SIDES}  # type: ignore[misc]


def _workload(case: Case) -> Workload:
    """Return the model with random weights and its loss; it has no data."""
    loss: Callable[[Any, Any], Loss]
    if isinstance(case.config, models.DecoderConfig):
        shapes = models.shapes(case.config)
        apply, loss = causal_lm.apply_of(models.DecoderModel(case.config)), causal_lm.token_loss
    else:
        shapes = models.shapes(case.config, models.Head("mean", 2))
        model = models.BertClassifier(case.config, 2, "mean")
        apply, loss = classification.apply_of(model), classification.class_loss
    return Workload(
        apply=apply,
        loss=loss,
        params=normal(shapes, 0),
        train=lambda shard: iter(()),  # type: ignore[arg-type, return-value]
    )


def _batch(case: Case) -> dict[str, jax.Array]:
    """Return a batch of random tokens without padding."""
    shape, (one, two) = (case.rows, case.length), jax.random.split(jax.random.key(1))
    words = case.config.vocab_size
    ids = jax.random.randint(one, shape, 0, words, dtype=jnp.int32)
    if isinstance(case.config, models.BertConfig):
        labels = jax.random.randint(two, (case.rows,), 0, 2, dtype=jnp.int32)
        weight = jnp.ones(case.rows, jnp.float32)
        return {"input_ids": ids, "mask": jnp.ones(shape, bool), "label": labels, "weight": weight}
    return {
        "input_ids": ids,
        "targets": jax.random.randint(two, shape, 0, words, dtype=jnp.int32),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(case.length, dtype=jnp.int32), shape),
        "loss_weight": jnp.ones(shape, jnp.float32),
    }


def stepping(side: TrainingSide) -> Callable[[], Any]:
    """Return a function that takes one step each time it is called, and returns the new state."""
    state = side.state

    def take() -> step.State:
        nonlocal state
        state, _ = side.program(state, side.frozen, side.batch)
        return state

    return take


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """The memory of a step on its device in bytes, as XLA reports it for the compiled program.

    total: arguments, results that do not reuse an argument's memory, and temporaries.
    weights: all parameters, trained or not, including LoRA's factors.
    optimizer: Adam's two moments of the trained parameters.
    gradients: one for each trained parameter; they are among the temporaries.
    """

    total: int
    weights: int
    optimizer: int
    gradients: int

    @property
    def rest(self) -> int:
        """Activations and other temporaries, and the batch."""
        return self.total - self.weights - self.optimizer - self.gradients


def memory(side: TrainingSide) -> StepBytes:
    """Return the memory of one step. Call this before the first step."""
    trained = bytes_of(side.state.trained)
    return StepBytes(
        total=round(memory_fit.of_step(side.program).bytes),
        weights=trained + bytes_of(side.frozen),
        optimizer=bytes_of(side.state.optimizer),
        gradients=trained,
    )


def written(side: TrainingSide, state: step.State, folder: pathlib.Path, name: str) -> int:
    """Export the trained parameters as train.py does, and return their bytes on disk."""
    identity = lora_jax.fingerprint(side.frozen)
    export.save(folder, name, side.layout, state.trained, identity)
    return export.size(export.folder(folder, name))
