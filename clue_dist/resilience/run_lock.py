"""One run folder, one job: a second job on the same folder is refused."""

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

# Seconds to wait for an earlier attempt of the same Slurm job to end: NFS servers let go of the
# locks of a dead client once its lease is over.
EARLIER_ATTEMPT_LIMIT = 90.0
_APPEARANCE_LIMIT = 5.0  # seconds until every rank sees what rank 0 has written
_TOKEN_LIFETIME = 3600.0  # seconds after which a token must be that of a job that was killed


def find_slurm_job() -> str | None:
    """Find the number of the Slurm job that this process is part of."""
    return os.environ.get("SLURM_JOB_ID")


@contextmanager
def hold_run_lock(run: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the lock of a run folder on rank 0. The system lets go of it however the process ends.

    An earlier attempt of the same Slurm job may take a while to end: it is waited for.

    Raises:
        ResumeError: another job holds the lock, or the ranks do not share the folder; raised on
            every rank.
    """
    with ExitStack() as stack:

        def take_lock() -> str | None:
            with translate_write_errors("the run folder", run):
                run.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((run / ".lock").open("ab+", buffering=0))
                return take_file_lock(file, run)

        holder = ranks.run_on_first(take_lock)
        if holder is not None:
            raise ResumeError(
                "another job is training in this run folder",
                where=run,
                got=holder,
                fix="wait until it ends, end it, or choose another folder with --set run=...; "
                f"if its machine is dead, remove {run / '.lock'}: some file servers keep the "
                "locks of dead machines",
            )
        _require_shared_folder(run, ranks)
        yield


def take_file_lock(file: FileIO, where: Path) -> str | None:
    """Take the lock of a file, and write into it whose it is.

    Args:
        file: the file, open; closing it lets go of the lock.
        where: what the lock is for, for the message.

    Returns:
        The holder's name where another job holds the lock, else None.
    """
    deadline, job = time.monotonic() + EARLIER_ATTEMPT_LIMIT, find_slurm_job()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "a job that has just begun"
            is_same_job = job is not None and f"Slurm job {job}" in holder.split(", ")
            if not is_same_job or time.monotonic() > deadline:
                return holder
            time.sleep(0.5)
        except OSError as error:  # Lustre may be mounted without locks
            print_line(
                f"{where}: no lock can be held here ({error}); see to it that one job alone uses it"
            )
            return None
        else:
            name = f"process {os.getpid()} on {socket.gethostname()}"
            file.truncate(0)
            file.write((f"{name}, Slurm job {job}\n" if job else f"{name}\n").encode())
            return None


def _require_shared_folder(run: Path, ranks: Ranks) -> None:
    """Require that every rank sees a token that rank 0 writes.

    Each rank writes its part of a checkpoint into what must be the folder of rank 0.

    Raises:
        ResumeError: a rank does not see it; raised on every rank.
    """

    def write_token() -> str:
        with translate_write_errors("the run folder", run):
            for leftover in run.glob(".shared-*"):
                if leftover.stat().st_mtime < time.time() - _TOKEN_LIFETIME:
                    leftover.unlink(missing_ok=True)
            token = run / f".shared-{secrets.token_hex(4)}"
            token.touch()
            return token.name

    def find_token() -> bool:
        with translate_write_errors("the run folder", run):
            is_seen = _await_file(token)
            if is_seen:
                token.touch()  # which fails where this rank may not write
            return is_seen

    token = run / ranks.run_on_first(write_token)
    seen = ranks.run_on_all(find_token)
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


def _await_file(path: Path) -> bool:
    """Wait for a file to appear, as it may late on a network file system; tell whether it did."""
    deadline = time.monotonic() + _APPEARANCE_LIMIT
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return path.exists()
