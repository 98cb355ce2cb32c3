"""Notices that another rank is gone. Whoever waits for it in a collective, or to make one, may wait on.

A process that ends breaks its connection. A machine that dies says nothing: every rank says now and then that it lives,
at the store the ranks met at; rank 0 looks whether all have, the others whether rank 0 has looked. Who misses another
for too long ends its process, as no collective could end it. These are threads of Python: whatever else a process does
must let them run now and then.
A rank that leaves with an error says so first: the others leave with the same exit code, which tells whoever started
the job whether starting it again can help.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple, NoReturn

from clue_dist.errors import ClueError, LostError
from clue_dist.process import print_error
from clue_dist.ranks import Ranks
from clue_dist.resilience.lines import Lines

BEAT = 1.0  # seconds between two signs of life
SILENCE = 15.0  # seconds that a rank is missed, which begins with the third sign that does not come
GRACE = 5.0  # seconds until a rank that is stuck leaves, once another has ended without a word
LEAVING = 60.0  # seconds for one that an error has reached: to settle a checkpoint, to close wandb
_KEY, _LATE, _GONE = "clue_dist/beat", "clue_dist/late", "clue_dist/gone"
_FAILED, _HEARD = "clue_dist/failed", "clue_dist/heard"


class _Failure(NamedTuple):
    """What the first rank that failed told the others."""

    rank: int
    exit_code: int
    told: str


class Peers:
    """Watches while it is open, from before the ranks make a process group. Threads of its own, as training may wait in
    a collective.

    Raises:
        RankError: several machines and no MASTER_ADDR.
        LostError: as it begins rank 0 is gone; as it ends another is, of which an error of this rank came.
        ClueError: what another rank told, of which an error of this rank came.
    """

    def __init__(self, ranks: Ranks, silence: float = SILENCE) -> None:
        self._ranks, self._silence = ranks, silence
        self._failure: _Failure | None = None  # what is known of the first that failed
        self._own: ClueError | None = None  # what this rank leaves with
        self._over = threading.Event()
        self._heard = time.monotonic()  # when all was last well
        self._late: str | None = None  # of whom rank 0 has not heard for a while
        self._gone: str | None = None  # that another has ended without a word
        self._leaving = self._told = False

    def __enter__(self) -> Peers:
        if self._ranks.world > 1:
            self._store = self._ranks.open_rendezvous_store(aside=True)
            self._store.set_timeout(timedelta(seconds=SILENCE))
            works = (self._beat, self._watch, self._listen)
            self._threads = [threading.Thread(target=work, daemon=True) for work in works]
            for thread in self._threads[:2]:
                thread.start()
            try:
                self._lines = Lines(self._ranks, self._store)
            except RuntimeError as error:
                self._over.set()
                raise _lost("rank 0 has ended, or does not answer") from error
            self._threads[2].start()
        return self

    @contextmanager
    def announce_errors(self) -> Iterator[None]:
        """Around what may be stuck in a collective. A rank that an error takes out of it is not stuck: the others hear
        of the error, and it has the time to close what it writes to."""
        try:
            yield
        except BaseException as error:
            self._leaving = True
            self._tell(error)
            raise

    def _tell(self, error: BaseException) -> None:
        """What the others shall leave with, too."""
        if self._ranks.world == 1 or not isinstance(error, ClueError) or self._own is error:
            return
        self._own = error
        with suppress(RuntimeError):  # the store is gone
            self._store.compare_set(
                _FAILED, "", json.dumps(_Failure(self._ranks.rank, error.exit_code, str(error)))
            )
            self._told = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ranks.world == 1:
            return
        clean = False
        try:  # all the while `_watch` goes on: the others, or the store, may not answer any more
            if error is None:
                self._ranks.barrier()  # who is done early must not seem lost to who is not
                clean = True
            else:
                self._part(error)
        except RuntimeError as broken:
            self._part(broken)
            raise
        finally:
            # The others know of a failure that was told; of any other they hear as of a rank that was killed.
            self._lines.polite = clean or self._told or self._failure is not None
            self._over.set()
            self._threads[1].join()
            for thread in self._threads:
                thread.join(2 * BEAT)  # it may hang in a connection that leads nowhere

    def _part(self, error: BaseException) -> None:
        """Leave with an error of one's own, which the others are told, or with that which another told."""
        if isinstance(error, RuntimeError):
            self._await_why()
        self._tell(error)
        with suppress(RuntimeError):  # rank 0 is gone, and the store with it
            self._hear()
            if self._ranks.is_first and self._failure is not None:
                self._await_all()
        if isinstance(error, ClueError):
            return
        if self._failure is not None:
            raise _error(self._failure) from error
        if self._gone is not None:
            raise self._loss() from error

    def _await_why(self) -> None:
        """A collective that breaks off does so as another rank leaves or ends: shortly after, it is known why."""
        deadline = time.monotonic() + 2 * BEAT
        while self._failure is None and self._gone is None and time.monotonic() < deadline:
            try:
                self._hear()
            except RuntimeError:  # the store is gone
                self._miss("rank 0 has ended")
            time.sleep(BEAT / 20)

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
                if self._ranks.is_first:
                    late = self._late_ranks(seen)
                    self._late = f"rank {', '.join(map(str, late))}" if late else None
                    self._store.set(_LATE, self._late or "")
                    if self._late is None:
                        self._store.set(_KEY, str(number))
                        self._heard = time.monotonic()
                else:
                    self._store.set(f"{_KEY}/{self._ranks.rank}", str(number))
                    if self._changed(seen, 0, _KEY):
                        self._heard, self._late = time.monotonic(), None
                    elif self._store.check([_LATE]):
                        self._late = self._store.get(_LATE).decode() or None
                    if self._store.check([_GONE]):
                        self._miss(self._store.get(_GONE).decode())
                self._hear()
            except (
                RuntimeError
            ):  # the store is gone, and rank 0 with it: `_watch` waits whether it comes back
                continue

    def _late_ranks(self, seen: dict[int, tuple[bytes, float]]) -> list[int]:
        """Ranks that rank 0 has not heard of for a while."""
        now = time.monotonic()  # of many ranks the last is asked much later
        for rank in range(1, self._ranks.world):
            self._changed(seen, rank, f"{_KEY}/{rank}")
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
        silent = gone = leaving = 0.0
        last = time.monotonic()
        while not self._over.wait(BEAT / 2):
            now = time.monotonic()
            passed = min(now - last, 2 * BEAT)
            silent = silent + passed if self._heard <= last else 0.0
            gone += passed if self._gone is not None else 0.0
            leaving += passed if self._leaving else 0.0
            last = now
            told = self._told or self._failure is not None  # then the others leave, and are silent
            if (
                leaving > LEAVING
                or (gone > GRACE and not self._leaving)
                or (silent > self._silence and not (self._leaving and told))
            ):
                self._end()

    def _end(self) -> NoReturn:
        """With what this rank or another told, if one has."""
        error = self._own or (_error(self._failure) if self._failure is not None else self._loss())
        print_error(f"error: {error}")
        os._exit(error.exit_code)

    def _loss(self) -> LostError:
        silence = (
            f"nothing heard of {self._late or 'rank 0'} for {time.monotonic() - self._heard:.0f} s"
        )
        return _lost(self._gone or silence)

    def _listen(self) -> None:
        for rank in self._lines.broken(self._over):
            self._miss(f"rank {rank} has ended")
            if self._ranks.is_first:
                with suppress(RuntimeError):
                    self._store.set(_GONE, f"rank {rank} has ended")

    def _miss(self, why: str) -> None:
        """What is known first counts: others end because of it."""
        if self._gone is None:
            self._gone = why if self._late is None else f"nothing heard of {self._late}"


def _error(failure: _Failure) -> ClueError:
    error = ClueError(f"rank {failure.rank}: {failure.told}")
    error.exit_code, error.on_every_rank = failure.exit_code, True
    return error


def _lost(why: str) -> LostError:
    return LostError(
        f"another rank is lost: {why}",
        fix="type the same command again, on the machines that are left: it goes on from the last checkpoint",
    )
