"""Read tensors of a Hugging Face folder that bitsandbytes has quantised to 4 or 8 bits.

A weight `P.weight` comes with tensors that say how to read it:

    4 bits   P.weight.absmax, .quant_map, .quant_state.bitsandbytes__nf4 (or __fp4: JSON),
             and .nested_absmax, .nested_quant_map with double quantisation
    8 bits   P.SCB, P.weight_format
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.base import QuantisedMatrix
from lora_jax.bases.dynamic import BLOCK, Dynamic
from lora_jax.bases.nf4 import FourBit
from lora_jax.bases.scaled import ScaledCodes
from lora_jax.errors import WeightsError, damaged
from lora_jax.models.weights.disk_arrays import ArrayOnDisk, Index, in_memory
from lora_jax.system.safetensors_reader import FLOATS, StoredTensor

_STATE = ".quant_state.bitsandbytes__"
_ENDINGS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


@dataclasses.dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """A quantised weight [out, in], and the tensors that belong to it, by their endings."""

    weight: StoredTensor
    others: Mapping[str, StoredTensor]

    @property
    def shape(self) -> tuple[int, ...]:
        if ".SCB" in self.others:
            return self.weight.shape
        return tuple(self._state["shape"])

    def base(self, transposed: bool, dtype: Any) -> QuantisedMatrix:
        """Return the base of W, [in, out] if transposed, else [out, in], with arrays on disk."""
        order = (1, 0) if transposed else (0, 1)
        name = np.dtype(dtype).name
        if ".SCB" in self.others:
            return ScaledCodes(self.shape, order, name, *self._eight_bits())
        codes, scales = self._four_bits()
        table = tuple(map(float, self._read(".quant_map", (16,), np.float32)))
        return FourBit(self.shape, order, name, codes, scales, self._state["blocksize"], table)

    def numbers(self) -> np.ndarray:
        """Return the weight [out, in] in float32."""
        base = self.base(transposed=False, dtype=np.float32)
        return np.asarray(jax.tree.map(lambda array: array.whole(), base).dense())

    @functools.cached_property
    def _state(self) -> dict[str, Any]:
        """The values of the JSON: blocksize, shape, and the offset of nested statistics."""
        ending = next(x for x in self.others if x.startswith(_STATE))
        try:
            state = json.loads(self._raw(ending).tobytes())
            known: dict[str, Any] = {
                "blocksize": int(state["blocksize"]),
                "shape": [int(x) for x in state["shape"]],
            }
            if ".nested_absmax" in self.others:
                known["offset"] = np.float32(state["nested_offset"])
                if state["nested_blocksize"] != BLOCK:
                    raise ValueError(f"nested_blocksize is {state['nested_blocksize']}")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise damaged(self.weight.path, f"{self.weight.name}{ending}: {error!r}") from error
        if len(known["shape"]) != 2 or known["blocksize"] < 1:
            raise damaged(self.weight.path, f"{self.weight.name}{ending} says {known}")
        return known

    def _four_bits(self) -> tuple[Any, Any]:
        outputs, inputs = self.shape
        block, size = self._state["blocksize"], outputs * inputs
        rows = outputs if inputs % block == 0 else 1
        blocks = -(-size // block)
        # With quant_storage the bytes may be stored as floats; they are the same bytes.
        codes = self._bytes(rows, -(-size // 2))
        if ".nested_absmax" not in self.others:
            scales = self._read(".absmax", (blocks,), np.float32).reshape(rows, -1)
            return codes, in_memory(scales)
        nested = Dynamic(
            in_memory(self._read(".absmax", (blocks,), np.uint8).reshape(rows, -1)),
            in_memory(self._read(".nested_absmax", (-(-blocks // BLOCK),), np.float32)),
            in_memory(np.array(self._state["offset"], np.float32)),
            in_memory(self._read(".nested_quant_map", (256,), np.float32)),
        )
        return codes, nested

    def _bytes(self, rows: int, size: int) -> ArrayOnDisk:
        def read(index: Index) -> np.ndarray:
            raw = self.weight.whole().reshape(-1).view(np.uint8)
            if raw.size != size:
                raise damaged(
                    self.weight.path, f"{self.weight.name} has {raw.size} bytes of {size}"
                )
            return raw.reshape(rows, -1)[index]

        return ArrayOnDisk((rows, size // rows), np.dtype(np.uint8), read)

    def _eight_bits(self) -> tuple[Any, Any]:
        outputs, _ = self.shape
        layout = ".weight_format"
        if layout in self.others and self._raw(layout).item() != 0:
            raise WeightsError(
                f"{self.weight.path}: {self.weight.name} is in an order for one kind of GPU "
                f"(weight_format {self._raw(layout).item()}); supported is 0, rows. Save the model "
                "again with a newer bitsandbytes"
            )
        scales = self._read(".SCB", (outputs,), np.float32) / np.float32(127)
        codes = ArrayOnDisk(self.weight.shape, np.dtype(np.int8), self.weight.part)
        return codes, in_memory(scales[:, None])

    def _read(self, ending: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if ending not in self.others:
            raise damaged(self.weight.path, f"{self.weight.name} has no {ending}")
        found = self._raw(ending)
        if found.shape != shape or found.dtype != dtype:
            raise damaged(
                self.weight.path,
                f"{self.weight.name}: {ending} is {found.dtype}{list(found.shape)}, expected "
                f"{np.dtype(dtype)}{list(shape)}",
            )
        return found

    def _raw(self, ending: str) -> np.ndarray:
        return self.others[ending].whole()


def split(
    held: Mapping[str, StoredTensor],
) -> tuple[dict[str, StoredTensor], dict[str, QuantisedTensor]]:
    """Split the tensors of a folder into plain ones and weights that bitsandbytes has quantised."""
    plain, quantised = dict(held), {}
    for name, weight in held.items():
        if not name.endswith(".weight"):
            continue
        others = _others(name, held)
        if not others:
            continue
        quantised[name] = QuantisedTensor(weight, others)
        for x in (weight, *others.values()):
            del plain[x.name]
    return plain, quantised


def _others(name: str, held: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors that belong to a quantised weight, by ending; none if it is plain."""
    found = {end: held[name + end] for end in _ENDINGS if name + end in held}
    states = [other for other in held if other.startswith(name + _STATE)]
    found |= {other.removeprefix(name): held[other] for other in states}
    stem = name.removesuffix(".weight")
    eight = {end: held[stem + end] for end in (".SCB", ".weight_format") if stem + end in held}
    if ".SCB" in eight:
        return eight
    if found and (len(states) != 1 or states[0] not in (name + _STATE + x for x in ("nf4", "fp4"))):
        raise WeightsError(
            f"{held[name].path}: {name} has 4-bit statistics of {states or 'no type'}; supported "
            f"are {_STATE}nf4 and {_STATE}fp4, one for each weight"
        )
    return found


def check_floats(tensor: StoredTensor, method: Any) -> None:
    """Raise `WeightsError` for integers in place of floats."""
    if tensor.dtype not in FLOATS:
        raise WeightsError(
            f"{tensor.path}: tensor {tensor.name} is stored as {tensor.dtype}{list(tensor.shape)}, "
            f"and its scaling is not known (quant_method is {method!r}). Supported are "
            f"{', '.join(FLOATS)}, and the tensors that bitsandbytes writes in 4 and 8 bits"
        )
