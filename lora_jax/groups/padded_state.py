"""States of different shapes, padded with zeros to common shapes, and cut back bit for bit.

A zero that fills up stays zero in training: where a column of `a` and the row of `b` that meets it
are both zero, so are their gradients; a head's column whose logit the loss leaves out has none; and
AdamW moves no zero that has no gradient. So the step needs no mask of ranks.

All of this is done on the host: it happens as a group begins, when its members change and as they
are written, and compiles nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.training.state import State, Trained

Tree = Any  # a pytree
HostState = dict[Any, np.ndarray]  # key path -> array


@dataclasses.dataclass(frozen=True)
class StateShapes:
    """The shapes, dtypes and shardings of one state: `like` is of jax.ShapeDtypeStructs.

    Of an array that another form has too, but smaller, every axis is filled up at its end.
    """

    like: State

    def host(self, state: State) -> HostState:
        """A state of this form as arrays on the host."""
        found = {}
        for path, leaf in _leaves(state):
            # A copy: on a CPU the array itself may be given up to the next step.
            found[path] = np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        return found

    def pad(self, arrays: HostState) -> HostState:
        """Arrays of another form in this one: filled up with zeros, all zeros if not there."""
        found = {}
        for path, leaf in _leaves(self.like):
            shape, dtype = _stored(leaf)
            found[path] = np.zeros(shape, dtype)
            if path in arrays:
                own = arrays[path]
                found[path][tuple(map(slice, own.shape))] = own
        return found

    def unpad(self, arrays: HostState) -> HostState:
        """The arrays of this form out of ones that were filled up."""
        found = {}
        for path, leaf in _leaves(self.like):
            shape, _ = _stored(leaf)
            found[path] = arrays[path][tuple(map(slice, shape))]
        return found

    def state(self, arrays: HostState) -> State:
        """Arrays of this form on their devices."""
        return _placed(self.like, arrays, lambda leaf: leaf.sharding)

    def trained(self, arrays: HostState) -> Trained:
        """What is trained of the arrays of this form, on its devices."""
        return _placed(only_trained(self.like.trained), arrays, lambda x: x.sharding).trained

    def stack(self, members: Sequence[HostState], mesh: Mesh) -> State:
        """The states of N members, all of this form, as one with a leading axis [N]."""
        arrays = {path: np.stack([m[path] for m in members]) for path in members[0]}
        # Each device has its part of every member.
        return _placed(self.like, arrays, lambda x: NamedSharding(mesh, P(None, *x.sharding.spec)))


def only_trained(trained: Trained) -> State:
    """A state of nothing else, whose key paths are those of a whole one."""
    nothing: Any = None
    return State(trained, nothing, nothing, nothing, nothing)


def _placed(like: State, arrays: HostState, where: Callable[[Any], Any]) -> State:
    def put(path: Any, leaf: Any) -> Any:
        value: Any = arrays[path]
        if _is_key(leaf):
            value = jax.random.wrap_key_data(value)  # of the default kind, as all keys here
        return jax.device_put(value, where(leaf))

    placed: State = jax.tree_util.tree_map_with_path(put, like)
    return placed


def unstack(arrays: HostState, index: int) -> HostState:
    """Member `index` of a stack."""
    return {path: array[index] for path, array in arrays.items()}


def _leaves(tree: Tree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _is_key(leaf: Any) -> bool:
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _stored(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of what a leaf is kept as: of a key, its data."""
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return data.shape, data.dtype
    return leaf.shape, leaf.dtype
