"""PEFT's methods other than LoRA, as kinds of update.

    LOHA   .hada_w1_a, .hada_w2_a [out, rank]; .hada_w1_b, .hada_w2_b [rank, in]
    LOKR   .lokr_w1 [l, m], or .lokr_w1_a @ .lokr_w1_b; .lokr_w2 [k, n], or the same of w2
    VERA   .vera_lambda_b [out], .vera_lambda_d [rank]; of all modules base_model.vera_A, vera_B

A kind whose own formula cannot have the arrays is read as the plain factors that they are equal to:
VeRA, since PEFT draws its frozen pair in another way, and LoKr of another split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lora_jax.errors import LoraError
from lora_jax.exchange.module_update import KindArrays, ModuleUpdate
from lora_jax.exchange.peft_config import ModuleSettings, PeftConfig

Tensors = Mapping[str, np.ndarray]  # by the last part of the key
Read = Callable[[Tensors, PeftConfig, int, float], KindArrays]
SHARED = {"VERA": {"base_model.vera_A", "base_model.vera_B"}}  # tensors of no module
LARGEST = 2**24  # elements of a factor of LoKr that is stored as two
_NAMES = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w1_a", "lokr_w1_b",
    "lokr_w2", "lokr_w2_a", "lokr_w2_b", "vera_lambda_b", "vera_lambda_d",
)  # fmt: skip
SLOTS = {f".{name}": name for name in _NAMES}


def update_of(
    read: Read,
    slots: Mapping[str, tuple[str, np.ndarray]],
    config: PeftConfig,
    own: ModuleSettings,
    shared: Tensors,
) -> ModuleUpdate:
    """Return the update of one module, given its tensors with their keys, and the shared ones."""
    tensors = {name: x for name, (_, x) in slots.items()}
    tensors |= {key.rpartition(".")[2]: x for key, x in shared.items()}
    key = next(iter(slots.values()))[0]
    try:
        return ModuleUpdate(None, None, own=read(tensors, config, own[0], own[1]))
    except LoraError:
        raise
    except KeyError as error:
        raise LoraError(f"{key} is there, and {error.args[0]} is not") from error
    except ValueError as error:  # shapes that do not go together
        raise LoraError(f"{key}: the arrays of its module do not fit: {error}") from error


def _loha(t: Tensors, config: PeftConfig, rank: int, alpha: float) -> KindArrays:
    arrays = {f"b{i}": t[f"hada_w{i}_a"] for i in (1, 2)}
    arrays |= {f"a{i}": t[f"hada_w{i}_b"] for i in (1, 2)}
    _check_ranks(rank, [*(arrays[f"b{i}"].T for i in (1, 2)), *(arrays[f"a{i}"] for i in (1, 2))])
    return KindArrays("loha", rank, alpha, len(arrays["b1"]), arrays)


def _lokr(t: Tensors, config: PeftConfig, rank: int, alpha: float) -> KindArrays:
    if "lokr_w1" in t:
        left = t["lokr_w1"]
    else:
        _check_ranks(rank, [t["lokr_w1_a"].T, t["lokr_w1_b"]])
        if len(t["lokr_w1_a"]) * t["lokr_w1_b"].shape[1] > LARGEST:
            raise ValueError(f"lokr_w1 would have more than {LARGEST:,} elements")
        left = t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:  # as a product with an identity
        w2 = t["lokr_w2"].reshape(len(t["lokr_w2"]), -1)
        wide = len(w2) <= w2.shape[1]
        b, a = (np.eye(len(w2), dtype=np.float32), w2) if wide else (w2, np.eye(w2.shape[1]))
    else:
        b, a = t["lokr_w2_a"], t["lokr_w2_b"]
        _check_ranks(rank, [b.T, a])
    arrays = {"left": left, "a": a.astype(np.float32), "b": b}
    return KindArrays("lokr", len(a), alpha * len(a) / rank, len(left) * len(b), arrays)


def _vera(t: Tensors, config: PeftConfig, rank: int, alpha: float) -> KindArrays:
    if "vera_A" not in t:
        raise LoraError(
            "vera_A and vera_B are not in the file (save_projection is false), and PyTorch alone "
            "draws the same again; save it in PEFT with save_projection=True"
        )
    each, inner, b = t["vera_lambda_b"], t["vera_lambda_d"], t["vera_B"]
    _check_ranks(rank, [t["vera_A"], b.T, inner[:, None]])
    arrays = {"a": t["vera_A"], "b": b[: len(each)] * each[:, None] * inner}
    return KindArrays("lora", rank, float(rank), len(each), arrays)


def _check_ranks(rank: int, arrays: list[Any]) -> None:
    """Raise `ValueError` unless these are matrices whose first axis is the rank."""
    shapes = [x.shape for x in arrays]
    if any(len(shape) != 2 or shape[0] != rank or not shape[1] for shape in shapes):
        raise ValueError(f"their shapes, [rank, n], are {shapes}, and r is {rank}")


READERS: dict[str, Read] = {"LOHA": _loha, "LOKR": _lokr, "VERA": _vera}
