"""A rank that is not heard of any more ends the others; one that is busy, or a job that is suspended, does not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clue_dist.errors import LOST
from clue_dist.resilience import peers
from tests.distributed.command import ROOT, environment

WORLD, SILENCE = 3, 4.0

CODE = f"""
import sys, time
import torch, torch.distributed as dist
from clue_dist.process import run_main
from clue_dist.ranks import Ranks
from clue_dist.resilience.peers import Peers

def main():
    ranks = Ranks.from_environment().join_group()
    with Peers(ranks, silence_limit={SILENCE}):
        dist.all_reduce(torch.ones(1))
        print("met", flush=True)
        if ranks.rank == 1:
            time.sleep({3 * SILENCE})  # busy for long, as rank 0 is while it computes singular vectors
        dist.all_reduce(torch.ones(1))
        print("done", flush=True)
    ranks.leave_group()

run_main(main)
"""


@contextmanager
def ranks(
    folder: Path, code: str = CODE, *args: str, met: bool = True
) -> Iterator[list[subprocess.Popen[str]]]:
    """Three ranks; once they have met, where they are to meet."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = environment() | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(WORLD),
    }
    outputs = [folder / f"{rank}.out" for rank in range(WORLD)]
    started = []
    try:
        for rank, path in enumerate(outputs):
            with path.open("w") as out:
                env = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, "-c", code, *args]
                started.append(
                    subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out, text=True)
                )
        deadline = time.monotonic() + 90
        while met and not all("met" in path.read_text() for path in outputs):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_rank_that_is_silent_ends_the_others_who_name_it(tmp_path: Path) -> None:
    with ranks(tmp_path) as (zero, one, two):
        two.send_signal(signal.SIGSTOP)
        assert [zero.wait(30), one.wait(30)] == [LOST, LOST]
        assert two.poll() is None
    for rank in (0, 1):
        assert (
            "another rank is lost: nothing heard of rank" in (tmp_path / f"{rank}.out").read_text()
        )
    assert "nothing heard of rank 2" in (tmp_path / "0.out").read_text()


FAILING = """
import sys
import torch, torch.distributed as dist
from clue_dist.errors import StoreError
from clue_dist.process import run_main
from clue_dist.ranks import Ranks
from clue_dist.resilience.peers import Peers

def main():
    ranks = Ranks.from_environment().join_group()
    with Peers(ranks):
        dist.all_reduce(torch.ones(1))
        if ranks.rank == int(sys.argv[1]):
            raise StoreError("a chunk is damaged", where="rna/3")
        dist.all_reduce(torch.ones(1))
    ranks.leave_group()

run_main(main)
"""


@pytest.mark.parametrize("who", range(WORLD))
def test_a_rank_that_fails_takes_the_others_with_it_by_its_own_exit_code(
    tmp_path: Path, who: int
) -> None:
    """Whoever started the job must not start it again where that mends nothing."""
    with ranks(tmp_path, FAILING, str(who), met=False) as started:
        assert [process.wait(60) for process in started] == [2, 2, 2]
    said = [(tmp_path / f"{rank}.out").read_text() for rank in range(WORLD)]
    assert "a chunk is damaged\n  where: rna/3" in said[0]
    assert "a chunk is damaged" in said[who]
    assert not any("Traceback" in text for text in said)


ALONE = """
import os, signal, sys, time
import torch.distributed as dist
from clue_dist.process import run_main
from clue_dist.ranks import Ranks
from clue_dist.resilience.peers import Peers

WAITS = {
    "a loop of its own": lambda ranks: time.sleep(60),
    "a process group": lambda ranks: ranks.open_side_channel(),
    "the first one": lambda ranks: ranks.join_group(),
    "rank 0 alone in a collective": lambda ranks: (
        dist.barrier() if ranks.is_first else time.sleep(60)
    ),
}

def main():
    waits_in, victim, silence_limit = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    ranks = Ranks.from_environment()
    ranks.run_before_joining(lambda: None)
    with Peers(ranks, silence_limit=silence_limit):
        if waits_in != "the first one":
            ranks.join_group()
        if ranks.rank == victim:
            print("met", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        WAITS[waits_in](ranks)

run_main(main)
"""
NOTICED = {  # seconds until the others have left: by their silence limit, or by the end of the store
    ("a loop of its own", 2, peers.SILENCE_LIMIT): 20,
    ("a process group", 2, SILENCE): 12,
    ("the first one", 2, SILENCE): 12,
    ("a loop of its own", 0, peers.SILENCE_LIMIT): 10,
    ("a process group", 0, peers.SILENCE_LIMIT): 10,
    ("the first one", 0, peers.SILENCE_LIMIT): 10,
    ("rank 0 alone in a collective", 2, peers.SILENCE_LIMIT): 15,
}


@pytest.mark.parametrize(("waits_in", "victim", "silence_limit"), NOTICED)
def test_a_rank_that_is_killed_while_the_others_are_in_no_collective_ends_them(
    tmp_path: Path, waits_in: str, victim: int, silence_limit: float
) -> None:
    """No collective breaks off where none is under way: the signs of life tell, or the store."""
    arguments = waits_in, str(victim), str(silence_limit)
    with ranks(tmp_path, ALONE, *arguments, met=False) as started:
        assert started[victim].wait(60) == -signal.SIGKILL
        began = time.monotonic()
        left = [process.wait(60) for rank, process in enumerate(started) if rank != victim]
        took = time.monotonic() - began
    assert left == [LOST, LOST]
    said = [(tmp_path / f"{rank}.out").read_text() for rank in range(WORLD) if rank != victim]
    loss = "rank 0 has ended" if victim == 0 else f"nothing heard of rank {victim}"
    assert all(f"error: another rank is lost: {loss}" in text for text in said), said
    assert not any("Traceback" in text for text in said)
    assert took <= NOTICED[waits_in, victim, silence_limit]


SLOW = """
import os, signal, sys, time
import torch, torch.distributed as dist
from clue_dist.errors import TrainingError
from clue_dist.process import run_main
from clue_dist.ranks import Ranks
from clue_dist.resilience.peers import LOSS_LIMIT, Peers

def main():
    ranks = Ranks.from_environment().join_group()
    with Peers(ranks) as peers:
        try:
            with peers.announce_errors():
                dist.all_reduce(torch.ones(1))
                if sys.argv[1] == "told":
                    raise TrainingError("all of them fail")
                if not ranks.is_first:
                    os.kill(os.getpid(), signal.SIGKILL)
                dist.all_reduce(torch.ones(1))
        finally:
            if ranks.is_first:
                time.sleep(LOSS_LIMIT + 3)  # as its sinks close
                print("closed", flush=True)

run_main(main)
"""


@pytest.mark.parametrize(
    ("how", "codes"), [("told", [1, 1, 1]), ("killed", [LOST, -signal.SIGKILL, -signal.SIGKILL])]
)
def test_a_rank_that_takes_longer_to_leave_than_the_others_has_the_time(
    tmp_path: Path, how: str, codes: list[int]
) -> None:
    with ranks(tmp_path, SLOW, how, met=False) as started:
        assert [process.wait(60) for process in started] == codes
    said = (tmp_path / "0.out").read_text()
    assert "closed" in said
    assert ("error: another rank is lost" in said) == (how == "killed")


BUG = """
import time
import torch, torch.distributed as dist
from clue_dist.process import run_main
from clue_dist.ranks import Ranks
from clue_dist.resilience.peers import Peers

def main():
    ranks = Ranks.from_environment().join_group()
    with Peers(ranks) as peers:
        dist.all_reduce(torch.ones(1))
        if ranks.rank == 1:
            raise KeyError("a bug")
        time.sleep(60)

run_main(main)
"""


def test_an_error_that_nobody_foresaw_ends_the_others_as_a_kill_does(tmp_path: Path) -> None:
    with ranks(tmp_path, BUG, met=False) as (zero, one, two):
        assert one.wait(60) == LOST
        began = time.monotonic()
        assert [zero.wait(60), two.wait(60)] == [LOST, LOST]
        assert time.monotonic() - began < peers.SILENCE_LIMIT
    assert "KeyError: 'a bug'" in (tmp_path / "1.out").read_text()
    assert "another rank is lost: rank 1 has ended" in (tmp_path / "0.out").read_text()


def test_when_rank_0_is_silent_all_others_leave(tmp_path: Path) -> None:
    with ranks(tmp_path) as (zero, one, two):
        zero.send_signal(signal.SIGSTOP)
        assert [one.wait(30), two.wait(30)] == [LOST, LOST]
    assert "nothing heard of rank 0" in (tmp_path / "1.out").read_text()


BUSY = """
import sys, time
import torch, torch.distributed as dist
from clue_dist.errors import StoreError
from clue_dist.process import run_main
from clue_dist.ranks import Ranks
from clue_dist.resilience.peers import Peers

def main():
    ranks = Ranks.from_environment().join_group()
    with Peers(ranks, silence_limit=4):
        dist.all_reduce(torch.ones(1))
        print("met", flush=True)
        if ranks.rank == 1:
            raise StoreError("a chunk is damaged")
        time.sleep(60 if ranks.rank == 0 else 0)
        dist.all_reduce(torch.ones(1))

run_main(main)
"""


def test_a_rank_that_is_busy_as_another_fails_leaves_with_what_that_one_said(
    tmp_path: Path,
) -> None:
    with ranks(tmp_path, BUSY) as started:
        assert [process.wait(30) for process in started] == [2, 2, 2]
    said = (tmp_path / "0.out").read_text()
    assert "error: rank 1: a chunk is damaged" in said
    assert "type the same command again" not in said


UNHEARD = """
import time
import torch, torch.distributed as dist
from clue_dist.errors import StoreError
from clue_dist.process import run_main
from clue_dist.ranks import Ranks
from clue_dist.resilience.peers import Peers

def main():
    ranks = Ranks.from_environment().join_group()
    with Peers(ranks, silence_limit=4):
        dist.all_reduce(torch.ones(1))
        print("met", flush=True)
        time.sleep(2)
        raise StoreError(f"rank {ranks.rank} has no more disk")

run_main(main)
"""


def test_who_fails_as_rank_0_is_gone_does_not_wait_for_it(tmp_path: Path) -> None:
    """The store is that of rank 0; a machine that is gone, or stands still, does not even refuse."""
    with ranks(tmp_path, UNHEARD) as (zero, one, two):
        zero.send_signal(signal.SIGSTOP)
        assert [one.wait(30), two.wait(30)] == [2, 2]
        assert zero.poll() is None
    assert "rank 1 has no more disk" in (tmp_path / "1.out").read_text()


DUMB = """
import os
os.dup2(os.open("/dev/full", os.O_WRONLY), 2)  # as a terminal that was closed: nothing can be said any more
"""


@pytest.mark.parametrize("code", [CODE, FAILING], ids=["lost", "failed"])
def test_ranks_end_though_they_cannot_say_why(tmp_path: Path, code: str) -> None:
    with ranks(tmp_path, DUMB + code, "2", met=code == CODE) as started:
        if code == CODE:
            started[2].send_signal(signal.SIGSTOP)
        codes = [process.wait(30) for process in (started[:2] if code == CODE else started)]
    assert codes == ([LOST, LOST] if code == CODE else [2, 2, 2])


def test_a_job_that_is_suspended_and_one_rank_that_is_busy_are_not_lost(tmp_path: Path) -> None:
    with ranks(tmp_path) as started:
        for process in started:
            os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1.5 * SILENCE)
        for process in started:
            os.kill(process.pid, signal.SIGCONT)
        assert [process.wait(60) for process in started] == [0, 0, 0]
