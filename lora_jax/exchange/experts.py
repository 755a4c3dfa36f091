"""Experts in one parameter [experts, d1, d2], as in PEFT's target_parameters.

A wrapper has A [experts * rank, x], where the expert is the slowest index, and B
[y, rank * experts], where it is the fastest. Which of d1 and d2 is x depends on the version of PEFT
that wrote the file, and on `is_transposed` of the module (whether it stores [experts, in, out]):

    up to 0.18   x = d1 and y = d2
    0.19.0       x = d2 if the module is transposed, else d1
    from 0.19.1  x = d1 if the module is transposed, else d2: x is the input

In our exchange, and in files with a key for each expert, an expert is a module of its own:
`<module>.<number>.<parameter>`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.errors import LoraError
from lora_jax.exchange.module_update import ModuleUpdate
from lora_jax.exchange.names import NameTable, TensorPlace
from lora_jax.exchange.peft_config import ModuleSettings, PeftConfig
from lora_jax.exchange.peft_keys import PREFIX
from lora_jax.resolve import resolve
from lora_jax.spec import LoraSpec, Rule, Target

ORDER = ("gate_up_proj", "down_proj")  # the order of attributes in Transformers' expert modules
WRAPPER = re.compile(r"(?P<module>.+?)(?P<inner>(\.base_layer)*)\.lora_(?P<side>[AB])\.weight")


class Expanded(NamedTuple):
    """The updates of single experts, and the tensors that do not belong to experts."""

    updates: dict[str, ModuleUpdate]
    tensors: dict[str, np.ndarray]


def expand(
    tensors: Mapping[str, np.ndarray],
    config: PeftConfig,
    table: NameTable,
    f: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
) -> Expanded:
    """Split the wrappers of target_parameters into the updates of single experts."""
    wanted = config.target_parameters or []
    if (len(wanted) + len(config.modules_to_save or ())) * len(tensors) > 10**7:  # 1 s
        raise LoraError("target_parameters and modules_to_save name too many modules for the file")
    wrappers: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    rest = {}
    for key, x in tensors.items():
        match = WRAPPER.fullmatch(key.removeprefix(PREFIX))
        if match and _parameters(match["module"], wanted):
            depth = match["inner"].count(".base_layer")
            pair = wrappers.setdefault(match["module"], {}).setdefault(depth, {})
            pair[match["side"]] = x.astype(np.float32)
        else:
            rest[key] = x
    if not wrappers:
        return Expanded({}, rest)
    sizes = _Sizes(table, f, params, args)
    pairs = {
        (module, parameter): pair
        for module, levels in wrappers.items()
        for parameter, pair in _assigned(module, levels, wanted).items()
    }
    own = config.of_modules([".".join(both) for both in pairs])
    updates: dict[str, ModuleUpdate] = {}
    for both, pair in pairs.items():
        updates |= _experts(*both, pair, config, own[".".join(both)], sizes)
    return Expanded(updates, rest)


class _Size(NamedTuple):
    """The sizes of one parameter of experts.

    transposed: whether the module stores [experts, in, out].
    """

    experts: int
    inputs: int
    outputs: int
    transposed: bool


class _Sizes:
    """The sizes of parameters of experts, which a trace of the model finds."""

    def __init__(self, table: NameTable, f: Any, params: Any, args: Any) -> None:
        self._table, self._traced = table, (f, params, *args)
        self._found: dict[str, Target] = {}

    def of(self, module: str, parameter: str) -> _Size:
        places = self._table.find(f"{module}.0.{parameter}.weight")
        if not places:
            raise LoraError(
                f"the file adapts the parameter {parameter!r} of {module!r}, and the names have no "
                f"'{module}.{{expert}}.{parameter}'; nearest:\n"
                f"{self._table.near(f'{module}.0.{parameter}.weight')}\n"
                "Of a fused one say the rows: HfModule('...experts.{expert}.gate_up_proj', "
                "rows=(0, size))"
            )
        target = self._target(places[0])
        entry = places[0].entry
        outputs = max(sum(p.entry.rows) if p.entry.rows else target.fan_out for p in places)
        ours = max(target.inputs) < min(target.outputs)  # whether we store [in, out]
        stored = ours != entry.is_transposed(places[0].path)
        return _Size(target.shape[target.stack[-1]], target.fan_in, outputs, stored)

    def _target(self, place: TensorPlace) -> Target:
        if place.path not in self._found:
            f, params, *args = self._traced
            layout = resolve(LoraSpec(1, 1.0, (Rule(place.path),)), f, params, *args)
            self._found[place.path] = layout[place.path]
        target = self._found[place.path]
        if not target.stack:
            raise LoraError(f"{place.path!r} has no axis of experts: {target.shape}")
        return target


def _parameters(module: str, wanted: list[str]) -> list[str]:
    """Return the parameters of a module that the configuration targets."""
    found = []
    for name in wanted:
        above, _, parameter = name.rpartition(".")
        if not above or module == above or module.endswith(f".{above}"):
            found.append(parameter)
    return sorted(set(found), key=lambda p: (ORDER.index(p) if p in ORDER else 0, p))


def _assigned(
    module: str, levels: dict[int, dict[str, np.ndarray]], wanted: list[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Assign each wrapper to a parameter: the innermost to the module's first attribute."""
    names = _parameters(module, wanted)
    pairs = [levels[depth] for depth in sorted(levels, reverse=True)]
    whole = all(set(pair) == {"A", "B"} for pair in pairs)
    if sorted(levels) != list(range(len(names))) or not whole:
        raise LoraError(
            f"{module!r} has wrappers {sorted(levels)} for the parameters {names}; expected a pair "
            "of lora_A and lora_B for each"
        )
    if len(names) > 1 and not set(names) <= set(ORDER):
        raise LoraError(
            f"{module!r} has the parameters {names}, and which wrapper is of which follows from "
            "the order of the module's attributes, which the file does not say"
        )
    return dict(zip(names, pairs, strict=True))


def _experts(
    module: str,
    parameter: str,
    pair: dict[str, np.ndarray],
    config: PeftConfig,
    own: ModuleSettings,
    sizes: _Sizes,
) -> dict[str, ModuleUpdate]:
    name = f"{module}.{parameter}"
    size, (a, b) = sizes.of(module, parameter), (pair["A"], pair["B"])
    n, rank = size.experts, own[0]
    natural = _input_first(config.peft_version, size, name)
    x, y = (size.inputs, size.outputs) if natural else (size.outputs, size.inputs)
    if a.shape != (n * rank, x) or b.shape != (y, n * rank):
        raise LoraError(
            f"{name!r}: lora_A is {a.shape} and lora_B {b.shape}; by PEFT "
            f"{config.peft_version or '0.17'} they are {(n * rank, x)} and {(y, n * rank)} "
            f"for {n} experts of rank {rank}"
        )
    a, b = a.reshape(n, rank, x), b.reshape(y, rank, n)
    alpha, scaling = own[1], config.scaling
    found = {}
    for i in range(n):
        down, up = (a[i], b[:, :, i]) if natural else (b[:, :, i].T, a[i].T)
        found[f"{module}.{i}.{parameter}"] = ModuleUpdate(down, up, alpha, scaling)
    return found


def _input_first(version: str | None, size: _Size, name: str) -> bool:
    """Return whether lora_A runs along the inputs, in the version of PEFT that wrote the file."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)(.*)", version or "0.17.0")
    if numbers is None or (numbers[4] and not numbers[4].startswith("+")):
        raise LoraError(
            f"{name!r}: peft_version is {version!r}, and which axis of the experts lora_A runs "
            "along differs between versions; save it again with a released PEFT"
        )
    release = tuple(map(int, numbers.groups()[:3]))
    if release >= (0, 19, 1):
        return True
    return size.transposed and release < (0, 19, 0)


def pack(
    updates: Mapping[str, ModuleUpdate],
) -> tuple[dict[str, ModuleUpdate], dict[str, np.ndarray]]:
    """Join the updates of single experts, in the form of PEFT 0.19.1 and later.

    Return {parameter: the update of one of its experts}, and tensors by PEFT's names.
    """
    grouped: dict[str, dict[str, dict[int, ModuleUpdate]]] = {}
    for name, update in updates.items():
        if update.layer == "experts":
            above, number, parameter = name.rsplit(".", 2)
            grouped.setdefault(above, {}).setdefault(parameter, {})[int(number)] = update
    parameters, tensors = {}, {}
    for module, found in grouped.items():
        if len(found) > 1 and not set(found) <= set(ORDER):
            raise LoraError(
                f"{module!r}: PEFT tells the parameters {sorted(found)} apart by the order of the "
                "module's attributes, which nothing here says; adapt one of them"
            )
        names = sorted(found, key=lambda p: (ORDER.index(p) if p in ORDER else 0, p))
        for depth, parameter in enumerate(reversed(names)):
            each = [found[parameter][i] for i in sorted(found[parameter])]
            start = f"{PREFIX}{module}{'.base_layer' * depth}"
            a = np.concatenate([u.a for u in each])
            b = np.stack([u.b for u in each], axis=-1)
            tensors[f"{start}.lora_A.weight"] = a
            tensors[f"{start}.lora_B.weight"] = b.reshape(len(b), -1)
            parameters[f"{module}.{parameter}"] = each[0]
    return parameters, tensors
