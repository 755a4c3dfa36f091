"""The adapter that a run starts from: `train.py --from RUN`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax import checkpoint, paths
from lora_jax.base import is_base
from lora_jax.bases.recipe import ABOUT
from lora_jax.checkpoint import adapter_path
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.errors import LoraError, listed
from lora_jax.layout import Layout
from lora_jax.training.config import Config, ConfigError, LoraConfig, check_loraplus
from lora_jax.training.mesh import Placement
from lora_jax.training.workload import Workload

Tree = Any  # a pytree


def described(earlier: SavedAdapter, workload: Workload) -> str:
    """Return what a run says of the adapter that it starts from."""
    trainable, ours = earlier.trainable_shapes, _labels(workload)
    more = f", {len(trainable)} trained in full" if trainable else ""
    text = f"Begins with {earlier.folder}: {len(earlier.layout.targets)} adapted parameters{more}"
    if earlier.labels in ((), ours) or "classifier/out/kernel" not in trainable:
        return text
    return f"{text}\nIts classes {', '.join(earlier.labels)} are {', '.join(ours)} here"


class Restored(NamedTuple):
    """The placed adapters, and the base with the parameters that were trained in full."""

    adapters: Tree
    params: Tree


def open_earlier(config: Config, workload: Workload) -> SavedAdapter | None:
    """Return the adapter that the config starts from, or None if it starts from none.

    It fits the model of the workload. Its arrays are not read yet.
    """
    if config.start_from is None:
        return None
    _, folder = adapter_path.find_one(config.start_from)
    found = SavedAdapter.open_lora(folder, config.start_from, config.allow_other_base)
    try:
        _check_settings(found, workload)
        found.layout.check_params(paths.flatten(workload.params))
        _check_trainable(found, workload)
        ratio, kinds = config.optimizer.loraplus_lr_ratio, {t.kind for t in found.layout.targets}
        check_loraplus(ratio, kinds)
    except LoraError as error:
        raise ConfigError(f"--from {config.start_from} ({folder}) does not fit: {error}") from error
    return found


def changed_by(earlier: SavedAdapter) -> Any:
    """Return the method of `lora.init` that changed its base before training, or None."""
    method = earlier.changed_by
    if method is None or LoraConfig(init=method).changes_base:  # type: ignore[arg-type]
        return method
    raise ConfigError(f"{earlier.folder} says that its base was changed by {method[:80]!r}")


def patterns(lora: LoraConfig, workload: Workload, earlier: SavedAdapter | None) -> tuple[str, ...]:
    """Return the patterns of the parameters that a run trains in full.

    They include the parameters that were trained in full with the earlier adapter.
    """
    own = workload.trainable if lora.trainable is None else lora.trainable
    if earlier is None:
        return own
    theirs = earlier.trainable_shapes
    left = [p for p in theirs if not any(paths.match(pattern, p) for pattern in own)]
    if left and lora.trainable is not None:
        raise ConfigError(
            f"--from {earlier.name} has trained these in full, and lora.trainable leaves them "
            f"out, so that their values would be lost:\n{listed(left)}\nadd them to it"
        )
    return (*own, *left)


def restore(
    earlier: SavedAdapter, workload: Workload, layout: Layout, params: Tree, place: Placement
) -> Restored:
    """Read the arrays of an earlier adapter, and put parameters trained in full into the base."""
    ours, theirs = set(layout.targets), set(earlier.layout.targets)
    if other := [target.path for target in theirs - ours]:
        raise ConfigError(
            f"--from {earlier.name} adapts these along other axes than this model has:\n"
            f"{listed(other)}\nis it the same model?"
        )
    leaves = paths.flatten(params)
    fresh = {path for pattern in workload.trainable for path in paths.matching(pattern, leaves)}
    if not earlier.allow_other_base:  # else nothing has to be hashed
        earlier.check_base(checkpoint.fingerprint(params), fresh)
    where = place.trained(earlier.layout, earlier.trainable_shapes)
    found = earlier.load({**where["adapters"], **where["base"]})
    masters = jax.tree.map(lambda x: x.astype(jnp.float32), found.parameters)
    adapters = {target.path: masters[target.path] for target in layout.targets}
    trained = {path: x.astype(leaves[path].dtype) for path, x in found.trainable.items()}
    return Restored(adapters, paths.replace(params, trained))


def _check_settings(earlier: SavedAdapter, workload: Workload) -> None:
    """Raise if the model has other settings; shapes would reveal them late or never."""
    theirs, ours = (_settings(about) for about in (earlier.about, workload.about))
    for name in ("scan_layers", "pooling"):
        of_head = name == "pooling" and "classifier/out/kernel" not in earlier.trainable_shapes
        both = name in theirs and name in ours and not of_head
        if both and theirs[name] != ours[name]:
            flag = f"--model.{name.replace('_', '-')} {str(theirs[name])[:80]}"
            raise ConfigError(f"its model.{name} is {theirs[name]!r}, here {ours[name]!r}: {flag}")
    labels, wanted = earlier.labels, _labels(workload)
    if sorted(labels) == sorted(wanted) and labels != wanted:
        raise ConfigError(
            f"its classes are {list(labels)}, and the data has them in another order, "
            f"{list(wanted)}: give --data.label-names in the order of the adapter"
        )
    before, now = _quantised(earlier.about), _quantised(workload.about)
    if before != now and not earlier.allow_other_base:
        raise ConfigError(
            f"it was trained on {_in_words(before)}, and here the base is {_in_words(now)}: give "
            f"--model.quantize {'none' if before is None else before[0]} with its settings, or "
            "--allow-other-base"
        )


def _check_trainable(earlier: SavedAdapter, workload: Workload) -> None:
    """Raise if a parameter that was trained in full is missing or has another shape."""
    leaves = paths.flatten(workload.params)
    for path, shape in earlier.trainable_shapes.items():
        leaf = leaves.get(path)
        if leaf is not None and is_base(leaf):
            raise ConfigError(
                f"it has trained {path!r} in full, which is quantised here: add it to "
                "--lora.trainable, so that it stays a float"
            )
        got = None if leaf is None else tuple(leaf.shape)
        if got != shape:
            is_head = any(paths.match(pattern, path) for pattern in workload.trainable)
            cure = (
                "The head has an output for each class: take data with the classes of the adapter"
                if is_head and got is not None
                else "Is it the same model?"
            )
            raise ConfigError(
                f"it has trained {path!r} of shape {list(shape)} in full; here that is "
                f"{'missing' if got is None else list(got)}. {cure}"
            )


def _settings(about: Mapping[str, Any]) -> Mapping[str, Any]:
    model = about.get("model")
    return model if isinstance(model, Mapping) else {}


def _labels(workload: Workload) -> tuple[str, ...]:
    return tuple(map(str, workload.about.get("labels") or ()))


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
