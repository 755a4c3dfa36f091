"""A SLURM cluster of two nodes on one machine: munged, slurmctld and two slurmd; no systemd."""

from __future__ import annotations

import os
import pathlib
import signal

from tests.launchers.machine import Machine, installed, wait_for

HOSTS = {"n1": "10.77.0.1", "n2": "10.77.0.2"}

# cred_expire is also the time that a requeued job waits before it starts again. With
# config_overrides, nodes may have more than the machine has. The GPUs are device files that nobody
# opens.
_CONFIG = """
ClusterName=lora
SlurmctldHost=n1
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdTimeout=5
NodeName=n1 NodeHostname=n1 Port=17001 CPUs=64 Gres=gpu:8
NodeName=n2 NodeHostname=n2 Port=17002 CPUs=64 Gres=gpu:8
PartitionName=all Nodes=n1,n2 Default=YES
"""
_MUNGED = (
    "munged --force --key-file=key --socket=munge.socket --pid-file=munge.pid --log-file=munge.log"
)


INSTALLED = installed("munged", "slurmctld", "slurmd", "sbatch")  # Debian: slurm-wlm, munge


class Slurm(Machine):
    """A machine with the cluster on it."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder, HOSTS)
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")

    def begin(self) -> None:
        """Start the daemons, and wait until both nodes can be used."""
        for name in ("state", *HOSTS):
            (self.folder / name).mkdir(exist_ok=True)
        (self.folder / "slurm.conf").write_text(_CONFIG.format(folder=self.folder))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        (self.folder / "key").write_bytes(os.urandom(128))
        (self.folder / "key").chmod(0o600)
        self._shell(f"for i in $(seq 0 7); do mknod gpu$i c 1 3; done; {_MUNGED}")
        self._shell("slurmctld")
        for name in HOSTS:
            self.start_node(name)
        wait_for(
            lambda: self.run("sinfo", "--noheader", "--format=%D %T").split() == ["2", "idle"],
            lambda: "\n".join(path.read_text() for path in self.folder.glob("**/*.log")),
        )

    def _shell(self, line: str) -> None:
        self.run("sh", "-c", f"cd {self.folder} && {line}")

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        self.run("slurmd", "-N", name)

    def kill_node(self, name: str, task: int) -> None:
        """Kill a node as a power cut would: its daemon, and a task with its supervisor."""
        parent = int(pathlib.Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()[1])
        for pid in (*self.pids(name), parent, task):
            os.kill(pid, signal.SIGKILL)

    def submit(self, script: str, *options: str) -> str:
        """Submit a batch script and return the number of the job."""
        path = self.folder / "job.sh"
        path.write_text(script)
        return self.run("sbatch", "--parsable", *options, str(path)).strip()

    def field(self, job: str, name: str) -> str:
        return self.run("scontrol", "show", "job", job).partition(f"{name}=")[2].split()[0]
