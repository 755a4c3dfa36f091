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
    """The place of a parameter in a Hugging Face model, with the facts that its name leaves open.

    If the name says it all, a string is enough: `"model.norm"` stands for `HfModule("model.norm")`.

    Attributes:
      name: the name of the module, `"model.layers.{layer}.self_attn.q_proj"`. `.weight` or `.bias`
        may be added; otherwise it follows from the last key of the path. A name in braces stands
        for a number: one in the path, `layers_{layer}/q/kernel`, or else the index along the next
        stack axis of the parameter (scanned layers, experts). `{gate|up}` has a word for each.
      layer: "linear", "embedding", "conv", or "experts": one parameter that holds all experts,
        which the name counts, `"model.layers.{layer}.mlp.experts.{expert}.down_proj"`. "" means an
        embedding if the path or the name says so, and else linear. A weight with several input
        axes needs it: a convolution and a product with heads look alike.
      part: (start, size), if our parameter is fused: the slice of it that this module is.
      axis: the output axis that `part` slices, as an index into the output axes.
      rows: (start, size), if their module is fused: the output rows of it that our parameter is.
      rotary: the size of a head, if our model rotates its pairs (2i, 2i + 1) and theirs rotates
        (i, i + half), as Hugging Face does. 0: no difference.
      transposed: whether the module stores the whole weight as [out, in] and we store [in, out].
        None: yes if the last key of the path is `kernel`, no if it is `weight`.
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
        """Return the name of the tensor in a Hugging Face checkpoint.

        Args:
          path: the path of our parameter.

        >>> HfModule("encoder.dense").tensor("dense/kernel"), HfModule("norm.bias").tensor("b")
        ('encoder.dense.weight', 'norm.bias')
        """
        if self.name.endswith((".weight", ".bias")):
            return self.name
        return f"{self.name}.bias" if path.endswith("bias") else f"{self.name}.weight"

    def layer_of(self, path: str) -> LayerKind | Literal[""]:
        """Return `layer`, or "embedding" if the path or the name says so, or "".

        Args:
          path: the path of our parameter.
        """
        if self.layer:
            return self.layer
        last = self.name.removesuffix(".weight").rpartition(".")[2]
        found = path.endswith("embedding") or EMBEDDING.fullmatch(last)
        return "embedding" if found else ""

    def is_transposed(self, path: str) -> bool:
        """Return `transposed`, or the answer that the last key of the path gives.

        Args:
          path: the path of our parameter.

        Raises:
          LoraError: neither of them tells.
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
"""`{path: module}`, where a path may contain `{layer}` and the like.

Several modules for one path are the parts of a fused parameter. If several stand for the same
part, all of them are read and the first is written.
"""


def fused(*modules: tuple[str, int], axis: int = -1) -> tuple[HfModule, ...]:
    """Return the modules of a fused parameter, one after the other along an output axis.

    Args:
      *modules: (name, size along the axis) of each.
      axis: the output axis, as an index into the output axes.

    >>> [m.part for m in fused(("attn.q_proj", 8), ("attn.k_proj", 4), ("attn.v_proj", 4))]
    [(0, 8), (8, 4), (12, 4)]
    """
    found, start = [], 0
    for name, size in modules:
        found.append(HfModule(name, part=(start, size), axis=axis))
        start += size
    return tuple(found)
