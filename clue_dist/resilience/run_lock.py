"""One run, one job: a second job on the same run folder is refused."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path

from clue_dist.errors import ResumeError
from clue_dist.files import translate_write_errors
from clue_dist.process import print_line
from clue_dist.ranks import Ranks


@contextmanager
def hold_run_lock(run: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the run folder's lock on rank 0; the system lets go of it when the process ends, however it ends.

    An earlier attempt of the same Slurm job may take a while to end: it is waited for.

    Raises:
        ResumeError: another job holds it, on every rank.
    """
    with ExitStack() as held:

        def take() -> str | None:
            with translate_write_errors("the run folder", run):
                run.mkdir(parents=True, exist_ok=True)
                return _taken(held.enter_context((run / ".lock").open("ab+", buffering=0)), run)

        holder = ranks.run_on_first(take)
        if holder is not None:
            raise ResumeError(
                "another job is training in this run folder",
                where=run,
                got=holder,
                fix="wait until it ends, end it, or choose another folder with --set run=...; "
                f"if its machine is dead, remove {run / '.lock'}: some file servers keep the locks of the dead",
            )
        _check_shared(run, ranks)
        yield


def _taken(lock: FileIO, run: Path) -> str | None:
    """Who holds the lock; None once this process does."""
    deadline = time.monotonic() + EARLIER_ATTEMPT
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().decode().strip() or "a job that has just begun"
            if (
                JOB is None
                or f"Slurm job {JOB}" not in holder.split(", ")
                or time.monotonic() > deadline
            ):
                return holder
            time.sleep(0.5)
            continue
        except OSError as error:  # Lustre mounted without locks, for one
            print_line(
                f"{run}: no lock can be held here ({error}); see to it that one job alone trains in it"
            )
            return None
        mine = f"process {os.getpid()} on {socket.gethostname()}"
        lock.truncate(0)
        lock.write((f"{mine}, Slurm job {JOB}\n" if JOB else f"{mine}\n").encode())
        return None


EARLIER_ATTEMPT = (
    90.0  # seconds to wait for it: NFS servers let go of a dead client's locks after its lease
)
JOB = os.environ.get("SLURM_JOB_ID")


def _check_shared(run: Path, ranks: Ranks) -> None:
    """Each rank writes its part of a checkpoint into the folder of rank 0, where rank 0 has put a token."""

    def make() -> str:
        with translate_write_errors("the run folder", run):
            for token in run.glob(".shared-*"):
                if token.stat().st_mtime < time.time() - 3600:  # of a job that was killed here
                    token.unlink(missing_ok=True)
            token = run / f".shared-{secrets.token_hex(4)}"
            token.touch()
            return token.name

    def sees() -> bool:
        with translate_write_errors("the run folder", run):
            there = _appears(token)
            if there:
                token.touch()
            return there

    token = run / ranks.run_on_first(make)
    seen = ranks.run_on_all(sees)
    if ranks.is_first:
        with translate_write_errors("the run folder", run):
            token.unlink(missing_ok=True)
    if not all(seen):
        raise ResumeError(
            "the run folder is not the same on all machines",
            where=run,
            got=f"rank {seen.index(False)} does not see what rank 0 writes",
            fix="choose a folder on a file system that all nodes share, with --set run=...",
        )


def _appears(path: Path, within_s: float = 5) -> bool:
    deadline = time.monotonic() + within_s  # network file systems may be late
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return path.exists()
