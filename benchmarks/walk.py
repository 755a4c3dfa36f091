"""Count the files entered, and the moves between them, for one DoRA target on NF4 in a scan.

`python -m benchmarks.walk` follows resolve, init, the trace of adapt, and merge. The exit status is
1 above the bound of 18 files and 300 moves.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax

ROOT = str(pathlib.Path(lora_jax.__file__).parent)


def f(params: Any, x: Any) -> Any:
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0] @ params["head"]


keys = jax.random.split(jax.random.key(0), 3)
params = {"w": jax.random.normal(keys[0], (3, 64, 64)), "head": jax.random.normal(keys[1], (64, 8))}
x = jax.random.normal(keys[2], (4, 64))
spec = lora_jax.LoraSpec(rank=2, targets="w", kind="dora")
first = lora_jax.resolve(spec, f, params, x)
base = lora_jax.quantize(params, "nf4", first)
state: dict[str, Any] = {"files": set(), "calls": 0, "moves": 0, "last": None}


def profile(frame: Any, event: str, _: Any) -> None:
    name = frame.f_code.co_filename
    if event == "call" and name.startswith(ROOT):
        state["files"].add(name)
        state["calls"] += 1
        state["moves"] += name != state["last"]
        state["last"] = name


sys.setprofile(profile)
layout = lora_jax.resolve(spec, f, base, x)
adapters = lora_jax.init(jax.random.key(1), layout, params=base)
jax.eval_shape(lora_jax.adapt(layout, f), base, adapters, x)
lora_jax.merge(layout, base, adapters)
sys.setprofile(None)
print(f"{len(state['files'])} files, {state['calls']} calls, {state['moves']} moves")
sys.exit(not (len(state["files"]) <= 18 and state["moves"] <= 300))
