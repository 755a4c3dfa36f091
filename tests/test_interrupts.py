"""Ctrl-C while a save begins: the save is completed, and then the program stops."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from orbax.checkpoint import v1

import lora_jax
from lora_jax.system import interrupts
from lora_jax.training.checkpoints import Checkpoints
from tests.training.test_checkpoints import bits, state


@pytest.fixture(autouse=True)
def python_handler() -> Any:
    """Python's own handler, since a shell may start the tests with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_it_is_delivered_at_the_end() -> None:
    done = []

    @interrupts.held_back()
    def block() -> None:
        signal.raise_signal(signal.SIGINT)
        done.append("the rest of the block")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done


def test_a_second_one_is_delivered_at_once() -> None:
    @interrupts.held_back()
    def block() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one was held back as well")

    with pytest.raises(KeyboardInterrupt):
        block()


@pytest.fixture(autouse=True)
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each save by Orbax is interrupted as it begins."""
    for name in ("save_checkpointables", "save_checkpointables_async"):
        monkeypatch.setattr(v1, name, _interrupted(getattr(v1, name)))


def _interrupted(begin: Callable[..., Any]) -> Callable[..., Any]:
    def interrupt(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return begin(*args, **kwargs)

    return interrupt


def test_the_checkpoint_of_a_run_is_completed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state(3), {})
    with Checkpoints(tmp_path) as checkpoints:
        assert bits(checkpoints.restore(state(0))[0]) == bits(state(3))


def test_a_saved_adapter_is_completed(tmp_path: Path) -> None:
    layout = lora_jax.Layout((lora_jax.Target("w", (3, 4), (), (0,), (1,), rank=2, alpha=4.0),))
    adapters = lora_jax.init(jax.random.key(0), layout)
    with pytest.raises(KeyboardInterrupt):
        lora_jax.save(tmp_path / "a", (layout, adapters))
    assert bits(lora_jax.restore(tmp_path / "a")[1]) == bits(adapters)
