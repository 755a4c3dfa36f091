"""Kill a scenario with SIGKILL at random moments, and check its files after each kill.

A third of the moments are random in time, over as long as the command takes from the beginning to
its end. A third are random among the command's changes to files, because the clock alone would
hardly ever hit the moment between two renames. A third come right after a certain file appears,
such as the summary of a run: the last lines are written then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import random
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any

from tests.faults.scenarios import Scenario
from tests.training.forks import Fork

KINDS = ("time", "change", "file")


@dataclasses.dataclass
class Outcome:
    """The results of the kills of one scenario.

    kills: the number of kills. moments: the number of times that each kind of moment was chosen.
    torn: the number of kills that left an unfinished file or folder under a temporary name.
    ends: the number of times that the command ended and was compared with `whole`.
    states: the state after each kill, as the scenario gives it.
    failures: the faults that were found, in words.
    """

    name: str
    kills: int = 0
    moments: dict[str, int] = dataclasses.field(default_factory=dict)
    torn: int = 0
    ends: int = 0
    seconds: float = 0.0
    states: list[Any] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        failed = "".join(f"\n  {failure}" for failure in self.failures)
        return (
            f"{self.kills} kills {self.moments}, {self.torn} half-written, {self.ends} ends "
            f"compared, {len(self.failures)} failed, {self.seconds} s{failed}"
        )


class Kills:
    """The kills of one scenario."""

    def __init__(self, name: str, scenario: Scenario, seed: int) -> None:
        """Run the scenario whole, twice; the second run gives the time and the changes."""
        self.outcome, self._scenario = Outcome(name), scenario
        self._random, self._began = random.Random(f"{seed} {name}"), time.monotonic()
        self._place, self._last = scenario.folder / "killed", list[Any]()
        self._wait(scenario.start(scenario.whole))
        again = time.monotonic()
        self._wait(scenario.start(self._place, 0))
        self._seconds = time.monotonic() - again
        self._changes = int(next(scenario.folder.glob("killed*.changes")).read_text())
        self._end()

    def run(self, kills: int) -> Outcome:
        """Kill the command `kills` times, over as many runs as that needs."""
        with contextlib.suppress(KeyboardInterrupt):  # then there are fewer kills
            while self.outcome.kills < kills:
                self._try(self._kill)
        self._try(self._finish)
        self.outcome.seconds = round(time.monotonic() - self._began, 1)
        return self.outcome

    def _try(self, act: Callable[[], None]) -> None:
        """Note a failure, keep its files so that a person can look at them, and begin anew."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 - any failure is a result
            number = len(self.outcome.failures)
            kept = self._place.with_name(f"failed-{number}")
            if self._place.exists():
                self._place.rename(kept)
            logs = "".join(log.read_text()[-1500:] for log in self._logs() if log.exists())
            text = f"{type(error).__name__}: {str(error)[:1500]}\n{kept}\n{logs}"
            self.outcome.failures.append(text)
            self._clear()

    def _kill(self) -> None:
        kind = self._random.choice(KINDS)
        awaited = [mark for mark in self._scenario.marks if not (self._place / mark).exists()]
        if kind == "file" and not awaited:
            kind = "time"
        at = self._random.randint(1, self._changes) if kind == "change" else None
        forks = self._scenario.start(self._place, at)
        victim, lasts = self._random.choice(forks), self._random.uniform(0, self._seconds)
        if kind == "file":
            file, lasts = self._place / self._random.choice(awaited), self._random.uniform(0, 0.02)
            while victim.status is None and not file.exists():
                time.sleep(0.0005)
        if kind != "change":
            deadline = time.monotonic() + lasts
            while victim.status is None and time.monotonic() < deadline:
                time.sleep(0.0005)
            if victim.status is None:
                victim.send(signal.SIGKILL)
        statuses = [fork.wait(_SECONDS) for fork in forks]
        if statuses == [0] * len(forks):
            self._end()
            return
        assert -signal.SIGKILL in statuses, f"it ended with {statuses}"
        assert len(forks) == 1 or 0 not in statuses or self._summary(), "the other process went on"
        self.outcome.kills += 1
        self.outcome.moments[kind] = self.outcome.moments.get(kind, 0) + 1
        self._check()

    def _summary(self) -> bool:
        return (self._place / "summary.json").is_file()

    def _check(self) -> None:
        torn = [p for p in self._scenario.folder.rglob("*") if _is_unfinished(p)]
        self.outcome.torn += bool(torn)
        state = self._scenario.state(self._place)
        assert not self._last or all(a <= b for a, b in zip(self._last, state, strict=True)), (
            f"{state} after {self._last}: something whole was lost"
        )
        self._last = state
        self.outcome.states.append(state)
        if self._scenario.is_finished(self._place):
            self._end()

    def _finish(self) -> None:
        self._wait(self._scenario.start(self._place))
        self._end()

    def _wait(self, forks: list[Fork]) -> None:
        for fork in forks:
            assert fork.wait(_SECONDS) == 0, fork.log.read_text()[-3000:]

    def _end(self) -> None:
        self._scenario.assert_same(self._place)
        said = "".join(log.read_text() for log in self._logs())
        assert "set aside" not in said, said[-3000:]
        self.outcome.ends += 1
        self._clear()

    def _clear(self) -> None:
        shutil.rmtree(self._place, ignore_errors=True)
        for file in [*self._logs(), *self._scenario.folder.glob(".writing*")]:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        self._last = []

    def _logs(self) -> list[pathlib.Path]:
        return sorted(self._scenario.folder.glob("killed*.log"))


_SECONDS = 1800  # the time that a command may take on a busy machine


def _is_unfinished(path: pathlib.Path) -> bool:
    return any(part in path.name for part in ("tmp", ".writing", ".new", ".old"))
