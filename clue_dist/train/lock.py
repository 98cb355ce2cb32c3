"""One run, one job: a second job on the same run folder is refused."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clue_dist.errors import ResumeError
from clue_dist.ranks import Ranks


@contextmanager
def alone_in(run: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the run folder's lock on rank 0; the system lets go of it when the process ends, however it ends.

    Raises:
        ResumeError: another job holds it, on every rank.
    """
    run.mkdir(parents=True, exist_ok=True)
    _check_shared(run, ranks)
    with (run / ".lock").open("a") as handle:
        free = True
        if ranks.first:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
            except OSError as error:  # Lustre mounted without locks, for one
                print(
                    f"{run}: no lock can be held here ({error}); see to it that one job alone trains in it", flush=True
                )
        if not ranks.all_gather_object(free)[0]:
            fix = "wait until it ends, end it, or choose another folder with --set run=..."
            raise ResumeError("another job is training in this run folder", where=run, fix=fix)
        yield


def _check_shared(run: Path, ranks: Ranks) -> None:
    """Each rank writes its part of a checkpoint into the folder of rank 0."""
    token = run / f".rank0-{os.getpid()}-{time.time_ns()}"
    if ranks.first:
        token.touch()
    name = ranks.all_gather_object(token.name)[0]
    seen = ranks.all_gather_object(ranks.first or _appears(run / name))
    if ranks.first:
        token.unlink()
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
