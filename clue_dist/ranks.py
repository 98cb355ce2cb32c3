"""Which of how many processes this one is, and the few words they exchange. One process needs no set-up at all.

torch is imported where it is needed: a mistake in a config is told at once, not seconds later.
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

JOIN = 300.0  # seconds to wait for the others at the start: clusters start ranks minutes apart, dead ones never come
T = TypeVar("T")

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ranks:
    """Process `rank` of `world`, the `local_rank`-th of its machine.

    Every method is a no-op, or the trivial answer, for one process.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    group: Any = None  # the channel they speak by; None: the one they joined

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> Ranks:
        """What the launcher said: `deepspeed` and torchrun (RANK, WORLD_SIZE, LOCAL_RANK), or srun.

        Under srun the size is that of the job *step*: a batch script that calls `python` without srun is alone,
        though SLURM_NTASKS is set there too and waiting for the others would never end.

        Raises:
            RankError: the variables are not numbers, or the rank lies outside the world.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if "RANK" not in env and "SLURM_STEP_NUM_TASKS" in env:
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        values = [
            env.get(name, default) for name, default in zip(names, ("0", "1", "0"), strict=True)
        ]
        got = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        if not all(v.isdecimal() for v in values) or not int(values[0]) < int(values[1]):
            raise RankError(
                "the launcher's variables make no sense",
                where="environment",
                got=got,
                expected=f"whole numbers with {names[0]} < {names[1]}",
                fix=f"start with `deepspeed`, torchrun or srun, or unset {names[0]}",
            )
        return cls(*map(int, values))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def run_before_joining(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank before they join; what this rank's returned. Where one cannot, none begins.

        Raises:
            RankError: several machines and no MASTER_ADDR, or this rank has no GPU where others have.
            LostError: not all ranks came in time.
            ClueError: what `work` raised, on all ranks, whoever met it.
        """
        if self.world == 1:
            return work()
        done: Any = None
        problem: ClueError | None = None
        try:
            done = work()
            self.choose_device()  # which imports torch
        except ClueError as error:
            problem = self._met(error)
        try:
            said = self._exchanged(pickle.dumps(problem))
        except LostError as error:
            raise problem or error from None
        _raise_first([pickle.loads(one) for one in said])
        return cast("T", done)

    def join_group(self, backend: str = "gloo", timeout_s: float = 1800) -> Ranks:
        """Join the others; returns self. timeout_s: of what they exchange from then on.

        Raises:
            RankError: several machines and no MASTER_ADDR.
            LostError: not all ranks came in time.
        """
        import torch.distributed as dist

        if self.world == 1 or dist.is_initialized():
            return self
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(
            backend,
            store=self.open_rendezvous_store(),
            rank=self.rank,
            world_size=self.world,
            timeout=timeout,
        )
        return self

    def open_side_channel(self) -> Ranks:
        """The same ranks on a channel of their own, for a thread that works beside the others. All must call."""
        import torch.distributed as dist

        return self if self.world == 1 else replace(self, group=dist.new_group(backend="gloo"))

    def leave_group(self) -> None:
        """Leave the others, after the last exchange."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def choose_device(self) -> torch.device:
        """This rank's GPU; the CPU where none is visible.

        A rank that sees one GPU takes it, whatever its number: `srun --gpus-per-task=1` shows each rank its own.

        Raises:
            RankError: several GPUs are visible, but fewer than the ranks of this machine need.
        """
        import torch

        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if seen > 1 and self.local_rank >= seen:
            raise RankError(
                "more ranks on this machine than GPUs",
                where=f"rank {self.rank}, local rank {self.local_rank}",
                got=f"{seen} visible GPUs",
                expected=f"{self.local_rank + 1} or more",
                fix="start as many ranks per machine as it has GPUs, or widen CUDA_VISIBLE_DEVICES",
            )
        return torch.device("cuda", self.local_rank % seen) if seen else torch.device("cpu")

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier(group=self.group)

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. Values are pickled: keep them small."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        got: list[T] = [value] * self.world
        dist.all_gather_object(got, value, group=self.group)
        return got

    def run_on_all(self, work: Callable[[], T]) -> list[T]:
        """Do `work`, then wait for the others: what it returned, in rank order, which is pickled.

        Raises:
            ClueError: what `work` raised, on all ranks, whoever met it, so that none waits on.
        """
        done: Any = None
        problem: ClueError | None = None
        try:
            done = work()
        except ClueError as error:
            if self.world == 1:
                raise
            problem = self._met(error)
        gathered = self.all_gather_object((done, problem))
        _raise_first([met for _, met in gathered])
        return [value for value, _ in gathered]

    def run_on_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, which alone does it, on every rank.

        Raises:
            ClueError: what `work` raised, on all ranks.
        """
        first: Any = self.run_on_all(lambda: work() if self.is_first else None)[0]
        return cast("T", first)

    def slice_for_rank(self, n: int) -> slice:
        """This rank's consecutive part of range(n); the parts differ by one at most and cover it."""
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def _met(self, error: ClueError) -> ClueError:
        """An error of this rank as the others are told."""
        if not self.is_first:  # which speaks for all
            error.what = f"rank {self.rank} on {socket.gethostname()}: {error.what}"
        return error

    def _exchanged(self, mine: bytes) -> list[bytes]:
        """What each rank said, before they have joined."""
        store = self.open_rendezvous_store()
        said, read = (
            [f"clue_dist/{what}/{rank}" for rank in range(self.world)] for what in ("said", "read")
        )
        try:
            store.set(said[self.rank], mine)
            store.wait(said, timedelta(seconds=JOIN))
            got = store.multi_get(said)
            store.set(read[self.rank], b"1")
            if self.is_first:  # the store may end with this process
                store.wait(read, timedelta(seconds=JOIN))
        except RuntimeError as error:
            raise self._not_met(error) from error
        return cast("list[bytes]", got)

    def open_rendezvous_store(self, aside: bool = False) -> Any:
        """The store at which the ranks meet: a server on rank 0, or that of torchrun.

        aside: by another connection, for threads that must not wait for what the first waits for.

        Raises:
            RankError: several machines and no MASTER_ADDR.
            LostError: it cannot be reached.
        """
        os.environ.update(
            RANK=str(self.rank), WORLD_SIZE=str(self.world), LOCAL_RANK=str(self.local_rank)
        )
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = self._only_host()
        os.environ.setdefault("MASTER_PORT", str(choose_port(os.environ)))
        mark_as_rank()
        try:
            meeting = _meeting(self.rank, self.world)
            return meeting.aside if aside else meeting.store
        except RuntimeError as error:
            raise self._not_met(error) from error

    def _not_met(self, error: RuntimeError) -> LostError:
        return LostError(
            "the ranks did not find each other",
            where=f"rank {self.rank} of {self.world} on {socket.gethostname()}",
            got=str(error).partition("\n")[0],
            expected=f"all ranks at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {JOIN:.0f} s",
            fix="look for what the others said, and whether that address and port can be reached from all machines",
        )

    def _only_host(self) -> str:
        if os.environ.get("SLURM_STEP_NUM_NODES", "1") != "1":
            raise RankError(
                "several machines, and nobody said where to meet",
                where="environment",
                got=f"no MASTER_ADDR on rank {self.rank} of {self.world}",
                fix="in the sbatch file: export MASTER_ADDR=$(scontrol show hostnames | head -n 1)",
            )
        return "127.0.0.1"


class _Meeting(NamedTuple):
    """Two connections to a store, made at once: rank 0 may be gone later, and connecting would be tried for long."""

    store: Any
    aside: Any


@functools.cache
def _meeting(rank: int, world: int) -> _Meeting:
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store: Any = next(rendezvous("env://", rank, world, timeout=timedelta(seconds=JOIN)))[0]
    # torchrun keeps its store when it starts the ranks again: what was said then is not for them.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt/{attempt}", store)  # type: ignore[attr-defined]
    return _Meeting(store, store.clone())


def choose_port(env: Mapping[str, str]) -> int:
    """A port that no other job on a machine should take, nor another attempt of the job, as the one before may hold its
    own for a while; all ranks of a job derive the same."""
    attempt = f"{env.get('SLURM_JOB_ID', '0')}/{env.get('SLURM_RESTART_COUNT', '0')}"
    return 20000 + zlib.crc32(attempt.encode()) % 10000


def _raise_first(met: list[ClueError | None]) -> None:
    """By rank order."""
    for error in met:
        if error is not None:
            error.on_every_rank = True
            raise error
