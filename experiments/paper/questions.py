"""The list of experiments, in the order of the report."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

from experiments.paper import (
    agreement,
    benefits,
    directions,
    latency,
    matrices,
    methods,
    published,
    ranks,
    samples,
)
from experiments.paper.experiments import Experiment, Task
from experiments.paper.settings import Setting, settings, there
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.report.document import Block, Paragraph, Section
from lora_jax.serving.served_adapters import BaseChoice

NAMES = (
    "matrices", "rank", "directions", "methods", "samples", "definitions", "latency", "benefits",
)  # fmt: skip


def experiments(base: BaseChoice) -> tuple[Experiment, ...]:
    """Return all experiments."""
    every = (
        Experiment(
            "matrices",
            "Which matrices? Table 5: one budget over q, k, v, o and the MLP",
            _swept("matrices"),
            _section("Which matrices?", _MATRICES, _matrices),
            agreement.of_matrices,
        ),
        Experiment(
            "rank",
            "Which rank? Tables 6 and 18: r = 1, 2, 4, 8, 64",
            _swept("rank"),
            _section("Which rank?", _RANKS, lambda found: ranks.blocks(found, "ranks")),
            agreement.of_ranks,
        ),
        Experiment(
            "directions",
            "What is in an update? Figures 3 and 4, Table 7",
            directions.tasks,
            lambda folder: directions.sections(folder, base),
        ),
        Experiment(
            "methods",
            "Tables 2 and 3: LoRA and ten other methods, learning rates tuned",
            methods.tasks,
            methods.sections,
        ),
        Experiment(
            "samples",
            "Table 16: 100, 1,000 and all examples",
            samples.tasks,
            samples.sections,
            agreement.of_samples,
        ),
        Experiment(
            "definitions",
            "Tables 5 and 18 for a decoder: SmolLM2 on definitions",
            _swept("definitions"),
            _section("The same for a decoder", _DEFINITIONS, _definitions),
        ),
        Experiment(
            "latency",
            "Table 1: the cost of adapter layers and LoRA in a forward pass",
            _measured("latency"),
            latency.sections,
        ),
        Experiment(
            "benefits",
            "Section 4.2: memory, checkpoints and speed against full fine-tuning",
            _measured("benefits"),
            benefits.sections,
        ),
    )
    assert tuple(one.name for one in every) == NAMES
    return every


def chosen(names: Sequence[str], base: BaseChoice) -> tuple[Experiment, ...]:
    """Return the experiments with these names, or all of them without names."""
    for name in names:
        if name not in NAMES:
            near = nearest(name, NAMES)
            raise LoraError(
                f"no experiment {name!r}; nearest:\n{listed(near)}\nthere are: {', '.join(NAMES)}"
            )
    return tuple(one for one in experiments(base) if not names or one.name in names)


def _swept(name: str) -> Callable[[pathlib.Path], Sequence[Task]]:
    """Return the command of a sweep in `experiments/paper/configs`."""
    config = f"experiments/paper/configs/{name}.py"
    return lambda folder: (
        Task(folder, ("train.py", "--config", config, "--run-dir", str(folder))),
    )


def _measured(name: str) -> Callable[[pathlib.Path], Sequence[Task]]:
    """Return the command of a module here that measures."""
    return lambda folder: (
        Task(folder, ("-m", f"experiments.paper.{name}", "--out", str(folder / f"{name}.json"))),
    )


def _section(
    title: str, text: str, blocks: Callable[[Sequence[Setting]], Sequence[Block]]
) -> Callable[[pathlib.Path], Sequence[Section]]:
    """Return a function that makes the section of a folder of runs; none if no run has finished."""

    def sections(folder: pathlib.Path) -> Sequence[Section]:
        found = blocks(settings(there(folder)))
        return (Section(title, (Paragraph(text), *found)),) if found else ()

    return sections


def _matrices(found: Sequence[Setting]) -> Sequence[Block]:
    return matrices.blocks(found, published.MATRICES, "matrices")


def _definitions(found: Sequence[Setting]) -> Sequence[Block]:
    """Make the blocks of the settings with equal budgets, and those on q and v by rank."""
    budgets = [setting.trained for setting in found]
    common = max(set(budgets), key=budgets.count) if budgets else 0
    alike = [setting for setting in found if setting.trained == common]
    on_qv = [setting for setting in found if matrices.label(setting) == "q+v"]
    return [
        *matrices.blocks(alike, {}, "definitions"),
        *ranks.blocks(on_qv, "definitions-ranks"),
    ]


_MATRICES = (
    "The same number of trained parameters on different matrices of every layer of MiniLM, on the "
    "movie reviews. The paper does not try the MLP, which is included here."
)
_RANKS = (
    "MiniLM on the movie reviews. The scale alpha / r is the same at every rank. Rank 64 is there "
    "a second time with the alpha of rank 8, because the paper has one alpha for all ranks."
)
_DEFINITIONS = (
    "SmolLM2-135M writes the WordNet definition of a word. The score is the loss per token, where "
    "less is better. In the first table all choices have the same number of trained parameters; "
    "the second compares ranks on q and v."
)
