"""The weights of a run with its adapter merged into them, one tensor at a time.

The adapter is merged into the weights on which it was trained: the file's weights rounded to
`model.param_dtype`, or the dequantised floats of the run's quantised weights. The sum is formed in
float32 and rounded once, to the dtype that is written.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Generator, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.analysis.from_base import init_from_base
from lora_jax.base import dense
from lora_jax.bases.recipe import STORED, requantised
from lora_jax.checkpoint.fingerprint import PartwiseFingerprint, fingerprint
from lora_jax.errors import LoraError
from lora_jax.exchange.tensor_file import LazyTensor
from lora_jax.layout import Layout
from lora_jax.models.hf_names import hf_prefix
from lora_jax.models.weights.assemble import load_one, read_slice
from lora_jax.models.weights.families import table_of
from lora_jax.models.weights.stored import StoredParameter, parameters
from lora_jax.models.weights.tensor_names import TensorName
from lora_jax.serving.served_adapters import Served
from lora_jax.updates.kind import kind_of
from lora_jax.updates.sliced import sliced


class MergedWeights:
    """The merged weights of a run by Hugging Face's names.

    Tensors of the file that the model does not use (a pooler, the head of another task) are left
    out.
    """

    def __init__(self, run: Served, dtype: Any = jnp.float32) -> None:
        """Look up the tensors, to be written as `dtype`, without reading them."""
        self._run, self._dtype = run, np.dtype(dtype)
        self._stored = run.source.stored(run.config)
        self._parameters = parameters(self._stored, run.config, None)
        self._hashes: dict[str, Any] = {}

    def tensors(self) -> list[LazyTensor]:
        """Return all tensors in the order of the model. Make each one once, in this order."""
        found = [x for parameter in self._parameters for x in self._of_parameter(parameter)]
        return [*found, *self._of_head()]

    def changed(self) -> dict[str, tuple[StoredParameter, LazyTensor]]:
        """Return the tensors that differ from the base's, by the names that the base's file has."""
        run = self._run
        everything = run.changed_by is not None or run.recipe not in (None, {"scheme": STORED})
        own = {t.path for t in run.member.layout.targets} | {*run.member.trainable}
        found = dict[str, tuple[StoredParameter, LazyTensor]]()
        for parameter in self._parameters:
            if everything or run.root + parameter.path in own:
                tensors = zip(parameter.sources, self._of_parameter(parameter), strict=True)
                found |= {name: (parameter, tensor) for name, tensor in tensors}
        return found

    def check_base(self) -> None:
        """Raise `LoraError` unless the file has the base of the run. Call it after all are made."""
        for parameter in self._parameters:
            path = self._run.root + parameter.path
            if path not in self._hashes and path not in self._run.member.trainable:
                collections.deque(self._base(path, parameter), 0)
        self._run.member.check_base(self._hashes)

    def _of_parameter(self, parameter: StoredParameter) -> Iterator[LazyTensor]:
        """Yield the tensors of one parameter: one per layer, one per expert."""
        row, slices = parameter.row, self._merged(parameter)
        prefix = hf_prefix(self._run.config, row, self._run.head)
        shape = parameter.shape[::-1] if row.transposed else parameter.shape
        for name in parameter.hf:
            last = name == parameter.hf[-1]
            make = functools.partial(self._next, prefix + name, row, slices, last)
            yield LazyTensor(prefix + name, shape, self._dtype, make)

    def _of_head(self) -> Iterator[LazyTensor]:
        head, config = self._run.head, self._run.config
        if head is None:
            return
        shapes = paths.flatten({"classifier": self._run.shapes["classifier"]})
        for row in table_of(config).heads[head.pooling]:
            if row.path not in shapes:
                continue
            value = self._run.member.trainable[row.path]
            shape = value.shape[::-1] if row.transposed else value.shape
            name = hf_prefix(config, row, head) + row.hf
            make = functools.partial(self._next, name, row, (x for x in [value]), True)
            yield LazyTensor(name, tuple(shape), self._dtype, make)

    def _next(
        self, name: str, row: TensorName, slices: Generator[Any, None, None], last: bool
    ) -> np.ndarray:
        """Return the next slice in the form of the file."""
        wide = np.asarray(next(slices))
        if last:
            slices.close()  # otherwise it holds its weight until all are written
        if not np.isfinite(wide).all():
            raise LoraError(
                f"{name} is not finite with the adapter merged into it: the base or the adapter "
                f"({self._run.member.folder}) holds NaN or infinity; export another adapter"
            )
        with np.errstate(over="ignore"):  # an overflow is an error below
            value = (wide.T if row.transposed else wide).astype(self._dtype)
        if not np.isfinite(value).all():
            raise LoraError(
                f"{name} has numbers up to {np.abs(wide).max():.3g}, which {self._dtype} cannot "
                "hold: --dtype bfloat16, or float32"
            )
        return value

    def _merged(self, parameter: StoredParameter) -> Generator[Any, None, None]:
        """Yield the merged slices of one parameter, in the order of its tensors."""
        path = self._run.root + parameter.path
        trained, layout = self._run.member.trainable, self._run.member.layout
        target = {t.path: t for t in layout.targets}.get(path)
        indices = list(itertools.product(*map(range, parameter.stack)))
        if path in trained:
            yield from (trained[path][index] for index in indices)
            return
        slices = self._base(path, parameter)
        if target is None:
            yield from slices
            return
        own = self._run.member.parameters[path]
        if not set(range(len(parameter.stack))) <= set(target.stack):
            whole = jnp.stack([jnp.asarray(w, jnp.float32) for w in slices])
            merged = kind_of(target).merged(target, own, whole.reshape(target.shape))
            yield from (merged[index] for index in indices)
            return
        for index, w in zip(indices, slices, strict=True):
            one, arrays = sliced(target, own, index)
            yield kind_of(one).merged(one, arrays, jnp.asarray(w, jnp.float32))

    def _base(self, path: str, parameter: StoredParameter) -> Iterator[Any]:
        """Yield the slices of one frozen weight as training had it, and hash them on the way."""
        config = self._run.config
        if self._run.recipe is not None or self._run.changed_by is not None:
            whole = self._changed(path, parameter)
            self._hashes |= fingerprint({path: whole})
            floats = dense(whole)
            yield from (floats[i] for i in itertools.product(*map(range, parameter.stack)))
            return
        parts = PartwiseFingerprint(parameter.whole)
        for number in range(len(parameter.sources)):
            w = jnp.asarray(read_slice(self._stored, parameter, number, config))
            parts.add(w)
            self._hashes[path] = parts.value
            yield w

    def _changed(self, path: str, parameter: StoredParameter) -> Any:
        """Return the weight as the run changed it before the first step."""
        run, how = self._run, self._run.recipe
        keep = how == {"scheme": STORED}
        floats = load_one(self._stored, parameter, run.config, keep)
        w = floats
        if how is not None and not keep:
            layout = Layout.from_json(how["layout"]).subset(path)
            w = requantised({path: w}, {**how, "layout": layout.to_json()})[path]
        layout = run.member.layout.subset(path)
        if run.changed_by is None or not layout.targets:
            return w
        quantised = None if how is None else {path: w}
        changed = init_from_base(layout, {path: floats}, run.changed_by, quantised=quantised)
        return changed.params[path]
