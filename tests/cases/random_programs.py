"""Random programs whose weights meet other values on their way to a product.

`python -m tests.cases.random_programs 2000` checks as many programs. Every matrix reaches a product
by construction, so each must be a target of "all-linear", or named with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lora_jax
from lora_jax import LoraSpec, Rule
from tests import laws
from tests.cases.case import normal

N = 8
X = normal(1, 3, N)
Change = Callable[[Any, Any, Any, Any], Any]  # (w [N, N], another parameter [N, N], h, x) -> w


def _key(x: Any) -> Any:
    return jax.random.key(jnp.abs(x).sum().astype(jnp.uint32))


def _whole_scan(w: Any, v: Any, h: Any, x: Any) -> Any:
    return lax.scan(lambda carry, _: (jnp.roll(carry, 1, 0), None), w, None, length=2)[0]


def _layers(w: Any, v: Any, h: Any, x: Any) -> Any:
    return lax.scan(lambda _, one: (one, one), w[0], w)[1]


def _at_most(w: Any, v: Any, h: Any, x: Any) -> Any:
    return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, 0.5 * s[1]), (0, w))[1]


CHANGES: dict[str, Change] = {
    "nothing": lambda w, v, h, x: w,
    "cast": lambda w, v, h, x: w.astype(jnp.float64 if jax.config.x64_enabled else w.dtype) * 1.0,
    "transposed": lambda w, v, h, x: w.T,
    "halves_swapped": lambda w, v, h, x: jnp.concatenate([w[:, 4:], w[:, :4]], 1),
    "padded": lambda w, v, h, x: jnp.pad(w[:, :6], ((0, 0), (1, 1))),
    "reshaped": lambda w, v, h, x: w.reshape(N, 2, 4).reshape(N, N),
    "flattened": lambda w, v, h, x: (w.reshape(-1) * 0.5).reshape(N, N),
    "reversed": lambda w, v, h, x: w[::-1],
    "rolled": lambda w, v, h, x: jnp.roll(w, 1, 0),
    "negative": lambda w, v, h, x: -w,
    "columns": lambda w, v, h, x: w[:, jnp.array([3, 0, 7, 2, 1, 6, 5, 4])],
    "scaled_by_an_argument": lambda w, v, h, x: w * x.mean(),
    "scaled_by_an_activation": lambda w, v, h, x: h.mean() * w,
    "inputs_scaled": lambda w, v, h, x: w * x.mean(0)[:, None],
    "outputs_scaled": lambda w, v, h, x: w / (1 + h[:1] ** 2),
    "modulated": lambda w, v, h, x: (w[None] * h[:, :, None]).mean(0),
    "dropped": lambda w, v, h, x: w * jax.random.bernoulli(_key(x), 0.5, w.shape),
    "noisy": lambda w, v, h, x: w + jax.random.normal(_key(x), w.shape),
    "shifted": lambda w, v, h, x: w + x.T @ x,
    "fast_weights": lambda w, v, h, x: w + h.T @ h,
    "gated": lambda w, v, h, x: w * jnp.tanh(h.T @ x),
    "rows_set": lambda w, v, h, x: w.at[:3].set(x),
    "rows_added": lambda w, v, h, x: w.at[1].add(h[0]),
    "where_an_argument": lambda w, v, h, x: jnp.where(x.T @ x > 0, w, 0.0),
    "clipped": lambda w, v, h, x: jnp.clip(w, -1, x.max() + 9),
    "normalised": lambda w, v, h, x: w / jnp.linalg.norm(w, axis=0, keepdims=True),
    "squashed": lambda w, v, h, x: jnp.tanh(w),
    "summed": lambda w, v, h, x: w + v,
    "gained": lambda w, v, h, x: w * v[:1],
    "multiplied": lambda w, v, h, x: w @ v,
    "interpolated": lambda w, v, h, x: w * x.mean() + v * (1 - x.mean()),
    "a_barrier": lambda w, v, h, x: lax.optimization_barrier((w, h))[0],
    "moved": lambda w, v, h, x: jax.device_put((w, x))[0],
    "moved_by_memory": lambda w, v, h, x: jax.device_put(w, jax.memory.Space.Device),
    "in_jit": lambda w, v, h, x: jax.jit(lambda w: 2 * w)(w),
    "rematerialised": lambda w, v, h, x: jax.checkpoint(lambda w, x: w * x.mean())(w, x),
    "carried": _whole_scan,
    "row_by_row": _layers,
    "looped": _at_most,
    "chosen": lambda w, v, h, x: lax.cond(x.sum() > 0, lambda: w, lambda: v),
    "switched": lambda w, v, h, x: lax.cond(x.sum() > 0, lambda w: w, lambda w: 2 * w, w),
    "stopped": lambda w, v, h, x: lax.stop_gradient(x.mean()) * w,
}
USES_THE_OTHER = ("summed", "multiplied", "interpolated", "chosen")  # as a matrix


def program(seed: int) -> tuple[Callable[..., Any], dict[str, Any], set[str]]:
    """Return a random program, its parameters, and the matrices that reach a product."""
    draw = np.random.default_rng(seed)
    names = list(CHANGES)
    layers = [draw.choice(names, draw.integers(1, 4)).tolist() for _ in range(draw.integers(1, 4))]
    params = {f"{kind}{i}": 0.4 * normal(seed + 7 * i, N, N) for i in range(len(layers))
              for kind in "wv"}  # fmt: skip
    reach = {f"w{i}" for i in range(len(layers))}
    reach |= {f"v{i}" for i, one in enumerate(layers) if {*one} & {*USES_THE_OTHER}}

    def f(p: Any, x: Any) -> Any:
        h = jnp.tanh(x @ p["first"])
        for i, changes in enumerate(layers):
            w = p[f"w{i}"]
            for change in changes:
                w = CHANGES[change](w, p[f"v{i}"], h, x)
            h = jnp.tanh(h @ w)
        return h @ p["head"]

    ends = {"first": normal(seed + 1, N, N), "head": normal(seed + 2, N, 5)}
    return f, params | ends, reach | {*ends}


def assert_targets_or_named(seed: int) -> None:
    """Check that every matrix is a target or named, and that `adapt` equals `merge`."""
    f, params, reach = program(seed)
    layout = lora_jax.resolve(LoraSpec(2, 4.0), f, params, X)
    named = laws.left_out(layout)
    taken = {t.path for t in layout.targets}
    assert "first" in taken and "head" in named, f"seed {seed}: {taken}, {named}"
    assert reach <= taken | {*named}, f"seed {seed}: {reach - taken - {*named}} are not named"
    adapters = laws.drawn_adapters(layout)
    _compare(f, params, layout, adapters, seed)
    cured = sorted(path for path, why in named.items() if "fold" in why)
    if cured:
        axes = {"inputs": (0,), "outputs": (1,)} if "Rule" in named[cured[0]] else {}
        rule = Rule(cured[0], **axes)
        layout = lora_jax.resolve(LoraSpec(2, 4.0, rule, fold=cured[0]), f, params, X)
        _compare(f, params, layout, laws.drawn_adapters(layout), seed)


def _compare(f: Any, params: Any, layout: Any, adapters: Any, seed: int) -> None:
    got = lora_jax.adapt(layout, f)(params, adapters, X)
    want = f(lora_jax.merge(layout, params, adapters), X)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3, err_msg=f"seed {seed}")


if __name__ == "__main__":
    for number in range(int(sys.argv[1])):
        assert_targets_or_named(number)
