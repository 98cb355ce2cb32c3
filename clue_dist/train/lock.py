"""One run, one job: a second job on the same run folder is refused."""

from __future__ import annotations

import fcntl
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
    with (run / ".lock").open("a") as handle:
        free = True
        if ranks.first:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
        if not ranks.all_gather_object(free)[0]:
            fix = "wait until it ends, end it, or choose another folder with --set run=..."
            raise ResumeError("another job is training in this run folder", where=run, fix=fix)
        yield
