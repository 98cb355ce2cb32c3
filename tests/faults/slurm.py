"""A real Slurm cluster of two nodes on this machine, in a folder of its own (Debian's packages)."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import psutil

from tests.distributed.command import environment
from tests.ports import find_free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")


def missing() -> str | None:
    """Why no cluster can be started here."""
    if os.geteuid() != 0:
        return "needs root: Slurm's and munge's daemons start processes of any user"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return (
        f"not installed: {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)"
        if absent
        else None
    )


class Slurm:
    """What a person types on the cluster."""

    def __init__(self, folder: Path, project: Path) -> None:
        self.folder, self.project = folder, project
        self.env = environment() | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(
        self,
        *command: str,
        check: bool = True,
        timeout: float = 120,
        cwd: Path | None = None,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=cwd or self.project,
            env=self.env | variables,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def submit(self, *args: str, folder: Path | None = None, **variables: str) -> str:
        """Submit a job.

        Args:
            args: What is typed behind `sbatch`.
            folder: Where it is typed; by default the project.
            variables: Of its environment, besides those that all jobs have.

        Returns:
            The number of the job.
        """
        command = ("sbatch", "--parsable", *args)
        return self.run(*command, cwd=folder, variables=variables).stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, ExitCode, Restarts, ..."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def power_off(self, node: str) -> None:
        """A node is gone at once: its daemon, the daemons of its steps and all that they run."""
        pid = int((self.folder / f"slurmd-{node}.pid").read_text())
        steps = {p.ppid() for p in self.processes(node)}
        for one in [pid, *steps, *(p.pid for p in self.processes(node))]:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)

    def processes(self, node: str) -> list[psutil.Process]:
        """What jobs of this cluster run on a node."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                env = process.environ()
                if (env.get("SLURMD_NODENAME"), env.get("SLURM_CONF")) == (
                    node,
                    self.env["SLURM_CONF"],
                ):
                    found.append(process)
        return found

    def wait(self, job: str, timeout_s: float) -> dict[str, str]:
        """Wait until a job is over for good."""
        deadline = time.monotonic() + timeout_s
        while (state := self.state(job))["JobState"] in (
            "PENDING",
            "CONFIGURING",
            "RUNNING",
            "COMPLETING",
            "REQUEUED",
        ):
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
        return state


def configuration(folder: Path, ports: Mapping[str, int]) -> str:
    """slurm.conf. ports: of the controller and of the nodes."""
    host = socket.gethostname()
    return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports["ctld"]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=30
SlurmdTimeout=15
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports["one"]} CPUs=16 Gres=gpu:2
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports["two"]} CPUs=16 Gres=gpu:2
PartitionName=all Nodes=one,two Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def cluster(folder: Path, project: Path) -> Iterator[Slurm]:
    """Nodes `one` and `two`; Slurm thinks that each has 16 cores and two GPUs.

    Args:
        folder: Where the cluster lives.
        project: The folder in which commands are typed.
    """
    for name in ("state", "one", "two"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    ports = {name: find_free_port() for name in ("ctld", "one", "two")}
    (folder / "slurm.conf").write_text(configuration(folder, ports))
    for number in (0, 1):  # what Slurm takes for the devices of GPUs
        os.mknod(folder / f"gpu{number}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    slurm = Slurm(folder, project)
    munge = ("--force", "--foreground", f"--key-file={key}", f"--socket={folder}/munge.socket")
    files = (
        f"--pid-file={folder}/munge.pid",
        f"--log-file={folder}/munge.log",
        f"--seed-file={folder}/munge.seed",
    )
    with ExitStack() as started:
        started.enter_context(daemon(slurm, folder, "munged", *munge, *files))
        await_file(folder / "munge.socket")
        started.enter_context(daemon(slurm, folder, "slurmctld", "-D"))
        for node in ("one", "two"):
            started.enter_context(daemon(slurm, folder, "slurmd", "-D", "-N", node))
        deadline = time.monotonic() + 60
        while slurm.run("sinfo", "-h", "-o", "%T", check=False).stdout.split() != ["idle"]:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.3)
        yield slurm
        slurm.run("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 40
        while slurm.run("squeue", "-h", check=False).stdout and time.monotonic() < deadline:
            time.sleep(0.5)


@contextmanager
def daemon(slurm: Slurm, folder: Path, *command: str) -> Iterator[None]:
    with (folder / f"{command[0]}.out").open("ab") as out:
        process = subprocess.Popen(command, env=slurm.env, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.1)
