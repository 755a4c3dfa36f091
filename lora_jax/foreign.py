"""NNX, Equinox and Keras models as pure functions of their parameters.

f, params, state = lora_jax.from_nnx(model)  # or from_equinox, from_keras
y, state = f(params, state, x)

`params` holds the weights by readable paths; `state` holds every other array: batch statistics,
random number generators, tables. `f` keeps no array of its own, so everything that it reads can be
placed on a mesh. It changes nothing in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import LoraError, listed

Bridged = tuple[Callable[..., Any], Any, Any]  # (f, params, state)
MAKE_STATE = (
    "make both by `model, state = eqx.nn.make_with_state(Model)(...)` and say "
    "`from_equinox(model, state)`"
)


def from_nnx(model: Any, method: str = "__call__") -> Bridged:
    """Split an NNX model into a pure function, its parameters, and all its other state.

    Args:
      model: an `nnx.Module`; it is read, not changed. Dropout and batch normalisation stay in the
        mode that the model is in: call `model.train()` or `model.eval()` before.
      method: the name of the method that `f` calls.

    Returns:
      `(f, params, state)` with `f(params, state, *args, **kwargs) -> (output, new_state)`.
      `params` is a plain nested dict of the `nnx.Param` values (paths like
      `layers/0/attention/query/kernel`). `state` is a plain dict of everything else: batch
      statistics, random number generators, caches. `f` takes it and returns it, so that dropout and
      batch statistics advance as they do in NNX.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> from flax import nnx
    >>> f, params, state = lora_jax.from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> spec, x = lora_jax.LoraSpec(rank=2, targets="kernel"), jnp.ones((1, 4))
    >>> layout = lora_jax.resolve(spec, f, params, state, x)
    >>> adapters = lora_jax.init(jax.random.key(0), layout)
    >>> y, state = lora_jax.adapt(layout, f)(params, adapters, state, x)
    >>> y.shape
    (1, 3)
    """
    from flax import nnx  # imported here because it takes 1.6 s

    graphdef, *states = nnx.split(model, nnx.Param, ...)
    param_state, rest_state = states

    def f(params: Any, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        whole = nnx.merge(
            graphdef, _filled(nnx, param_state, params), _filled(nnx, rest_state, state)
        )
        out = getattr(whole, method)(*args, **kwargs)
        return out, nnx.to_pure_dict(nnx.state(whole, nnx.Not(nnx.Param)))

    return f, nnx.to_pure_dict(param_state), nnx.to_pure_dict(rest_state)


def _filled(nnx: Any, abstract: Any, values: Any) -> Any:
    """Return a state of the same structure and variable types, with other values."""
    state = nnx.merge_state(abstract)
    nnx.replace_by_pure_dict(state, values)
    return state


def from_equinox(model: Any, state: Any = None, method: str = "__call__") -> Bridged:
    """Split an Equinox model into a pure function, its parameters, and all its other arrays.

    This is `eqx.partition` and `eqx.combine` without the need for Equinox: it takes any callable
    whose arrays are the leaves of its tree.

    Args:
      model: an `eqx.Module`. Dropout and batch normalisation stay in the mode that the model is
        in: `eqx.nn.inference_mode(model)` turns them off. In training, a call takes `key=`.
      state: the `eqx.nn.State` that `eqx.nn.make_with_state` returned with the model, if it has
        one. `f` then calls the model with `state=` and expects `(output, new_state)`.
      method: the name of the method that `f` calls.

    Returns:
      `(f, params, state)` with `f(params, state, *args, **kwargs) -> (output, new_state)`.
      `params` is the model with only its floating-point (and complex) arrays, and None for
      everything else. Its paths follow the attributes, as in `layers/0/weight`, and
      `eqx.combine(params, model)` puts (merged) parameters back. `state` is
      `{"arrays": ..., "state": ...}`: the model's integer, boolean and key arrays, which never
      change, and the `eqx.nn.State`. A model for one example is mapped over a batch as in Equinox:
      `jax.vmap(f, in_axes=(None, None, 0), out_axes=(0, None))`.

    Raises:
      LoraError: a model without a floating-point array, or one that holds its initial state; in
        `f`, a model that needs a state and has none, or that was given one and returns none.

    >>> import dataclasses, jax, jax.numpy as jnp, lora_jax
    >>> @jax.tree_util.register_dataclass
    ... @dataclasses.dataclass
    ... class Linear:  # as an eqx.Module is
    ...     weight: jax.Array
    ...     def __call__(self, x):
    ...         return self.weight @ x
    >>> f, params, state = lora_jax.from_equinox(Linear(jnp.ones((3, 4))))
    >>> spec, x = lora_jax.LoraSpec(rank=2, targets="weight"), jnp.ones(4)
    >>> layout = lora_jax.resolve(spec, f, params, state, x)
    >>> adapters = lora_jax.init(jax.random.key(0), layout)
    >>> y, state = lora_jax.adapt(layout, f)(params, adapters, state, x)
    >>> y.shape
    (3,)
    """
    params, stateful = _only(_is_weight, model), _is_stateful(model)
    if not jax.tree.leaves(params):
        raise LoraError(
            f"from_equinox takes a model whose arrays are the leaves of its tree; {_name(model)}"
            " has no floating-point array there. An NNX model goes through from_nnx, a Keras "
            "model through from_keras, and Linen's `model.apply` is such a function already"
        )
    program = _only(lambda x: not _is_array(x), model)
    arrays = _only(lambda x: _is_array(x) and not _is_weight(x), model)

    def f(params: Any, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        call = getattr(_together(params, state["arrays"], program), method)
        if state["state"] is None:
            given = {type(x).__name__ for x in (*args, *kwargs.values())}
            if stateful and "State" not in given:
                raise LoraError(f"{_name(model)} needs a state; {MAKE_STATE}")
            return call(*args, **kwargs), state
        own = jax.tree.map(lambda x: x, state["state"])  # a `State` may be updated only once
        out = call(*args, state=own, **kwargs)
        if not (isinstance(out, tuple) and len(out) == 2 and type(out[1]) is type(own)):
            raise LoraError(
                f"{_name(model)} was given state= and returned {type(out).__name__}; expected "
                "(output, new_state). A model without state takes none: from_equinox(model)"
            )
        return out[0], {**state, "state": out[1]}

    return f, params, {"arrays": arrays, "state": state}


def _is_stateful(model: Any) -> bool:
    """Return whether the model reads an `eqx.nn.State`: it then has `StateIndex` nodes.

    Raises:
      LoraError: the nodes hold the state themselves, so it would be mistaken for weights.
    """

    def is_index(x: Any) -> bool:
        return type(x).__name__ == "StateIndex"

    found = [x for x in jax.tree.leaves(model, is_leaf=is_index) if is_index(x)]
    if any(map(_is_array, jax.tree.leaves(found))):
        raise LoraError(f"{_name(model)} holds its initial state among its weights; {MAKE_STATE}")
    return bool(found)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _is_weight(x: Any) -> bool:
    return _is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)


def _only(keep: Callable[[Any], bool], tree: Any) -> Any:
    """Return the tree with None for the leaves that `keep` refuses."""
    return jax.tree.map(lambda x: x if keep(x) else None, tree)


def _together(*trees: Any) -> Any:
    """Join trees of `_only`: each leaf is the first that is not None."""
    first = lambda *found: next((x for x in found if x is not None), None)  # noqa: E731
    return jax.tree.map(first, *trees, is_leaf=lambda x: x is None)


def from_keras(model: Any) -> Bridged:
    """Split a Keras model into a pure function, its parameters, and all its other variables.

    Args:
      model: a Keras 3 model or layer that is built, with JAX as Keras's backend; it is read, not
        changed.

    Returns:
      `(f, params, state)` with `f(params, state, *args, **kwargs) -> (output, new_state)`, which
      is `model.stateless_call`. `params` is a dict of the trainable variables by path,
      `{"encoder/dense/kernel": ...}`. `state` is a dict of all others: batch statistics, seeds of
      dropout, and the weights of frozen layers. `f(..., training=True)` is a training step, in
      which dropout is on and batch statistics change (under `jit`, use
      `functools.partial(f, training=True)`). Without it, neither happens.

    Raises:
      LoraError: a model that is not built or is frozen as a whole, two variables with one path,
        another backend, or an object that is not a Keras model.

    >>> f, params, state = lora_jax.from_keras(model)  # doctest: +SKIP
    >>> spec = lora_jax.LoraSpec(rank=4, targets="**/kernel")  # doctest: +SKIP
    >>> layout = lora_jax.resolve(spec, f, params, state, x)  # doctest: +SKIP
    >>> adapted = lora_jax.adapt(layout, f)  # doctest: +SKIP
    >>> y, state = adapted(params, adapters, state, x, training=True)  # doctest: +SKIP
    """
    _check_keras(model)
    params = _by_path(model, model.trainable_variables)
    state = _by_path(model, model.non_trainable_variables)

    def f(params: Any, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        trainable = [params[path] for path in order]
        out, new = model.stateless_call(trainable, [state[p] for p in others], *args, **kwargs)
        return out, dict(zip(others, new, strict=True))

    order, others = list(params), list(state)
    return f, params, state


def _check_keras(model: Any) -> None:
    """Raise `LoraError` unless the model can be called without its variables."""
    if isinstance(model, type) or getattr(model, "stateless_call", None) is None:
        raise LoraError(
            f"from_keras takes a model or layer of Keras 3, an object with `stateless_call`; got "
            f"{_name(model)}"
        )
    if not model.built:
        raise LoraError(
            f"{_name(model)} is not built, so that it has no variables yet: call it on an example "
            "(`model(x)`) or `model.build(shape)` first"
        )
    if not model.trainable_variables:
        raise LoraError(
            f"{_name(model)} has {len(model.variables)} variables, none of them trainable, and "
            "parameters are the trainable ones. Say `model.trainable = True`: the base gets no "
            "gradient all the same, because the adapters are another argument"
        )


def _by_path(model: Any, variables: Sequence[Any]) -> dict[str, Any]:
    found = {v.path: v.value for v in variables}
    if len(found) < len(variables):
        known = [v.path for v in variables]
        twice = sorted({path for path in known if known.count(path) > 1})
        raise LoraError(
            f"{_name(model)} has several variables of one path:\n{listed(twice)}\n"
            "Give the layers names of their own (`name=`)"
        )
    for path, value in found.items():
        if not isinstance(value, jax.Array):
            raise LoraError(
                f"{path!r} of {_name(model)} is a {type(value).__module__}.{type(value).__name__}, "
                "not a JAX array: set KERAS_BACKEND=jax before Keras is imported"
            )
    return found


def _name(model: Any) -> str:
    """Return a name for the model in messages: its class."""
    return f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
