"""Run several processes as one run: they connect, agree, are preempted and end.

Every process runs the same command. They all take part in each compiled step, each save and each
restore; only process 0 prints, writes files and holds the lock of the run directory. With a single
process, as `python train.py` starts it, these functions connect to nothing.

A process that fails ends at once and does not wait for the others. These notice the broken
connection or, after `processes.heartbeat_timeout` seconds, the missing heartbeat. JAX then ends
them with abort(), after which no Python code runs; `LastWords` prints their message.
"""

from __future__ import annotations

import glob
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from lora_jax.errors import LoraError, listed
from lora_jax.training.config import Config, ConfigError, ProcessesConfig
from lora_jax.training.config_json import differences, to_dict

PREEMPTED = 128 + signal.SIGTERM  # 143, the exit status of a run that SIGTERM stopped after a save

_REPEATED = 1.0  # seconds in which a signal that was sent twice has come twice

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


class ElsewhereError(LoraError):
    """Another process had an error, which it prints; the message names the process."""


class Preempted(Exception):
    """SIGTERM was received, and the step in the message is saved."""


# ---- connecting


def launcher(environment: Mapping[str, str]) -> str | None:
    """Return the launcher that started this process as one of several, or None if it is alone.

    It is recognized by its environment variables:

    Open MPI: OMPI_COMM_WORLD_SIZE above 1.
    SLURM (`srun`): SLURM_NTASKS above 1, and the other variables of a step.
    Cloud TPU: the devices of a TPU VM; on GKE, more than one name in TPU_WORKER_HOSTNAMES or
      TPU_PROCESS_ADDRESSES, a TPU_PROCESS_ADDRESSES_PATH, or MEGASCALE_NUM_SLICES above 1.
      JAX_PLATFORMS without `tpu` rules it out.
    Kubernetes: JOB_COMPLETION_INDEX, which an Indexed Job and a JobSet set.

    >>> launcher({"OMPI_COMM_WORLD_SIZE": "4"}), launcher({"SLURM_NTASKS": "4"})
    ('Open MPI', None)
    """

    def number(name: str) -> int:
        text = environment.get(name, "")
        return int(text) if text.isdecimal() else 0

    if number("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    if all(name in environment for name in _SLURM) and number("SLURM_NTASKS") > 1:
        return "SLURM"
    platforms = environment.get("JAX_PLATFORMS", "")
    hosts = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
    several = any("," in environment.get(name, "") for name in hosts)
    several |= number("MEGASCALE_NUM_SLICES") > 1 or "TPU_PROCESS_ADDRESSES_PATH" in environment
    if (not platforms or "tpu" in platforms) and (several or _tpu_vm(environment)):
        return "Cloud TPU"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return None


def _tpu_vm(environment: Mapping[str, str]) -> bool:
    """Whether a metadata server can tell which TPU worker this is; a variable rules it out."""
    if "TPU_SKIP_MDS_QUERY" in environment or "TPU_WORKER_HOSTNAMES" in environment:
        return False
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def join(config: ProcessesConfig) -> None:
    """Connect to the other processes, if there are any. Call it before any array is made."""
    found = None if config.count is not None else launcher(os.environ)
    if config.coordinator is None and found is None:
        return
    where = f"of {found}" if found else f"{config.index} of {config.count}"
    at = config.coordinator or f"the coordinator that JAX reads off {found}'s environment"
    cure = (
        f"Do all of them run, with the same --processes.coordinator and --processes.count, and is "
        f"the port of {at} open between them? --processes.connect-timeout gives more time than "
        f"{config.connect_timeout} s; --processes.count 1 runs this process alone"
    )
    LAST.words(f"process {where} did not meet the others. {cure}")
    method = _method(config, found)
    begins_mpi = method == "mpi4py" and "mpi4py.MPI" not in sys.modules
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.count,
            config.index,
            cluster_detection_method=method,
            initialization_timeout=config.connect_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
        )
    except Exception as error:  # also errors of the packages through which JAX asks the launcher
        raise ConfigError(f"process {where} did not meet the others: {error}\n{cure}") from error
    if begins_mpi:
        # MPI is needed only to connect, and `mpirun` reports an error if it is not finalized.
        importlib.import_module("mpi4py.MPI").Finalize()
    LAST.words(f"{name()}was ended. {LOST}")
    if not first():
        # Also what libraries print, such as XLA's collectives on a CPU. Errors go to stderr.
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _method(config: ProcessesConfig, found: str | None) -> str | None:
    """Return how `jax.distributed.initialize` finds the values that no flag sets."""
    if found is None:
        return "deactivate"
    if found == "Open MPI" and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        _need("mpi4py", "Open MPI 5 is met through mpi4py", "pip install mpi4py")
        return "mpi4py"
    if found == "Kubernetes":
        _need("kubernetes", "an Indexed Job is met through its API", "pip install 'jax[k8s]'")
    return None


def _need(package: str, why: str, install: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{why}, which needs a package: {install}. Or set all three flags: "
            "--processes.coordinator host:port --processes.count N --processes.index i "
            "(docs/pods.md). --processes.count 1 runs this process alone"
        )


# ---- agreeing


def first() -> bool:
    """Return whether this is process 0, which prints and writes files."""
    return jax.process_index() == 0


def name() -> str:
    """Return the prefix of this process's messages, `process 1 of 2: `, or "" if it is alone."""
    count = jax.process_count()
    return "" if count == 1 else f"process {jax.process_index()} of {count}: "


def gather(value: Any) -> list[Any]:
    """Return the JSON value of each process, in order. Every process must call this."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def everywhere(action: Callable[[], Any]) -> list[Any]:
    """Call a function on every process, and return each process's result (JSON values)."""
    if jax.process_count() == 1:
        return [action()]
    value, error = None, None
    try:
        value = action()
    except (LoraError, OSError) as caught:
        error = caught
    found = gather({"value": value, "error": None if error is None else str(error)})
    if error is not None:
        raise error
    for index, each in enumerate(found):
        if each["error"] is not None:
            raise ElsewhereError(f"process {index}: {each['error']}")
    return [each["value"] for each in found]


def by_first(action: Callable[[], Any]) -> Any:
    """Call a function on process 0 only, and return its JSON value on every process.

    All processes wait for it, and raise if it raises.

    >>> by_first(lambda: 3)
    3
    """
    return everywhere(action if first() else lambda: None)[0]


def check_same(config: Config) -> None:
    """Raise `ConfigError` unless all processes run the same config on the same version of JAX."""
    facts = {"jax": jax.__version__, **to_dict(config)}
    del facts["processes"]
    for index, other in enumerate(gather(facts)):
        changed = differences(other, facts)
        if changed:
            raise ConfigError(
                f"process {index} was started with other values than this one; they differ in\n"
                f"{listed(changed, 20)}\nstart every process with the same command"
            )


def union(states: Sequence[Any], path: str = "state") -> Any:
    """Merge the states of all processes: dictionaries are merged key by key.

    >>> union([{"step": 3, "at": {"0": 5}}, {"step": 3, "at": {"1": 7}}])
    {'step': 3, 'at': {'0': 5, '1': 7}}
    """
    if all(isinstance(state, dict) for state in states):
        keys = dict.fromkeys(key for state in states for key in state)
        return {k: union([s[k] for s in states if k in s], f"{path}[{k!r}]") for k in keys}
    if any(state != states[0] for state in states):
        different = next(state for state in states if state != states[0])
        raise LoraError(
            f"the training iterators of two processes give {states[0]!r} and {different!r} for "
            f"{path}: what differs between processes must have a key of its own in get_state()"
        )
    return states[0]


# ---- preemption


class Preemption:
    """Watches for SIGTERM inside a `with` block.

    With one process, the first SIGTERM is remembered and a second one kills at once, even while the
    checkpoint is written; then the checkpoint before it is complete. A signal that comes within
    `_REPEATED` seconds of the first is the same request, because `timeout`, `srun` and others
    signal a process and its whole group. With several processes, JAX remembers the signal and lets
    all of them stop at the same step, even if only one received it; a second one changes nothing.
    """

    def __init__(self) -> None:
        self._asked: float | None = None  # when
        self._before = signal.getsignal(signal.SIGTERM)
        self._ours = not jax.distributed.is_initialized()
        self._ours &= threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Preemption:
        if self._ours:
            signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._ours:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
        elif now - self._asked > _REPEATED:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self, step: int) -> bool:
        """Return whether to save and stop after this step. Call this at every step."""
        if jax.distributed.is_initialized():
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked is not None


# ---- ending

AGAIN = "The same command goes on from what is kept."
LOST = (
    "Either another process ended first (see what that one printed), or this one was killed. Start "
    "all of them again with the same command: the run goes on from its last checkpoint"
)


class LastWords:
    """Prints a line to stderr if this process ends without calling `leave`.

    A shell waits until its input ends and then prints the last line of it. A thread or handler
    cannot do this, because abort() and `kill -9` run no more code in this process.
    """

    _SCRIPT = (
        'trap "" INT TERM HUP; while IFS= read -r line; do last=$line; done; '
        '[ -z "$last" ] || printf "error: %s\\n" "$last" >&2'
    )

    def __init__(self) -> None:
        self._shell: subprocess.Popen[str] | None = None

    def words(self, text: str) -> None:
        if self._shell is None:
            try:
                self._shell = subprocess.Popen(
                    ["/bin/sh", "-c", self._SCRIPT],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,
                )
            except OSError:  # the image has no shell; JAX's own message must be enough
                return
        if self._shell.stdin is not None:
            self._shell.stdin.write(text.replace("\n", " ") + "\n")
            self._shell.stdin.flush()

    def leave(self) -> None:
        """Print nothing when this process ends."""
        if self._shell is not None:
            self._shell.communicate("\n")  # an empty line means: print nothing
            self._shell = None


LAST = LastWords()


def end(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end this process with the status that it returns.

    With several processes, one that fails does not wait for the others, which may have ended or may
    be waiting for it. Its last line on stderr says so.
    """
    try:
        status = main()
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        sys.stderr.write(f"error: {name()}ended by this. {LOST}\n")
        status = 1
    if jax.distributed.is_initialized():
        if status in (0, PREEMPTED):
            jax.distributed.shutdown()  # waits until all processes have finished
        sys.stdout.flush()
        sys.stderr.flush()
        LAST.leave()
        os._exit(status)
    sys.exit(status)
