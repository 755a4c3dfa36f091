"""Pad states of different shapes with zeros to common shapes, and cut them back bit for bit.

Padding stays zero in training. If a column of `a` and the matching row of `b` are both zero, so are
their gradients; a column of a head has no gradient if the loss leaves out its logit; and AdamW does
not change a zero whose gradient is zero. So the step needs no mask of ranks.

All of this runs on the host: when a group begins, when its members change and when they are
written. It compiles nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.paths import Tree
from lora_jax.training.state import State, Trained

HostState = dict[Any, np.ndarray]  # key path -> array


@dataclasses.dataclass(frozen=True)
class StateShapes:
    """The shapes, dtypes and shardings of one state; `like` consists of jax.ShapeDtypeStructs.

    A smaller array is padded at the end of every axis.
    """

    like: State

    def host(self, state: State) -> HostState:
        """Copy a state of these shapes to the host."""
        # It must be a copy: on a CPU the next step may be donated the array itself.
        return {path: np.array(leaf) for path, leaf in _leaves(_data(state))}

    def pad(self, arrays: HostState) -> HostState:
        """Pad arrays with zeros to these shapes; a missing array becomes all zeros."""
        found = {}
        for path, leaf in _leaves(jax.eval_shape(_data, self.like)):
            found[path] = np.zeros(leaf.shape, leaf.dtype)
            if path in arrays:
                own = arrays[path]
                found[path][tuple(map(slice, own.shape))] = own
        return found

    def unpad(self, arrays: HostState) -> HostState:
        """Cut padded arrays back to these shapes."""
        leaves = _leaves(jax.eval_shape(_data, self.like))
        return {path: arrays[path][tuple(map(slice, leaf.shape))] for path, leaf in leaves}

    def state(self, arrays: HostState) -> State:
        """Place arrays of these shapes on their devices."""
        return _placed(self.like, arrays, lambda leaf: leaf.sharding)

    def trained(self, arrays: HostState) -> Trained:
        """Place only the trained arrays on their devices."""
        return _placed(only_trained(self.like.trained), arrays, lambda x: x.sharding).trained

    def stack(self, members: Sequence[HostState], mesh: Mesh) -> State:
        """Stack the states of N members, all of these shapes, along a leading axis [N]."""
        arrays = {path: np.stack([m[path] for m in members]) for path in members[0]}
        # Each device has its part of every member's arrays.
        return _placed(self.like, arrays, lambda x: NamedSharding(mesh, P(None, *x.sharding.spec)))


def only_trained(trained: Trained) -> State:
    """Return a state with nothing but `trained`, and with the key paths of a whole state."""
    nothing: Any = None
    return State(trained, nothing, nothing, nothing, nothing)


def _placed(like: State, arrays: HostState, where: Callable[[Any], Any]) -> State:
    def put(path: Any, leaf: Any) -> Any:
        value: Any = arrays[path]
        if _is_key(leaf):
            value = jax.random.wrap_key_data(value)  # all keys here are of the default kind
        return jax.device_put(value, where(leaf))

    placed: State = jax.tree_util.tree_map_with_path(put, like)
    return placed


def unstack(arrays: HostState, index: int) -> HostState:
    return {path: array[index] for path, array in arrays.items()}


def _leaves(tree: Tree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _is_key(leaf: Any) -> bool:
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _data(state: Tree) -> Tree:
    """Return a state as it is held on the host: a key is held as its data."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, state)
