"""`python -m experiments.sequel`: grids, programs, verdicts, and the report of their results."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import pytest

from experiments.sequel import __main__ as command
from experiments.sequel import cells, claims, formats, grids, page, programs, tables, verdicts
from experiments.sequel.cells import FULL, QUICK
from experiments.sequel.results import Results, Scored
from lora_jax.sweeps import loop
from lora_jax.sweeps.config import GroupConfig
from lora_jax.training.config_json import to_dict
from tests.experiments import runs


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [
        ({3e-3: [0.6], 1e-2: [0.5], 3e-2: [0.7]}, None),  # inside
        ({3e-3: [0.4], 1e-2: [0.5], 3e-2: [0.7]}, 1e-3),
        ({3e-3: [0.6], 1e-2: [0.5], 3e-2: [0.4]}, 1e-1),
        ({3e-3: [0.6], 1e-2: [0.5], 3e-2: [math.nan]}, None),  # diverged: not the best
    ],
)
def test_a_grid_goes_on_from_the_edge_at_which_its_best_rate_is(
    losses: grids.Losses, wanted: float | None
) -> None:
    found = grids.next_rate(losses, longer=1, first=3)
    assert found == wanted


def test_a_grid_ends_when_it_is_too_long() -> None:
    losses = {rate: [1.0 - i / 10] for i, rate in enumerate((1e-3, 3e-3, 1e-2, 3e-2, 1e-1))}
    assert grids.next_rate(losses, longer=2, first=3) is None
    assert grids.next_rate(losses, longer=3, first=3) == 0.3
    assert grids.edge(losses) == "highest"


@pytest.mark.parametrize(
    ("claim", "value", "half", "wanted"),
    [
        (claims.DORA, -0.02, 0.01, verdicts.HOLDS),
        (claims.DORA, 0.02, 0.01, verdicts.NOT),
        (claims.DORA, -0.02, 0.03, verdicts.UNTOLD),
        (claims.DORA, -0.02, math.inf, verdicts.UNTOLD),
        (claims.VERA, 0.002, 0.005, verdicts.HOLDS),
        (claims.VERA, 0.002, 0.02, verdicts.UNTOLD),
        (claims.VERA, 0.05, 0.01, verdicts.NOT),
        (claims.VERA, -0.05, 0.01, verdicts.NOT),
    ],
)
def test_a_difference_within_its_interval_is_no_verdict(
    claim: claims.Claim, value: float, half: float, wanted: str
) -> None:
    assert verdicts.verdict(claim, verdicts.Difference(value, half)) == wanted


def test_pairs_have_students_interval() -> None:
    """By hand: differences 1, 2 and 3 have the mean 2 and the standard error 1 / sqrt(3)."""
    found = verdicts.paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.half == pytest.approx(4.303 / math.sqrt(3))
    assert not math.isfinite(verdicts.paired([1.0], [2.0]).half)


def test_claims_compare_methods_of_their_table() -> None:
    for table in tables.TABLES:
        for arm in table.arms:
            at = grids.RATES.index(arm.rates[0])
            assert arm.rates == grids.RATES[at : at + len(arm.rates)], "no gap in the grid"
        names = {arm.name for arm in table.arms}
        assert len(names) == len(table.arms)
        assert set(table.main) <= names
        for claim in table.claims:
            assert {claim.better, claim.than} <= names, claim.text


def test_the_same_run_of_two_tables_is_one_cell() -> None:
    arms = {(table.name, arm.name): arm for table in tables.TABLES for arm in table.arms}
    alike = [
        ("kinds", "lora r8"),
        ("loraplus", "ratio 1"),
        ("bits", "float32"),
        ("starts", "zeros"),
    ]
    keys = {cells.cell(arms[name], 1e-2, 0, FULL).key for name in alike}
    assert len(keys) == 1
    others = [cells.cell(arm, 1e-2, 0, FULL).key for arm in arms.values()]
    assert len(set(others)) == len(arms) - 6, "and lora r2 and dora r8 are in two tables"
    assert cells.cell(arms["kinds", "lora r8"], 1e-2, 1, FULL).key not in others
    assert cells.cell(arms["kinds", "lora r8"], 1e-2, 0, QUICK).key not in others


def test_all_cells_see_as_many_examples_and_choices_of_matrices_have_one_budget() -> None:
    (table,) = (table for table in tables.TABLES if table.name == "where")
    configs = {arm.name: cells.cell(arm, 1e-2, 0, FULL).config for arm in table.arms}
    assert {c.steps * c.data.batch_size for c in configs.values()} == {FULL.steps * 8}
    assert configs["all r2, batch 32"].data.batch_size == 32
    per_rank = {"attention r5": 4 * 768, "mlp r4": 2 * (384 + 1536)}
    counts = {name: size * configs[name].lora.rank for name, size in per_rank.items()}
    assert set(counts.values()) == {92_160 // 6}


def test_a_program_mixes_rates_ratios_and_scalings_and_nothing_else() -> None:
    every = [
        one for table in tables.TABLES for arm in table.arms
        for one in tables.cells(arm, arm.rates, FULL)
    ]  # fmt: skip
    found = list(programs.programs(every))
    assert sorted(c.key for alike in found for c in alike) == sorted(c.key for c in every)
    assert len({c.arm for alike in found for c in alike}) > 20
    for alike in found:
        assert len(alike) <= programs.MOST
        first = alike[0].config
        for one in alike:
            assert (one.config.lora.kind, one.config.lora.rank) == (
                first.lora.kind,
                first.lora.rank,
            )
            assert (one.config.model, one.config.data) == (first.model, first.data)
            if one.config.lora.init in ("pissa", "olora"):
                assert one.config.lora == first.lora
    mixed = [{c.arm for c in alike} for alike in found]
    assert {"rslora r4", "lora r4"} in mixed
    assert any({"ratio 4", "ratio 16"} <= names for names in mixed)


def made_up(arm: str, rate: float, seed: int) -> float:
    """Return a loss whose best rate is 0.1, beyond all grids; DoRA is better by 0.1."""
    return abs(math.log10(rate) + 1) / 10 + 0.3 + 0.001 * seed - 0.1 * (arm == "dora")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write finished runs in place of training; return the names of the members trained."""
    names: list[str] = []

    def run(config: GroupConfig, grid: Any, path: pathlib.Path, console: Any) -> None:
        for member in config.members:
            one = member.config
            loss = made_up(one.lora.kind, one.optimizer.learning_rate, one.seed)
            runs.finished(path / member.name, to_dict(one), loss, loss, "loss")
            summary = json.loads((path / member.name / "summary.json").read_text())
            summary["after"]["test"]["accuracy"] = 0.75
            (path / member.name / "summary.json").write_text(json.dumps(summary))
            names.append(member.name)

    monkeypatch.setattr(loop, "run", run)
    monkeypatch.setattr(command.formats, "measure", lambda: ())
    return names


def test_grids_are_trained_until_their_best_rates_are_inside(
    trained: list[str], tmp_path: pathlib.Path
) -> None:
    given = ["kinds", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert command.main(given) == 0
    results = Results(tmp_path / "out" / "results.json")
    assert len(results.cells) == len(trained) == len(set(trained))
    for arm in tables.TABLES[0].arms:
        own = tables.tuned(arm, results, FULL)
        assert own is not None
        assert own.rate == 0.1
        assert not grids.edge(own.losses)
        assert all(len(scores) == len(tables.SEEDS) for scores in own.found.values())
    count = len(trained)
    assert command.main(given) == 0
    assert len(trained) == count, "cells with results are trained again"
    text = (tmp_path / "out" / "report.md").read_text()
    line = next(x for x in text.splitlines() if "DoRA is better than LoRA" in x)
    assert verdicts.HOLDS in line
    assert "-0.1000 ± 0.0000" in line
    assert "not run yet" in text, "the other tables"


def test_quick_trains_a_part_and_fewer_steps(trained: list[str], tmp_path: pathlib.Path) -> None:
    where = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert command.main(["kinds", "--quick", *where]) == 0
    rounds = 1 + QUICK.longer
    most = len(tables.TABLES[0].main) * len(tables.SEEDS) * (3 + rounds)
    assert len(trained) <= most
    for name in trained:
        config = json.loads((tmp_path / "runs" / name / "config.json").read_text())
        assert config["steps"] == QUICK.steps


def test_a_result_is_read_as_it_was_written(tmp_path: pathlib.Path) -> None:
    results = Results(tmp_path / "results.json")
    results.add({"b": Scored(0.5, math.inf, 0.7, 10, 1.25, 3.0, 4)})
    results.add({"a": Scored(0.123456789, 0.5, 0.7, 10, 1.25, 3.0, 4)})
    again = Results(tmp_path / "results.json").cells
    assert again["b"] == Scored(0.5, math.inf, 0.7, 10, 1.25, 3.0, 4)
    assert again["a"].validation == 0.123457
    (tmp_path / "results.json").write_text('{"a": [1]}')
    with pytest.raises(Exception, match=r"results\.json cannot be read"):
        Results(tmp_path / "results.json")


def test_numbers_that_were_not_read_in_the_paper_are_marked() -> None:
    assert "remembered" in claims.LORA_PLUS.number
    assert "remembered" not in claims.DORA.number
    report = page.make(Results(pathlib.Path("none")), FULL, ())
    assert len(report.notes) == len(tables.TABLES)


def test_formats_have_verdicts_of_their_own() -> None:
    names = ("int4", "nf4", "nf4 double", "nf4, pissa r8")
    lost = [formats.Lost(n, 4.5 - i / 4, 0.3 - i / 10, 0.2, 0.1) for i, n in enumerate(names)]
    (section,) = page._formats(lost)
    rows = section.blocks[1].rows  # type: ignore[union-attr]
    assert [row[-1] for row in rows] == [verdicts.HOLDS, verdicts.HOLDS, verdicts.NOT]
    assert "0.250" in rows[0][2]


def test_an_unknown_table_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["kind"]) == 1
    assert "no table 'kind'; nearest:" in capsys.readouterr().err
