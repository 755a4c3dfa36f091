"""Write `v1`, the files of today's formats: `python -m tests.formats.make`.

Run it while a format is unreleased and changes. Afterwards a new format gets a folder of its own.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
import train
from lora_jax import LoraSpec, Rule
from lora_jax.cli import predict
from lora_jax.layout import Layout
from tests.formats import HERE, RUNS, V1
from tests.training import tiny

KEPT = ("adapters", "checkpoints", "config.json", "metrics.jsonl", "summary.json")
BASE = {"layers": jnp.ones((3, 4, 4)), "q": jnp.ones((4, 2, 3)), "bias": jnp.zeros(3)}

TEXT = """import pathlib
from tests.serving import classifiers
config = classifiers.config_of(pathlib.Path("model"), "three/{split}.jsonl")
"""


def adapter() -> None:
    """Write an adapter in bfloat16, with a stack, a fold, a trained bias and a fingerprint."""

    def f(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        for w in params["layers"]:
            x = x @ w
        return jnp.einsum("bi,ijk->bjk", x, params["q"] * 2.0) + params["bias"]

    rules = (Rule("layers", rank=2, alpha=6.0), Rule("q", rank=1, alpha=0.5))
    layout = lora_jax.resolve(LoraSpec(1, 1.0, rules, ("q",)), f, BASE, jnp.ones((1, 4)))
    random = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=x.shape), jnp.bfloat16),
        lora_jax.init(jax.random.key(0), layout),
    )
    bias = {"bias": jnp.arange(3.0)}
    lora_jax.save(
        V1 / "adapter",
        (layout, adapters, bias),
        fingerprint=lora_jax.fingerprint(BASE),
        about={"made": "by hand"},
    )
    (V1 / "layout.json").write_text(layout.to_json() + "\n")
    found = {f"{p}/{n}": x for p, t in adapters.items() for n, x in t._asdict().items()}
    _write_arrays("adapter", {**found, "base/bias": bias["bias"]})


def kinds() -> None:
    """Write an adapter with every kind of update, and the weights merged with it."""
    rows = {
        "lora": {},
        "rslora": {"scaling": "alpha/sqrt(r)"},
        "parts": {"parts": ((0, 3), (6, 3))},
    }
    rows |= {name: {"kind": name} for name in ("dora", "vera", "loha", "lokr")}
    axes = ((2, 6, 9), (0,), (1,), (2,), 2, 3.0)
    targets = [lora_jax.Target(name, *axes, **more) for name, more in rows.items()]
    targets.append(lora_jax.Target("bias", (9,), (), (), (0,), 1, 1.0, kind="bias"))
    left_out = (lora_jax.layout.Remark("head", (6, 9), "the output head"),)
    layout, random = Layout(tuple(targets), left_out), np.random.default_rng(1)
    w = {t.path: random.normal(size=t.shape).astype(np.float32) for t in targets}
    adapters = jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32),
        lora_jax.init(jax.random.key(0), layout, params=w),
    )
    lora_jax.save(V1 / "kinds", (layout, adapters))
    found = {f"{p}/{n}": x for p, t in adapters.items() for n, x in t._asdict().items()}
    found |= {f"w/{path}": x for path, x in w.items()}
    merged = lora_jax.merge(layout, w, adapters)
    _write_arrays("kinds", found | {f"merged/{path}": x for path, x in merged.items()})


def runs() -> None:
    """Write a finished run, a finished sweep, and a text classifier with its predictions."""
    small = str(HERE / "small.py")
    for config in (small, f"{small}:sweep"):
        assert train.main(["--config", config]) == 0
    tiny.write_model(pathlib.Path("model"), tiny.ROBERTA)
    tiny.write_examples(
        pathlib.Path("three"), ("text",), lambda kind: ("bad", "good", "so-so")[kind]
    )
    pathlib.Path("text.py").write_text(TEXT)
    assert train.main(["--config", "text.py", "--run-dir", "runs/text"]) == 0
    lines = [{"text": " ".join(tiny.WORDS[i : i + 5])} for i in range(6)]
    (V1 / "texts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    words = ["--file", str(V1 / "texts.jsonl"), "--out", str(V1 / "predicted.jsonl")]
    assert predict.main([*words, "--adapter", "runs/text"]) == 0
    for summary in pathlib.Path("runs").rglob("summary.json"):
        for path in summary.parent.iterdir():
            if path.name not in KEPT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree("runs", RUNS, ignore=shutil.ignore_patterns("lock", "*.csv", "*.png"))


def _write_arrays(name: str, arrays: dict[str, jax.Array]) -> None:
    wide = {path: np.asarray(x, np.float32) for path, x in arrays.items()}
    np.savez_compressed(V1 / f"{name}.npz", allow_pickle=False, **wide)


if __name__ == "__main__":
    shutil.rmtree(V1, ignore_errors=True)
    V1.mkdir()
    adapter()
    kinds()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        runs()
