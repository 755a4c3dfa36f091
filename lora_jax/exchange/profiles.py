"""The PEFT settings and tensors of an adapter: as it is, or in a form that all servers read."""

from __future__ import annotations

import collections
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax import paths
from lora_jax.errors import LoraError
from lora_jax.exchange import experts, peft_keys, peft_methods
from lora_jax.exchange.axes import tensors_of
from lora_jax.exchange.module_update import Modules, ModuleUpdate, check_plain
from lora_jax.exchange.names import NameTable
from lora_jax.exchange.peft_config import OFF
from lora_jax.exchange.whole_parameters import tensor_of
from lora_jax.layout import Layout

DECISIVE = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
    "bias", "target_modules", "target_parameters", "modules_to_save", "peft_version",
    "feedforward_modules", "oft_block_size", "use_cayley_neumann",
)  # fmt: skip
"""The settings that decide the function of the adapter. `peft.load` detects a changed one."""
EXPERTS_VERSION = "0.19.1"  # the first PEFT that reads experts in the form we write


def spelled(
    profile: str, modules: Modules, table: NameTable, layout: Layout, params: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the settings and the tensors of a folder."""
    if profile not in ("faithful", "portable"):
        raise LoraError(f"profile is {profile!r}; there are 'faithful' and 'portable'")
    if not modules.updates:
        raise LoraError(
            "the adapter has no factors, and PEFT opens no folder without any; write the merged "
            "model (lora-jax export --format hf)"
        )
    if profile == "faithful" and any(u.own for u in modules.updates.values()):
        return _spelled_by_method(modules, table, layout, params)
    updates = _with_biases(modules.updates)
    sizes = _known_modules(table, layout, params)
    if profile == "portable":
        heads = [f"{n}: the output head" for n in modules.updates if n.endswith("lm_head")]
        check_plain(modules, "profile='portable', unlike 'faithful',", ("linear",), more=heads)
        updates = _at_one_rank(_in_every_layer(updates, sizes))
    values = _with_siblings(modules.values, table, layout, params)
    updates |= _at_one_rank({n: u for n, u in updates.items() if u.layer == "experts"})
    parameters, packed = experts.pack(updates)
    single = {name: u for name, u in updates.items() if u.layer != "experts"}
    known = set(sizes) | set(single)
    short = profile == "portable"
    # PEFT warns of patterns that name parameters, so the first one decides r and alpha.
    settings = _settings(
        {**parameters, **single}, rslora=profile == "faithful", first=bool(parameters)
    )
    tensors = {**peft_keys.spell(single), **packed}
    settings["target_modules"] = _targets(single, known, short)
    if parameters:
        settings["target_parameters"] = sorted(parameters)
        settings["peft_version"] = EXPERTS_VERSION
    settings["ensure_weight_tying"] = modules.ties
    tensors |= _whole_tensors(values, single, settings)
    for name, (numbers, rows) in modules.rows.items():
        module = name.removesuffix(".weight")
        settings.setdefault("trainable_token_indices", {})[module] = numbers
        tensors[f"{peft_keys.PREFIX}{module}{peft_keys.WRAPPER}{peft_keys.TOKENS}"] = rows
    return settings, {k: np.ascontiguousarray(x) for k, x in tensors.items()}


def _spelled_by_method(
    modules: Modules, table: NameTable, layout: Layout, params: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if modules.rows:
        raise LoraError("rows were trained, which PEFT has with LoRA only; merge the adapter")
    settings, own = peft_methods.spell(modules.updates)
    leaves = {} if params is None else paths.flatten(params)
    values = dict(modules.values)
    for module, update in modules.updates.items():
        assert update.own is not None  # or `spell` has raised
        name, gain = f"{module}.bias", update.own.arrays.get("gain")
        if gain is None or not update.own.outputs or not table.speaks_of(name):
            continue
        if params is None:
            raise LoraError(f"{name!r} is multiplied by PEFT's (IA)3 too: pass params=, the base")
        if places := table.find(name):
            base = tensor_of(name, {p.path: leaves[p.path] for p in places}, {}, table, layout)
            if not np.allclose(values.pop(name, base), base * gain, rtol=1e-5, atol=1e-6):
                raise LoraError(
                    f"PEFT's (IA)3 multiplies {name!r} by the gains as well, and the adapter does "
                    "not: no PEFT folder can say it. Merge the adapter and ship the model"
                )
    tensors = {f"{peft_keys.PREFIX}{key}": x for key, x in own.items()}
    values = _with_siblings(values, table, layout, params)
    tensors |= _whole_tensors(values, modules.updates, settings)
    if settings.get("bias", "none") != "none":
        raise LoraError(
            f"biases were trained, and a folder of PEFT's {settings['peft_type']} has none; merge "
            "the adapter and ship the model"
        )
    return settings, {k: np.ascontiguousarray(x, np.float32) for k, x in tensors.items()}


def digest(settings: Mapping[str, Any]) -> str:
    """Return a hash of the settings that decide the function of the adapter."""
    decisive = {k: settings[k] for k in DECISIVE if settings.get(k) not in OFF}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]


def _with_biases(updates: Mapping[str, ModuleUpdate]) -> dict[str, ModuleUpdate]:
    """Give every module a bias if one has it, as PEFT's lora_bias requires: zeros for the rest."""
    if all(u.bias is None for u in updates.values()):
        return dict(updates)
    for name, u in updates.items():
        if u.layer in ("embedding", "experts") or u.magnitude is not None:
            raise LoraError(
                f"{name!r} cannot add a bias, and others do by a difference: pass params=, the "
                "base, so that biases are written as they are"
            )
    zeros = {n: np.zeros(len(u.b), np.float32) for n, u in updates.items()}
    return {n: u if u.bias is not None else u._replace(bias=zeros[n]) for n, u in updates.items()}


def _at_one_rank(updates: Mapping[str, ModuleUpdate]) -> dict[str, ModuleUpdate]:
    """Return all updates in float32, at one rank and scale if they differ."""
    if not updates:
        return {}
    wide = {
        n: u._replace(a=u.a.astype(np.float32), b=u.b.astype(np.float32))
        for n, u in updates.items()
    }
    agree = len({(u.rank, u.alpha, u.scaling) for u in wide.values()}) <= 1
    plain = all(
        u.scaling == "alpha/r" and u.alpha == int(u.alpha) and u.alpha >= 1 for u in wide.values()
    )
    if agree and plain:
        return wide
    rank = max(u.rank for u in wide.values())
    return {n: u.folded(rank) for n, u in wide.items()}


def _settings(updates: Mapping[str, ModuleUpdate], rslora: bool, first: bool) -> dict[str, Any]:
    """Return the settings that follow from ranks, scales and kinds of the updates.

    `first` takes r and alpha from the first update, rather than the most frequent values.
    """
    if not updates:
        ranks, scaled, all_rs = {}, {}, False
    else:
        ranks = {name: u.rank for name, u in updates.items()}
        all_rs = rslora and all(u.scaling != "alpha/r" for u in updates.values())
        scaled = {
            name: _number(u.scale * (math.sqrt(u.rank) if all_rs else u.rank), u, all_rs)
            for name, u in updates.items()
        }
    r, alpha = (_usual(list(x.values())[: 1 if first else None], 8) for x in (ranks, scaled))
    products = [u for u in updates.values() if u.layer == "linear"]
    dora = [name for name, u in updates.items() if u.magnitude is not None]
    if dora and len(dora) < len(updates):
        plain = next(name for name, u in updates.items() if u.magnitude is None)
        raise LoraError(
            f"{dora[0]!r} is adapted by DoRA and {plain!r} by LoRA, and PEFT has one setting for "
            "all; write them as two adapters, or adapt all by one kind"
        )
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {name: x for name, x in ranks.items() if x != r},
        "alpha_pattern": {name: x for name, x in scaled.items() if x != alpha},
        "use_rslora": all_rs,
        "use_dora": bool(dora),
        "lora_bias": any(u.bias is not None for u in updates.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bool(products) and all(u.stored_in_out for u in products),
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _number(alpha: float, update: ModuleUpdate, all_rs: bool) -> float:
    """Return alpha: the module's own if the scale has its form, and an integer if possible."""
    if all_rs or update.scaling == "alpha/r":
        alpha = update.alpha
    return int(alpha) if alpha == int(alpha) else alpha


def _usual(values: Iterable[Any], default: Any) -> Any:
    counted = collections.Counter(values).most_common(1)
    return counted[0][0] if counted else default


def _known_modules(table: NameTable, layout: Layout, params: Any) -> dict[str, int]:
    """Return all modules of the model with a weight, and its size; {} without params."""
    if params is None:
        return {}
    found: dict[str, int] = {}
    for path in table.paths():
        for entry in table.entries(path):
            shape = table.shapes[path]
            tensors = [name for _, name in tensors_of(table, layout, path, entry, shape)]
            size = math.prod(shape) // len(tensors) if entry.part is None else 0
            ours = [name for name in tensors if name.endswith(".weight")]
            found |= {name.removesuffix(".weight"): size for name in ours}
    return found


def _in_every_layer(
    updates: Mapping[str, ModuleUpdate], sizes: Mapping[str, int]
) -> dict[str, ModuleUpdate]:
    """Add zero updates, so that the last names of the adapted modules name no others.

    A module is added if one with the same last name and size is adapted.
    """
    like = {(name.rpartition(".")[2], u.b.shape[0] * u.fan_in): u for name, u in updates.items()}
    found = dict(updates)
    for name, size in sizes.items():
        u = like.get((name.rpartition(".")[2], size))
        if u is not None and name not in found:
            found[name] = u._replace(a=np.zeros_like(u.a), b=np.zeros_like(u.b))
    return found


def _targets(updates: Mapping[str, ModuleUpdate], known: set[str], short: bool) -> list[str]:
    """Return the names for target_modules: last segments if all modules that end so
    are adapted.

    PEFT compares the ends of names. If only the adapted modules are known, `short` is needed.
    """
    certain = short or known > set(updates)
    found = set()
    for name in updates:
        last = name.rpartition(".")[2]
        alike = {n for n in known if n == last or n.endswith(f".{last}")}
        exact = certain and alike <= set(updates) and not last.isdigit()
        found.add(last if exact else name)
    return sorted(found)


def _with_siblings(
    values: Mapping[str, np.ndarray], table: NameTable, layout: Layout, params: Any
) -> dict[str, np.ndarray]:
    """Return whole tensors with the other tensors of their modules, which PEFT requires."""
    found = dict(values)
    leaves = {} if params is None else paths.flatten(params)
    for name in values:
        module, _, parameter = name.rpartition(".")
        other = f"{module}.{'bias' if parameter == 'weight' else 'weight'}"
        if other in found or parameter == "bias":
            continue  # a bias without its weight is written as a bias
        if params is None and table.speaks_of(other):
            raise LoraError(
                f"{name!r} was trained as a whole and {other!r} was not, and PEFT saves a "
                "module with all of its tensors: pass params=, the base"
            )
        if table.find(other):
            found[other] = tensor_of(other, leaves, {}, table, layout)
    return found


def _whole_tensors(
    values: Mapping[str, np.ndarray], updates: Mapping[str, Any], settings: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Return the tensors to write whole, and add the settings that they need."""
    modules = {n.rpartition(".")[0] for n in values if n.endswith(".weight")} - set(updates)
    biases = {n.rpartition(".")[0] for n in values if n.endswith(".bias")} - modules
    tables = [n for n in values if n.endswith(".weight") and n.rpartition(".")[0] in updates]
    if tables:
        raise LoraError(
            f"{tables[0]!r} was trained as a whole and has factors as well, which PEFT does not "
            "have; merge the adapter, or train one of the two"
        )
    if modules:
        settings["modules_to_save"] = sorted(modules)
    if biases:
        settings["bias"] = "lora_only" if biases <= set(updates) else "all"
    return peft_keys.spell_values(values, updates)
