"""Open a base and any number of adapters for it.

The files may come from a stranger: `lora_jax.checkpoint` reads them as such. An adapter also names
its base. That base is opened if it is a path on this machine or a package whose checksum lora_jax
knows (`models.weights.source.is_safe`). Any other base is downloaded only if the user names it
(`base`) or trusts the adapter (`trust_base`).
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import models, paths
from lora_jax.adapters import Adapter
from lora_jax.analysis.from_base import init_from_base
from lora_jax.bases.recipe import STORED, requantised
from lora_jax.checkpoint import adapter_path
from lora_jax.checkpoint.fingerprint import Fingerprint, fingerprint
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.checkpoint.storage import RemotePath
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.layout import Layout
from lora_jax.models.weights.families import table_of
from lora_jax.models.weights.stored import LAST
from lora_jax.multi.stack import BASE, Stack
from lora_jax.multi.stack import stack as stack_adapters
from lora_jax.paths import Tree
from lora_jax.serving import shared_base

BASE_NAME = "base"  # as the name of an adapter: no adapter


@dataclasses.dataclass(frozen=True)
class Served:
    """A base and its adapters.

    reference: the reference of the base, as the user or the adapters name it.
    source: the opened model with its tokenizer and chat template.
    config: the config of the model, with the settings that the adapters were trained with.
    members: the adapters that were opened with it.
    lock: held while adapters come and go, and from the look-up of an id to its use.
    """

    reference: str
    source: models.Source
    config: Any
    members: tuple[SavedAdapter, ...]
    lock: Any = dataclasses.field(default_factory=threading.RLock, init=False, repr=False)

    @functools.cached_property
    def slots(self) -> dict[int, SavedAdapter]:
        """The adapters by their ids, at first the positions of the members."""
        return dict(enumerate(self.members))

    @functools.cached_property
    def params(self) -> Tree:
        """The frozen base, loaded once, changed as it was before training, and checked.

        It is `{"bert": ...}`, `{"vit": ...}` or `{"decoder": ...}` without a head for a classifier,
        and the whole model for a decoder that writes.
        """
        for member in self.members:
            self._check(member)
        return self._loaded

    @functools.cached_property
    def _loaded(self) -> Tree:
        recipe, method = self.recipe, self.changed_by
        params = self.source.load(self.config, keep_quantised=recipe == {"scheme": STORED})
        params = {self.root.strip("/"): params} if self.root else params
        floats, params = params, params if recipe is None else requantised(params, recipe)
        if method is None:
            return params
        quantised = None if recipe is None else params
        return init_from_base(self.members[0].layout, floats, method, quantised=quantised).params

    @functools.cached_property
    def _identity(self) -> Fingerprint:
        return fingerprint(self._loaded)

    def _check(self, member: SavedAdapter) -> None:
        """Raise unless an adapter was trained on this base, or may be used on it and fits."""
        try:
            member.check_base({} if member.allow_other_base else self._identity)
            member.layout.check_params(paths.flatten(self._loaded))
        except LoraError as error:
            own = member.model.get("reference", "a base that it does not name")
            raise LoraError(
                f"adapter {member.name!r}, trained on {own}, is not for the base "
                f"{self.reference}:\n{error}"
            ) from error

    def read(self, name: str, path: str, allow_other_base: bool = False) -> SavedAdapter:
        """Read one more adapter, and check that it is for this base as it is."""
        member = _read(adapter_path.find_one(path)[1], name, allow_other_base)
        both = (*self.members[:1], member)
        shared_base.shared_settings(both, self.reference, True)
        shared_base.shared_recipe(both)
        shared_base.shared_change(both)
        self._check(member)
        return member

    def stack(self, slots: int | None = None) -> tuple[Layout, Stack]:
        """`(layout, stacked)` of the adapters, with so many slots. There must be at least one."""
        own = [Adapter(m.layout, jax.tree.map(np.asarray, m.parameters)) for m in self.members]
        return stack_adapters(own, size=slots)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order of their ids."""
        return tuple(member.name for _, member in sorted(self.slots.items()))

    @property
    def recipe(self) -> Mapping[str, Any] | None:
        """The recipe by which the base was quantised (`bases.recipe`), or None."""
        return shared_base.shared_recipe(self.members)

    @property
    def changed_by(self) -> Any:
        """The method by which the base was changed before the first step, or None."""
        return shared_base.shared_change(self.members)

    @property
    def root(self) -> str:
        """The prefix of the base's parameters in the paths of the adapters."""
        return f"{self.config.root}/" if self.classifies else ""

    @property
    def classifies(self) -> bool:
        """Whether the adapters classify, as an encoder's do; else they write texts."""
        return not isinstance(self.config, models.DecoderConfig) or _on_last_token(self.members)

    @property
    def member(self) -> SavedAdapter:
        """The only adapter."""
        (member,) = self.members
        return member

    @functools.cached_property
    def head(self) -> models.Head | None:
        """The classification head that was trained with the adapter; None for one that writes."""
        if not self.classifies:
            return None
        member = self.member
        check_head(member, len(member.labels) or 1)
        default = "cls" if isinstance(self.config, models.VitConfig) else "mean"
        pooling = member.model.get("pooling", default)
        if pooling not in list(table_of(self.config).heads):  # a stranger's may be unhashable
            raise LoraError(f"{member.folder} says model.pooling is {str(pooling)[:80]!r}")
        return models.Head(pooling, len(member.labels) or 1)

    @property
    def shapes(self) -> Any:
        """The shapes of the parameters with the head, before they are quantised."""
        return models.shapes(self.config, self.head)

    @property
    def trained_on(self) -> str:
        """A description of the weights on which the adapter was trained."""
        if self.recipe is None:
            found = f"{jnp.dtype(self.config.param_dtype)} weights"
            if self.source.path.suffix == ".gguf":  # whose own types are others
                found += f", expanded from {self.source.path.name}"
        else:
            scheme = self.recipe["scheme"]
            found = f"weights that were quantised ({scheme}), as the floats that they stand for"
        method = self.changed_by
        return found if method is None else f"{found}, changed before training by {method}"

    def id_of(self, name: str | None, where: str) -> int:
        """Return the id of an adapter; "base" is `lora_jax.multi.BASE`.

        None is the only adapter, or the base if there is none. `where` is the place of the request,
        for the error message.
        """
        if name is None and len(self.slots) <= 1:
            return next(iter(self.slots), BASE)
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
        return next(i for i, member in self.slots.items() if member.name == name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseChoice:
    """Which base model may be opened for adapters. The commands have these fields as options."""

    base: str | None = None
    """The base model, in the form of model.reference. None: the one that the adapter names."""
    trust_base: bool = False
    """Download the base that the adapter names even if lora_jax does not know its checksum."""
    allow_other_base: bool = False
    """Accept a base model other than the one that the adapter was trained on."""

    def open(
        self,
        adapters: Sequence[str],
        task: Literal["predict", "generate"] | None = None,
        opened: Callable[[int, int], None] = lambda number, total: None,
    ) -> Served:
        """Open adapters and load their base.

        An adapter is `[NAME=]PATH`, as in `checkpoint.adapter_path.find`. `task` is what the caller
        can do (None: both), and `opened` is called with the number of adapters that are open, first
        0, and of all.
        """
        members = _members(adapters, self.allow_other_base, opened)
        found = open_base(members, self.base, self.trust_base)
        _check_task(found, task)
        found.params  # noqa: B018  errors of the base come here
        return found


def open_run(path: str, base: str | None = None, trust_base: bool = False) -> Served:
    """Open one adapter on its base, of which no weight is read."""
    name, folder = adapter_path.find_one(path)
    run = open_base([_read(folder, name)], base, trust_base)
    run.member.layout.check_params(paths.flatten(run.shapes))
    return run


def open_base(
    members: Sequence[SavedAdapter], base: str | None = None, trust_base: bool = False
) -> Served:
    """Open the base of some adapters, with the settings that they were trained with."""
    settings = shared_base.shared_settings(members, base, trust_base)
    reference = settings.pop("reference")
    source = models.open(reference)
    config = dataclasses.replace(source.config, **settings)
    if isinstance(config, models.DecoderConfig) and _on_last_token(members):
        config = config.without_logits()
    return Served(reference, source, config, tuple(members))


def check_head(member: SavedAdapter, outputs: int) -> None:
    """Raise unless an adapter was trained with a head of so many outputs."""
    shape = member.trainable_shapes.get("classifier/out/kernel")
    if shape is None or shape[-1:] != (outputs,):
        raise LoraError(
            f"adapter {member.name!r} ({member.folder}) needs a head of {outputs} outputs; "
            f"it has {'none' if not shape else shape[-1]}. These parameters were "
            f"trained in full with it:\n{listed(member.trainable_shapes)}"
        )


def _read(path: RemotePath, name: str, allow_other_base: bool = False) -> SavedAdapter:
    member = SavedAdapter.open_lora(path, name, allow_other_base)
    member.adapter  # noqa: B018  its arrays are read, and checked, now
    return member


def _members(
    adapters: Sequence[str], allow_other_base: bool, opened: Callable[[int, int], None]
) -> tuple[SavedAdapter, ...]:
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
        members.append(_read(path, name, allow_other_base))
        opened(len(members), len(places))
    return tuple(members)


def _on_last_token(members: Sequence[SavedAdapter]) -> bool:
    """Return whether adapters of a decoder classify."""
    return any(member.model.get("pooling") == LAST for member in members)


def _check_task(served: Served, task: str | None) -> None:
    other = "predict" if served.classifies else "generate"
    if task in (None, other):
        return
    what = "a decoder" if isinstance(served.config, models.DecoderConfig) else "an encoder"
    what += ", and its adapters classify" if what == "a decoder" and served.classifies else ""
    raise LoraError(f"the base {served.reference} is {what}; `lora-jax {other}` runs it")
