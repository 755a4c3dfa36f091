"""Find out which classification head a PEFT folder was trained with."""

from __future__ import annotations

import re
from typing import NamedTuple

from lora_jax import models
from lora_jax.errors import LoraError, listed
from lora_jax.exchange import peft, peft_keys
from lora_jax.models.weights.folder import Folder
from lora_jax.models.weights.stored_head import stored_head

DENSE = "roberta_head"  # the pooling of a head of two products, which all of Hugging Face's are
_MODULE = re.compile(r"(?P<module>.+?)(\.base_layer)?\.(weight|bias|lora_B\.weight)")
# Classes of transformers whose head is not one for whole texts.
_OTHERS = ("TokenClassification", "QuestionAnswering", "MultipleChoice", "MaskedLM")


class FoundHead(NamedTuple):
    """The head, and how its pooling was found, in words."""

    head: models.Head
    why: str


def head_of(
    found: peft.Description, source: Folder, config: models.BertConfig, pooling: str | None
) -> FoundHead | None:
    """Return the head of a PEFT folder; None for an encoder without one.

    The number of outputs is that of the tensors in the folder, or else of those in the base's.

    Args:
      found: what the folder says.
      source, config: of the base.
      pooling: as the user says it. None: as the tensors tell.

    Raises:
      LoraError: a head for something else than whole texts, or one of which the tensors do not
        tell what it reads.
    """
    _check_task(found)
    rows, stored = _rows(found), stored_head(source.stored(), DENSE)
    names = {kind: models.hf_names(config, models.Head(kind, 1)) for kind in ("mean", DENSE)}
    out, deep_out = (_module(names[kind]["classifier/out/kernel"]) for kind in names)
    dense = _module(names[DENSE]["classifier/dense/kernel"])
    held = {_module(names[DENSE][p]): x.shape[-1] for p, x in stored.items() if "kernel" in p}
    outputs = rows.get(deep_out) or rows.get(out)
    if outputs is None and found.settings.get("task_type") != "FEATURE_EXTRACTION":
        outputs = held.get(deep_out)
    if outputs is None:
        return None
    said = found.about.get("model")
    said = said.get("pooling") if isinstance(said, dict) else None
    if pooling is not None:
        chosen = pooling, "as you say"
    elif said is not None:
        chosen = said, "as the folder says"
    elif dense in rows or (deep_out != out and deep_out in rows):
        chosen = DENSE, f"by the folder's {dense if dense in rows else deep_out}"
    elif dense in held and not found.ours:
        chosen = DENSE, f"by the base's {dense}, which transformers' classifiers read"
    else:
        raise LoraError(
            f"the folder does not tell what its head {out!r} reads: it has no {dense!r}"
            f"{', nor has the base' * (dense not in held)}. Say it by --pooling:\n"
            f"{listed(f'{name}: {what}' for name, what in models.bert.POOLINGS.items())}"
        )
    _check_pooling(chosen[0], source)
    return FoundHead(models.Head(chosen[0], outputs), chosen[1])


def _check_task(found: peft.Description) -> None:
    """Raise for a head of another task, whose tensors could have the same names."""
    task, mapping = found.settings.get("task_type"), found.settings.get("auto_mapping")
    name = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
    known = (None, "SEQ_CLS", "FEATURE_EXTRACTION")
    if task not in known or any(other in name for other in _OTHERS):
        raise LoraError(
            f"the folder is for task_type {str(task)[:80]!r} ({name[:80] or 'no class named'}); "
            "encoders are taken with a head for whole texts (SEQ_CLS) or with none"
        )


def _check_pooling(pooling: object, source: Folder) -> None:
    if pooling not in models.bert.POOLINGS:
        raise LoraError(
            f"the folder says that its pooling is {str(pooling)[:80]!r}; known are "
            f"{', '.join(models.bert.POOLINGS)}"
        )
    own = source.json.get("classifier_pooling")
    if pooling == DENSE and own == "mean":
        raise LoraError(
            f"{source.path} has classifier_pooling 'mean': its head is a dense layer over the "
            "mean of the tokens, which is not supported; 'cls' is"
        )


def _rows(found: peft.Description) -> dict[str, int]:
    """How many output rows each module has that the folder has a weight, a bias or a factor of."""
    rows: dict[str, int] = {}
    for key, shape in found.shapes.items():
        name = peft_keys.WRAPPED.sub(".", key.removeprefix(peft_keys.PREFIX))
        match = _MODULE.fullmatch(name)
        if match is not None and shape:
            rows.setdefault(match["module"], shape[0])
    return rows


def _module(name: object) -> str:
    """The module of a weight, which is named in the table by itself or by its tensor."""
    text = name if isinstance(name, str) else getattr(name, "name", "")
    return str(text).removesuffix(".weight")
