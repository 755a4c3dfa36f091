"""PEFT's methods other than LoRA, as kinds of update.

    LOHA   .hada_w1_a, .hada_w2_a [out, rank]; .hada_w1_b, .hada_w2_b [rank, in]
    LOKR   .lokr_w1 [l, m], or .lokr_w1_a @ .lokr_w1_b; .lokr_w2 [k, n], or the same of w2
    IA3    .ia3_l [out, 1], or [1, in] of a feed-forward module
    MISS   .miss_block [rank, out]
    OFT    .oft_R.weight [in / size, size (size - 1) / 2]
    VERA   .vera_lambda_b [out], .vera_lambda_d [rank]; of all modules base_model.vera_A, vera_B

A kind whose own formula cannot have the arrays is read as the plain factors that they are equal to:
VeRA, since PEFT draws its frozen pair in another way, and LoKr of another split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lora_jax.errors import LoraError
from lora_jax.exchange.module_update import KindArrays, ModuleUpdate
from lora_jax.exchange.peft_config import ModuleSettings, PeftConfig

Tensors = Mapping[str, np.ndarray]  # by the last part of the key
Spelled = tuple[dict[str, Any], dict[str, np.ndarray]]
Read = Callable[[Tensors, PeftConfig, int, float], KindArrays]
SHARED = {"VERA": {"base_model.vera_A", "base_model.vera_B"}}  # tensors of no module
SERIES = {"oft": True, "oft_cayley": False}  # kind -> use_cayley_neumann
LARGEST = 2**24  # elements of a factor of LoKr that is stored as two
_NAMES = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w1_a", "lokr_w1_b",
    "lokr_w2", "lokr_w2_a", "lokr_w2_b", "vera_lambda_b", "vera_lambda_d", "ia3_l", "miss_block",
    "oft_R.weight",
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
        found = read(tensors, config, own[0], own[1])
    except LoraError:
        raise
    except KeyError as error:
        raise LoraError(f"{key} is there, and {error.args[0]} is not") from error
    except ValueError as error:  # shapes that do not go together
        raise LoraError(f"{key}: the arrays of its module do not fit: {error}") from error
    gains = found.arrays.get("gain") if found.outputs else None
    return ModuleUpdate(None, None, own=found, bias_gain=gains)


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


def _ia3(t: Tensors, config: PeftConfig, rank: int, alpha: float) -> KindArrays:
    gain = t["ia3_l"]
    if gain.ndim != 2 or 1 not in gain.shape:
        raise ValueError(f"ia3_l is {gain.shape}; expected [out, 1] or [1, in], of a linear layer")
    kind, outputs = ("ia3", len(gain)) if gain.shape[1] == 1 else ("ia3_inputs", 0)
    return KindArrays(kind, 1, 1.0, outputs, {"gain": gain.ravel()})


def _miss(t: Tensors, config: PeftConfig, rank: int, alpha: float) -> KindArrays:
    block = t["miss_block"]
    _check_ranks(rank, [block])
    return KindArrays("miss", rank, float(rank), block.shape[1], {"block": block.T})


def _oft(t: Tensors, config: PeftConfig, rank: int, alpha: float) -> KindArrays:
    rotation, series = t["oft_R.weight"], config.use_cayley_neumann
    if series and (config.num_cayley_neumann_terms != 5 or config.peft_version is None):
        raise LoraError(
            "OFT is read with num_cayley_neumann_terms=5, as PEFT 0.18 and later have it, or with "
            "use_cayley_neumann=False; merge it in PEFT, and load the model"
        )
    size = round((1 + math.sqrt(1 + 8 * rotation.shape[-1])) / 2)
    if rotation.ndim != 2 or size * (size - 1) // 2 != rotation.shape[1]:
        raise ValueError(f"oft_R.weight is {rotation.shape}; expected [blocks, n (n - 1) / 2]")
    kind = next(kind for kind, own in SERIES.items() if own == series)
    return KindArrays(kind, size, float(size), 0, {"rotation": rotation.T})


def spell(updates: Mapping[str, ModuleUpdate]) -> Spelled:
    """Return the settings of modules adapted by a method other than LoRA, and {key: tensor}.

    A key is without PEFT's prefix.
    """
    kinds = sorted({u.own.kind if u.own else "lora" for u in updates.values()})
    writers = {WRITERS.get(kind) for kind in kinds}
    writer = writers.pop()
    if writer is None or writers:
        raise LoraError(
            f"the adapter has the kinds {', '.join(kinds)}, and a PEFT folder has one method; of "
            f"the kinds that only multiply W it can be one of {', '.join(WRITERS)}. Save it as "
            "several adapters, or merge it and ship the model"
        )
    settings, tensors = writer({name: u.own for name, u in updates.items() if u.own})
    settings |= {"inference_mode": True, "modules_to_save": None, "target_modules": [*updates]}
    return settings, tensors


def _spell_ia3(modules: Mapping[str, KindArrays]) -> Spelled:
    gains = {name: (own.outputs, own.arrays["gain"]) for name, own in modules.items()}
    tensors = {
        f"{n}.ia3_l": x.reshape((-1, 1) if out else (1, -1)) for n, (out, x) in gains.items()
    }
    inputs = [name for name, (outputs, _) in gains.items() if not outputs]
    return {"peft_type": "IA3", "feedforward_modules": inputs, "fan_in_fan_out": False}, tensors


def _spell_oft(modules: Mapping[str, KindArrays]) -> Spelled:
    size, kinds = max(own.rank for own in modules.values()), {o.kind for o in modules.values()}
    tensors = {f"{n}.oft_R.weight": own.arrays["rotation"].T for n, own in modules.items()}
    for name, own in modules.items():
        inputs = own.rank * len(tensors[f"{name}.oft_R.weight"])
        every = [n for n in range(1, inputs + 1) if inputs % n == 0]
        taken = min(every, key=lambda n: (abs(n - size), n))  # by PEFT
        if taken != own.rank or len(kinds) > 1:
            raise LoraError(
                f"{name!r} has blocks of {own.rank}, and PEFT's one oft_block_size, {size}, would "
                f"give it {taken}; or the kinds differ: {', '.join(sorted(kinds))}. Give all "
                "targets one rank and kind, or merge the adapter"
            )
    settings = {"r": 0, "oft_block_size": size, "use_cayley_neumann": SERIES[kinds.pop()]}
    fixed = {"num_cayley_neumann_terms": 5, "coft": False, "block_share": False, "bias": "none"}
    return {"peft_type": "OFT", **settings, **fixed, "peft_version": "0.18.0"}, tensors


def _check_ranks(rank: int, arrays: list[Any]) -> None:
    """Raise `ValueError` unless these are matrices whose first axis is the rank."""
    shapes = [x.shape for x in arrays]
    if any(len(shape) != 2 or shape[0] != rank or not shape[1] for shape in shapes):
        raise ValueError(f"their shapes, [rank, n], are {shapes}, and r is {rank}")


READERS: dict[str, Read] = {
    "IA3": _ia3, "LOHA": _loha, "LOKR": _lokr, "MISS": _miss, "OFT": _oft, "VERA": _vera,
}  # fmt: skip
WRITERS = {"ia3": _spell_ia3, "ia3_inputs": _spell_ia3, "oft": _spell_oft, "oft_cayley": _spell_oft}
