"""Several processes as one run: how they connect, agree, are preempted and end.

Every process runs the same command. Together they take part in each compiled step, in each save and
in each restore; only process 0 prints, writes files and holds the lock of the run directory. With
one process, which is what `python train.py` starts, nothing is connected to and every function here
is the plain thing.

A process that fails ends at once and takes no leave: the others find out from the broken connection
or, at the latest, when its heartbeat has been missing for `processes.heartbeat_timeout` seconds.
JAX then ends them with abort(), in which no Python code runs; `LastWords` speaks for them.
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

PREEMPTED = 128 + signal.SIGTERM  # 143, the status of a run that SIGTERM stopped and that saved

_REPEATED = 1.0  # seconds in which a signal that was sent twice has come twice

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


class ElsewhereError(LoraError):
    """An error of another process, which prints it; the message says which."""


class Preempted(Exception):
    """SIGTERM came, and the step of the message is saved."""


# ---- meeting


def launcher(environment: Mapping[str, str]) -> str | None:
    """What started this process as one of several, by the environment variables it sets.

    Open MPI: OMPI_COMM_WORLD_SIZE above 1.
    SLURM (`srun`): SLURM_NTASKS above 1, and the others that a step has.
    Cloud TPU: the devices of a TPU VM; on GKE, more than one name in TPU_WORKER_HOSTNAMES or
      TPU_PROCESS_ADDRESSES, a TPU_PROCESS_ADDRESSES_PATH, or MEGASCALE_NUM_SLICES above 1.
    Kubernetes: JOB_COMPLETION_INDEX, which an Indexed Job and a JobSet set.

    None: it is alone. JAX_PLATFORMS without `tpu` rules a TPU out.

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
    """Whether a metadata server says which worker of a TPU this is (a variable rules it out)."""
    if "TPU_SKIP_MDS_QUERY" in environment or "TPU_WORKER_HOSTNAMES" in environment:
        return False
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def join(config: ProcessesConfig) -> None:
    """Meet the other processes, if there are any. Before any array is made.

    Raises:
      ConfigError: they cannot be met; after `connect_timeout` seconds JAX aborts instead.
    """
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
    except Exception as error:  # also those of the packages that JAX asks the launcher through
        raise ConfigError(f"process {where} did not meet the others: {error}\n{cure}") from error
    if begins_mpi:
        _end_mpi()
    LAST.words(f"{name()}was ended. {_LOST}")


def _end_mpi() -> None:
    """Finalize MPI, which is needed only to meet: `mpirun` calls it a failure to end without."""
    importlib.import_module("mpi4py.MPI").Finalize()


def _method(config: ProcessesConfig, found: str | None) -> str | None:
    """How `jax.distributed.initialize` learns what the flags do not say."""
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
            f"{why}, which needs a package: {install}. Or say all that there is to know: "
            "--processes.coordinator host:port --processes.count N --processes.index i "
            "(docs/pods.md). --processes.count 1 runs this process alone"
        )


# ---- agreeing


def first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def name() -> str:
    """`process 1 of 2: ` before what this one says; nothing where it is alone."""
    count = jax.process_count()
    return "" if count == 1 else f"process {jax.process_index()} of {count}: "


def gather(value: Any) -> list[Any]:
    """The JSON value of each process, in their order. Every process must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def everywhere(action: Callable[[], Any]) -> list[Any]:
    """Do it on every process, and give what each gave (JSON values).

    Raises:
      LoraError, OSError: what it raised here.
      ElsewhereError: it went well here, but not on another process.
    """
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
    """Do it on process 0 alone, and give its JSON value on all; they wait for it, and fail with it.

    >>> by_first(lambda: 3)
    3
    """
    return everywhere(action if first() else lambda: None)[0]


def check_same(config: Config, version: str = jax.__version__) -> None:
    """Raise unless all processes run the same config on the same JAX."""
    facts = {"jax": version, **to_dict(config)}
    del facts["processes"]
    for index, other in enumerate(gather(facts)):
        changed = differences(other, facts)
        if changed:
            raise ConfigError(
                f"process {index} was started with other values than this one; they differ in\n"
                f"{listed(changed, 20)}\nstart every process with the same command"
            )


def union(states: Sequence[Any], path: str = "state") -> Any:
    """The states of all processes in one: dictionaries are put together, key by key.

    >>> union([{"step": 3, "at": {"0": 5}}, {"step": 3, "at": {"1": 7}}])
    {'step': 3, 'at': {'0': 5, '1': 7}}

    Raises:
      LoraError: they give different values for one key.
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


# ---- making way


class Preemption:
    """Looks for SIGTERM while it is entered.

    One process: the first SIGTERM is noted, a second kills at once, also while the checkpoint is
    written; the one before it is whole then. Those within `_REPEATED` seconds of the first are the
    same request: `timeout`, `srun` and the like signal a process and its whole group. Several
    processes: JAX notes it, and has all of them stop at the same step even if the signal reaches
    only one; a second changes nothing.
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
        """Whether to save and stop after this step. To be called at every step."""
        if jax.distributed.is_initialized():
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked is not None


# ---- ending

_LOST = (
    "Either another process ended first (see what that one printed), or this one was killed. Start "
    "all of them again with the same command: the run goes on from its last checkpoint"
)


class LastWords:
    """Says a line on stderr when this process is gone without having taken leave.

    A shell that waits for the end of its input and prints the last line of it. No thread or handler
    of ours could: abort() and `kill -9` run no more code in this process.
    """

    _SCRIPT = (
        'trap "" INT TERM HUP; while IFS= read -r line; do last=$line; done; '
        '[ -z "$last" ] || printf "error: %s\\n" "$last" >&2'
    )

    def __init__(self) -> None:
        self._shell: subprocess.Popen[str] | None = None

    def words(self, text: str) -> None:
        """What to say from now on."""
        if self._shell is None:
            try:
                self._shell = subprocess.Popen(
                    ["/bin/sh", "-c", self._SCRIPT],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,
                )
            except OSError:  # an image without a shell: JAX's own message has to do
                return
        if self._shell.stdin is not None:
            self._shell.stdin.write(text.replace("\n", " ") + "\n")
            self._shell.stdin.flush()

    def leave(self) -> None:
        """Say nothing any more."""
        if self._shell is not None:
            self._shell.communicate("\n")  # an empty line, and the end of its input
            self._shell = None


LAST = LastWords()


def end(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end this process with the status it gives.

    With several processes one that fails does not wait for the others, which may be gone or may
    wait for it; the last line on stderr says so.
    """
    try:
        status = main()
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        sys.stderr.write(f"error: {name()}ended by this. {_LOST}\n")
        status = 1
    if jax.distributed.is_initialized():
        if status in (0, PREEMPTED):
            jax.distributed.shutdown()  # waits until all have come to their end
        sys.stdout.flush()
        sys.stderr.flush()
        LAST.leave()
        os._exit(status)
    sys.exit(status)
