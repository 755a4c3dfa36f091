"""The command line: accepted options, and the messages about others."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib

import pytest

import train
from lora_jax.cli import generate, predict
from lora_jax.cli import train as command_line
from lora_jax.planner import PlanOptions
from lora_jax.sweeps.sweep import SweepConfig
from lora_jax.system import options_help
from lora_jax.training import directory
from lora_jax.training.config import Config, ConfigError
from lora_jax.training.config_json import differences, to_dict
from lora_jax.training.text import TextConfig
from tests.training.runs import OWN, ROOT


def parse(*arguments: str) -> Config:
    return command_line.parse(arguments, OWN, ROOT)[1]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the text that the user reads, without boxes and line breaks."""
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2
    output = capsys.readouterr()
    return " ".join((output.out + output.err).replace("│", " ").split())


def test_any_field_is_set_by_its_path() -> None:
    found = parse("--steps", "50", "--lora.rank", "4", "--optimizer.learning-rate", "0.5")
    assert (found.steps, found.lora.rank, found.optimizer.learning_rate) == (50, 4, 0.5)
    changed = differences(to_dict(parse()), to_dict(found))
    assert [line.partition(":")[0] for line in changed] == [
        "steps", "lora.rank", "optimizer.learning_rate",
    ]  # fmt: skip


def test_a_field_that_the_config_file_adds() -> None:
    assert vars(parse("--width", "32"))["width"] == 32


def test_targets_may_be_empty_and_may_carry_their_own_rank() -> None:
    assert parse("--lora.targets").lora.spec.targets == ()
    rule = parse("--lora.targets", "**/kernel@rank=1,alpha=3").lora.spec.rules[0]
    assert (rule.pattern, rule.rank, rule.alpha) == ("**/kernel", 1, 3.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--stesp", "3"), ["--stesp", "Perhaps you meant", "--steps INT"]),
        (("--lora.rnak", "3"), ["--lora.rnak", "Perhaps you meant", "--lora.rank INT"]),
        (("--conifg", "x.py"), ["--conifg", "Perhaps you meant", "--config STR"]),
        (("--steps", "3.5"), ["--steps", "3.5", "int"]),
        (("--optimizer.schedule", "liner"), ["liner", "--optimizer.schedule", "'linear'"]),
        (("--lora.rank", "0"), ["lora.rank must be at least 1, got 0"]),
        (("--lora.alpha", "-1"), ["lora.alpha must be above 0, got -1.0"]),
        (("--optimizer.warmup", "1"), ["optimizer.warmup must be in [0, 1), got 1.0"]),
        (("--optimizer.clip", "0"), ["optimizer.clip must be above 0, got 0.0"]),
        (("--lora.targets", "**@rnak=1"), ["lora.targets", "rnak=1", "pattern@rank=4,alpha=8"]),
    ],
)
def test_refused_at_once(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: list[str]
) -> None:
    text = refused(capsys, *arguments)
    for part in says:
        assert part in text


def test_a_top_level_value_is_refused_as_well() -> None:
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        parse("--steps", "0")


def test_an_option_that_is_given_twice_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """An option that is given twice causes a note, except where its values add up."""
    assert parse("--lora.rank", "4", "--steps", "2", "--lora.rank=8").lora.rank == 8
    assert capsys.readouterr().err == "note: --lora.rank is given 2 times; the last one counts\n"
    asked = ["--adapter", "a", "--adapter", "b", "--batch-size", "1", "--batch-size", "2"]
    for main, text in ((predict.main, "--text"), (generate.main, "--prompt")):
        assert main([*asked, text, "x", text, "y"]) == 1
        said = capsys.readouterr().err.split("error: ")[0]
        assert said == "note: --batch-size is given 2 times; the last one counts\n"


def test_one_reader_of_options() -> None:
    package = pathlib.Path(command_line.__file__).parents[1]
    using = {p.name for p in package.rglob("*.py") if "tyro.cli(" in p.read_text()}
    assert using == {"console.py", "config_fields.py"}  # config_fields.py reads single values


def test_a_model_that_is_not_there_leaves_the_directory_to_others(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    run = tmp_path / "run"
    assert train.main(["--model.reference", str(tmp_path / "none"), "--run-dir", str(run)]) == 1
    assert "none is neither a folder nor a .gguf file" in capsys.readouterr().err
    assert not run.exists()
    own = dataclasses.replace(parse(), run_dir=str(run))
    with contextlib.suppress(KeyboardInterrupt), directory.enter("own", own):
        (run / "metrics.jsonl").write_text("")
        raise KeyboardInterrupt
    assert (run / "config.json").is_file()  # so that run has begun


def every_field(kind: type, prefix: str = "") -> list[str]:
    found = []
    for field in dataclasses.fields(kind):
        found.append(prefix + field.name)
        if dataclasses.is_dataclass(field.default):
            found += every_field(type(field.default), f"{prefix}{field.name}.")
    return found


def test_help_names_every_field_with_default_and_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse("--help-all")
    out = capsys.readouterr().out.replace("│", " ")
    text, blocks = " ".join(out.split()), out.split("--")
    assert "Rank r of the update. (default: 2)" in text
    assert "--width" in text and "--workload" not in text
    nested = {"workload", "lora", "optimizer", "mesh", "processes"}
    for field in set(every_field(Config)) - nested:
        option = "from" if field == "start_from" else field.replace("_", "-")
        block = next(" ".join(b.split()) for b in blocks if b.split()[:1] == [option])
        meaning = block.partition("(default")[0].removeprefix(option)
        assert [w for w in meaning.split() if w.islower()], block


@pytest.mark.parametrize("config", ["minilm_reviews", "own_model", "sweep", "multitask"])
def test_the_short_help_is_one_screen(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The short help has at most 40 lines that a screen of 80 columns does not wrap."""
    with pytest.raises(SystemExit) as end:
        command_line.parse(("--help", "--config", f"configs/{config}.py"), OWN, ROOT)
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    assert "--steps 50" in lines[1] or "--steps 50" in lines[2]  # an example comes first
    assert "--help-all" in lines[-1]
    assert ("--width" in " ".join(lines)) == (config == "own_model")


def test_the_short_help_names_options_that_exist() -> None:
    """Every option of the short help is an option of some config."""
    kinds = (TextConfig, SweepConfig, PlanOptions)
    known = {one.name.removeprefix("--") for kind in kinds for one in options_help.options(kind)}
    lines = command_line.MAIN.strip().splitlines()
    assert not {line.split("   ")[0] for line in lines if "   " in line} - known


def test_help_fills_lines_and_says_what_flags_turn_off(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        command_line.parse(("--help-all", "--config", "configs/minilm_reviews.py"), OWN, ROOT)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    at = next(i for i, line in enumerate(lines) if line.strip() == "--data.no-pack")
    assert lines[at + 1].strip().startswith("Turn this off: Language modelling: put as many")
    filled = [
        (one, two)
        for one, two in itertools.pairwise(lines)
        if all(x[:6] == "      " != x[1:7] for x in (one, two))
    ]
    assert len(filled) > 50
    short = [one for one, two in filled if len(one) + 1 + len(two.split()[0]) <= 80]
    assert not short  # a word that had room on the line before


def test_a_missing_config_file_lists_those_there_are(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError) as error:
        command_line.load("configs/minilm_revews.py", ROOT)
    assert "no config file configs/minilm_revews.py" in str(error.value)
    assert "own_model.py" in str(error.value)


def test_a_file_without_a_config_names_what_it_holds(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="this one holds none"):
        command_line.load(str(file), ROOT)
    with pytest.raises(ConfigError, match="no config named 'other'"):
        command_line.load(f"{OWN}:other", ROOT)
    name, found = command_line.load(f"{OWN}:config", ROOT)
    assert name == "own_model-config"
    assert found.steps == 500
