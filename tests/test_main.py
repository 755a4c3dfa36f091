"""`lora-jax COMMAND`: one command line for everything that the package can do."""

from __future__ import annotations

import pytest

from lora_jax import __main__ as command
from lora_jax.cli import report
from lora_jax.system.extras import MissingExtraError


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n    {name} " in said for name in command.COMMANDS)
    assert command.main([]) == 2


def test_an_unknown_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["predikt"]) == 2
    assert "no command 'predikt'; nearest: 'predict'" in capsys.readouterr().err


def test_train_is_train_py(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["train", "--config", "configs/own_model.py", "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "lora-jax train" in said
    assert "--width" in said


def test_a_missing_extra_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(arguments: object) -> int:
        raise MissingExtraError("lora_jax.report needs jinja2:\n    pip install 'lora-jax[report]'")

    monkeypatch.setattr(report, "main", missing)
    assert command.main(["report", "runs/a"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: lora_jax.report needs jinja2") and "pip install" in said
