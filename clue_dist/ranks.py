"""Which process of a job this one is, and the few words that the processes exchange.

One process alone needs no set-up at all. torch is imported only where it is needed: a mistake in a
config is reported at once, not seconds later.
"""

from __future__ import annotations

import functools
import os
import pickle
import socket
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from clue_dist.errors import ClueError, LostError, RankError
from clue_dist.process import mark_as_rank

# Seconds to wait for the other ranks at the start: a cluster may start them minutes apart, and a
# rank that is dead never comes.
JOIN_LIMIT = 300.0
T = TypeVar("T")

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job. Every method is trivial where it is the only one."""

    rank: int = 0  # number of this process, from 0
    world: int = 1  # how many ranks the job has
    local_rank: int = 0  # number of this process on its machine
    process_group: Any = None  # which collectives use; None stands for the default one

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """Read what the launcher set: `deepspeed` and torchrun (RANK, ...), or srun (SLURM_...).

        Under srun the world is that of the job *step*. A batch script that calls `python` without
        srun is alone, though SLURM_NTASKS is set there too: waiting for the others would never end.

        Raises:
            RankError: the variables are not numbers, or the rank lies outside the world.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if "RANK" not in environment and "SLURM_STEP_NUM_TASKS" in environment:
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        values = [
            environment.get(name, default)
            for name, default in zip(names, ("0", "1", "0"), strict=True)
        ]
        if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
            raise RankError(
                "the launcher's variables make no sense",
                where="environment",
                got=", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True)),
                expected=f"whole numbers with {names[0]} < {names[1]}",
                fix=f"start with `deepspeed`, torchrun or srun, or unset {names[0]}",
            )
        return cls(*map(int, values))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints, commits and decides for all."""
        return self.rank == 0

    def run_before_joining(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank before they join; where one rank fails, none goes on.

        Returns:
            What `work` returned on this rank.

        Raises:
            RankError: there are several machines and no MASTER_ADDR, or this rank has no GPU where
                others have one.
            LostError: not all ranks came in time.
            ClueError: what `work` raised on any rank, on all of them.
        """
        if self.world == 1:
            return work()
        result: Any = None
        problem: ClueError | None = None
        try:
            result = work()
            self.choose_device()  # its errors, too, concern all ranks; imports torch
        except ClueError as error:
            problem = self._name_rank(error)
        try:
            problems = self._exchange_at_rendezvous(pickle.dumps(problem))
        except LostError as error:
            raise problem or error from None
        _raise_first_problem([pickle.loads(pickled) for pickled in problems])
        return cast("T", result)

    def join_group(self, backend: str = "gloo", timeout_s: float = 1800) -> Ranks:
        """Join the other ranks in torch's default process group.

        Args:
            backend: "nccl" or "gloo".
            timeout_s: seconds that a collective may take from then on.

        Returns:
            These ranks.

        Raises:
            RankError: there are several machines and no MASTER_ADDR.
            LostError: not all ranks came in time.
        """
        import torch.distributed as dist

        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group(
                backend,
                store=self.open_rendezvous(),
                rank=self.rank,
                world_size=self.world,
                timeout=timedelta(seconds=timeout_s),
            )
        return self

    def open_side_channel(self) -> Ranks:
        """Make a process group for a thread that works beside the others. All ranks must call.

        Returns:
            The same ranks, whose collectives use that group.
        """
        import torch.distributed as dist

        if self.world == 1:
            return self
        return replace(self, process_group=dist.new_group(backend="gloo"))

    def leave_group(self) -> None:
        """Leave the default process group, after the last collective."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def choose_device(self) -> torch.device:
        """Choose the GPU of this rank, or the CPU where none is visible.

        A rank that sees one GPU takes it, whatever its local rank: `srun --gpus-per-task=1` shows
        each rank its own.

        Raises:
            RankError: several GPUs are visible, but fewer than the ranks of this machine need.
        """
        import torch

        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if visible > 1 and self.local_rank >= visible:
            raise RankError(
                "more ranks on this machine than GPUs",
                where=f"rank {self.rank}, local rank {self.local_rank}",
                got=f"{visible} visible GPUs",
                expected=f"{self.local_rank + 1} or more",
                fix="start as many ranks per machine as it has GPUs, or widen CUDA_VISIBLE_DEVICES",
            )
        if visible == 0:
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % visible)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier(group=self.process_group)

    def all_gather_object(self, value: T) -> list[T]:
        """Gather a value of every rank, by rank, on all of them. It is pickled: keep it small."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[T] = [value] * self.world
        dist.all_gather_object(values, value, group=self.process_group)
        return values

    def run_on_all(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank, then wait for the others.

        Returns:
            What `work` returned, by rank; it is pickled on the way.

        Raises:
            ClueError: what `work` raised on any rank, on all of them, so that none waits on.
        """
        result: Any = None
        problem: ClueError | None = None
        try:
            result = work()
        except ClueError as error:
            if self.world == 1:
                raise
            problem = self._name_rank(error)
        gathered = self.all_gather_object((result, problem))
        _raise_first_problem([problem for _, problem in gathered])
        return [result for result, _ in gathered]

    def run_on_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone; return what it returned there, on every rank.

        Raises:
            ClueError: what `work` raised, on all ranks.
        """
        results: list[Any] = self.run_on_all(lambda: work() if self.is_first else None)
        return cast("T", results[0])

    def slice_for_rank(self, count: int) -> slice:
        """Slice range(count) into consecutive parts whose sizes differ by one at most.

        Returns:
            The part of this rank.
        """
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def open_rendezvous(self, beside: bool = False) -> Any:
        """Open the rendezvous, a store of keys and values: a server on rank 0, or that of torchrun.

        Args:
            beside: open a second connection, for threads that must not wait for what the main
                thread waits for.

        Raises:
            RankError: there are several machines and no MASTER_ADDR.
            LostError: the rendezvous cannot be reached.
        """
        os.environ.update(
            RANK=str(self.rank), WORLD_SIZE=str(self.world), LOCAL_RANK=str(self.local_rank)
        )
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = self._name_only_host()
        os.environ.setdefault("MASTER_PORT", str(choose_port(os.environ)))
        mark_as_rank()
        try:
            connections = _connect_to_rendezvous(self.rank, self.world)
        except RuntimeError as error:
            raise self._make_lost_error(error) from error
        return connections.beside if beside else connections.main

    def _name_rank(self, error: ClueError) -> ClueError:
        """Write into an error which rank it arose on. Rank 0 speaks for all."""
        if not self.is_first:
            error.what = f"rank {self.rank} on {socket.gethostname()}: {error.what}"
        return error

    def _exchange_at_rendezvous(self, message: bytes) -> list[bytes]:
        """Exchange a message with all ranks, before there is a process group."""
        rendezvous = self.open_rendezvous()
        sent, received = (
            [f"clue_dist/{what}/{rank}" for rank in range(self.world)]
            for what in ("sent", "received")
        )
        try:
            rendezvous.set(sent[self.rank], message)
            rendezvous.wait(sent, timedelta(seconds=JOIN_LIMIT))
            messages = rendezvous.multi_get(sent)
            rendezvous.set(received[self.rank], b"1")
            if self.is_first:  # the rendezvous may end with this process
                rendezvous.wait(received, timedelta(seconds=JOIN_LIMIT))
        except RuntimeError as error:
            raise self._make_lost_error(error) from error
        return cast("list[bytes]", messages)

    def _make_lost_error(self, error: RuntimeError) -> LostError:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return LostError(
            "the ranks did not find each other",
            where=f"rank {self.rank} of {self.world} on {socket.gethostname()}",
            got=str(error).partition("\n")[0],
            expected=f"all ranks at {address} within {JOIN_LIMIT:.0f} s",
            fix="look at what the other ranks printed, and whether all machines can reach that "
            "address and port",
        )

    def _name_only_host(self) -> str:
        """Name the address to meet at, where all ranks are on one machine."""
        if os.environ.get("SLURM_STEP_NUM_NODES", "1") != "1":
            raise RankError(
                "several machines, and no address to meet at",
                where="environment",
                got=f"no MASTER_ADDR on rank {self.rank} of {self.world}",
                fix="in the sbatch file: export MASTER_ADDR=$(scontrol show hostnames | head -n 1)",
            )
        return "127.0.0.1"


class _RendezvousConnections(NamedTuple):
    """Two connections to the rendezvous.

    They are made together: rank 0, which serves it, may be gone later, and torch would try to
    connect to it for long.
    """

    main: Any  # for the main thread
    beside: Any  # for threads beside it


@functools.cache
def _connect_to_rendezvous(rank: int, world: int) -> _RendezvousConnections:
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous as open_stores

    timeout = timedelta(seconds=JOIN_LIMIT)
    rendezvous: Any = next(open_stores("env://", rank, world, timeout=timeout))[0]
    # torchrun keeps its server when it starts the ranks again: what the ranks of an earlier attempt
    # wrote there must not be read by those of this one.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    rendezvous = dist.PrefixStore(f"attempt/{attempt}", rendezvous)  # type: ignore[attr-defined]
    return _RendezvousConnections(rendezvous, rendezvous.clone())


def choose_port(environment: Mapping[str, str]) -> int:
    """Choose the port to meet at, which all ranks of a job derive alike.

    No other job on the machine should choose it, nor another attempt of this job: the attempt
    before may hold its port for a while.
    """
    job, restart = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_RESTART_COUNT", "0")
    return 20000 + zlib.crc32(f"{job}/{restart}".encode()) % 10000


def _raise_first_problem(problems: list[ClueError | None]) -> None:
    """Raise the error of the lowest rank that has one."""
    for problem in problems:
        if problem is not None:
            problem.on_every_rank = True
            raise problem
