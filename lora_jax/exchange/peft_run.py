"""Turn a PEFT adapter, on its base, into the contents of a run."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import checkpoint, models, paths
from lora_jax.adapters import Adapter, merge
from lora_jax.checkpoint.fingerprint import Fingerprint
from lora_jax.errors import LoraError, listed
from lora_jax.exchange import peft
from lora_jax.exchange.peft_head import FoundHead, head_of
from lora_jax.layout import Layout
from lora_jax.models.config import TextModelConfig
from lora_jax.models.weights.folder import Folder
from lora_jax.models.weights.source import KNOWN, is_safe
from lora_jax.models.weights.stored import stored_head

_HEAD = "classifier/"
_LENGTHS = (32, 64, 128, 256, 512)  # the default lengths of batches


class ImportSettings(NamedTuple):
    """The user's statements about an adapter; None or () leaves them to the folder or the base.

    base: the reference of the base.
    model: settings of the base: `scan_layers`, `dtype`, `param_dtype`.
    pooling, labels, text_fields, lengths: of a classifier, see `serving.classifier`.
    """

    base: str | None
    model: Mapping[str, Any]
    pooling: str | None = None
    labels: tuple[str, ...] = ()
    text_fields: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()


class Imported(NamedTuple):
    """The arguments of `lora_jax.save`, and a line for each conclusion that was drawn."""

    adapter: Adapter
    fingerprint: Fingerprint
    about: dict[str, Any]
    notes: tuple[str, ...]


def read(folder: str, given: ImportSettings) -> Imported:
    """Read a PEFT folder and its base."""
    found = peft.describe(folder)
    reference = _reference(found, given.base)
    source: Any = models.open(reference)
    config = dataclasses.replace(source.config, **given.model)
    imported = {
        "folder": str(pathlib.Path(folder).expanduser().resolve()),
        "peft_version": _text(found.settings.get("peft_version")),
        "base": _text(found.settings.get("base_model_name_or_path")),
    }
    try:
        writes = found.settings.get("task_type") != "SEQ_CLS"
        if isinstance(config, models.DecoderConfig) and writes:
            adapter, params, more, notes = _decoder(folder, found, source, config)
        elif not isinstance(config, models.VitConfig):
            adapter, params, more, notes = _classifier(folder, found, source, config, given)
        else:
            raise LoraError("the base is an image encoder; only text models can be imported")
    except LoraError as error:
        raise LoraError(f"{folder} on the base {reference}: {error}") from error
    model = {"reference": reference, **given.model, **more.pop("model", {})}
    about = {"model": model, **more, "imported": imported}
    return Imported(adapter, checkpoint.fingerprint(params), about, notes)


_Found = tuple[Adapter, Any, dict[str, Any], tuple[str, ...]]  # adapter, base, about, notes


def _decoder(
    folder: str, found: peft.Description, source: Any, config: models.DecoderConfig
) -> _Found:
    task = found.settings.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise LoraError(
            f"the folder is for task_type {str(task)[:80]!r}, and the base is a decoder, which is "
            "taken for CAUSAL_LM or SEQ_CLS"
        )
    params = source.load(config)
    model = models.DecoderModel(config)

    def apply(params: Any, ids: Any) -> Any:
        return model.apply({"params": params}, ids)

    adapter = peft.load(folder, models.hf_names(config), apply, params, _EXAMPLE)
    texts = {name: found.about.get(name) for name in ("prompt", "eos", "template")}
    about: dict[str, Any] = {k: text for k, text in texts.items() if isinstance(text, str)}
    if found.about.get("chat") is True:
        about["chat"] = True
    if tokens := found.settings.get("alora_invocation_tokens"):
        about["invocation"] = tokens
    return adapter, params, about, ()


def _classifier(
    folder: str,
    found: peft.Description,
    source: Folder,
    config: models.BertConfig | models.DecoderConfig,
    given: ImportSettings,
) -> _Found:
    head = head_of(found, source, config, given.pooling)
    if isinstance(config, models.DecoderConfig):
        config = config.without_logits()
    base = {config.root: source.load(config)}
    if head is None and isinstance(config, models.BertConfig):
        names = models.hf_names(config, root="bert/")
        encoder = models.Bert(config)

        def encode(params: Any, ids: Any) -> Any:
            return encoder.apply({"params": params["bert"]}, ids)

        adapter = peft.load(folder, names, encode, base, _EXAMPLE)
        return adapter, base, {}, ("no classification head: train.py --from adds one",)
    if head is None:
        raise LoraError("it has no head (score.weight), and neither has the base")
    classifier = models.classifier(config, head.head)

    def apply(params: Any, ids: Any) -> Any:
        return classifier.apply({"params": params}, ids)

    params = {**base, "classifier": _stored_or_open(source, config, head.head)}
    names = models.hf_names(config, head.head)
    loaded = peft.load(folder, names, apply, params, _EXAMPLE)
    adapter = _with_whole_head(loaded, params, head)
    about, note = _task(found, source, config, head.head, given)
    pooling = f"pooling {head.head.pooling}, {head.why}"
    return adapter, base, about, (note, pooling)


_EXAMPLE = jax.ShapeDtypeStruct((1, 2), jnp.int32)  # token ids to trace a model with


def _stored_or_open(source: Folder, config: Any, head: models.Head) -> Any:
    """Return the head's parameters from the base's folder; NaN if it has none of that shape."""
    stored = stored_head(source.stored(), head.pooling)
    shapes = paths.flatten({"classifier": models.shapes(config, head)["classifier"]})
    found = {}
    for path, x in shapes.items():
        value = stored.get(path)
        fits = value is not None and value.shape == x.shape
        found[path] = jnp.asarray(value) if fits else jnp.full(x.shape, jnp.nan, jnp.float32)
    tree = {"classifier": models.shapes(config, head)["classifier"]}
    return paths.replace(tree, found)["classifier"]


def _with_whole_head(adapter: Adapter, params: Any, head: FoundHead) -> Adapter:
    """Return the adapter with its whole head among the trainable parameters, as predict needs it.

    That includes a dense layer of the base's own, and one that has an update, merged.
    """
    trained = paths.flatten(paths.replace(params, dict(adapter.trainable)))
    whole = {path: x for path, x in trained.items() if path.startswith(_HEAD)}
    inside = tuple(t for t in adapter.layout.targets if t.path in whole)
    own = {t.path: adapter.parameters[t.path] for t in inside}
    whole = merge(Layout(inside), whole, own)
    if lost := [path for path, x in whole.items() if np.isnan(x).any()]:
        raise LoraError(
            f"its head has the pooling {head.head.pooling!r} ({head.why}), and neither the folder "
            f"nor the base has its\n{listed(lost)}\nsay another --pooling, or give the base that "
            "has them"
        )
    layout = dataclasses.replace(
        adapter.layout, targets=tuple(t for t in adapter.layout.targets if t.path not in whole)
    )
    rest = {t.path: adapter.parameters[t.path] for t in layout.targets}
    return Adapter(layout, rest, {**adapter.trainable, **whole})


def _task(
    found: peft.Description,
    source: Folder,
    config: TextModelConfig,
    head: models.Head,
    given: ImportSettings,
) -> tuple[dict[str, Any], str]:
    """Return the facts that predict needs about a classifier, and a line that describes them."""
    labels = _labels(found, source, head.num_classes, given.labels)
    fields = given.text_fields or _texts(found.about.get("text_fields")) or ("text",)
    if len(fields) > 2:
        raise LoraError(f"--text-fields takes one field, or two of a pair; got {list(fields)}")
    about = {
        "model": {"pooling": head.pooling},
        "labels": list(labels),
        "text_fields": list(fields),
        "lengths": list(_lengths(found, config, given.lengths)),
    }
    return about, f"classes: {', '.join(labels)}" if labels else "one output: a real number"


def _labels(
    found: peft.Description, source: Folder, outputs: int, given: Sequence[str]
) -> tuple[str, ...]:
    if given and len(given) != (0 if outputs == 1 else outputs):
        wanted = "no labels: it gives a number" if outputs == 1 else f"{outputs} labels"
        raise LoraError(f"--labels has {len(given)} names, and the head takes {wanted}")
    if len(set(given)) != len(given):
        raise LoraError(f"--labels names a class twice: {list(given)}")
    if given or outputs == 1:
        return tuple(given)
    ids = source.json.get("id2label")
    ids = ids if isinstance(ids, dict) else {}
    of_base = [ids.get(str(i)) for i in range(outputs)] if len(ids) == outputs else None
    for names in (_texts(found.about.get("labels")), _texts(of_base)):
        if len(set(names)) == outputs:
            return names
    return tuple(f"LABEL_{i}" for i in range(outputs))


def _lengths(
    found: peft.Description, config: TextModelConfig, given: Sequence[int]
) -> tuple[int, ...]:
    most, theirs = config.max_positions, found.about.get("lengths")
    lengths = tuple(sorted(given))
    if not lengths and isinstance(theirs, list) and theirs and all(type(n) is int for n in theirs):
        lengths = tuple(theirs)
    if not lengths:
        lengths = tuple(n for n in _LENGTHS if n < most) or (most,)
        lengths += (most,) if lengths[-1] < most < _LENGTHS[-1] else ()
    if lengths[0] < 1 or lengths[-1] > most or sorted(lengths) != list(lengths):
        raise LoraError(f"--lengths must be ascending and within 1 to {most}, got {list(lengths)}")
    return lengths


def _reference(found: peft.Description, given: str | None) -> str:
    """Return the user's base, or the base that the folder names if it needs no download."""
    if given is not None:
        return given
    own = found.about.get("model")
    named = [own.get("reference") if isinstance(own, dict) else None]
    named.append(found.settings.get("base_model_name_or_path"))
    for name in named:
        if not isinstance(name, str) or not name.isprintable() or not is_safe(name):
            continue
        if name in KNOWN or pathlib.Path(name).expanduser().exists():
            return name
    name, revision = _text(named[-1]), _text(found.settings.get("revision"))
    if not name:
        raise LoraError("the folder does not name its base: say it by --base REFERENCE")
    hub = name if ":" in name else f"hub:{name}@{revision}" if revision else f"hub:{name}"
    raise LoraError(
        f"the folder names the base {name!r}, which is not a folder here. An adapter may come from "
        "anyone, so a base is fetched only if you name it:\n"
        f"  --base {shlex.quote(hub)}\n"
        "  --base path/to/model    a folder of yours"
    )


def _text(value: Any) -> str:
    """Return a printable text from the folder, cut to 300 characters; "" for anything else."""
    return value[:300] if isinstance(value, str) and value.isprintable() else ""


def _texts(values: Any) -> tuple[str, ...]:
    """Return a list of texts as a tuple; () for anything else."""
    fits = isinstance(values, list) and all(isinstance(x, str) for x in values)
    return tuple(values) if fits else ()
