"""Adapters from strangers: layouts, Orbax checkpoints, and folders of PEFT and MLX."""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Callable
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax import models
from lora_jax.checkpoint import adapter as checkpoints
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.exchange import mlx, peft, peft_run
from lora_jax.exchange.peft_head import head_of
from lora_jax.layout import Layout
from lora_jax.models.hf_module import HfModule
from lora_jax.serving import served_adapters, text_classifier
from tests.fuzz import databases, mutate, tensors
from tests.fuzz.kind import FORMATS, GOLDEN, Files, stored

MANIFEST = "meta/_strings.json"
PARAMS = {
    "embed": jnp.ones((7, 6)),
    "q": jnp.ones((6, 5)),
    "v": jnp.ones((5, 4)),
    "bias": jnp.zeros(4),
}
NAMES: Any = {
    "embed": HfModule("embed", layer="embedding"),
    "q": HfModule("layers.0.q", transposed=True),
    "v": HfModule("layers.0.v", transposed=True),
    "bias": "layers.0.v.bias",
}
IDS = jnp.zeros((1, 2), jnp.int32)


def model(p: Any, ids: Any) -> Any:
    """A model of an embedding, two products and a bias."""
    return jnp.tanh(p["embed"][ids] @ p["q"]) @ p["v"] + p["bias"][None, None]


def _adapter(targets: str, **rule: Any) -> lora_jax.Adapter:
    spec = lora_jax.LoraSpec(2, 3.0, (lora_jax.Rule(targets, **rule),))
    layout = lora_jax.resolve(spec, model, PARAMS, IDS)
    adapters = lora_jax.init(jax.random.key(0), layout, params=PARAMS)
    return lora_jax.Adapter(layout, jax.tree.map(jnp.ones_like, adapters))


# ---- layouts ---------------------------------------------------------------------------------


@functools.cache
def layouts() -> tuple[bytes, ...]:
    """Return layouts of every form."""
    kinds = checkpoints.restore_layout(FORMATS / "v1" / "kinds").to_json().encode()
    part = lora_jax.Target("qkv", (8, 6), (), (0,), (1,), 2, 2.0, parts=((0, 2), (4, 2)))
    return (
        (FORMATS / "v1" / "layout.json").read_bytes(),
        kinds,
        Layout((part,)).to_json().encode(),
    )


def make_layout(random: Random) -> Files:
    return {"layout.json": mutate.json_text(random, random.choice(layouts()))}


def read_layout(random: Random, folder: pathlib.Path) -> None:
    """Read a layout and check it."""
    text = (folder / "layout.json").read_bytes().decode("utf-8", "surrogateescape")
    check_layout(Layout.from_json(text))


def check_layout(layout: Layout) -> None:
    assert Layout.from_json(layout.to_json()) == layout
    assert isinstance(hash(layout), int) and layout.size >= 0
    str(layout).encode()


# ---- checkpoints -----------------------------------------------------------------------------


@functools.cache
def checkpoints_files() -> tuple[Files, ...]:
    """Return adapters with a trained bias, of every kind, and of a text classifier, as files."""
    model = {"reference": str(GOLDEN / "golden_models" / "bert"), "pooling": "mean"}
    model |= {"dtype": "float32", "param_dtype": "float32", "scan_layers": False}
    about = {"labels": ["no", "yes"], "text_fields": ["text"], "lengths": [8, 16], "model": model}
    about |= {"prompt": "{text}", "eos": "</s>"}
    layout, adapters, _ = _adapter("{q,v}")
    head = {"classifier/out/kernel": jnp.ones((4, 2)), "classifier/out/bias": jnp.zeros(2)}
    three, frozen = (layout, adapters, head), lora_jax.fingerprint(PARAMS)
    made = _saved(lambda path: lora_jax.save(path, three, fingerprint=frozen, about=about))
    return (dict(stored(FORMATS / "v1" / "adapter")), dict(stored(FORMATS / "v1" / "kinds")), made)


def sealed(text: str) -> bytes:
    """Return the file of a manifest, sealed correctly."""
    data = text.encode("utf-8", "surrogatepass")
    return json.dumps({"text": text, "sha256": hashlib.sha256(data).hexdigest()}).encode()


def make_manifest(random: Random) -> Files:
    """Draw an adapter whose manifest was changed, and mostly sealed again."""
    files = dict(random.choice(checkpoints_files()))
    if random.random() < 0.15:
        return files | {MANIFEST: mutate.json_text(random, files[MANIFEST])}
    data = json.loads(json.loads(files[MANIFEST])["text"])
    part = random.choice(("all", "layout", "notes", "about", "arrays"))
    if part == "layout":
        made = mutate.json_text(random, data["notes"]["layout"])
        data["notes"]["layout"] = made.decode("utf-8", "surrogateescape")
        return files | {MANIFEST: sealed(json.dumps(data))}
    holder = {"all": [data], "about": data["notes"]}.get(part, data)
    key: Any = 0 if part == "all" else part
    made = mutate.json_text(random, json.dumps(holder.get(key) if key else data))
    holder[key] = "@"
    text = json.dumps("@" if part == "all" else data)
    text = text.replace('"@"', made.decode("utf-8", "surrogateescape"))
    return files | {MANIFEST: sealed(text)}


def read_checkpoint(random: Random, folder: pathlib.Path) -> None:
    """Read an adapter as the library and the commands do."""
    match random.randrange(6):
        case 0:
            check_layout(checkpoints.restore_layout(folder))
        case 1:
            saved = SavedAdapter.open(folder, name="a")
            text_classifier.TextClassifier.task_of(saved)
            served_adapters.open_base([saved])
        case 2:
            for shape in SavedAdapter.open(folder).trainable_shapes.values():
                assert all(n >= 0 for n in shape)
        case 3:
            SavedAdapter.open(folder).check_base(lora_jax.fingerprint(PARAMS))
        case _:
            check_adapter(lora_jax.restore(folder))


def check_adapter(adapter: lora_jax.Adapter) -> None:
    """Assert that the adapter has the arrays of its layout."""
    layout, parameters, _ = adapter
    check_layout(layout)
    assert [t.path for t in layout.targets] == list(parameters)
    lora_jax.adapters.check(layout, parameters)


def make_orbax(random: Random) -> Files:
    """Draw an adapter in which one of Orbax's own files was changed or deleted."""
    files = dict(random.choice(checkpoints_files()))
    name = random.choice(sorted(set(files) - {MANIFEST, "orbax.checkpoint"}))
    data, change = files[name], random.randrange(14)
    if change >= 8:
        changes = (databases.with_value, databases.with_node, databases.with_special_file)
        return changes[(change - 8) // 2](random, files)
    if change == 0:
        del files[name]
    elif change == 1:
        files[random.choice((f"{name}x", "arrays/x", "other/_METADATA", "meta/x"))] = data
    else:
        changed = mutate.json_text if data[:1] == b"{" else mutate.bytes_of
        files[name] = changed(random, data)
    return files


def read_orbax(random: Random, folder: pathlib.Path) -> None:
    check_adapter(lora_jax.restore(folder))


# ---- PEFT and MLX ----------------------------------------------------------------------------


def _saved(save: Callable[[pathlib.Path], object]) -> Files:
    """Return the files that `save` writes into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        save(pathlib.Path(folder, "adapter"))
        return dict(stored(pathlib.Path(folder, "adapter")))


@functools.cache
def peft_folders() -> tuple[Files, ...]:
    layout, parameters, _ = _adapter("{q,v}")
    about = {"labels": ["a", "b"], "model": {"pooling": "mean"}}
    write = functools.partial(peft.save, base="org/name", params=PARAMS, about=about)
    adapters = (
        lora_jax.Adapter(layout, parameters, {"bias": jnp.ones(4)}),
        _adapter("{q,v}", kind="dora"),
        _adapter("{embed,v}", scaling="alpha/sqrt(r)"),
    )
    return tuple(_saved(lambda path: write(path, NAMES, each)) for each in adapters)  # noqa: B023


@functools.cache
def mlx_folders() -> tuple[Files, ...]:
    """Return folders of mlx-lm's LoRA and DoRA."""
    adapters = [_adapter("{q,v}", kind=kind) for kind in ("lora", "dora")]
    return tuple(_saved(lambda path: mlx.save(path, NAMES, each)) for each in adapters)  # noqa: B023


def _folder(random: Random, folders: tuple[Files, ...], weights: str) -> Files:
    files = dict(random.choice(folders))
    changed = random.choice((None, None, tensors.renamed, tensors.changed))
    if changed is not None:
        return files | {weights: changed(random, files[weights])}
    if random.random() < 0.3:
        return files | {peft.CONFIG: mutate.json_text(random, files[peft.CONFIG])}
    config = mutate.read(files[peft.CONFIG])
    values = [pair for pair in config if pair[1] not in (None, False)]
    for _ in range(random.randint(1, 2)):  # mostly a setting that has an effect
        pair = random.choice(values if random.random() < 0.7 else config)
        pair[1] = random.choice((mutate.near(random, pair[1]), mutate.some_value(random)))
    return files | {peft.CONFIG: mutate.dump(config).encode("utf-8", "surrogatepass")}


def make_peft(random: Random) -> Files:
    return _folder(random, peft_folders(), peft.TENSORS)


def read_peft(random: Random, folder: pathlib.Path) -> None:
    """Describe a folder, check it for a server, and load it."""
    found = peft.describe(folder)
    assert isinstance(found.about, dict)
    if random.random() < 0.2:
        peft.check(folder, random.choice(("vllm", "sglang", "llama.cpp", "lorax", "ollama")))
    verify = random.random() < 0.2
    check_exchanged(peft.load(folder, NAMES, model, PARAMS, IDS, verify=verify))


def make_mlx(random: Random) -> Files:
    return _folder(random, mlx_folders(), mlx.TENSORS)


def read_mlx(random: Random, folder: pathlib.Path) -> None:
    """Load a folder of mlx-lm."""
    check_exchanged(mlx.load(folder, NAMES, model, PARAMS, IDS))


def check_exchanged(adapter: lora_jax.Adapter) -> None:
    """Assert that an adapter fits the model, and that its numbers are finite."""
    check_adapter(adapter)
    adapter.layout.check_params(PARAMS)
    for x in jax.tree.leaves((adapter.parameters, dict(adapter.trainable))):
        assert np.isfinite(x).all()
    for path, x in adapter.trainable.items():
        assert x.shape == PARAMS[path].shape


# ---- PEFT folders on a base, as `lora-jax import` reads them -----------------------------------

BASE = GOLDEN / "golden_models" / "bert"
ABOUT = {
    "labels": ["a", "b", "c"],
    "text_fields": ["text"],
    "lengths": [8],
    "model": {"pooling": "roberta_head", "reference": str(BASE)},
}


def make_import(random: Random) -> Files:
    """Draw a PEFT folder for BERT, which may have the metadata that our own export writes."""
    files = {n: x for n, x in stored(GOLDEN / "golden_peft" / "bert").items() if "npz" not in n}
    header, body = tensors.split(files[peft.TENSORS])
    tree = mutate.read(header)
    about = mutate.tree_of(random, mutate.read(json.dumps(ABOUT)), 2)
    if random.random() < 0.5:
        said = mutate.Pairs([[peft.ABOUT, mutate.dump(about)]])
        tree = mutate.Pairs([p for p in tree if p[0] != "__metadata__"] + [["__metadata__", said]])
    files[peft.TENSORS] = tensors.joined(mutate.dump(tree).encode("utf-8", "surrogatepass"), body)
    match random.randrange(3):
        case 0:
            files[peft.TENSORS] = tensors.renamed(random, files[peft.TENSORS])
        case 1:
            files[peft.CONFIG] = mutate.json_text(random, files[peft.CONFIG], 1)
    return files


@functools.cache
def bert() -> Any:
    return models.open(str(BASE))


def read_import(random: Random, folder: pathlib.Path) -> None:
    """Find the folder's head; in one case of ten, import the folder."""
    if random.random() < 0.1:
        said = peft_run.ImportSettings(random.choice((None, str(BASE))), {"dtype": "float32"})
        run = peft_run.read(str(folder), said)
        for x in jax.tree.leaves((run.adapter.parameters, dict(run.adapter.trainable))):
            assert np.isfinite(x).all()
        json.dumps(run.about)
        return
    found = head_of(peft.describe(folder), bert(), bert().config, None)
    assert found is None or found.head.num_classes > 0
