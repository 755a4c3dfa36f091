"""The types of the tables in `names`: one row for each tensor, with our path and its stored names.

`{layer}` stands for the number of the layer. A row is skipped if the model does not have its path
(a bias, a q/k norm, an untied head).
"""

import dataclasses
import fnmatch
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class TensorName:
    """One tensor (of each layer, of each expert): our path, Hugging Face's name, GGUF's name.

    All experts are one array of ours; `hf` is the name of one of them. `in_out`: Hugging Face
    stores the kernel as [in, out], too (GPT-2's `Conv1D`). `first_layer` is the first layer that
    has it.
    """

    path: str
    hf: str
    gguf: str = ""
    in_out: bool = False
    first_layer: int = 0

    @property
    def transposed(self) -> bool:
        """Whether it is a kernel stored as [out, in, ...], where ours is [..., in, out]."""
        return self.path.endswith("/kernel") and not self.in_out

    @property
    def layered(self) -> bool:
        """Whether every layer has such a tensor."""
        return "{layer}" in self.path

    @property
    def of_experts(self) -> bool:
        """Whether every expert has such a tensor."""
        return "{expert}" in self.hf

    @property
    def stacked_path(self) -> str:
        """The path in a tree of scanned layers, where one array holds all layers."""
        return re.sub(r"layers?_\{layer\}", "layers", self.path)


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """The rows of one architecture, and the variants of its Hugging Face files.

    `heads`: pooling -> rows of a classification head, whose paths start with `classifier/`.
    `prefix` may stand before every name in `rows`. `skipped` are patterns (fnmatch) of names that
    are stored but not wanted. `renamed`: ending in old files -> ending today.
    """

    rows: tuple[TensorName, ...]
    heads: Mapping[str, tuple[TensorName, ...]] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    skipped: tuple[str, ...] = ()
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)

    def clean(self, name: str) -> str:
        """Return a stored name as in the rows: without prefix, in today's spelling."""
        name = name.removeprefix(self.prefix)
        for old, new in self.renamed.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return name

    def skips(self, name: str) -> bool:
        """Return whether a (clean) name is known and not wanted."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.skipped)


def linear(path: str, hf: str, gguf: str = "") -> tuple[TensorName, TensorName]:
    return (
        TensorName(f"{path}/kernel", f"{hf}.weight", gguf and f"{gguf}.weight"),
        TensorName(f"{path}/bias", f"{hf}.bias", gguf and f"{gguf}.bias"),
    )


def conv1d(path: str, hf: str) -> tuple[TensorName, TensorName]:
    return (
        TensorName(f"{path}/kernel", f"{hf}.weight", in_out=True),
        TensorName(f"{path}/bias", f"{hf}.bias"),
    )


def layer_norm(path: str, hf: str) -> tuple[TensorName, TensorName]:
    return scale(path, hf), TensorName(f"{path}/bias", f"{hf}.bias")


def scale(path: str, hf: str, gguf: str = "") -> TensorName:
    return TensorName(f"{path}/scale", f"{hf}.weight", gguf and f"{gguf}.weight")


def of_layers(path: str, hf: str, gguf: str, *rows: TensorName) -> tuple[TensorName, ...]:
    """Return rows of every layer, with prefixes before each name."""
    return tuple(
        dataclasses.replace(row, path=path + row.path, hf=hf + row.hf, gguf=gguf + row.gguf)
        for row in rows
    )
