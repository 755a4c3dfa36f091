"""The display of a run in progress, on terminals of several kinds and in a file."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest
from rich.console import Console

from lora_jax.sweeps.progress import GroupDisplay, Lines
from lora_jax.training import progress
from lora_jax.training.loss_curve import AHEAD, LEVELS, LossCurve
from lora_jax.training.progress import Display


def line(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "loss": loss, "learning_rate": 1e-3, "units": 4}


def last_line(text: str) -> str:
    """Return the last line on the screen, without the terminal's escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").split("\n")[-2].rstrip()


def shown(width: int, *, encoding: str = "utf-8", terminal: bool = True, start: int = 0) -> str:
    """Return the last line of a run that has done 50 of 100 steps; its loss falls evenly."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    with Display(console, 100, start, 10, "tokens") as display:
        for step in range(start + 1, 51):
            display.step(line(step, 100.0 - step))
    file.seek(0)
    return last_line(file.read())


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_the_bar_is_the_curve_of_the_loss(width: int) -> None:
    text = shown(width)
    found = [LEVELS.index(c) for c in text if c in LEVELS]
    assert found == sorted(found, reverse=True) and found[0] == len(LEVELS) - 1 and found[-1] == 0
    assert abs(text.count(AHEAD) - len(found)) <= 1  # half of the steps are to come
    assert len(text.rstrip()) <= width
    assert "loss 50.0000" in text or width < 80


def test_a_run_that_goes_on_shows_what_it_knows() -> None:
    text = shown(100, start=25)
    assert text.startswith("·" * 5) and LEVELS[-1] in text and LEVELS[0] in text


def test_terminals_without_blocks_and_files_are_shown_plain_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert shown(80, encoding="ascii").isascii()
    assert "loss 50.0000" in shown(80, encoding="ascii")
    in_a_file = shown(80, terminal=False)
    assert in_a_file.startswith("step 50/100  loss 50.0000  lr 1.00e-03") and in_a_file.isascii()
    monkeypatch.setenv("TERM", "linux")
    assert not set(LEVELS) & set(shown(80))


def test_a_group_has_the_curve_of_its_mean_loss() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    with GroupDisplay(console, 1) as display:
        for tick in range(1, 11):
            Lines(display, "a").step(line(tick, 10.0 - tick))
            Lines(display, "b").step(line(tick, float("nan") if tick == 5 else 10.0 - tick))
            display.tick(tick, [(tick, 10), (tick, 10)], ["a", "b"])
    text = last_line(file.getvalue())
    found = [LEVELS.index(c) for c in text if c in LEVELS]
    assert found == sorted(found, reverse=True) and found[0] == len(LEVELS) - 1 and found[-1] == 0
    assert "loss 0.0000" in text and "2 of 2 members" in text


def test_a_curve_keeps_the_mean_of_many_steps() -> None:
    curve = LossCurve()
    for step in range(1, 4001):
        curve.add(step / 4000, float(step % 2))
    assert curve.heights(8, 1.0) == [0.5] * 8
    assert curve.heights(8, 0.0) == []


def test_the_remaining_time_leaves_compilation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening and compiling for a minute, then a second a step: the rest is a second a step."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    console = Console(file=file, width=100)
    with Display(console, 100, 0, 1, "tokens") as display:
        now[0] += 60
        for step in range(1, 4):
            if step in (1, 3):
                with display.compiling("the step"):
                    now[0] += 60
            now[0] += 1
            display.step(line(step, 1.0))
    steps = [text for text in file.getvalue().splitlines() if "/100" in text]
    ends = [text.split("/s")[1].strip() for text in steps]
    assert ends == ["- left", "0:01:38 left", "0:01:37 left"]


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_compiled_is_shown_with_its_time(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LONG", 0.0)
    file = io.StringIO()
    console = Console(file=file, width=100, force_terminal=terminal, color_system=None)
    with Display(console, 100, 0, 10, "tokens") as display:
        with display.compiling("the step", "8 x 48"):
            deadline = time.monotonic() + 10
            while "compiling the step (8 x 48)" not in file.getvalue():
                display.refresh()
                assert time.monotonic() < deadline
        display.refresh()
    assert ("since" in file.getvalue()) == (not terminal)
    end = "step (8 x 48) in 0 s" if not terminal else "loss -"
    assert end in last_line(file.getvalue())
