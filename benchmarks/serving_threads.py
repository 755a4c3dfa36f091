"""Serve 10,000 requests from 8 threads with 4 adapters, while adapters come and go.

    python -m benchmarks.serving_threads
    python -m benchmarks.serving_threads --requests 1000

The model is a tiny Llama with random weights. A third of the requests are streams, and half of
these are cancelled after two pieces. Meanwhile adapters are swapped: one name stands for one of two
adapters in turn, and another name comes and goes. Every answer is compared with the answer of a
server that has only this adapter and one row. Printed are the requests in a second, the
compilations after `warm_up` (of the whole process), and the memory that the process has allocated.
"""

import argparse
import concurrent.futures
import json
import pathlib
import random
import tempfile
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import models as kinds
from tokenizers import pre_tokenizers

import lora_jax
from benchmarks.soak import allocated, slope
from lora_jax import models, paths, serving
from lora_jax.models.weights import families

WORDS = [f"word{i}" for i in range(60)]
THREADS, NEW, LONGEST = 8, 8, 24
NAMES = {"one": "a", "two": "b", "three": "c"}  # name -> folder; "swapped" is c or d
MODEL = {
    "model_type": "llama", "vocab_size": len(WORDS) + 2, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
}  # fmt: skip


def write_base(folder: pathlib.Path) -> None:
    """Write a tiny Llama with random weights, and one token for each word."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", *WORDS])}
    made = tokenizers.Tokenizer(kinds.WordLevel(vocabulary, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    config: Any = families.parse(MODEL, "tiny")
    shapes, draw = paths.flatten(models.shapes(config)), np.random.default_rng(0)
    tensors = {}
    for row in families.FAMILIES["llama"].names.rows:
        for layer in range(config.num_layers if row.layered else 1):
            if (path := row.path.format(layer=layer)) in shapes:
                value = draw.normal(path.endswith("/scale"), 0.3, shapes[path].shape)
                turned = np.ascontiguousarray(value.T if row.transposed else value, np.float32)
                tensors[row.hf.format(layer=layer)] = turned
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def write_adapters(folder: pathlib.Path) -> None:
    """Write the adapters a, b, c and d, of ranks 1 to 4, for the base in the folder."""
    source = models.open(str(folder / "base"))
    params = source.load()

    config: Any = source.config

    def apply(params: Any, ids: Any) -> Any:
        return models.DecoderModel(config).apply({"params": params}, ids)

    for rank, name in enumerate("abcd", 1):
        spec = lora_jax.LoraSpec(rank, 2.0 * rank, targets=("layers_*/attention/*/kernel",))
        ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        layout = lora_jax.resolve(spec, apply, params, ids)
        draw = np.random.default_rng(rank).normal
        adapters = {
            path: lora_jax.Factors(factors.a, jnp.asarray(draw(size=factors.b.shape), jnp.float32))
            for path, factors in lora_jax.init(jax.random.key(rank), layout).items()
        }
        adapter = lora_jax.Adapter(layout, adapters)
        about = {"model": {"reference": str(folder / "base")}}
        own = lora_jax.fingerprint(params)
        lora_jax.save(folder / name, adapter, fingerprint=own, about=about)


def main() -> None:
    """Run the benchmark, and print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--prompts", type=int, default=60, help="different prompts")
    options = parser.parse_args()
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    draw = random.Random(0)
    prompts = [
        " ".join(draw.choices(WORDS, k=draw.randint(1, LONGEST))) for _ in range(options.prompts)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_base(folder / "base")
        write_adapters(folder)
        print(served(folder, prompts, options.requests, compiled))


def served(folder: pathlib.Path, prompts: list[str], requests: int, compiled: list[str]) -> str:
    """Serve all requests, check the answers, and return the figures."""
    alone: dict[tuple[str, str], str] = {}
    for own in "abcd":
        single = serving.open(folder / own, slots=1, batch_size=1, max_tokens=64)
        found = single.generate(prompts, max_new_tokens=NEW)
        alone |= {(own, p): answer.text for p, answer in zip(prompts, found, strict=True)}
    server = serving.open(
        folder / "base",
        {**{name: folder / own for name, own in NAMES.items()}, "swapped": folder / "d"},
        slots=6,
        max_tokens=64,
    )
    warm, before = server.warm_up(), len(compiled)
    left, lock = iter(range(requests)), threading.Lock()
    done, wrong, cancelled, swaps = [0], list[str](), [0], [0]
    numbers, memory = list[int](), list[int]()

    def ask(seed: int) -> None:
        own = random.Random(seed)
        while True:
            with lock:
                if next(left, None) is None:
                    return
            name, prompt = own.choice([*NAMES, "swapped"]), own.choice(prompts)
            stop = None
            if own.random() < 1 / 3:
                stop = 2 if own.random() < 0.5 else NEW
                with server.stream(prompt, name, max_new_tokens=NEW) as texts:
                    text = "".join(piece for _, piece in zip(range(stop), texts, strict=False))
            else:
                text = server.generate([prompt], name, max_new_tokens=NEW)[0].text
            wanted = [alone[o, prompt] for o in ([NAMES[name]] if name in NAMES else "cd")]
            right = any(text == w if stop in (None, NEW) else w.startswith(text) for w in wanted)
            with lock:
                done[0] += 1
                cancelled[0] += stop == 2
                wrong.extend([] if right else [f"{name} {prompt!r}: {text!r}, not {wanted}"])
                if done[0] % max(requests // 200, 1) == 0:
                    numbers.append(done[0])
                    memory.append(allocated())

    def swap() -> None:
        while done[0] < requests:
            server.add("swapped", folder / "cd"[swaps[0] % 2])
            server.add("brief", folder / "b")
            server.remove("brief")
            swaps[0] += 2
            time.sleep(0.1)

    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(THREADS + 1) as pool:
        others = pool.submit(swap)
        for future in [pool.submit(ask, seed) for seed in range(THREADS)]:
            future.result()
        others.result()
    seconds, first = time.monotonic() - began, len(memory) // 5
    growth, error = slope(numbers[first:], memory[first:])
    return "\n".join([
        f"warm_up {warm:.1f} s, {before} compilations until then",
        f"{requests:,} requests, {THREADS} threads: {seconds:.1f} s: {requests / seconds:.0f}/s",
        f"{cancelled[0]:,} streams cancelled, {swaps[0]:,} adapters put into slots under load",
        f"{len(wrong)} wrong answers {wrong[:3] or ''}",
        f"{len(compiled) - before} compilations after warm_up",
        f"memory {memory[first] / 1e6:.1f} MB after a fifth, {memory[-1] / 1e6:.1f} MB at the end, "
        f"{growth:.0f} B a request (standard error {error:.0f})",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
