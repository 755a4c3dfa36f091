"""`lora-jax COMMAND`: one command line for everything that the package can do."""

from __future__ import annotations

import pytest

from lora_jax import __main__ as command


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n    {name} " in said for name in command.COMMANDS)
    assert all(f"\n{' ' * 20}lora-jax {name} " in said for name in command.COMMANDS)  # an example
    assert said.index("LORA_JAX_CACHE") > max(said.index(f"\n    {n} ") for n in command.COMMANDS)
    assert command.main([]) == 2


def test_train_is_train_py(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["train", "--config", "configs/own_model.py", "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "lora-jax train" in said
    assert "--width" in said
