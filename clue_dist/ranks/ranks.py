"""Which process of a job this one is, and the few words that the processes exchange.

One process alone needs no set-up at all. torch is imported only where it is needed: a mistake in a
config is reported at once, not seconds later.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from clue_dist.errors import ClueError, ConfigError, LostError, RankError, format_count
from clue_dist.ranks.messages import (
    MOST_BYTES,
    decode_error,
    decode_value,
    encode_error,
    encode_value,
    make_foreign_value_error,
)
from clue_dist.ranks.rendezvous import connect_to_rendezvous, exchange_messages

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

    def require_alone(self, reason: str) -> None:
        """Refuse that a launcher has started several processes.

        Args:
            reason: why one process does the work.

        Raises:
            ConfigError: there are several.
        """
        if self.world > 1:
            raise ConfigError(
                reason,
                got=format_count(self.world, "process", "processes"),
                fix="start one: leave --ranks or the launcher out",
            )

    def run_before_joining(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank before they join; where one rank fails, none goes on.

        Returns:
            What `work` returned on this rank.

        Raises:
            RankError: there are several machines and no MASTER_ADDR, another job holds the port to
                meet at, or this rank has no GPU where others have one.
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
            problems = self.gather_values(encode_error(problem))
        except LostError as error:
            raise problem or error from None
        _raise_first_problem(
            decode_error(value, f"the value of rank {rank}") for rank, value in enumerate(problems)
        )
        return cast("T", result)

    def join_group(
        self, backend: str = "gloo", timeout_s: float = 1800, gpu: torch.device | None = None
    ) -> Ranks:
        """Join the other ranks in torch's default process group.

        Args:
            backend: "nccl" or "gloo".
            timeout_s: seconds that a collective may take from then on.
            gpu: the GPU of this rank, for NCCL.

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
                device_id=gpu,
            )
        return self

    def have_joined(self) -> bool:
        """Whether these ranks are in torch's default process group already."""
        if self.world == 1:
            return True
        import torch.distributed as dist

        return bool(dist.is_initialized())

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

    def gather_values(self, value: T) -> list[T]:
        """Gather a value of every rank, by rank, on all of them, whether they have joined or not.

        Args:
            value: plain data, which travels as JSON, so that a tuple arrives as a list.

        Raises:
            RankError: what came of another rank is not JSON, or is too long.
            LostError: not all ranks came in time, of ranks that have not joined.
        """
        message = encode_value(value)
        if self.world == 1:
            messages = [message]
        elif self.have_joined():
            messages = self._gather_bytes(message)
        else:
            connections = connect_to_rendezvous(self.rank, self.world, self.local_rank)
            messages = exchange_messages(connections, message)
        return [
            decode_value(message, f"the value of rank {rank}")
            for rank, message in enumerate(messages)
        ]

    def run_on_all(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank, then wait for the others.

        Returns:
            What `work` returned, by rank; it must be plain data, as for `gather_values`.

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
        gathered = self.gather_values((result, encode_error(problem)))
        for rank, pair in enumerate(gathered):
            if not isinstance(pair, list) or len(pair) != 2:
                raise make_foreign_value_error(
                    pair, f"the value of rank {rank}", "a result and an error"
                )
        _raise_first_problem(
            decode_error(error, f"the error of rank {rank}")
            for rank, (_, error) in enumerate(gathered)
        )
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
            RankError: there are several machines and no MASTER_ADDR, or another job holds the port.
            LostError: the rendezvous cannot be reached.
        """
        connections = connect_to_rendezvous(self.rank, self.world, self.local_rank)
        return connections.beside if beside else connections.main

    def _name_rank(self, error: ClueError) -> ClueError:
        """Write into an error which rank it arose on. Rank 0 speaks for all."""
        if not self.is_first:
            error.what = f"rank {self.rank} on {socket.gethostname()}: {error.what}"
        return error

    def _gather_bytes(self, message: bytes) -> list[bytes]:
        """Gather a message of every rank. Objects, as torch gathers them, would be pickles."""
        import torch
        import torch.distributed as dist

        is_on_gpu = dist.get_backend(self.process_group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if is_on_gpu else "cpu"
        sizes = torch.zeros(self.world, dtype=torch.int64, device=device)
        size = torch.tensor([len(message)], device=device)
        dist.all_gather(list(sizes.split(1)), size, group=self.process_group)
        for rank, length in enumerate(sizes.tolist()):
            if not 0 <= length <= MOST_BYTES:
                found = f"{length} bytes"
                raise make_foreign_value_error(
                    found, f"the value of rank {rank}", f"at most {MOST_BYTES:,}"
                )
        longest = int(sizes.max())
        padded = torch.zeros(longest, dtype=torch.uint8, device=device)
        padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded, group=self.process_group)
        return [
            part[:length].cpu().numpy().tobytes()
            for part, length in zip(parts, sizes.tolist(), strict=True)
        ]


def run_on_first_rank(work: Callable[[], T]) -> T:
    """Run on rank 0 alone what one process does, however many a launcher has started.

    Args:
        work: what is done, which returns plain data.

    Returns:
        What `work` returned there, on every rank.

    Raises:
        ClueError: what `work` raised, on all ranks.
    """
    ranks = Ranks.from_environment()
    if ranks.world == 1:
        return work()
    had_joined = ranks.have_joined()
    try:
        return ranks.join_group().run_on_first(work)
    finally:
        if not had_joined:
            ranks.leave_group()


def _raise_first_problem(problems: Iterable[ClueError | None]) -> None:
    """Raise the error of the lowest rank that has one."""
    for problem in problems:
        if problem is not None:
            problem.on_every_rank = True
            raise problem
