"""A rank that fails, or is not heard of any more, ends the others; one that is busy does not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clue_dist.errors import LOST, StoreError, TrainingError
from clue_dist.process import run_main
from clue_dist.ranks import Ranks
from clue_dist.resilience.peers import LOSS_LIMIT, SILENCE_LIMIT, Peers
from tests.processes import await_ranks, end_ranks, start_ranks

WORLD, SILENCE = 3, 4.0
LOSS = "error: another rank is lost: "


@contextmanager
def open_job(
    folder: Path, work: Callable[..., None], *arguments: Any, meet: bool = False
) -> Iterator[list[ForkServerProcess]]:
    """Start three ranks that do `work`; with `meet`, wait until all of them have printed "met"."""
    processes = start_ranks(WORLD, folder, run_work, work, *arguments)
    try:
        deadline = time.monotonic() + 90
        while meet and not all("met" in output for output in read_outputs(folder)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield processes
    finally:
        end_ranks(processes)


def run_work(work: Callable[..., None], *arguments: Any) -> None:
    run_main(lambda: work(*arguments))


def read_outputs(folder: Path) -> list[str]:
    outputs = [folder / f"{rank}.out" for rank in range(WORLD)]
    return [path.read_text() if path.exists() else "" for path in outputs]


def send_signal(process: ForkServerProcess, number: int) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


def sum_ones() -> None:
    """Meet the other ranks in a collective."""
    dist.all_reduce(torch.ones(1))


def mute_stderr() -> None:
    """Do as a terminal that was closed: nothing can be printed any more."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)


def stay_busy(is_mute: bool = False) -> None:
    ranks = Ranks.from_environment().join_group()
    if is_mute:
        mute_stderr()
    with Peers(ranks, silence_limit=SILENCE):
        sum_ones()
        print("met", flush=True)
        if ranks.rank == 1:
            time.sleep(3 * SILENCE)  # as rank 0 does while it computes singular vectors
        sum_ones()
        print("done", flush=True)
    ranks.leave_group()


def test_a_rank_that_is_silent_ends_the_others_which_name_it(tmp_path: Path) -> None:
    with open_job(tmp_path, stay_busy, meet=True) as processes:
        send_signal(processes[2], signal.SIGSTOP)
        assert await_ranks(processes[:2], 30) == [LOST, LOST]
        assert processes[2].is_alive()
    assert all(f"{LOSS}nothing heard of rank 2" in output for output in read_outputs(tmp_path)[:2])


def test_when_rank_0_is_silent_all_others_leave(tmp_path: Path) -> None:
    with open_job(tmp_path, stay_busy, meet=True) as processes:
        send_signal(processes[0], signal.SIGSTOP)
        assert await_ranks(processes[1:], 30) == [LOST, LOST]
    assert all(f"{LOSS}nothing heard of rank 0" in output for output in read_outputs(tmp_path)[1:])


def test_a_job_that_is_suspended_and_a_rank_that_is_busy_are_not_lost(tmp_path: Path) -> None:
    with open_job(tmp_path, stay_busy, meet=True) as processes:
        for process in processes:
            send_signal(process, signal.SIGSTOP)
        time.sleep(1.5 * SILENCE)
        for process in processes:
            send_signal(process, signal.SIGCONT)
        assert await_ranks(processes, 60) == [0, 0, 0]


def fail_on(rank: int, is_mute: bool = False) -> None:
    ranks = Ranks.from_environment().join_group()
    if is_mute:
        mute_stderr()
    with Peers(ranks):
        sum_ones()
        if ranks.rank == rank:
            raise StoreError("a chunk is damaged", where="rna/3")
        sum_ones()
    ranks.leave_group()


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_rank_that_fails_takes_the_others_with_it_by_its_own_exit_code(
    tmp_path: Path, rank: int
) -> None:
    """Whoever started the job must not start it again where that mends nothing."""
    with open_job(tmp_path, fail_on, rank) as processes:
        assert await_ranks(processes, 60) == [2, 2, 2]
    outputs = read_outputs(tmp_path)
    assert "a chunk is damaged\n  where: rna/3" in outputs[0]
    assert "a chunk is damaged" in outputs[rank]
    assert not any("Traceback" in output for output in outputs)


def test_ranks_that_can_print_nothing_end_when_another_is_lost(tmp_path: Path) -> None:
    with open_job(tmp_path, stay_busy, True, meet=True) as processes:
        send_signal(processes[2], signal.SIGSTOP)
        assert await_ranks(processes[:2], 30) == [LOST, LOST]


def test_ranks_that_can_print_nothing_end_when_another_fails(tmp_path: Path) -> None:
    with open_job(tmp_path, fail_on, 2, True) as processes:
        assert await_ranks(processes, 30) == [2, 2, 2]


def barrier_on_first(ranks: Ranks) -> None:
    if ranks.is_first:
        dist.barrier()
    else:
        time.sleep(60)


WAITS: dict[str, Callable[[Ranks], object]] = {
    "a loop of its own": lambda ranks: time.sleep(60),
    "making a group": lambda ranks: ranks.open_side_channel(),
    "making the first group": lambda ranks: ranks.join_group(),
    "rank 0 alone in a collective": barrier_on_first,
}


def wait_for_victim(wait: str, victim: int, silence_limit: float) -> None:
    ranks = Ranks.from_environment()
    ranks.run_before_joining(lambda: None)
    with Peers(ranks, silence_limit):
        if wait != "making the first group":
            ranks.join_group()
        if ranks.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        WAITS[wait](ranks)


@pytest.mark.parametrize(
    ("wait", "victim", "silence_limit", "within_s"),
    [
        # Only the signs of life tell of rank 2, as long as no collective breaks off.
        ("a loop of its own", 2, SILENCE_LIMIT, 20),
        ("making a group", 2, SILENCE, 12),
        ("making the first group", 2, SILENCE, 12),
        ("rank 0 alone in a collective", 2, SILENCE_LIMIT, 15),
        # The store ends with rank 0.
        ("a loop of its own", 0, SILENCE_LIMIT, 10),
        ("making a group", 0, SILENCE_LIMIT, 10),
        ("making the first group", 0, SILENCE_LIMIT, 10),
    ],
)
def test_a_rank_that_is_killed_ends_the_others_whatever_they_wait_for(
    tmp_path: Path, wait: str, victim: int, silence_limit: float, within_s: float
) -> None:
    with open_job(tmp_path, wait_for_victim, wait, victim, silence_limit) as processes:
        assert await_ranks([processes.pop(victim)], 60) == [-signal.SIGKILL]
        began = time.monotonic()
        assert await_ranks(processes, 60) == [LOST, LOST]
        took = time.monotonic() - began
    outputs = read_outputs(tmp_path)
    del outputs[victim]
    reason = "rank 0 has ended" if victim == 0 else f"nothing heard of rank {victim}"
    assert all(f"{LOSS}{reason}" in output for output in outputs), outputs
    assert not any("Traceback" in output for output in outputs)
    assert took <= within_s


def close_slowly(is_killed: bool) -> None:
    """All ranks end at once, but rank 0 needs longer to close what it writes to."""
    ranks = Ranks.from_environment().join_group()
    with Peers(ranks) as peers:
        try:
            with peers.announce_errors():
                sum_ones()
                if not is_killed:
                    raise TrainingError("all of them fail")
                if not ranks.is_first:
                    os.kill(os.getpid(), signal.SIGKILL)
                sum_ones()
        finally:
            if ranks.is_first:
                time.sleep(LOSS_LIMIT + 3)
                print("closed", flush=True)


@pytest.mark.parametrize(
    ("is_killed", "codes"), [(False, [1, 1, 1]), (True, [LOST, -signal.SIGKILL, -signal.SIGKILL])]
)
def test_a_rank_that_takes_longer_to_leave_than_the_others_has_the_time(
    tmp_path: Path, is_killed: bool, codes: list[int]
) -> None:
    with open_job(tmp_path, close_slowly, is_killed) as processes:
        assert await_ranks(processes, 60) == codes
    output = read_outputs(tmp_path)[0]
    assert "closed" in output
    assert (LOSS in output) == is_killed


def have_a_bug() -> None:
    ranks = Ranks.from_environment().join_group()
    with Peers(ranks):
        sum_ones()
        if ranks.rank == 1:
            raise KeyError("a bug")
        time.sleep(60)


def test_an_error_that_nobody_foresaw_ends_the_others_soon(tmp_path: Path) -> None:
    with open_job(tmp_path, have_a_bug) as processes:
        assert await_ranks([processes[1]], 60) == [LOST]
        began = time.monotonic()
        assert await_ranks(processes, 60) == [LOST, LOST, LOST]
        assert time.monotonic() - began < SILENCE_LIMIT
    outputs = read_outputs(tmp_path)
    assert "KeyError: 'a bug'" in outputs[1]
    assert f"{LOSS}rank 1 has ended" in outputs[0]


def stay_busy_as_another_fails() -> None:
    ranks = Ranks.from_environment().join_group()
    with Peers(ranks, silence_limit=SILENCE):
        sum_ones()
        if ranks.rank == 1:
            raise StoreError("a chunk is damaged")
        time.sleep(60 if ranks.is_first else 0)
        sum_ones()


def test_a_rank_that_is_busy_as_another_fails_leaves_with_the_error_of_that_one(
    tmp_path: Path,
) -> None:
    with open_job(tmp_path, stay_busy_as_another_fails) as processes:
        assert await_ranks(processes, 30) == [2, 2, 2]
    output = read_outputs(tmp_path)[0]
    assert "error: rank 1: a chunk is damaged" in output
    assert "type the same command again" not in output


def fail_everywhere() -> None:
    ranks = Ranks.from_environment().join_group()
    with Peers(ranks, silence_limit=SILENCE):
        sum_ones()
        print("met", flush=True)
        time.sleep(2)
        raise StoreError(f"rank {ranks.rank} has no more disk")


def test_a_rank_that_fails_does_not_wait_for_a_store_that_stands_still(tmp_path: Path) -> None:
    """Rank 0 serves the store; a machine that is gone, or stands still, does not even refuse."""
    with open_job(tmp_path, fail_everywhere, meet=True) as processes:
        send_signal(processes[0], signal.SIGSTOP)
        assert await_ranks(processes[1:], 30) == [2, 2]
        assert processes[0].is_alive()
    assert "rank 1 has no more disk" in read_outputs(tmp_path)[1]
