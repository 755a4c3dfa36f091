"""Loggers get what metrics.jsonl gets, go on in the same run, and are not needed unless asked."""

from __future__ import annotations

import importlib
import pathlib
import types
from typing import Any

import pytest

from lora_jax.system import extras
from lora_jax.training import config, metrics

Calls = list[tuple[Any, ...]]


class FakeLibrary:
    """The functions of wandb and mlflow that the loggers call, which list their calls."""

    def __init__(self) -> None:
        self.calls: Calls = []
        self.away = False
        entity = lambda *values: values  # noqa: E731
        self.errors = types.SimpleNamespace(Error=KeyError)
        self.exceptions = types.SimpleNamespace(MlflowException=KeyError)
        self.entities = types.SimpleNamespace(Metric=entity, Param=entity)

    def init(self, **options: Any) -> Any:
        self.calls.append(("init", options["id"], options["config"]))
        return self

    def define_metric(self, *names: str, step_metric: str) -> None: ...

    def log(self, values: dict[str, Any]) -> None:
        self.calls.append(("log", values))

    def finish(self) -> None:
        self.calls.append(("end",))

    def MlflowClient(self) -> Any:
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return types.SimpleNamespace(experiment_id="3")

    def create_run(self, where: str, run_name: str) -> Any:
        self.calls.append(("init", where, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r7"))

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        if self.away:
            raise ConnectionError("no route to the server")
        self.calls += [("log", run, name, value, step) for name, value, _, step in metrics]

    def set_terminated(self, run: str) -> None:
        self.calls.append(("end",))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    made = FakeLibrary()
    real = importlib.import_module
    fake: Any = lambda name: made if name in ("wandb", "mlflow") else real(name)  # noqa: E731
    monkeypatch.setattr(importlib, "import_module", fake)
    return made


def record(path: pathlib.Path, name: str) -> metrics.Record:
    return metrics.Record(path, log_to=(name,), settings={"lora": {"rank": 4}})


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_gets_the_lines_and_goes_on_in_its_run(
    name: str, library: FakeLibrary, tmp_path: pathlib.Path
) -> None:
    for _ in range(2):
        one = record(tmp_path, name)
        one.write({"step": 5, "split": "test", "accuracy": 0.25, "f1": None})
        one.close()
    kinds = [call[0] for call in library.calls]
    if name == "wandb":
        assert kinds == ["init", "log", "end"] * 2
        assert library.calls[0] == library.calls[3]  # the id is in the run directory
        assert library.calls[1] == ("log", {"test/accuracy": 0.25, "step": 5})
    else:
        assert kinds == ["init", "log", "end", "log", "end"]
        assert library.calls[1] == ("log", "r7", "test/accuracy", 0.25, 5)
    assert not list(tmp_path.glob("events.*"))


def test_a_server_that_is_away_ends_no_run_and_loses_nothing_if_it_comes_back(
    library: FakeLibrary, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = record(tmp_path, "mlflow")
    library.away = True
    one.write({"step": 1, "loss": 0.5})
    one.sync()
    assert "no route to the server" in caplog.text
    library.away = False
    one.close()
    assert ("log", "r7", "train/loss", 0.5, 1) in library.calls


def test_a_missing_library_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(extras.MissingExtraError, match=r"pip install 'lora-jax\[wandb\]'"):
        config.Config(workload=lambda _: None, log_to=("wandb",))  # type: ignore[arg-type,return-value]
