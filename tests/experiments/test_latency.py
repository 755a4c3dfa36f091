"""The forward pass of five methods: their programs, and the report on their times."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import lora_jax
from experiments import methods
from experiments.paper import forward, latency, measurement_file
from experiments.paper.forward import BASE, HOULSBY, LIN, MERGED, METHODS, UNMERGED, Sizes
from experiments.paper.latencies import Latencies, Timed, Timings, table
from experiments.paper.published import LATENCY_MILLIONS
from lora_jax import LoraError, models
from lora_jax.planner import hlo
from lora_jax.report.document import Figure, Table
from measuring import timing
from measuring.published_models import MEDIUM

BATCH, LENGTH, D, LAYERS = 2, 8, 128, 2
TINY = dataclasses.replace(
    MEDIUM, vocab_size=37, hidden_size=D, num_layers=LAYERS, num_heads=4, mlp_size=256,
    max_positions=16,
)  # fmt: skip
SIZES = Sizes(rank=16, lin=64, houlsby=48)
MACHINE = timing.Machine("a processor", 2, "cpu", "cpu", "3", "1", "2")


@pytest.fixture(scope="module")
def made() -> dict[str, forward.Variant]:
    return forward.variants(TINY, SIZES)


@pytest.fixture(scope="module")
def programs(made: dict[str, forward.Variant]) -> dict[str, Any]:
    return {name: forward.compiled(one, BATCH, LENGTH) for name, one in made.items()}


def test_the_model_has_the_size_of_gpt2_medium() -> None:
    assert lora_jax.count(models.shapes(MEDIUM)) == 354_823_168


def test_the_numbers_are_those_of_the_trees(made: dict[str, forward.Variant]) -> None:
    found = forward.added(TINY, SIZES)
    lin, houlsby = methods.lin(TINY, SIZES.lin), methods.houlsby(TINY, SIZES.houlsby)
    _, factors = made[UNMERGED].weights
    assert list(found) == list(made) == list(METHODS)
    assert found[UNMERGED] == found[MERGED] == lora_jax.count(factors)
    assert found[LIN] == lora_jax.count(lin.shapes())
    assert found[HOULSBY] == lora_jax.count(houlsby.shapes())
    assert lora_jax.count(made[MERGED].weights) == lora_jax.count(made[BASE].weights)


def test_the_adapter_layers_are_as_large_as_the_papers() -> None:
    for sizes, shape in ((latency.SMALL, (32, 512)), (latency.LARGE, (1, 128))):
        found = forward.added(MEDIUM, sizes)
        paper = LATENCY_MILLIONS[shape]
        for name in (LIN, HOULSBY):
            assert found[name] / 1e6 == pytest.approx(paper, rel=0.1)


def test_merged_is_the_bases_own_program(programs: dict[str, Any]) -> None:
    forward.check_merged(programs)
    assert forward.text(programs[MERGED]) == forward.text(programs[BASE])
    with pytest.raises(LoraError, match=r"base's own program: \d+ lines of HLO and \d+"):
        forward.check_merged({**programs, MERGED: programs[UNMERGED]})


@pytest.fixture
def locations() -> Iterator[None]:
    """Programs name their source lines, as they do outside of the tests."""
    jax.config.update("jax_traceback_in_locations_limit", 10)
    yield
    jax.config.update("jax_traceback_in_locations_limit", 0)


@pytest.mark.usefixtures("locations")
def test_a_program_is_more_than_where_it_comes_from(programs: dict[str, Any]) -> None:
    def one(x: Any) -> Any:
        return x * 2 + 1

    first, one = jax.jit(one), lambda x: x * 2 + 1
    one.__name__ = one.__qualname__ = "one"
    apart = {"xla_llvm_disable_expensive_passes": True}  # or the cache gives both one program
    lowered = [f.lower(np.ones(3, np.float32)) for f in (first, jax.jit(one))]
    found = [lowered[0].compile(), lowered[1].compile(apart)]
    assert found[0].as_text() != found[1].as_text()
    assert forward.text(found[0]) == forward.text(found[1])
    assert "metadata=" in programs[LIN].as_text()
    assert "metadata=" not in forward.text(programs[LIN])
    module = hlo.parse(forward.text(programs[LIN]))
    assert forward.instructions(programs[LIN]) == sum(map(len, module.computations.values()))
    assert forward.instructions(programs[LIN]) > forward.instructions(programs[BASE]) > 0


def test_merged_does_what_unmerged_does(
    made: dict[str, forward.Variant], programs: dict[str, Any]
) -> None:
    ids = jax.random.randint(jax.random.key(3), (BATCH, LENGTH), 0, TINY.vocab_size, np.int32)
    found = {name: np.asarray(programs[name](one.weights, ids)) for name, one in made.items()}
    scale = np.abs(found[BASE]).max()
    np.testing.assert_allclose(found[MERGED], found[UNMERGED], atol=1e-5 * scale)
    for name in (MERGED, LIN, HOULSBY):
        assert np.abs(found[name] - found[BASE]).max() > 1e-4 * scale, name


def test_flops_are_more_by_those_of_what_is_added(programs: dict[str, Any]) -> None:
    """A method adds exactly its own FLOPs of products, and at most 15 % more by XLA's count."""
    tokens = BATCH * LENGTH
    more = {
        BASE: 0,
        MERGED: 0,
        UNMERGED: tokens * 2 * SIZES.rank * (D + D) * 2 * LAYERS,
        LIN: tokens * 4 * D * SIZES.lin * LAYERS,
        HOULSBY: tokens * 4 * D * SIZES.houlsby * 2 * LAYERS,
    }
    products = {name: _products(program) for name, program in programs.items()}
    every = {name: forward.flops(program) for name, program in programs.items()}
    for name, wanted in more.items():
        assert products[name] - products[BASE] == wanted, name
        assert wanted <= every[name] - every[BASE] <= 1.15 * wanted, name


def _products(program: Any) -> int:
    return sum(p.flops * p.times for p in hlo.products(hlo.parse(program.as_text())))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "MEDIUM", dataclasses.replace(TINY, num_layers=24))
    monkeypatch.setattr(latency, "LARGE", SIZES)


@pytest.mark.usefixtures("tiny")
def test_the_command(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "latency.json"
    given = ["--layers", "1", "--repeats", "3", "--shapes", "2x8"]
    assert latency.main(["--out", str(out), *given]) == 0
    found = measurement_file.read(out, Latencies, "")
    assert found is not None
    assert (found.layers, found.whole_layers, found.merged_is_base) == (1, 24, True)
    assert [(at.batch, at.length) for at in found.shapes] == [(2, 8)]
    one = dataclasses.replace(TINY, num_layers=1)
    for at in found.shapes:
        assert [len(run.seconds) for run in at.runs] == [3] * len(METHODS)
        assert {run.method: run.added for run in at.runs} == forward.added(one, SIZES)
        assert [24 * run.added for run in at.runs] == [run.added_whole for run in at.runs]
        flops = {run.method: run.flops for run in at.runs}
        assert flops[MERGED] == flops[BASE] < flops[UNMERGED] < flops[HOULSBY]
    said = capsys.readouterr()
    assert "LoRA, merged" in said.out and found.machine.line() in said.out
    assert "2 x 8: 1 layers, 3 repeats" in said.err
    (section,) = latency.sections(out.parent)
    assert table(found) in section.blocks


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--shapes", "32"], "'32': expected batch x length, such as 32x512"),
        (["--shapes", "1x17"], "the model has 16 positions"),
        (["--repeats", "0"], "must be at least 1"),
        (["--layers", "-1"], "must be at least 1"),
        (["--out", ".", "--shapes", "1x4"], "is a folder"),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_errors_of_the_command_line(
    given: list[str], said: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--out" in given else ["--out", str(tmp_path / "x.json")]
    assert latency.main([*out, *given]) == 1
    assert said in " ".join(capsys.readouterr().err.split())
    assert not any(tmp_path.iterdir())


def by_hand(shape: tuple[int, int] = (32, 512)) -> Latencies:
    runs = tuple(
        Timed(name, 10, 120, (1.0, 2.0, 6.0) if name != LIN else (3.0,), 1e9, 50)
        for name in METHODS
    )
    return Latencies(MACHINE, 2, 24, True, 12.5, (Timings(*shape, runs),))


def test_the_table_has_the_papers_numbers_beside_ours() -> None:
    rows = {row[1]: row for row in table(by_hand()).rows}
    assert rows["Adapter^L"][4:] == ("3,000.0", "+50.0%", "+0.00%", "1,482.0 ± 1.0", "+2.2%")
    assert rows["LoRA, merged"][4:] == (
        *("2,000.0 ± 2,645.8", "+0.0%", "+0.00%"),
        *("1,449.4 ± 0.8", "+0.0%"),
    )
    assert rows["LoRA, not merged"][7:] == ("-", "-")
    other = {row[1]: row for row in table(by_hand((4, 4))).rows}
    assert other["Adapter^L"][5:] == ("+50.0%", "+0.00%", "-", "-")


def test_what_is_written_is_what_is_read(tmp_path: pathlib.Path) -> None:
    found = by_hand()
    measurement_file.write(tmp_path / "latency.json", found)
    assert measurement_file.read(tmp_path / "latency.json", Latencies, "") == found
    assert [path.name for path in tmp_path.iterdir()] == ["latency.json"]
    (section,) = latency.sections(tmp_path)
    kinds = [type(block) for block in section.blocks]
    assert Table in kinds and Figure in kinds
    (figure,) = (block for block in section.blocks if isinstance(block, Figure))
    assert "Adapter^L +50.0%" in figure.panels[0].alternative


def test_nothing_measured_is_no_section(tmp_path: pathlib.Path) -> None:
    assert latency.sections(tmp_path / "none") == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.pop("layers"), "it has machine, "),
        (lambda found: found.update(more=1), "more, expected machine, layers"),
        (lambda found: found.update(layers="2"), "layers is '2', expected a int"),
        (lambda found: found.update(layers=True), "layers is 'True', expected a int"),
        (lambda found: found.update(seconds=float("nan")), "seconds is 'nan', expected a float"),
        (lambda found: found.update(merged_is_base=False), "merged_is_base is False"),
        (lambda found: found.update(machine=[]), "machine has list, expected processor"),
        (lambda found: found.update(shapes=[]), "shapes is '[]', expected a list with entries"),
        (lambda found: found["shapes"][0]["runs"].pop(), "runs are ('base', 'merged'"),
    ],
)
def test_a_damaged_file_is_named(change: Any, said: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "latency.json"
    measurement_file.write(file, by_hand())
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))
    with pytest.raises(LoraError) as error:
        latency.sections(tmp_path)
    text = str(error.value)
    assert said in text and str(file) in text
    assert f"python -m experiments.paper.latency --out {file}" in text


def test_half_a_file_is_named(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "latency.json"
    file.write_text('{"machine": {')
    with pytest.raises(LoraError, match=r"latency\.json cannot be read: .*make it again"):
        latency.sections(tmp_path)
