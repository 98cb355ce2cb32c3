"""Which job a rank belongs to, and where the ranks of that job meet."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from clue_dist.errors import ClueError, LostError, RankError, list_names
from clue_dist.ranks.messages import (
    clean_text,
    decode_value,
    encode_value,
    make_foreign_value_error,
)

# Seconds to wait for the other ranks at the start: a cluster may start them minutes apart, and a
# rank that is dead never comes.
JOIN_LIMIT = 300.0
MOST_COMMAND = 200  # characters of a command line that are shown
MOST_HOLDER = 400  # characters of what another job says of itself
_TOKEN = re.compile("[0-9a-f]{1,64}")
RUN_ALONE = "to run alone, type RANK=0 WORLD_SIZE=1 before the command"


@dataclass(frozen=True)
class RankClaim:
    """What a rank writes at the rendezvous to claim its place in a job."""

    job: str  # name of the job, the same on all of its ranks: see `name_job`
    world: int  # how many ranks the job has
    holder: str  # describes the process, for people who wonder who holds a port
    token: str  # random; that of rank 0 begins the names of all keys that the job writes

    def encode(self) -> bytes:
        """Encode the claim as it is written."""
        return encode_value([self.job, self.world, self.holder, self.token])

    @classmethod
    def decode(cls, data: bytes, where: str) -> RankClaim:
        """Decode what `encode` wrote.

        Raises:
            RankError: it is something else.
        """
        value = decode_value(data, where)
        types = [str, int, str, str]
        fits = isinstance(value, list) and [type(field) for field in value] == types
        if not fits or not _TOKEN.fullmatch(value[3]):
            raise make_foreign_value_error(data, where, "the claim of a rank")
        return cls(value[0], value[1], clean_text(value[2])[:MOST_HOLDER], value[3])


@dataclass(frozen=True)
class MeetingPoint:
    """Where one rank meets the others of its job."""

    rank: int
    world: int
    host: str
    port: int
    is_given: bool  # whether a launcher or a person named the port, so that it stays the same

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def format_rank(self) -> str:
        """Say which rank this is, for an error."""
        return f"rank {self.rank} of {self.world} on {socket.gethostname()}"

    def make_lost_error(self, found: str) -> LostError:
        """Make the error of a rank that did not meet the others."""
        return LostError(
            "the ranks did not find each other",
            where=self.format_rank(),
            got=found,
            expected=f"all ranks at {self} within {JOIN_LIMIT:.0f} s",
            fix="look at what the other ranks printed, and whether all machines can reach that "
            f"address and port; {RUN_ALONE}",
        )

    def make_taken_error(self, holder: str) -> ClueError:
        """Make the error of a rank that finds another job where its own should meet."""
        # Slurm starts the job again with another port, where the port came of its number.
        kind = RankError if self.is_given else LostError
        return kind(
            "the port where the ranks meet is taken by another job",
            where=f"{self.format_rank()}, at {self}",
            got=holder,
            expected="a free port, or the ranks of this job",
            fix="wait until the other job has ended, or choose another port: `deepspeed "
            f"--master_port {self.port + 1} ...`; for torchrun and srun export MASTER_PORT",
        )


def locate_meeting(rank: int, world: int, environment: Mapping[str, str]) -> MeetingPoint:
    """Read where the ranks meet, or choose it where the launcher leaves that open.

    Raises:
        RankError: there are several machines and no MASTER_ADDR, or MASTER_PORT is no port.
    """
    host = environment.get("MASTER_ADDR")
    if host is None and environment.get("SLURM_STEP_NUM_NODES", "1") != "1":
        raise RankError(
            "several machines, and no address to meet at",
            where="environment",
            got=f"no MASTER_ADDR on rank {rank} of {world}",
            fix="in the sbatch file: export MASTER_ADDR=$(scontrol show hostnames | head -n 1); "
            f"{RUN_ALONE}",
        )
    port = environment.get("MASTER_PORT")
    if port is not None and not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise RankError(
            "the port where the ranks meet is not a port",
            where="environment",
            got=f"MASTER_PORT={port}",
            expected="a number from 1 to 65535",
        )
    chosen = choose_port(environment) if port is None else int(port)
    is_given = port is not None or "SLURM_JOB_ID" not in environment
    return MeetingPoint(rank, world, host or "127.0.0.1", chosen, is_given)


def choose_port(environment: Mapping[str, str]) -> int:
    """Choose the port to meet at, which all ranks of a job derive alike.

    No other job on the machine should choose it, nor another step or attempt of this job: the
    attempt before may hold its port for a while.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    key = "/".join(environment.get(name, "0") for name in names)
    return 20000 + zlib.crc32(key.encode()) % 10000


def name_job(world: int, environment: Mapping[str, str], command: Sequence[str]) -> str:
    """Name the job of this process, alike on all of its ranks and unlike other jobs.

    What tells jobs apart is the step of Slurm, the id that torchrun was given, or, where all ranks
    are on one machine, the process of their launcher. `deepspeed` on several machines gives its
    ranks nothing of that kind: there it is the command line.
    """
    if "RANK" not in environment and "SLURM_STEP_NUM_TASKS" in environment:
        return f"Slurm step {environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
    run_id = environment.get("TORCHELASTIC_RUN_ID", "none")  # "none" unless a person gave one
    if run_id != "none":
        return f"torchrun {run_id}"
    on_machine = environment.get("LOCAL_SIZE", environment.get("LOCAL_WORLD_SIZE"))
    if on_machine == str(world):
        return f"launched by process {_find_launcher()} on {socket.gethostname()}"
    # The launcher gives each rank another --local_rank.
    words = [word for word in command if not word.startswith(("--local_rank", "--local-rank"))]
    return f"command {hashlib.sha256(encode_value(words)).hexdigest()[:16]}"


def _find_launcher() -> int:
    """Find the process that started the ranks: the nearest ancestor that is not a rank itself.

    The parent may be one: a script around the command of each rank.
    """
    import psutil

    for ancestor in psutil.Process().parents():
        try:
            if "RANK" not in ancestor.environ():
                return ancestor.pid
        except psutil.Error:  # a process of another user
            return ancestor.pid
    return os.getppid()


def describe_process(number: int) -> str:
    """Describe a process of this machine: number, machine and command line."""
    import psutil

    command = ""
    with suppress(psutil.Error):
        command = ": " + " ".join(psutil.Process(number).cmdline())[:MOST_COMMAND]
    return clean_text(f"process {number} on {socket.gethostname()}{command}")


def describe_listener(port: int) -> str:
    """Describe the process of this machine that listens at a port."""
    import psutil

    with suppress(psutil.Error):  # macOS shows connections to root alone
        for connection in psutil.net_connections("tcp"):
            is_listener = connection.status == psutil.CONN_LISTEN
            if is_listener and connection.laddr.port == port and connection.pid is not None:
                return describe_process(connection.pid)
    return f"a process of another user on {socket.gethostname()}"


def list_ranks(numbers: Sequence[int]) -> str:
    """Write down numbers of ranks, as "rank 1" or "ranks 1, 2"."""
    return f"rank{'s' if len(numbers) > 1 else ''} {list_names(numbers)}"
