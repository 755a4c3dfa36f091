"""The names of tensors in PEFT's files, read into updates of modules and written from them.

    base_model.model.<module>.lora_A.weight            [rank, in]; of a convolution a window too
                             .lora_B.weight            [out, rank]; of a convolution [.., 1, ..]
                             .lora_B.bias              [out]                       (lora_bias)
                             .lora_embedding_A, _B     [rank, rows], [width, rank]
                             .lora_magnitude_vector    [out]; of a convolution [1, out, ..]   (DoRA)
                             .token_adapter.trainable_tokens_delta                 [n, width]
                             .base_layer.weight, .bias of the module itself, saved with the update
                             .weight, .bias            the same for a module without an update

The adapter has a name in PEFT's memory, but not in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax.errors import LoraError, listed
from lora_jax.exchange import peft_methods
from lora_jax.exchange.module_update import Modules, ModuleUpdate
from lora_jax.exchange.peft_config import ModuleSettings, PeftConfig

PREFIX = "base_model.model."
SLOTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
}
TOKENS = ".trainable_tokens_delta"
WRAPPER = ".token_adapter"  # around a module with trained rows, except in TRAINABLE_TOKENS
WRAPPED = re.compile(r"\.modules_to_save\.[^.]+\.")  # bias="all" writes biases by this name too
Slots = dict[str, tuple[str, np.ndarray]]  # slot -> (key, array)


def parse(tensors: Mapping[str, np.ndarray], config: PeftConfig) -> Modules:
    """Return the modules that the tensors of a file describe."""
    grouped: dict[str, Slots] = {}
    values: dict[str, np.ndarray] = {}
    base, rows = {}, {}
    known = SLOTS | peft_methods.SLOTS
    shared = peft_methods.SHARED.get(config.peft_type, set()) & {*tensors}
    for key in [key for key in tensors if key not in shared]:
        name = key.removeprefix(PREFIX)
        x = tensors[key]
        x = x if x.dtype == np.float32 else x.astype(np.float32)
        slot = next((s for s in known if name.endswith(s)), None)
        if slot is not None:
            grouped.setdefault(name.removesuffix(slot), {})[known[slot]] = (key, x)
        elif name.endswith(TOKENS):
            module = name.removesuffix(TOKENS).removesuffix(WRAPPER)
            rows[f"{module}.weight"] = (config.token_numbers(module), x)
        elif ".base_layer." in name:
            base[name.replace(".base_layer.", ".")] = x
        elif ".original_module." not in name:  # which PEFT does not use
            name = WRAPPED.sub(".", name)
            _check_value(key, name)
            if name in values and not np.array_equal(values[name], x):
                raise LoraError(f"{key} is there under another key with other numbers")
            values[name] = x
    for name in values:
        if name.rpartition(".")[0] in grouped:
            raise LoraError(
                f"{PREFIX}{name}: its module has factors too, whose own weight and bias PEFT has "
                "under base_layer, so PEFT would not load this one"
            )
    base |= {name: x for name, x in values.items() if not config.saves(name)}
    values = {name: x for name, x in values.items() if name not in base}
    own = config.of_modules(list(grouped))
    read = peft_methods.READERS.get(config.peft_type)
    if read is None:
        updates = {m: update_of(m, slots, config, own[m]) for m, slots in grouped.items()}
    else:
        both = {key: tensors[key].astype(np.float32) for key in shared}
        updates = {}
        for m, slots in grouped.items():
            _check_targeted(m, slots, config, own[m])
            updates[m] = peft_methods.update_of(read, slots, config, own[m], both)
    return Modules(updates, values, base, rows, config.ensure_weight_tying)


def _check_value(key: str, name: str) -> None:
    """Raise `LoraError` unless a tensor may be whole: modules_to_save, a bias, a resized table."""
    if "lora_" in name or not name.endswith((".weight", ".bias")):
        raise LoraError(
            f"{key}: not a name that PEFT's files have. A key holds no adapter's name (as "
            f"lora_A.default.weight does); known endings:\n{listed([*SLOTS, TOKENS], 10)}"
        )


def update_of(module: str, slots: Slots, config: PeftConfig, own: ModuleSettings) -> ModuleUpdate:
    """Return the update of one module, checked against the configuration."""
    rank, alpha, _ = own
    embedding = "embedding_a" in slots or "embedding_b" in slots
    names = ("embedding_a", "embedding_b") if embedding else ("a", "b")
    missing = [s for s, slot in SLOTS.items() if slot in names and slot not in slots]
    if missing or (embedding and ("a" in slots or "b" in slots)):
        keys = [key for key, _ in slots.values()]
        raise LoraError(f"{keys[0]}: {module!r} has no {missing or 'factors of one kind'}")
    (key_a, a), (key_b, b) = slots[names[0]], slots[names[1]]
    layer = "embedding" if embedding else ("conv" if a.ndim > 2 else "linear")
    window = b.shape[2:]
    fits = a.ndim >= 2 and b.ndim == a.ndim and set(window) <= {1} and b.shape[1] == a.shape[0]
    if not fits or 0 in (*a.shape, *b.shape):
        raise LoraError(
            f"{key_a} of shape {a.shape} and {key_b} of {b.shape} are not two factors; expected "
            "[rank, in] and [out, rank]"
        )
    b = b.reshape(b.shape[:2])
    if rank != len(a):
        raise LoraError(
            f"{key_a} has rank {len(a)}, and the configuration (r, rank_pattern) says "
            f"{rank}: its scale is not known"
        )
    _check_targeted(module, slots, config, own)
    return ModuleUpdate(
        a,
        b,
        alpha,
        config.scaling,
        _vector(slots, "magnitude", len(b), config.use_dora, "use_dora"),
        _vector(slots, "bias", len(b), config.lora_bias and not embedding, "lora_bias"),
        layer,
    )


def _check_targeted(module: str, slots: Slots, config: PeftConfig, own: ModuleSettings) -> None:
    if not own[2] and not config.ensure_weight_tying:  # tying adds the head
        raise LoraError(
            f"{next(iter(slots.values()))[0]}: the configuration does not target {module!r}, so "
            "PEFT would not load it, while others would; correct target_modules in "
            "adapter_config.json"
        )


def _vector(slots: Slots, name: str, size: int, wanted: bool, flag: str) -> Any:
    """Return a vector that a module has if and only if the configuration says so."""
    if wanted != (name in slots):
        key = slots[name][0] if name in slots else next(iter(slots.values()))[0]
        found = "is there" if name in slots else f"comes without {name}"
        raise LoraError(f"{key} {found}, and the configuration says {flag} is {wanted}")
    if not wanted:
        return None
    key, x = slots[name]
    if x.size != size or (name == "bias" and x.ndim != 1):
        raise LoraError(f"{key} has the shape {x.shape}, expected ({size},)")
    return x.reshape(size)


def spell(updates: Mapping[str, ModuleUpdate]) -> dict[str, np.ndarray]:
    """Return the tensors of modules' updates, by PEFT's names."""
    found: dict[str, np.ndarray] = {}
    for module, update in updates.items():
        start = f"{PREFIX}{module}"
        ones = (1,) * (update.a.ndim - 2)
        if update.layer == "embedding":
            found[f"{start}.lora_embedding_A"] = update.a
            found[f"{start}.lora_embedding_B"] = update.b
        else:
            found[f"{start}.lora_A.weight"] = update.a
            found[f"{start}.lora_B.weight"] = update.b.reshape(*update.b.shape, *ones)
        if update.bias is not None:
            found[f"{start}.lora_B.bias"] = update.bias
        if update.magnitude is not None:
            lead = (1,) if ones else ()
            found[f"{start}.lora_magnitude_vector"] = update.magnitude.reshape(*lead, -1, *ones)
    return found


def spell_values(values: Mapping[str, np.ndarray], adapted: Iterable[str]) -> dict[str, np.ndarray]:
    """Return whole tensors by PEFT's names: under base_layer for an adapted module."""
    adapted, found = set(adapted), {}
    for name, value in values.items():
        module, _, parameter = name.rpartition(".")
        inner = ".base_layer" if module in adapted else ""
        found[f"{PREFIX}{module}{inner}.{parameter}"] = value
    return found
