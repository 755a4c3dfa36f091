"""Which parameter is which module of a Hugging Face model: the table that an exchange needs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from lora_jax.errors import LoraError

LayerKind = Literal["linear", "embedding", "conv", "experts"]
EMBEDDING = re.compile(r".*embed(ding)?s?(_tokens|_in)?|wte|wpe|shared|tok_embeddings")


@dataclasses.dataclass(frozen=True)
class HfModule:
    """The place of a parameter in a Hugging Face model, with what its name does not say.

    Where nothing but the name has to be said a string will do: `"model.norm"` stands for
    `HfModule("model.norm")`.

    Attributes:
      name: of the module, `"model.layers.{layer}.self_attn.q_proj"`; `.weight` or `.bias` may be
        added, and otherwise follows from the last key of the path. What stands in braces is a
        number: one of the path, `layers_{layer}/q/kernel`, or else one along the next stack axis
        of the parameter (scanned layers, experts).
      layer: "linear", "embedding", "conv", or "experts": one parameter that holds all experts,
        which the name counts, `"model.layers.{layer}.mlp.experts.{expert}.down_proj"`. "": an
        embedding where the path or the name says so, else linear. A weight with several input
        axes needs it: a convolution and a product with heads look alike.
      part: (start, size): the slice of our parameter that this module is, where ours is a fused
        one: of its output axis `axis`, an index into the output axes.
      rows: (start, size): the output rows of the module that our parameter is, where theirs is a
        fused one.
      rotary: the size of a head, where our model rotates the pairs (2i, 2i + 1) of it and theirs
        (i, i + half), as Hugging Face's does.
      transposed: whether the module stores a whole weight as [out, in] and ours is [in, out].
        None: where the last key of the path is `kernel`, and not where it is `weight`.
      tied: the output head that shares this embedding, `"lm_head"`.
    """

    name: str
    layer: LayerKind | Literal[""] = ""
    part: tuple[int, int] | None = None
    axis: int = -1
    rows: tuple[int, int] | None = None
    rotary: int = 0
    transposed: bool | None = None
    tied: str = ""

    def tensor(self, path: str) -> str:
        """The name of the tensor, given the path of the parameter.

        >>> HfModule("encoder.dense").tensor("dense/kernel"), HfModule("norm.bias").tensor("b")
        ('encoder.dense.weight', 'norm.bias')
        """
        if self.name.endswith((".weight", ".bias")):
            return self.name
        return f"{self.name}.bias" if path.endswith("bias") else f"{self.name}.weight"

    def layer_of(self, path: str) -> LayerKind | Literal[""]:
        """`layer`, or what the path and the name say of it."""
        if self.layer:
            return self.layer
        last = self.name.removesuffix(".weight").rpartition(".")[2]
        found = path.endswith("embedding") or EMBEDDING.fullmatch(last)
        return "embedding" if found else ""

    def is_transposed(self, path: str) -> bool:
        """`transposed`, or what the last key of the path says of it.

        Raises:
          LoraError: neither says it.
        """
        if self.transposed is not None:
            return self.transposed
        last = re.split(r"[/.]", path)[-1]
        if last in ("kernel", "weight") or self.layer_of(path) == "embedding":
            return last == "kernel"
        raise LoraError(
            f"{path!r} is a matrix, and nothing says whether it is stored as the module "
            f"{self.name!r} stores its weight: HfModule({self.name!r}, transposed=True) if ours is "
            "[in, out] and theirs [out, in], False if they are alike"
        )


HfNames = Mapping[str, "str | HfModule | Sequence[HfModule]"]
"""`{path: module}`. Several modules for one path are the parts of a fused parameter; of several
for the same part the first is written and each is read. A path holds `{layer}` and the like."""


def fused(*modules: tuple[str, int], axis: int = -1) -> tuple[HfModule, ...]:
    """Return the modules that a fused parameter is, one after the other along an output axis.

    Args:
      *modules: (name, size along the axis) of each.
      axis: which output axis, as an index into them.

    >>> [m.part for m in fused(("attn.q_proj", 8), ("attn.k_proj", 4), ("attn.v_proj", 4))]
    [(0, 8), (8, 4), (12, 4)]
    """
    found, start = [], 0
    for name, size in modules:
        found.append(HfModule(name, part=(start, size), axis=axis))
        start += size
    return tuple(found)
