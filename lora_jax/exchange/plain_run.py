"""The update of a run as plain LoRA over the base as it is stored, and the error of that."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax import models, paths
from lora_jax.adapters import Adapter
from lora_jax.analysis import matrices
from lora_jax.analysis.as_lora import as_lora
from lora_jax.analysis.decompose import nearest_factors
from lora_jax.layout import Layout
from lora_jax.multi.combine import Truncation, truncate
from lora_jax.resolve import resolve
from lora_jax.serving.served_adapters import Served
from lora_jax.spec import LoraSpec
from lora_jax.transform import adapt
from lora_jax.updates.kind import kind_of

_HEAD = "classifier/"


class PlainRun(NamedTuple):
    """A run's update as plain LoRA.

    adapter: for the base as it is stored. Heads, norms and vectors stay as the run trained them.
    errors: the part of each target's update that the factors do not hold.
    logits: the norm of the error of the logits on `sample`, as a share of the change that the run
      makes to them.
    params: the parameters of the stored base, with the head of the run.
    """

    adapter: Adapter
    errors: dict[str, Truncation]
    logits: float
    params: Any


def sample(config: Any) -> Any:
    """Return the inputs on which the error of the logits is measured: 4 x 32 random tokens or less,
    or 4 random images.
    """
    draw = np.random.default_rng(0)
    if isinstance(config, models.VitConfig):
        images = draw.standard_normal((4, *config.image_size, config.channels))
        return jnp.asarray(images, jnp.float32)
    shape = (4, min(32, config.max_positions))
    return jnp.asarray(draw.integers(0, config.vocab_size, shape), jnp.int32)


def plain_run(run: Served, rank: int, share: bool = False) -> PlainRun:
    """Return the update of a run at `rank`: of each matrix, or as the mean if they `share` it."""
    layout, adapters, trained = run.member.adapter
    f, x = _model(run), sample(run.config)
    own = _with_head(run, run.params)
    changed = run.changed_by is not None
    stored = _with_head(run, _rooted(run, run.source.load(run.config))) if changed else own
    limit = None if share else rank
    factored = Layout(tuple(t for t in layout.targets if t.inputs))
    arrays = {t.path: adapters[t.path] for t in factored.targets}
    plain, found, errors = as_lora(factored, arrays, limit, own, stored if changed else None)

    after = {path: w for path, w in trained.items() if not path.startswith(_HEAD)}
    before = paths.flatten(stored)
    for target in layout.targets:
        if not target.inputs:
            w = jnp.asarray(before[target.path], jnp.float32)
            after[target.path] = kind_of(target).merged(target, adapters[target.path], w)
    products = resolve(LoraSpec(1, 1.0, "all-linear"), f, stored, x).targets if after else ()
    targets = list(plain.targets)
    for target in products:
        path = target.path
        if path in after:
            old, new = (matrices.of_weight(target, w) for w in (before[path], after[path]))
            whole = target.fan_in if limit is None else limit
            target, found[path], errors[path] = nearest_factors(target, old, new, whole)
            targets.append(target)
    adapter = Adapter(Layout(tuple(targets)), found)
    if share:
        adapter, errors = truncate(adapter, rank, share=True)

    vectors = tuple(t for t in layout.targets if not t.inputs and t.path not in found)
    adapter = Adapter(
        Layout((*adapter.layout.targets, *vectors)),
        {**adapter.parameters, **{t.path: adapters[t.path] for t in vectors}},
        {path: w for path, w in trained.items() if path not in found},
    )
    want = adapt(layout, f)(paths.replace(own, dict(trained)), adapters, x)
    there = paths.replace(stored, dict(adapter.trainable))
    got = adapt(adapter.layout, f)(there, adapter.parameters, x)
    change = float(jnp.linalg.norm(want - f(stored, x)))
    error = float(jnp.linalg.norm(got - want))
    return PlainRun(adapter, errors, error / change if change else 0.0, stored)


def _model(run: Served) -> Any:
    """Return the model as `f(params, inputs)`."""
    config, head = run.config, run.head
    module: Any = models.DecoderModel(config) if head is None else None
    if head is not None and isinstance(config, models.VitConfig):
        module = models.VitClassifier(config, head.num_classes)
    elif head is not None:
        module = models.BertClassifier(config, head.num_classes, head.pooling)
    return lambda params, inputs: module.apply({"params": params}, inputs)


def _rooted(run: Served, params: Any) -> Any:
    return {run.root.strip("/"): params} if run.root else params


def _with_head(run: Served, params: Any) -> Any:
    """Return a base, as `Served.params` has it, with the head that the run trained."""
    if run.head is None:
        return params
    head = {p: x for p, x in run.member.trainable.items() if p.startswith(_HEAD)}
    return paths.replace({**run.shapes, **params}, head)
