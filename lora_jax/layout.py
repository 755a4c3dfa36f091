"""The layout: which parameters are adapted, and the role of each of their axes.

A layout is static data: hashable, printable, and saved with the adapters. `lora_jax.resolve`
returns one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax import paths
from lora_jax.base import is_base
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.spec import LoraSpec, Target
from lora_jax.system import json_file, table
from lora_jax.updates.kind import kind_of

FORMAT = 1
AXES = 32  # of a parameter, as NumPy's arrays have
MOST = 2**62  # of a size


@dataclasses.dataclass(frozen=True)
class Remark:
    """A remark of a layout about one parameter.

    Attributes:
      path: the path of the parameter.
      shape: its shape.
      reason: the remark, such as why the parameter is not adapted.
    """

    path: str
    shape: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """All targets, in the order of the parameter tree. Hashable.

    `print(layout)` is a table of at most 100 columns. Parameters that differ in a layer's number or
    in one name have one line, with the pattern that matches them.

    Attributes:
      targets: the adapted parameters.
      left_out: the parameters that `"all-linear"` left out, each with the reason. They are printed
        and saved, but ignored when layouts are compared.
      chosen: the targets of which an axis may be meant in two ways, and what was chosen. They are
        printed and saved where there are any, and ignored when layouts are compared.
      dequantised: the quantised parameters, adapted or not, that some operation needs as a whole
        float array: a lookup, or an operation without a rule. (A product reads the codes.) They are
        printed and saved where there are any, and ignored when layouts are compared.

    Raises:
      LoraError: a target whose kind is unknown, or whose rank or axes its kind does not allow.
    """

    targets: tuple[Target, ...] = ()
    left_out: tuple[Remark, ...] = dataclasses.field(default=(), compare=False)
    dequantised: tuple[Remark, ...] = dataclasses.field(default=(), compare=False)
    chosen: tuple[Remark, ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        for target in self.targets:
            kind_of(target).check(target)

    def __getitem__(self, path: str) -> Target:
        known = {t.path: t for t in self.targets}
        if path not in known:
            near = listed(nearest(path, known))
            raise LoraError(f"no target {path!r} in the layout; nearest:\n{near}")
        return known[path]

    @property
    def size(self) -> int:
        """The number of array elements in an adapter tree of this layout."""
        return sum(_size(t) for t in self.targets)

    def subset(self, *patterns: str) -> Layout:
        """Return the layout of the targets that some pattern matches.

        Use it for a function that reads only part of the parameters: `adapt` refuses an adapter
        that is never read.

        Args:
          *patterns: patterns in the language of `lora_jax.paths`.

        Returns:
          A layout with the matching targets, in the same order.
        """
        known = [t.path for t in self.targets]
        keep = {path for pattern in patterns for path in paths.matching(pattern, known)}
        return Layout(tuple(t for t in self.targets if t.path in keep))

    def to_json(self) -> str:
        """Return the layout as JSON text. `from_json` reads it back as an equal layout."""
        data = {"format": FORMAT, **dataclasses.asdict(self)}
        if not self.chosen:
            del data["chosen"]
        return json.dumps(data, indent=1)

    @staticmethod
    def from_json(text: str) -> Layout:
        """Read the text that `to_json` wrote.

        Args:
          text: the JSON text.

        Returns:
          The layout.

        Raises:
          LoraError: text that is not a layout, or a layout with a field that this version does not
            know.
        """
        where = f"this is not a layout: {text[:80]!r}"
        data = json_file.parse_object(text.encode(errors="surrogatepass"), where, LoraError)
        known = ["format", *(f.name for f in dataclasses.fields(Layout))]
        if missing := [name for name in known if name not in data and name != "chosen"]:
            raise LoraError(f"{where} has no {missing[0]!r}")
        version = data["format"]
        _check_understood("a layout", version, set(data) - {*known})
        read = _read(Target, "a target of a layout", data["targets"], version)
        if (twice := json_file.first_repeated(target.path for target in read)) is not None:
            raise LoraError(f"{where} has the target {twice[:200]!r} twice")
        return Layout(
            read,
            _read(Remark, "a parameter that a layout left out", data["left_out"], version),
            _read(Remark, "a dequantised parameter of a layout", data["dequantised"], version),
            _read(Remark, "a choice of a layout", data.get("chosen", ()), version),
        )

    def check_params(self, leaves: Mapping[str, Any]) -> None:
        """Raise `LoraError` unless each target is among the leaves and has its shape.

        Args:
          leaves: `{path: leaf}`, as `lora_jax.paths.flatten` returns it. A leaf is an array, a
            `jax.ShapeDtypeStruct` or a quantised base.

        Raises:
          LoraError: a target that is missing, has another shape, or is not a float array.
        """
        for target in self.targets:
            if target.path not in leaves:
                raise LoraError(
                    f"the layout does not fit the parameters: they have no {target.path!r}; "
                    f"nearest:\n{listed(nearest(target.path, leaves))}\n"
                    "Pass the same parameter tree (with the same root) as to lora_jax.resolve."
                )
            leaf = leaves[target.path]
            shape = tuple(leaf.shape if is_base(leaf) else jnp.shape(leaf))
            dtype = leaf.dtype if is_base(leaf) else jnp.result_type(leaf)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise LoraError(
                    f"{target.path!r} is an array of {dtype}, and an adapter belongs to a float "
                    "array or to a quantised base (lora_jax.quantize)"
                )
            if shape != target.shape:
                raise LoraError(
                    f"the layout does not fit the parameters: {target.path!r} has shape {shape}, "
                    f"the layout has {target.shape}; resolve the spec again on this model"
                )

    def __str__(self) -> str:
        heading: tuple[str, ...] = ("shape", "stack", "in", "out", "kind", "rank", "scale")
        rows = [(t.path, _row(t), _size(t)) for t in self.targets]
        words = heading.index("rank")
        if all(
            t.kind == LoraSpec.kind and not (t.parts or t.fold) for t in self.targets
        ):  # then it says nothing
            words -= 1
            heading = (*heading[:words], *heading[words + 1 :])
            rows = [(path, (*x[:words], *x[words + 1 :]), size) for path, x, size in rows]
        lines = [table.of_paths(heading, rows, words, self.size)]
        for name in ("left_out", "dequantised", "chosen"):
            title = name.replace("_", " ") + ":"
            said = [(x.path, _times(x.shape), x.reason) for x in getattr(self, name)]
            lines += table.remarks(title, said)
        return "\n".join(lines)


def _size(target: Target) -> int:
    """Return the number of array elements in one target's adapter."""
    return sum(math.prod(shape) for shape in kind_of(target).shapes(target))


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _row(t: Target) -> tuple[str, ...]:
    def text(which: tuple[int, ...]) -> str:
        return ",".join(map(str, which)) or "-"

    parts = ",".join(f"{start}:{start + size}" for start, size in t.parts)
    kind = f"{t.kind}[{parts}]" if parts else t.kind
    kind += " folded" if t.fold else ""
    ranked = any(None in axes for axes in kind_of(t).axes(t))  # a bias has no rank
    roles = (text(t.stack), text(t.inputs), text(t.outputs))
    scale = f"{kind_of(t).scale(t):g}"
    return (_times(t.shape), *roles, kind, str(t.rank) if ranked else "-", scale)


def _read(type_: Any, what: str, rows: Any, version: int) -> tuple[Any, ...]:
    """Return the rows of a saved layout as objects of this type."""
    fields = [f.name for f in dataclasses.fields(type_)]
    found = []
    if not isinstance(rows, list | tuple):
        raise LoraError(f"{what} is expected in a list, got {str(rows)[:80]}")
    for row in rows:
        if not isinstance(row, dict):
            raise LoraError(f"this is not {what}: {str(row)[:200]}")
        _check_understood(what, version, set(row) - set(fields))
        missing = [name for name in fields if name not in row]
        if missing:
            raise LoraError(f"this is not {what}: it has no {missing[0]!r}: {str(row)[:200]}")
        values = {name: _as_tuple(value) for name, value in row.items()}
        for name, value in values.items():
            words, fits = _VALUES[name]
            if not fits(value):
                raise LoraError(f"this is not {what}: {name} is {str(value)[:80]}, not {words}")
        found.append(type_(**values))
    return tuple(found)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _are_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= AXES and all(map(_is_size, value))


def _are_parts(value: Any) -> bool:
    return isinstance(value, tuple) and all(_are_sizes(x) and len(x) == 2 for x in value)


_SIZES = (f"at most {AXES} integers from 0 to 2^62", _are_sizes)
_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("path", "kind", "scaling", "reason"), ("a text", lambda x: isinstance(x, str))
    ),
    **dict.fromkeys(("shape", "stack", "inputs", "outputs"), _SIZES),
    "rank": ("an integer from 0 to 2^62", _is_size),
    "alpha": ("a number", lambda x: type(x) in (int, float) and abs(x) <= 1e300),
    "fold": ("true or false", lambda x: isinstance(x, bool)),
    "parts": ("pairs of integers", _are_parts),
    "part_axis": ("an integer", lambda x: type(x) is int and abs(x) <= AXES),
}


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _check_understood(what: str, version: Any, unknown: set[str]) -> None:
    """Raise `LoraError` for a newer format or an unknown field: a layout is never read in part."""
    if unknown or version != FORMAT or type(version) is not int:
        field = f" and the field {min(unknown)[:80]!r}" if unknown else ""
        raise LoraError(
            f"{what} has format {repr(version)[:80]}{field}, which this lora_jax does not "
            f"understand (it reads format {FORMAT}); use the lora_jax that wrote it, or a "
            "newer one"
        )
