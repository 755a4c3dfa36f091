"""The adapter that a run starts from: `train.py --from RUN`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import checkpoint, paths
from lora_jax.base import is_base
from lora_jax.bases.recipe import ABOUT
from lora_jax.checkpoint import adapter_path
from lora_jax.checkpoint.saved_adapter import SavedAdapter, labels_in
from lora_jax.errors import LoraError, listed
from lora_jax.layout import Layout
from lora_jax.paths import Tree
from lora_jax.spec import LoraSpec, Rule
from lora_jax.training.config import Config, ConfigError, LoraConfig, check_loraplus
from lora_jax.training.mesh import Placement
from lora_jax.training.workload import Workload

_HEAD = "classifier/out/kernel"


def find(config: Config, workload: Workload) -> SavedAdapter | None:
    """Return the adapter that the config starts from, which fits the model of the workload.

    It is None without --from. No array is read yet.
    """
    if config.start_from is None:
        return None
    _, folder = adapter_path.find_one(config.start_from)
    saved = SavedAdapter.open_lora(folder, config.start_from)
    try:
        _check_settings(saved, workload, config.allow_other_base)
        saved.layout.check_params(paths.flatten(workload.params))
        _check_trainable(saved, workload)
        kinds = {target.kind for target in saved.layout.targets}
        check_loraplus(config.optimizer.loraplus_lr_ratio, kinds)
    except LoraError as error:
        raise ConfigError(f"--from {config.start_from} ({folder}) does not fit: {error}") from error
    return saved


def described(saved: SavedAdapter, workload: Workload) -> str:
    """Return a text about the adapter, with its classes if this run names them otherwise."""
    full, theirs, ours = saved.trainable_shapes, saved.labels, labels_in(workload.about)
    more = f", {len(full)} trained in full" if full else ""
    text = f"Begins with {saved.folder}: {len(saved.layout.targets)} adapted parameters{more}"
    if not theirs or theirs == ours or _HEAD not in full:
        return text
    return f"{text}\nIts classes {', '.join(theirs)} are {', '.join(ours)} here"


def spec_of(layout: Layout) -> LoraSpec:
    """Return a spec that resolves to the layout."""
    rules = tuple(
        Rule(t.path, t.rank, t.alpha, t.kind, t.scaling, t.parts or None, t.part_axis)
        for t in layout.targets
    )
    return LoraSpec(1, 1.0, rules, tuple(t.path for t in layout.targets if t.fold))


def base_method(saved: SavedAdapter) -> Any:
    """Return the method that changed the adapter's base before training, or None."""
    method = saved.changed_by
    if method is None or LoraConfig(init=method).changes_base:  # type: ignore[arg-type]
        return method
    raise ConfigError(f"{saved.folder} says that its base was begun by {method[:80]!r}")


def patterns(config: Config, workload: Workload, saved: SavedAdapter | None) -> tuple[str, ...]:
    """Return the patterns of the parameters that a run trains in full.

    They include the parameters that were trained in full with the earlier adapter.
    """
    given = config.adaptation.trainable
    own = workload.trainable if given is None else given
    full = () if saved is None else saved.trainable_shapes
    left = [p for p in full if not any(paths.match(pattern, p) for pattern in own)]
    if left and given is not None:
        raise ConfigError(
            f"--from {config.start_from} has trained these in full, and lora.trainable leaves them "
            f"out, so that their values would be lost:\n{listed(left)}\nadd them to it"
        )
    return (*own, *left)


def restore(
    saved: SavedAdapter,
    config: Config,
    workload: Workload,
    layout: Layout,
    params: Tree,
    place: Placement,
) -> tuple[Tree, Tree]:
    """Return the adapters, as float32, and the base with what was trained in full put into it.

    `layout` is what the adapter's spec resolves to, and `params` are changed as for the adapter.
    """
    if other := [target.path for target in {*saved.layout.targets} - {*layout.targets}]:
        raise ConfigError(
            f"--from {config.start_from} adapts these along other axes than this model has:\n"
            f"{listed(other)}\nis it the same model?"
        )
    leaves = paths.flatten(params)
    fresh = {path for pattern in workload.trainable for path in paths.matching(pattern, leaves)}
    if not config.allow_other_base:
        saved.check_base(checkpoint.fingerprint(params), fresh)
    where = place.trained(saved.layout, saved.trainable_shapes)
    found = saved.load({**where["adapters"], **where["base"]})
    masters = jax.tree.map(lambda x: x.astype(jnp.float32), found.parameters)
    adapters = {target.path: masters[target.path] for target in layout.targets}
    trained = {path: x.astype(leaves[path].dtype) for path, x in found.trainable.items()}
    return adapters, paths.replace(params, trained)


def _check_settings(saved: SavedAdapter, workload: Workload, allow_other_base: bool) -> None:
    """Raise if the model has other settings; shapes would reveal them late or never."""
    theirs, ours = saved.model, workload.about.get("model") or {}
    for name in ("scan_layers", "pooling"):
        of_head = name == "pooling" and _HEAD not in saved.trainable_shapes
        both = name in theirs and name in ours and not of_head
        if both and theirs[name] != ours[name]:
            flag = f"--model.{name.replace('_', '-')} {str(theirs[name])[:80]}"
            raise ConfigError(f"its model.{name} is {theirs[name]!r}, here {ours[name]!r}: {flag}")
    labels, own = saved.labels, labels_in(workload.about)
    if sorted(labels) == sorted(own) and labels != own:
        raise ConfigError(
            f"its classes are {list(labels)}, and the data has them in another order, "
            f"{list(own)}: give --data.label-names in the order of the adapter"
        )
    before, now = _quantised(saved.about), _quantised(workload.about)
    if before != now and not allow_other_base:
        raise ConfigError(
            f"it was trained on {_in_words(before)}, and here the base is {_in_words(now)}: give "
            f"--model.quantize {'none' if before is None else before[0]} with its settings, or "
            "--allow-other-base"
        )


def _check_trainable(saved: SavedAdapter, workload: Workload) -> None:
    """Raise if a parameter that was trained in full is missing or has another shape."""
    leaves = paths.flatten(workload.params)
    for path, shape in saved.trainable_shapes.items():
        leaf = leaves.get(path)
        if leaf is not None and is_base(leaf):
            raise ConfigError(
                f"it has trained {path!r} in full, which is quantised here: add it to "
                "--lora.trainable, so that it stays a float"
            )
        got = None if leaf is None else tuple(leaf.shape)
        if got != shape:
            cure = "Is it the same model?"
            if got is not None and any(
                paths.match(pattern, path) for pattern in workload.trainable
            ):
                cure = "The head has an output for each class: take data with the adapter's classes"
            raise ConfigError(
                f"it has trained {path!r} of shape {list(shape)} in full; here that is "
                f"{'missing' if got is None else list(got)}. {cure}"
            )


def _quantised(about: Mapping[str, Any]) -> tuple[Any, Any, Any] | None:
    """Return scheme, block, and whether the scales are quantised; `_check_trainable` does paths."""
    how = about.get(ABOUT)
    if not isinstance(how, Mapping):
        return None
    return how.get("scheme"), how.get("block"), bool(how.get("double"))


def _in_words(how: tuple[Any, Any, Any] | None) -> str:
    if how is None:
        return "a base of floats"
    scheme, block, double = (str(value)[:80] for value in how)
    return f"a base in {scheme} (block {block}, double {double})"
