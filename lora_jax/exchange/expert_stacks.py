"""Factors of experts in one array for each kind of projection, as in GGUF and MLX.

In our exchange, an expert is a module of its own, `<module>.experts.<number>.<projection>`. In a
stack the name has no number, and the factors are [experts, rank, in] and [experts, out, rank].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from lora_jax.errors import LoraError
from lora_jax.exchange.module_update import ModuleUpdate

NUMBERED = re.compile(r"(.*\bexperts)\.(\d+)\.(.*)")
Pair = tuple[np.ndarray, np.ndarray]


def stack(updates: Mapping[str, ModuleUpdate]) -> dict[str, Pair]:
    """Return (a, b) of every module, with experts in stacks."""
    found: dict[str, Pair] = {}
    experts: dict[str, dict[int, ModuleUpdate]] = {}
    for name, update in updates.items():
        if match := NUMBERED.fullmatch(name):
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = update
        else:
            found[name] = update.a, update.b
    for name, numbered in experts.items():
        if sorted(numbered) != list(range(len(numbered))):
            raise LoraError(
                f"{name!r} is adapted for the experts {sorted(numbered)} only, and the format has "
                "them all in one array; adapt all, or save as PEFT"
            )
        rows = [numbered[i] for i in range(len(numbered))]
        found[name] = np.stack([u.a for u in rows]), np.stack([u.b for u in rows])
    return found


def numbered(name: str, number: int = 0) -> str:
    """Return the name of an expert, given the name of the stack; other names are unchanged.

    >>> numbered("layers.0.mlp.experts.up_proj", 3), numbered("layers.0.mlp.up_proj")
    ('layers.0.mlp.experts.3.up_proj', 'layers.0.mlp.up_proj')
    """
    return re.sub(r"\bexperts\.", f"experts.{number}.", name)


def unstack(
    name: str, a: np.ndarray, b: np.ndarray
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (module, a, b) for a pair of factors, or for each expert of a stack."""
    stacked = name != numbered(name)
    fits = a.ndim == b.ndim == 2 + stacked and a.shape[-2] == b.shape[-1]
    if not fits or a.shape[:-2] != b.shape[:-2] or 0 in (*a.shape, *b.shape):
        wanted = (
            "[experts, rank, in] and [experts, out, rank]"
            if stacked
            else "[rank, in] and [out, rank]"
        )
        raise LoraError(f"{name!r}: factors of {a.shape} and {b.shape}; expected {wanted}")
    if not stacked:
        yield name, a, b
        return
    for number, pair in enumerate(zip(a, b, strict=True)):
        yield numbered(name, number), *pair
