"""Open a base and any number of adapters for it.

The files may come from a stranger: `lora_jax.checkpoint` reads them as such. An adapter also names
its base. That base is opened if it is a path on this machine or a package whose checksum lora_jax
knows (`models.weights.source.is_safe`). Any other base is downloaded only if the user names it
(`base`) or trusts the adapter (`trust_base`).
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import models, paths
from lora_jax.adapters import Adapter
from lora_jax.analysis.from_base import init_from_base
from lora_jax.bases.recipe import ABOUT, BEGUN, STORED, requantised
from lora_jax.checkpoint import adapter_path
from lora_jax.checkpoint.adapter import SavedAdapter
from lora_jax.checkpoint.added_parameters import check_lora
from lora_jax.checkpoint.fingerprint import fingerprint
from lora_jax.checkpoint.storage import Path, RemotePath
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.layout import Layout
from lora_jax.models.weights.source import is_safe
from lora_jax.multi.stack import BASE, Stack
from lora_jax.multi.stack import stack as stack_adapters
from lora_jax.paths import Tree
from lora_jax.updates.kind import Factors

_ENCODERS = {models.BertConfig: "bert", models.VitConfig: "vit"}  # its name in a classifier
BASE_NAME = "base"  # as the name of an adapter: no adapter
# The settings on which all adapters of a base must agree, and the check of their values.
_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "reference": lambda value: isinstance(value, str) and value.isprintable(),
    "scan_layers": lambda value: isinstance(value, bool),
    "dtype": lambda value: value in ("float32", "bfloat16"),
    "param_dtype": lambda value: value in ("float32", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class ServedAdapter:
    """One adapter.

    name: the name that requests use.
    saved: the folder that `lora_jax.save` wrote.
    layout, adapters: as `lora_jax.restore` returns them.
    base: the base parameters that were trained in full (`Adapter.trainable`).
    about: the notes of its training (`Workload.about`); empty if it was saved by hand.
    """

    name: str
    saved: SavedAdapter
    layout: Layout
    adapters: dict[str, Factors]
    base: Mapping[str, Any]
    about: Mapping[str, Any]

    @property
    def path(self) -> str:
        """The path of the folder."""
        return str(self.saved.folder)


@dataclasses.dataclass(frozen=True)
class Served:
    """A base, loaded once, and its adapters.

    reference: the reference of the base, as the user or the adapters name it.
    source: the opened model with its tokenizer and chat template.
    config: the config of the model, with the settings that the adapters were trained with.
    params: the frozen base: `{"bert": ...}` or `{"vit": ...}` without a head for an encoder, the
      whole model for a decoder.
    members: the adapters; the position of each is its id.
    """

    reference: str
    source: models.Source
    config: Any
    params: Tree
    members: tuple[ServedAdapter, ...]

    @functools.cached_property
    def stack(self) -> tuple[Layout, Stack]:
        """`(layout, stacked)` of all adapters. There must be at least one."""
        on_host = (jax.tree.map(np.asarray, m.adapters) for m in self.members)
        return stack_adapters(
            [Adapter(m.layout, x) for m, x in zip(self.members, on_host, strict=True)]
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order of their ids."""
        return tuple(member.name for member in self.members)

    def id_of(self, name: str | None, where: str) -> int:
        """Return the id of an adapter."""
        if name is None and len(self.members) <= 1:
            return 0 if self.members else BASE
        if name is None:
            raise LoraError(
                f"{where} does not say which adapter it is for, and there are several:\n"
                f'{listed(self.names)}\nadd "adapter": {self.names[0]!r} or another of them'
            )
        if name == BASE_NAME:
            return BASE
        if name not in self.names:
            near = nearest(name, self.names or [BASE_NAME], 1)[0]
            raise LoraError(
                f"{where}: no adapter is called {name!r}; nearest: {near!r}. There are:\n"
                f"{listed(self.names, 10)}\nanother one is opened with --adapter {name}=PATH"
            )
        return self.names.index(name)


def open_adapters(
    adapters: Sequence[str],
    kind: type[Any] | tuple[type[Any], ...],
    *,
    base: str | None = None,
    trust_base: bool = False,
    allow_other_base: bool = False,
    opened: Callable[[int, int], None] = lambda number, total: None,
) -> Served:
    """Open adapters and load their base."""
    members = _members(adapters, opened)
    reference, source, config = open_base(members, base, trust_base)
    _check_kind(source, kind, reference)
    how = quantised_how(members)
    params = source.load(config, keep_quantised=how == {"scheme": STORED})
    params = {_ENCODERS[type(config)]: params} if type(config) in _ENCODERS else params
    floats, params = params, params if how is None else requantised(params, how)
    if (method := begun_how(members)) is not None:
        quantised = None if how is None else params
        params = init_from_base(members[0].layout, floats, method, quantised=quantised).params
    _check_base(members, params, reference, allow_other_base)
    return Served(reference, source, config, params, members)


class OpenedBase(NamedTuple):
    """A base whose weights have not been read: its reference, the model, and its config."""

    reference: str
    source: models.Source
    config: Any


def open_base(members: Sequence[ServedAdapter], base: str | None, trust_base: bool) -> OpenedBase:
    """Open the base of some adapters, with the settings that they were trained with."""
    settings = _settings(members, base)
    reference = settings.pop("reference")
    if base is None and not trust_base:
        _check_named(members, reference)
    source = models.open(reference)
    return OpenedBase(reference, source, dataclasses.replace(source.config, **settings))


def read(name: str, path: Path) -> ServedAdapter:
    """Read an adapter from a folder that `lora_jax.save` wrote."""
    saved = SavedAdapter.open(path)
    layout, adapters, base = saved.load()
    check_lora(name, path, base, saved.about)
    return ServedAdapter(name, saved, layout, adapters, base, saved.about)


def _members(
    adapters: Sequence[str], opened: Callable[[int, int], None]
) -> tuple[ServedAdapter, ...]:
    """Read all adapters, and check that every name is used once."""
    found = [pair for given in adapters for pair in adapter_path.find(given)]
    places: dict[str, RemotePath] = {}
    for name, path in found:
        if name == BASE_NAME:
            raise LoraError(
                f"{path} cannot be called {BASE_NAME!r}: that stands for no adapter; give "
                "--adapter NAME=PATH with another name"
            )
        if name in places:
            raise LoraError(
                f"two adapters are called {name!r}:\n{listed(map(str, (places[name], path)))}\n"
                "give one of them another name: --adapter NAME=PATH"
            )
        places[name] = path
    opened(0, len(places))
    members = []
    for name, path in places.items():
        members.append(read(name, path))
        opened(len(members), len(places))
    return tuple(members)


def _settings(members: Iterable[ServedAdapter], base: str | None) -> dict[str, Any]:
    """Return the reference of the base, and the model settings that all adapters agree on."""
    said: dict[str, tuple[Any, str]] = {} if base is None else {"reference": (base, "--base")}
    for member in members:
        for name, value in _said(member).items():
            if name == "reference" and base is not None:
                continue
            first, by = said.setdefault(name, (value, member.name))
            if first != value:
                cure = ", or name one base for all with --base" if name == "reference" else ""
                raise LoraError(
                    f"the adapters do not share one model: model.{name} is {first!r} for {by!r} "
                    f"and {value!r} for {member.name!r}; open them one by one{cure}"
                )
    if "reference" not in said:
        whose = listed(f"{member.name}: {member.path}" for member in members)
        silent = f"\nThese adapters do not say what they were trained on:\n{whose}"
        raise LoraError(
            "no base: name it with --base, in the form that configs have in model.reference"
            + (silent if members else "")
        )
    return {name: value for name, (value, _) in said.items()}


def _said(member: ServedAdapter) -> dict[str, Any]:
    """Return the model settings in an adapter's notes, perhaps none."""
    model = member.about.get("model", {})
    if not isinstance(model, Mapping):
        raise LoraError(f"{member.path} says that its model is {str(model)[:80]!r}, not an object")
    for name, fits in _SETTINGS.items():
        if name in model and not fits(model[name]):
            raise LoraError(f"{member.path} says model.{name} is {str(model[name])[:80]!r}")
    return {name: model[name] for name in _SETTINGS if name in model}


def begun_how(members: Sequence[ServedAdapter]) -> Any:
    """Return the method that changed the base before training, or None."""
    for member in members:
        if not isinstance(how := member.about.get(BEGUN), str | None):
            raise LoraError(f"{member.path} says {BEGUN} is {str(how)[:80]!r}")
    said = {(member.about.get(BEGUN), member.layout) for member in members}
    methods = {method for method, _ in said}
    if methods <= {None}:
        return None
    if len(said) > 1:
        raise LoraError(
            f"the adapters do not share one base: each method ({listed(map(str, methods))}) and "
            "each set of targets begins with a base of its own; open them one by one"
        )
    return methods.pop()


def quantised_how(members: Sequence[ServedAdapter]) -> Mapping[str, Any] | None:
    """Return the recipe by which the base of the adapters was quantised, or None."""
    said = {member.name: member.about.get(ABOUT) for member in members}
    first = next(iter(said.values()), None)
    for name, how in said.items():
        if how != first:
            raise LoraError(
                f"the adapters do not share one base: {next(iter(said))!r} and {name!r} were "
                "trained on bases that were quantised differently; open them one by one"
            )
        if how is not None and not isinstance(how, Mapping):
            raise LoraError(f"adapter {name!r} says {ABOUT} is {str(how)[:80]!r}")
    return first


def _check_named(members: Sequence[ServedAdapter], reference: str) -> None:
    """Raise if a base would be downloaded only because an adapter names it."""
    if is_safe(reference):
        return
    whose = listed(f"{member.name}: {member.path}" for member in members)
    raise LoraError(
        f"the base {reference!r} is named only by the adapters, and would be downloaded:\n{whose}\n"
        "An adapter may come from anyone, so its base is downloaded only if you name it, or trust "
        "the adapter:\n"
        f"  --base {shlex.quote(reference)}\n  --trust-base"
    )


def _check_kind(
    source: models.Source, kind: type[Any] | tuple[type[Any], ...], reference: str
) -> None:
    if isinstance(source.config, kind):
        return
    what, other = {
        models.BertConfig: ("an encoder", "lora-jax predict"),
        models.VitConfig: ("an encoder of images", "lora-jax predict"),
        models.DecoderConfig: ("a decoder", "lora-jax generate"),
    }[type(source.config)]
    raise LoraError(f"the base {reference} is {what}; `{other}` runs models of this kind")


def _check_base(
    members: Sequence[ServedAdapter], params: Tree, reference: str, allow: bool
) -> None:
    """Raise unless every adapter was trained on these parameters, or `allow` and fits them."""
    flat = paths.flatten(params)
    ours = {} if allow or not members else fingerprint(params)
    for member in members:
        trained_on = _said(member).get("reference", "a base that it does not name")
        try:
            if not allow:
                member.saved.check_base(ours)
            member.layout.check_params(flat)
        except LoraError as error:
            raise LoraError(
                f"adapter {member.name!r}, trained on {trained_on}, is not for the base "
                f"{reference}:\n{error}"
            ) from error
