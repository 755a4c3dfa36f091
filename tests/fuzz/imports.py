"""PEFT folders on a base, read as `lora-jax import` reads them."""

from __future__ import annotations

import functools
import json
import pathlib
from random import Random
from typing import Any

import jax
import numpy as np

from lora_jax import models
from lora_jax.exchange import peft, peft_run
from lora_jax.exchange.peft_head import head_of
from tests.fuzz import mutate, tensors
from tests.fuzz.kind import GOLDEN, Files, stored

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
def base() -> Any:
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
    found = head_of(peft.describe(folder), base(), base().config, None)
    assert found is None or found.head.num_classes > 0
