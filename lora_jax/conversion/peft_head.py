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
    there = _modules(found, source, config)
    outputs = there.folder.get(there.deep) or there.folder.get(there.plain)
    if outputs is None and found.settings.get("task_type") != "FEATURE_EXTRACTION":
        outputs = there.base.get(there.deep)
    if outputs is None:
        return None
    kind, why = (pooling, "as you say") if pooling is not None else _pooling(found, there)
    if kind not in models.bert.POOLINGS:
        known = ", ".join(models.bert.POOLINGS)
        raise LoraError(f"the folder says that its pooling is {kind[:80]!r}; known are {known}")
    if kind == DENSE and source.json.get("classifier_pooling") == "mean":
        raise LoraError(
            f"{source.path} has classifier_pooling 'mean': its head is a dense layer over the "
            "mean of the tokens, which is not supported; 'cls' is"
        )
    return FoundHead(models.Head(kind, outputs), why)


class _HeadModules(NamedTuple):
    """The modules of a head, and how many output rows each module has that is stored.

    plain: the last one of a head of one product. deep, dense: the last and the first of two.
    folder: rows of all modules of the PEFT folder. base: of those of the base's own head.
    """

    plain: str
    deep: str
    dense: str
    folder: dict[str, int]
    base: dict[str, int]


def _modules(found: peft.Description, source: Folder, config: models.BertConfig) -> _HeadModules:
    plain, deep = (models.hf_names(config, models.Head(kind, 1)) for kind in ("mean", DENSE))
    stored = stored_head(source.stored(), DENSE)
    base = {_module(deep[path]): x.shape[-1] for path, x in stored.items() if "kernel" in path}
    out, first = "classifier/out/kernel", "classifier/dense/kernel"
    return _HeadModules(
        _module(plain[out]), _module(deep[out]), _module(deep[first]), _rows(found), base
    )


def _pooling(found: peft.Description, there: _HeadModules) -> tuple[str, str]:
    """What the head reads, and how that is known."""
    said = found.about.get("model")
    said = said.get("pooling") if isinstance(said, dict) else None
    if said is not None:
        return str(said), "as the folder says"
    if there.dense in there.folder:
        return DENSE, f"by the folder's {there.dense}"
    if there.deep != there.plain and there.deep in there.folder:
        return DENSE, f"by the folder's {there.deep}"
    if there.dense in there.base and not found.ours:
        return DENSE, f"by the base's {there.dense}, which transformers' classifiers read"
    nor = "" if there.dense in there.base else ", nor has the base"
    raise LoraError(
        f"the folder does not tell what its head {there.plain!r} reads: it has no "
        f"{there.dense!r}{nor}. Say it by --pooling:\n"
        f"{listed(f'{name}: {what}' for name, what in models.bert.POOLINGS.items())}"
    )


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
