"""Notices that another rank's machine is gone. A dead machine says nothing: whoever waits for it would wait on.

Every rank says now and then that it lives, at the store the ranks met at; rank 0 looks whether all have, the others
whether rank 0 has looked. Whoever hears nothing for too long ends its process, as no collective could end it. These
are threads of Python: whatever else a process does must let them run now and then.
A rank that leaves with an error says so first: the others leave with the same exit code, which tells whoever started
the job whether starting it again can help.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist

from clue_dist.errors import ClueError, LostError, say
from clue_dist.ranks import Ranks

BEAT = 1.0  # seconds between two signs of life
SILENCE = 15.0  # seconds without one after which a rank counts as lost
_KEY, _LATE, _FAILED, _HEARD = "clue_dist/beat", "clue_dist/late", "clue_dist/failed", "clue_dist/heard"


class _Failure(NamedTuple):
    """What the first rank that failed told the others."""

    rank: int
    exit_code: int
    told: str


class Peers:
    """Watches while it is open. Threads of its own, as training may wait in a collective."""

    def __init__(self, ranks: Ranks, silence: float = SILENCE) -> None:
        self._ranks, self._silence = ranks, silence
        self._failure: _Failure | None = None  # what is known of the first that failed
        self._own: ClueError | None = None  # what this rank leaves with
        self._over = threading.Event()
        self._heard = time.monotonic()  # when all was last well
        self._why = "rank 0"

    def __enter__(self) -> Peers:
        if self._ranks.world > 1:
            self._store = _connection()
            self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ranks.world == 1:
            return
        try:  # all the while `_watch` goes on: the others, or the store, may not answer any more
            if error is None:
                self._ranks.barrier()  # who is done early must not seem lost to who is not
            else:
                self._part(error)
        finally:
            self._over.set()
            self._threads[1].join()
            self._threads[0].join(2 * BEAT)  # it may hang in a connection that leads nowhere

    def _part(self, error: BaseException) -> None:
        """Leave with an error of one's own, which the others are told, or with that which another told."""
        with suppress(RuntimeError):  # rank 0 is gone, and the store with it
            if isinstance(error, ClueError):
                mine = _Failure(self._ranks.rank, error.exit_code, str(error))
                self._own = error
                self._store.compare_set(_FAILED, "", json.dumps(mine))
            self._hear()
            if self._ranks.first and self._failure is not None:
                self._await_all()
        if self._failure is not None and not isinstance(error, ClueError):
            raise _error(self._failure) from error

    def _await_all(self) -> None:
        """Until all have heard of the failure, as the store ends with rank 0; raises RuntimeError: so it did."""
        everyone = [f"{_HEARD}/{rank}" for rank in range(self._ranks.world)]
        deadline = time.monotonic() + self._silence
        while not self._store.check(everyone) and time.monotonic() < deadline:
            time.sleep(BEAT / 20)

    def _hear(self) -> None:
        """Learn whether a rank has failed, and say that this one knows. Raises RuntimeError: the store is gone."""
        if self._failure is None and self._store.check([_FAILED]):
            self._failure = _Failure(*json.loads(self._store.get(_FAILED)))
            self._store.set(f"{_HEARD}/{self._ranks.rank}", "1")

    def _beat(self) -> None:
        seen: dict[int, tuple[bytes, float]] = {}
        number = 0
        while not self._over.wait(BEAT):
            number += 1
            try:
                if self._ranks.first:
                    late = self._late(seen)
                    self._why = f"rank {', '.join(map(str, late))}"
                    if late:
                        self._store.set(_LATE, self._why)
                    else:
                        self._store.set(_KEY, str(number))
                        self._heard = time.monotonic()
                else:
                    self._store.set(f"{_KEY}/{self._ranks.rank}", str(number))
                    if self._changed(seen, 0, _KEY):
                        self._heard = time.monotonic()
                    elif self._store.check([_LATE]):
                        self._why = self._store.get(_LATE).decode()
                self._hear()
            except RuntimeError:  # the store is gone, and rank 0 with it: `_watch` waits whether it comes back
                continue

    def _late(self, seen: dict[int, tuple[bytes, float]]) -> list[int]:
        """Ranks that rank 0 has not heard of for a while."""
        for rank in range(1, self._ranks.world):
            self._changed(seen, rank, f"{_KEY}/{rank}")
        now = time.monotonic()
        return [rank for rank, (_, when) in seen.items() if now - when > 3 * BEAT]

    def _changed(self, seen: dict[int, tuple[bytes, float]], rank: int, key: str) -> bool:
        value = self._store.get(key) if self._store.check([key]) else b""
        before = seen.get(rank)
        if before is None or before[0] != value:
            seen[rank] = value, time.monotonic()
            return True
        return False

    def _watch(self) -> None:
        """Counts the time in which this process itself was running: a whole job may be suspended."""
        silent, last = 0.0, time.monotonic()
        while not self._over.wait(BEAT / 2):
            now = time.monotonic()
            silent = silent + min(now - last, 2 * BEAT) if self._heard <= last else 0.0
            last = now
            if silent > self._silence:
                told = _error(self._failure) if self._failure is not None else _lost(self._why, silent)
                _end(self._own or told)


def _connection() -> Any:
    """A connection of our own to the store the ranks met at: the other may be waiting for something."""
    store: Any = dist.distributed_c10d._get_default_store()
    store = store.clone()
    store.set_timeout(timedelta(seconds=SILENCE))
    return store


def _error(failure: _Failure) -> ClueError:
    error = ClueError(f"rank {failure.rank}: {failure.told}")
    error.exit_code, error.on_every_rank = failure.exit_code, True
    return error


def _lost(who: str, silent_s: float) -> LostError:
    return LostError(
        f"another rank is lost: nothing heard of {who} for {silent_s:.0f} s",
        fix="type the same command again, on the machines that are left: it goes on from the last checkpoint",
    )


def _end(error: ClueError) -> NoReturn:
    say(f"error: {error}")
    os._exit(error.exit_code)
