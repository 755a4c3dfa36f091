"""Rows of the tables in `names`: one tensor each, by our path, in Hugging Face's files and in GGUF.

One row per tensor; `{layer}` stands for the layer's number. A row whose path the model of a
given configuration does not have (a bias, a q/k norm, an untied head) is not looked for.
"""

import dataclasses
import fnmatch
import re


@dataclasses.dataclass(frozen=True)
class TensorName:
    """One tensor (of each layer, of each expert): our path, Hugging Face's name, GGUF's name.

    Attributes:
        path: a bank of experts is one array, with the experts first; `hf` names that of one.
        first_layer: the layers before it have no such tensor.
        in_out: a kernel that Hugging Face stores as [in, out] too (GPT-2's `Conv1D`).
    """

    path: str
    hf: str
    gguf: str = ""
    in_out: bool = False
    first_layer: int = 0

    @property
    def transposed(self) -> bool:
        """Whether it is a kernel that is stored [out, in, ...]: ours is [..., in, out]."""
        return self.path.endswith("/kernel") and not self.in_out

    @property
    def layered(self) -> bool:
        """Whether there is one such tensor in every layer."""
        return "{layer}" in self.path

    @property
    def of_experts(self) -> bool:
        """Whether there is one such tensor for every expert."""
        return "{expert}" in self.hf

    @property
    def stacked_path(self) -> str:
        """The path in a tree of scanned layers, where one array holds all of them."""
        return re.sub(r"layers?_\{layer\}", "layers", self.path)


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """The rows of one architecture, and how its Hugging Face files vary.

    Attributes:
        rows: the model's own tensors.
        heads: rows of a classification head by pooling; their paths start at `classifier/`.
        prefix: what may stand before every Hugging Face name that `rows` has.
        skipped: patterns (fnmatch) of names that are there and not wanted.
        renamed: endings of old files and what they are called now.
    """

    rows: tuple[TensorName, ...]
    heads: dict[str, tuple[TensorName, ...]] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    skipped: tuple[str, ...] = ()
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)

    def clean(self, name: str) -> str:
        """A stored name as the rows have it: without a prefix, in today's spelling."""
        name = name.removeprefix(self.prefix)
        for old, new in self.renamed.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return name

    def skips(self, name: str) -> bool:
        """Whether a (clean) name is known, and known not to be wanted."""
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
    """Rows of every layer: each name with what stands before it."""
    return tuple(
        dataclasses.replace(row, path=path + row.path, hf=hf + row.hf, gguf=gguf + row.gguf)
        for row in rows
    )
