"""The experiments, in the order of the report."""

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
from lora_jax.report.update_analysis import BaseChoice

NAMES = (
    "matrices", "rank", "directions", "methods", "samples", "definitions", "latency", "benefits",
)  # fmt: skip


def experiments(base: BaseChoice) -> tuple[Experiment, ...]:
    """All of them.

    Args:
      base: what the updates are compared with in Table 7.
    """
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
            "Tables 5 and 18 of a decoder: SmolLM2 on definitions",
            _swept("definitions"),
            _section("The same of a decoder", _DEFINITIONS, _definitions),
        ),
        Experiment(
            "latency",
            "Table 1: what adapter layers and LoRA cost in a forward pass",
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
    """Those of these names, all of none.

    Raises:
      LoraError: a name that there is not.
    """
    for name in names:
        if name not in NAMES:
            near = nearest(name, NAMES)
            raise LoraError(
                f"no experiment {name!r}; nearest:\n{listed(near)}\nthere are: {', '.join(NAMES)}"
            )
    return tuple(one for one in experiments(base) if not names or one.name in names)


def _swept(name: str) -> Callable[[pathlib.Path], Sequence[Task]]:
    """One sweep of `experiments/paper/configs`."""
    config = f"experiments/paper/configs/{name}.py"
    return lambda folder: (
        Task(folder, ("train.py", "--config", config, "--run-dir", str(folder))),
    )


def _measured(name: str) -> Callable[[pathlib.Path], Sequence[Task]]:
    """One module of this room that measures."""
    return lambda folder: (
        Task(folder, ("-m", f"experiments.paper.{name}", "--out", str(folder / f"{name}.json"))),
    )


def _section(
    title: str, text: str, blocks: Callable[[Sequence[Setting]], Sequence[Block]]
) -> Callable[[pathlib.Path], Sequence[Section]]:
    """What is said of a folder of runs; nothing where none has finished."""

    def sections(folder: pathlib.Path) -> Sequence[Section]:
        found = blocks(settings(there(folder)))
        return (Section(title, (Paragraph(text), *found)),) if found else ()

    return sections


def _matrices(found: Sequence[Setting]) -> Sequence[Block]:
    return matrices.blocks(found, published.MATRICES, "matrices")


def _definitions(found: Sequence[Setting]) -> Sequence[Block]:
    """Those of one budget, and those on q and v by rank."""
    budgets = [setting.trained for setting in found]
    common = max(set(budgets), key=budgets.count) if budgets else 0
    alike = [setting for setting in found if setting.trained == common]
    on_qv = [setting for setting in found if matrices.label(setting) == "q+v"]
    return [
        *matrices.blocks(alike, {}, "definitions"),
        *ranks.blocks(on_qv, "definitions-ranks"),
    ]


_MATRICES = (
    "The same number of trained parameters over different matrices of every layer of MiniLM, on "
    "the movie reviews. The paper left the MLP open; here it is beside the others."
)
_RANKS = (
    "MiniLM on the movie reviews. The scale alpha / r is the same at every rank, and rank 64 is "
    "there a second time with the alpha of rank 8: the paper has one alpha for all ranks."
)
_DEFINITIONS = (
    "SmolLM2-135M from a word to its WordNet definition; the score is the loss per token, and less "
    "is better. The first table has one number of trained parameters, the second ranks on q and v."
)
