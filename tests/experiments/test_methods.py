"""The configs of the methods, and the sections of the report on their runs."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text as Letters

from experiments.paper import counts, methods, published, samples, seed_scatter
from experiments.paper.configs import methods as config
from experiments.paper.configs import samples as few
from experiments.paper.experiments import Task
from lora_jax.errors import LoraError
from lora_jax.report.document import Figure, Note, Paragraph, Section, Table
from lora_jax.sweeps import config_fields
from lora_jax.sweeps.sweep import SweepConfig
from lora_jax.training.config_json import to_dict
from tests.experiments import runs

WIDTH, MLP, LAYERS = 384, 1_536, 6  # of MiniLM
BUDGET = counts.lora(8, [(WIDTH, WIDTH)] * 2 * LAYERS)
# Methods whose sizes match LoRA's number of parameters, and the difference that each may have.
MATCHED = {
    "prefix_layer": 0.0,
    "adapter_drop": 0.02,
    "pfeiffer": 0.031,
    "lin": 0.031,
    "houlsby": 0.052,
}


def sweep(module: Any, method: str) -> Any:
    """Return the SweepConfig of that name."""
    found = getattr(module, method)
    assert isinstance(found, SweepConfig)
    return found


def trained(method: str, **changes: int) -> int:
    """Return the number of trained parameters by formula, with the config's sizes or others."""
    chosen = sweep(config, method).base.method
    own = {**chosen.settings, **changes}
    size, tokens = own.get("size", 0), own.get("prefix", 0) + own.get("infix", 0)
    formulae = {
        "lora": lambda: BUDGET,
        "houlsby": lambda: counts.adapter(WIDTH, size, 2 * LAYERS, norms=2 * LAYERS + 1),
        "pfeiffer": lambda: counts.adapter(WIDTH, size, LAYERS),
        "adapter_drop": lambda: counts.adapter(WIDTH, size, LAYERS - own["drop"]),
        "lin": lambda: counts.adapter(WIDTH, size, LAYERS, norms=LAYERS),
        "prefix_embedding": lambda: counts.prefix_embedding(WIDTH, tokens),
        "prefix_layer": lambda: counts.prefix_layer(WIDTH, tokens, LAYERS),
        "bitfit": lambda: counts.biases(WIDTH, MLP, LAYERS),
        "top_layers": lambda: own["top_layers"] * counts.layer(WIDTH, MLP),
        "head": lambda: 0,
    }
    return formulae[method]()


# ---- the configs


def test_every_method_has_a_grid_of_nine() -> None:
    assert {n for n, v in vars(config).items() if isinstance(v, SweepConfig)} == {
        "config",
        *methods.METHODS,
    }
    assert config.config is config.lora
    for method in methods.METHODS:
        found = sweep(config, method)
        members = found.expand().members
        rates = [m.config.optimizer.learning_rate for m in members]
        assert found.base.method.name == method
        assert len(members) == 9
        assert len(set(rates)) == 3
        assert {m.config.seed for m in members} == {0, 1, 2}
        low, middle, high = sorted(set(rates))
        assert all(2 <= ratio <= 3.5 for ratio in (middle / low, high / middle))


def test_methods_differ_in_nothing_but_method_and_rate() -> None:
    bases = []
    for method in methods.METHODS:
        own = to_dict(sweep(config, method).base)
        del own["method"]
        bases.append(own)
    assert all(base == bases[0] for base in bases)


@pytest.mark.parametrize("method", MATCHED)
def test_sizes_are_the_nearest_to_loras_numbers(method: str) -> None:
    here = trained(method)
    assert abs(here - BUDGET) <= MATCHED[method] * BUDGET
    sizes = sweep(config, method).base.method.settings
    field = "size" if "size" in sizes else "prefix"
    near = [trained(method, **{field: sizes[field] + change}) for change in (-1, 1)]
    assert all(abs(here - BUDGET) <= abs(other - BUDGET) for other in near)


def test_the_docstring_has_the_counts() -> None:
    lines = [" ".join(line.split()) for line in (config.__doc__ or "").splitlines()]
    for method in set(methods.METHODS) - {"full"}:  # it has no formula
        assert any(f"{line} ".startswith(f"{method} {trained(method):,} ") for line in lines)


def test_samples_are_the_same_methods_on_three_sizes() -> None:
    names = {n for n, v in vars(few).items() if isinstance(v, SweepConfig)}
    assert names == {"config", *samples.METHODS}
    assert few.config is few.lora
    for method in samples.METHODS:
        members = sweep(few, method).expand().members
        assert len(members) == 9
        found = {(m.config.data.train_limit, m.config.seed) for m in members}
        assert found == {(n, seed) for n in (100, 1_000, None) for seed in (0, 1, 2)}
        rates = {m.config.optimizer.learning_rate for m in members}
        assert rates == {sorted(config.LEARNING_RATES[method])[1]}
        assert {m.config.steps for m in members} == {150}
        same = sweep(config, method).base.method
        assert {m.config.method for m in members} == {same}
    assert set(samples.METHODS) == set(published.SAMPLES)


@pytest.mark.parametrize("module", [methods, samples])
def test_commands_name_what_is_there(module: Any, tmp_path: pathlib.Path) -> None:
    found: Sequence[Task] = module.tasks(tmp_path)
    here = {methods: config, samples: few}[module]
    assert [task.folder.name for task in found] == list(module.METHODS)
    for task in found:
        script, option, value, _, folder = task.arguments
        assert (script, option, folder) == ("train.py", "--config", str(task.folder))
        file, _, attribute = value.partition(":")
        assert str(here.__file__).endswith(file)
        assert isinstance(getattr(here, attribute), SweepConfig)


# ---- what the sections say of runs


def run(path: pathlib.Path, base: Any, point: dict[str, Any], scores: Any) -> None:
    """Write a run of `base` with some values changed; without scores the run has not finished."""
    changed = base
    for field, value in point.items():
        changed = config_fields.with_field(changed, field, value)
    runs.finished(path, to_dict(changed), *(scores or (0.0, 0.0)))
    if scores is None:
        (path / "summary.json").unlink()


Scores = dict[float, list[tuple[float, float]]]  # learning rate -> (validation, test) of each seed


def group(folder: pathlib.Path, method: str, scores: Scores) -> None:
    base = sweep(config, method).base
    for rate, seeds in scores.items():
        for seed, one in enumerate(seeds):
            changes = {"optimizer.learning_rate": rate, "seed": seed}
            run(folder / method / f"{rate},{seed}", base, changes, one)


LORA: Scores = {
    1e-3: [(0.70, 0.99), (0.71, 0.99), (0.72, 0.99)],  # best on test, but not to be picked
    2e-3: [(0.75, 0.76), (0.77, 0.80), (0.79, 0.75)],
    4e-3: [(0.80, 0.60), (0.70, 0.61), (0.71, 0.62)],  # the best single run, but a lower mean
}
BITFIT: Scores = {
    1e-3: [(0.60, 0.60)] * 3,
    3e-3: [(0.61, 0.60)] * 3,
    1e-2: [(0.65, 0.62), (0.66, 0.66), (0.67, 0.61)],
}


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    group(tmp_path, "lora", LORA)
    group(tmp_path, "bitfit", BITFIT)
    return tmp_path


def tables(found: Sequence[Section]) -> list[dict[str, dict[str, str]]]:
    """Return each table as row -> column -> cell; the first cell of a row names it."""
    return [
        {row[0]: dict(zip(block.columns, row, strict=True)) for row in block.rows}
        for section in found
        for block in section.blocks
        if isinstance(block, Table)
    ]


def texts(found: Sequence[Section], kind: type[Paragraph | Note]) -> list[str]:
    return [b.text for section in found for b in section.blocks if isinstance(b, kind)]


def test_validation_picks_the_learning_rate(folder: pathlib.Path) -> None:
    first, *_ = tables(methods.sections(folder))
    assert first["lora"]["learning rate"] == "2e-3"
    assert first["lora"]["trained"] == "8,001"
    assert first["lora"]["seeds"] == "3"
    for split, place in {"validation": 0, "test": 1}.items():
        known = 100 * np.array([one[place] for one in LORA[2e-3]])
        assert first["lora"][split] == f"{known.mean():.1f} ± {known.std(ddof=1):.1f}"
    assert "95.1 (base, 0.3M)" in first["lora"]["paper: SST-2, RoBERTa"]
    assert first["lora"]["paper: BLEU, GPT-2 medium"] == "70.4 (0.35M)"


def test_a_rate_at_the_edge_is_marked(folder: pathlib.Path) -> None:
    found = methods.sections(folder)
    first, *_, every = tables(found)
    assert first["bitfit"]["learning rate"] == "0.01 (highest)"
    (edges,) = [text for text in texts(found, Paragraph) if "end of the rates" in text]
    assert "bitfit (the highest)" in edges
    assert "lora" not in edges
    assert every["bitfit"]["highest"].startswith("0.01: 66.0 ± 1.0")


def test_differences_have_the_error_of_two_means(folder: pathlib.Path) -> None:
    found = methods.sections(folder)
    _, second, _ = tables(found)
    ours, lora = (np.array([s[1] for s in x]) for x in (BITFIT[1e-2], LORA[2e-3]))
    error = np.sqrt(ours.var(ddof=1) / 3 + lora.var(ddof=1) / 3)
    assert set(second) == {"bitfit"}
    assert second["bitfit"]["minus LoRA"] == f"{100 * (ours.mean() - lora.mean()):+.1f}"
    assert second["bitfit"]["standard error"] == f"{100 * error:.1f}"
    assert second["bitfit"]["paper: SST-2, RoBERTa"] == "-1.4 (base, 0.1M)"
    (said,) = [text for text in texts(found, Paragraph) if "standard errors" in text]
    assert "below LoRA: 1 (bitfit); above LoRA: none; closer than that: none" in said
    assert "1 with our sign, 0 with the other" in said


def test_one_seed_has_no_error(folder: pathlib.Path) -> None:
    group(folder, "head", {1e-3: [(0.6, 0.5)]})
    found = methods.sections(folder)
    _, second, _ = tables(found)
    assert second["head"]["standard error"] == "-"
    (said,) = [text for text in texts(found, Paragraph) if "standard errors" in text]
    assert "closer than that: none; with too few seeds for an error: 1 (head)." in said


def test_what_is_missing_is_said_with_its_command(tmp_path: pathlib.Path) -> None:
    for module in (methods, samples):
        assert module.sections(tmp_path) == ()
    group(tmp_path, "lora", LORA)
    (note,) = texts(methods.sections(tmp_path), Note)
    first, *others = [method for method in methods.METHODS if method != "lora"]
    assert f"There are no runs of {first}, {', '.join(others)}." in note
    command = f"python train.py --config {methods.FILE}:{first} --run-dir {tmp_path / first};"
    assert command in note


def test_unfinished_runs_are_not_counted(tmp_path: pathlib.Path) -> None:
    base = sweep(config, "lora").base
    group(tmp_path, "lora", {1e-3: LORA[1e-3], 2e-3: LORA[2e-3]})
    for seed, scores in enumerate([(0.99, 0.99), None, None]):
        changes = {"optimizer.learning_rate": 4e-3, "seed": seed}
        run(tmp_path / "lora" / f"waiting{seed}", base, changes, scores)
    found = methods.sections(tmp_path)
    first, every = tables(found)
    assert first["lora"]["learning rate"] == "2e-3"
    assert every["lora"]["highest"] == "4e-3: 99.0"
    notes = texts(found, Note)
    assert [n.startswith("waiting") for n in notes] == [False, True, True]
    assert "step 1 of 150" in notes[1]


def test_samples_are_by_their_number(tmp_path: pathlib.Path) -> None:
    base = sweep(few, "lora").base
    scores = {100: (0.60, 0.64), 1_000: (0.70, 0.71), None: (0.75, 0.79)}
    for limit, seeds in scores.items():
        for seed, score in enumerate(seeds):
            changes = {"data.train_limit": limit, "seed": seed}
            run(tmp_path / "lora" / f"{limit},{seed}", base, changes, (0.5, score))
    found = samples.sections(tmp_path)
    (table,) = tables(found)
    row = table["lora"]
    for column, limit in {"100": 100, "1,000": 1_000, "all": None}.items():
        known = 100 * np.array(scores[limit])
        assert row[column] == f"{known.mean():.1f} ± {known.std(ddof=1):.1f}"
    assert [row[f"paper: {n}"] for n in ("100", "1,000", "10,000", "392,000")] == [
        f"{score:.1f}" for score in published.SAMPLES["lora"].values()
    ]
    (figure,) = [b for section in found for b in section.blocks if isinstance(b, Figure)]
    assert "100: 62.0" in figure.panels[0].alternative


def test_names_of_points_do_not_meet() -> None:
    near = [
        seed_scatter.NamedPoint(f"method_{i}", 70_000 + i, 75.0 + 0.01 * i, 1.0) for i in range(6)
    ]
    points = [
        *near,
        seed_scatter.NamedPoint("full", 22_000_000, 78.0, 0.5),
        seed_scatter.NamedPoint("head", 770, 60, 1),
    ]
    figure = seed_scatter.draw(points, "along", "up")
    figure.canvas.draw()
    # The letters alone, without the lines that lead to the points.
    boxes = [Letters.get_window_extent(text) for text in figure.axes[0].texts]
    assert len(boxes) == len(points)
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]]
    assert not any(a.overlaps(b) for a, b in pairs)
    assert all(figure.bbox.contains(x, y) for box in boxes for x, y in box.corners())


def test_a_damaged_run_is_an_error(folder: pathlib.Path) -> None:
    (folder / "lora" / "0.001,0" / "summary.json").write_text("{}")
    with pytest.raises(LoraError, match="summary"):
        methods.sections(folder)
