"""Compare the outputs of adapters of lora_jax, opened by the published PEFT, with our own.

    python -m benchmarks.peft.adapters [--python PATH]

It writes an adapter of every kind and profile, for tiny models (tests/golden/golden_models), with
`lora_jax.exchange.peft.save`. Then it opens each in the environment of `benchmarks.peft.compare`,
which is made if it does not exist (`--python` names another interpreter with torch, transformers
and peft), and prints the largest difference of the logits and PEFT's warnings. It fails if a
difference is above 1e-5, or if there is a warning.
"""

import argparse
import dataclasses
import pathlib
import subprocess
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from benchmarks.peft.compare import environment
from lora_jax import Layout, LoraSpec, Rule, Target, models
from lora_jax.exchange import peft
from lora_jax.models.hf_module import HfModule

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = HERE.parents[1] / "tests" / "golden" / "golden_models"
QV = ("**/{q,v}/kernel",)
MIXED = (
    Rule("**/q/kernel", rank=3, alpha=1.5),
    Rule("**/v/kernel", scaling="alpha/sqrt(r)"),
    Rule("layers*/**/down/kernel", rank=4, alpha=7.0),
)
RSLORA = LoraSpec(3, 4.0, "all-linear", scaling="alpha/sqrt(r)")
IA3 = (Rule("**/{k,v}/kernel", kind="ia3"), Rule("**/down/kernel", kind="ia3_inputs"))
TOKENS = Rule("embed/embedding", kind="tokens", parts=((5, 2), (9, 1)))

# Name -> (base, spec, parameters that are trained in full, options of `save`)
CASES: dict[str, tuple[str, LoraSpec, tuple[str, ...], dict[str, Any]]] = {
    "lora": ("llama", LoraSpec(2, 3.0, QV), (), {}),
    "lora_all": ("llama", LoraSpec(2, 3.0), (), {"params": True}),
    "rslora": ("llama", RSLORA, (), {}),
    "mixed": ("llama", LoraSpec(2, 3.0, MIXED), (), {}),
    "mixed_portable": ("llama", LoraSpec(2, 3.0, MIXED), (), {"profile": "portable"}),
    "rslora_portable": ("llama", RSLORA, (), {"profile": "portable"}),
    "one_layer": ("llama", LoraSpec(2, 3.0, "layers_1/**/q/kernel"), (), {"params": True}),
    "dora": ("llama", LoraSpec(2, 3.0, QV, kind="dora"), (), {}),
    "vera": ("llama", LoraSpec(2, 3.0, QV, kind="vera"), (), {}),
    "loha": ("llama", LoraSpec(2, 3.0, QV, kind="loha"), (), {}),
    "lokr": ("llama", LoraSpec(1, 3.0, QV, kind="lokr"), (), {}),
    "miss": ("llama", LoraSpec(3, 3.0, QV, kind="miss"), (), {}),
    "ia3": ("llama", LoraSpec(1, targets=IA3), ("lm_head/kernel",), {"params": True}),
    "ia3_scanned": ("llama", LoraSpec(1, targets=IA3), (), {"params": True, "scan": True}),
    "tokens": ("llama", LoraSpec(2, 3.0, (TOKENS, *QV)), (), {"params": True}),
    "tokens_tied": ("qwen2", LoraSpec(2, 3.0, (TOKENS, *QV)), (), {"params": True}),
    "oft": ("llama", LoraSpec(4, 1.0, QV, kind="oft"), (), {}),
    "oft_cayley": ("llama", LoraSpec(8, 1.0, QV, kind="oft_cayley"), (), {}),
    "tables": ("llama", LoraSpec(2, 3.0, ("embed/embedding", "lm_head/kernel")), (), {}),
    "dora_tables": ("llama", LoraSpec(2, 3.0, ("embed/embedding",), kind="dora"), (), {}),
    "whole": ("llama", LoraSpec(2, 3.0, QV), ("lm_head/kernel", "norm/scale"), {}),
    "scanned": ("llama", LoraSpec(2, 3.0, MIXED[:2]), (), {"scan": True}),
    "scanned_dora": ("llama", LoraSpec(2, 3.0, kind="dora"), (), {"scan": True}),
    "bias": (
        "llama_biased",
        LoraSpec(2, 3.0, (*QV, Rule("**/{q,v}/bias", kind="bias"))),
        (),
        {"params": True},
    ),
    "lora_bias": (
        "llama_biased",
        LoraSpec(2, 3.0, (*QV, Rule("**/{q,v}/bias", kind="bias"))),
        (),
        {},
    ),
    "tied": ("qwen2", LoraSpec(2, 3.0, ("embed/embedding", *QV)), (), {}),
    "classifier": (
        "bert",
        LoraSpec(2, 3.0, "**/{query,value}/kernel"),
        ("classifier/out/kernel",),
        {"params": True, "task_type": "SEQ_CLS"},
    ),
}


def written(folder: pathlib.Path, name: str) -> None:
    """Write the adapter of a case, with the inputs and outputs of its model."""
    base, spec, whole, options = CASES[name]
    source = models.open(str(GOLDEN / base))
    config = dataclasses.replace(source.config, scan_layers=options.pop("scan", False))
    head = models.Head("roberta_head", 3) if base == "bert" else None
    model: Any = (
        models.DecoderModel(config)
        if head is None
        else models.BertClassifier(config, 3, "roberta_head")
    )
    params = source.load(config, head=head)
    f = jax.jit(lambda p, ids: model.apply({"params": p}, ids))
    draw = np.random.default_rng(len(name)).standard_normal
    ids = jnp.asarray(np.random.default_rng(0).integers(3, 23, (2, 7)), jnp.int32)
    layout = lora_jax.resolve(spec, f, params, ids)
    start = lora_jax.init(jax.random.key(0), layout, params=params)
    adapters = jax.tree.map(lambda x: x + jnp.asarray(0.3 * draw(x.shape), x.dtype), start)
    leaves = lora_jax.paths.flatten(params)
    trained = {p: leaves[p] + jnp.asarray(0.3 * draw(leaves[p].shape), jnp.float32) for p in whole}
    adapter = lora_jax.Adapter(layout, adapters, trained)
    options = options | ({"params": params} if options.get("params") else {})
    names = models.hf_names(config, head)
    peft.save(folder, names, adapter, base=str(GOLDEN / base), **options)
    merged = lora_jax.merge(layout, lora_jax.paths.replace(params, trained), adapters)
    np.savez(folder / "expected.npz", input_ids=ids, out=f(merged, ids))


def written_experts(folder: pathlib.Path, each: bool) -> None:
    """Write an adapter of the experts of a Qwen3-MoE, and the differences that it makes.

    Args:
      folder: the folder of the adapter.
      each: whether each expert has its own keys, or all are one parameter.
    """
    draw = np.random.default_rng(3).standard_normal
    shapes = {"gate": (2, 4, 16, 12), "up": (2, 4, 16, 12), "down": (2, 4, 12, 16)}
    start = "model.layers.{layer}.mlp.experts.{expert}"
    names: Any = {n: f"{start}.{n}_proj" for n in shapes}
    if not each:
        names = {
            "gate": HfModule(f"{start}.gate_up_proj", layer="experts", rows=(0, 12)),
            "up": HfModule(f"{start}.gate_up_proj", layer="experts", rows=(12, 12)),
            "down": HfModule(f"{start}.down_proj", layer="experts"),
        }
    targets = tuple(Target(n, s, (0, 1), (2,), (3,), 2, 3.0) for n, s in shapes.items())
    layout = Layout(targets)
    adapters = {
        t.path: lora_jax.Factors(0.3 * draw(t.a_shape), 0.3 * draw(t.b_shape)) for t in targets
    }
    adapters = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), adapters)
    peft.save(folder, names, lora_jax.Adapter(layout, adapters), base="")
    zeros = {n: jnp.zeros(s) for n, s in shapes.items()}
    delta = lora_jax.merge(layout, zeros, adapters)
    fused = np.concatenate([delta["gate"], delta["up"]], axis=-1).swapaxes(2, 3)
    down = np.asarray(delta["down"]).swapaxes(2, 3)
    start = "model.layers.{}.mlp.experts.{}"
    expected = {start.format(i, "gate_up_proj"): x for i, x in enumerate(fused)}
    expected |= {start.format(i, "down_proj"): x for i, x in enumerate(down)}
    np.savez(folder / "expected.npz", **expected)


def written_toy(folder: pathlib.Path, kind: str) -> None:
    """Write an adapter of two convolutions and GPT-2's Conv1D, and the differences it makes."""
    draw = np.random.default_rng(4).standard_normal
    w = np.load(GOLDEN.parent / "golden_peft" / "toy.npz")
    turned = {"conv2": (2, 3, 1, 0), "conv1": (2, 1, 0), "fused": (0, 1)}
    params = {n: jnp.asarray(w[f"{n}/weight"].transpose(axes)) for n, axes in turned.items()}
    names: dict[str, Any] = {n: HfModule(n, "conv", transposed=True) for n in ("conv1", "conv2")}
    names["fused"] = HfModule("fused", transposed=False)
    targets = tuple(
        Target(n, x.shape, (), tuple(range(x.ndim - 1)), (x.ndim - 1,), 2, 3.0, kind=kind)
        for n, x in params.items()
        if n != "fused" or kind == "lora"
    )
    layout = Layout(targets)
    start = lora_jax.init(jax.random.key(0), layout, params=params)
    adapters = jax.tree.map(lambda x: x + jnp.asarray(0.3 * draw(x.shape), x.dtype), start)
    peft.save(folder, names, lora_jax.Adapter(layout, adapters), base="toy")
    delta = jax.tree.map(jnp.subtract, lora_jax.merge(layout, params, adapters), params)
    back = {"conv2": (3, 2, 0, 1), "conv1": (2, 1, 0), "fused": (0, 1)}
    expected = {f"{n}.weight": np.asarray(x).transpose(back[n]) for n, x in delta.items()}
    np.savez(folder / "expected.npz", **expected)


def main() -> None:
    parser = argparse.ArgumentParser(description="Adapters of lora_jax, opened by PEFT.")
    parser.add_argument("--python", help="an interpreter with torch, transformers and peft")
    args = parser.parse_args()
    python = args.python or str(environment())
    with tempfile.TemporaryDirectory() as scratch:
        for name in CASES:
            written(pathlib.Path(scratch, name), name)
        for name, each in (("experts_each", True), ("experts_as_one", False)):
            written_experts(pathlib.Path(scratch, name), each)
        for kind in ("lora", "dora"):
            written_toy(pathlib.Path(scratch, f"toy_{kind}"), kind)
        subprocess.run([python, str(HERE / "opened.py"), scratch], check=True)


if __name__ == "__main__":
    main()
