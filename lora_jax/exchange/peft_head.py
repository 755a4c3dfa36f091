"""Find out which classification head a PEFT folder was trained with."""

from __future__ import annotations

import re
from typing import NamedTuple

from lora_jax import models
from lora_jax.errors import LoraError, listed
from lora_jax.exchange import peft, peft_keys
from lora_jax.models.weights.folder import Folder
from lora_jax.models.weights.stored import LAST, stored_head

DENSE = "roberta_head"  # the pooling of a head with two products, as in all of Hugging Face's
_MODULE = re.compile(r"(?P<module>.+?)(\.base_layer)?\.(weight|bias|lora_B\.weight)")
# Classes of transformers whose head does not classify whole texts.
_OTHERS = ("TokenClassification", "QuestionAnswering", "MultipleChoice", "MaskedLM")


class FoundHead(NamedTuple):
    """The head, and a text that says how its pooling was found."""

    head: models.Head
    why: str


def head_of(
    found: peft.Description,
    source: Folder,
    config: models.BertConfig | models.DecoderConfig,
    pooling: str | None,
) -> FoundHead | None:
    """Return the head of a PEFT folder, or None for a model without one.

    The number of outputs comes from the tensors in the folder, or else from the base's head. The
    pooling of an encoder is the user's choice; None infers it from the tensors.
    """
    _check_task(found)
    if isinstance(config, models.DecoderConfig):
        if pooling is not None:
            raise LoraError(f"--pooling {pooling}: the head of a decoder reads its last token")
        stored = stored_head(source.stored(), LAST)
        rows = _rows(found).get("score") or next((x.shape[-1] for x in stored.values()), None)
        return rows and FoundHead(models.Head(LAST, rows), "as every decoder's")
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
    """The modules of a head, and the number of output rows of each stored module.

    plain: the last module of a head with one product.
    deep, dense: the last and the first module of a head with two.
    folder: the rows of all modules of the PEFT folder.
    base: the rows of the modules of the base's own head.
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
    """Return the input of the head, and a text that says how it was found."""
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
    """Raise `LoraError` for a head of another task, whose tensors could have the same names."""
    task, mapping = found.settings.get("task_type"), found.settings.get("auto_mapping")
    name = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
    known = (None, "SEQ_CLS", "FEATURE_EXTRACTION")
    if task not in known or any(other in name for other in _OTHERS):
        raise LoraError(
            f"the folder is for task_type {str(task)[:80]!r} ({name[:80] or 'no class named'}); "
            "encoders are taken with a head for whole texts (SEQ_CLS) or with none"
        )


def _rows(found: peft.Description) -> dict[str, int]:
    """Return the output rows of each module with a weight, bias or factor in the folder."""
    rows: dict[str, int] = {}
    for key, shape in found.shapes.items():
        name = peft_keys.WRAPPED.sub(".", key.removeprefix(peft_keys.PREFIX))
        match = _MODULE.fullmatch(name)
        if match is not None and shape:
            rows.setdefault(match["module"], shape[0])
    return rows


def _module(name: object) -> str:
    """Return the module of a weight; the table gives it as a name or as an `HfModule`."""
    text = name if isinstance(name, str) else getattr(name, "name", "")
    return str(text).removesuffix(".weight")
