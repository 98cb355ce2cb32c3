"""Notices that another rank has failed or is gone, and ends this process where nothing else would.

A rank that waits in a collective, or for a process group to be made, may wait on for a rank that
is gone. So two threads run beside the work: one exchanges signs of life with the other ranks (see
`bulletin`), the other ends the process once it has been in its state for too long. Both are
threads of Python: whatever else the process does must let them run now and then.

A rank that leaves with an error announces it first. The other ranks leave with the same exit code,
which tells whoever started the job whether starting it again can help.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from enum import IntEnum
from types import TracebackType
from typing import NoReturn

from clue_dist.errors import ClueError, LostError, shorten_error
from clue_dist.process import print_error
from clue_dist.ranks import Ranks
from clue_dist.resilience.bulletin import LATE_AFTER, SIGN_INTERVAL, Bulletin, Failure

# What a process may take in a state, in seconds, before it is ended.
SILENCE_LIMIT = 15.0  # alive or told: while another rank is late
LOSS_LIMIT = 5.0  # lost: to break off by itself; a process that is stuck does not
LEAVING_LIMIT = 60.0  # leaving: to settle a checkpoint, to close wandb
_CAUSE_LIMIT = LATE_AFTER + 4 * SIGN_INTERVAL  # until each rank has seen that another one is late


class PeerState(IntEnum):
    """What this rank knows of the others. The state only ever moves down this list."""

    ALIVE = 0  # no rank is known to have failed or ended
    LOST = 1  # another rank has ended without announcing why
    TOLD = 2  # a rank has announced an error, which all ranks leave with
    LEAVING = 3  # an error has taken this rank out of its work, whichever rank it arose on


class Peers:
    """Watches the other ranks while it is open, which it must be before they make a process group.

    Args:
        ranks: the ranks to watch; one process alone has nothing to watch.
        silence_limit: seconds that another rank may be late until this process ends.

    Raises:
        RankError: there are several machines and no MASTER_ADDR.
        LostError: the rendezvous cannot be reached, or another rank was lost and an error
            here came of that.
        ClueError: another rank announced it, and an error here came of that.
    """

    def __init__(self, ranks: Ranks, silence_limit: float = SILENCE_LIMIT) -> None:
        self._ranks = ranks
        self._silence_limit = silence_limit
        self._state = PeerState.ALIVE
        self._causes: dict[PeerState, ClueError] = {}  # the first error that led to each state
        self._lock = threading.Lock()  # held while the state changes
        self._closed = threading.Event()
        self._last_well = time.monotonic()  # when every rank last gave signs of life
        self._late: str | None = None  # the ranks that rank 0 calls late

    def __enter__(self) -> Peers:
        if self._ranks.world > 1:
            rendezvous = self._ranks.open_rendezvous(beside=True)
            rendezvous.set_timeout(timedelta(seconds=SILENCE_LIMIT))
            self._bulletin = Bulletin(self._ranks, rendezvous)
            self._signs = threading.Thread(target=self._exchange_signs, daemon=True)
            self._clock = threading.Thread(target=self._watch_clock, daemon=True)
            self._signs.start()
            self._clock.start()
        return self

    @contextmanager
    def announce_errors(self) -> Iterator[None]:
        """Announce an error as soon as it leaves the block.

        What stands in the block may be stuck in a collective. A rank that an error takes out of it
        is not stuck: it gets the time to close what it writes to.
        """
        try:
            yield
        except BaseException as error:
            if self._ranks.world > 1:
                self._enter(PeerState.LEAVING, error)
                with self._notice_lost_rendezvous():
                    self._announce_failure(error)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ranks.world == 1:
            return
        try:  # the clock runs on: the other ranks, or the rendezvous, may not answer any more
            if error is None:
                self._ranks.barrier()  # a rank that is done early must not seem lost to the others
            else:
                self._leave(error)
        except RuntimeError as broken:
            self._leave(broken)
            raise
        finally:
            self._closed.set()
            self._clock.join()
            self._signs.join(2 * SIGN_INTERVAL)  # it may hang in a connection that leads nowhere

    def _enter(self, state: PeerState, cause: BaseException | None = None) -> None:
        """Change the state. Nothing else does."""
        with self._lock:
            self._state = max(self._state, state)
            if isinstance(cause, ClueError):
                self._causes.setdefault(state, cause)

    def _must_end(self, state: PeerState, spent: float, silent: float) -> bool:
        """Tell whether the process has been in its state for too long.

        Args:
            state: the state it is in.
            spent: seconds since it entered that state.
            silent: seconds since every rank last gave signs of life.
        """
        is_silent = silent > self._silence_limit
        if state is PeerState.LEAVING:
            # Once an error is announced the others leave, and their silence means nothing.
            return spent > LEAVING_LIMIT or (is_silent and PeerState.TOLD not in self._causes)
        return is_silent or (state is PeerState.LOST and spent > LOSS_LIMIT)

    def _watch_clock(self) -> None:
        """End the process in time. Only time in which it ran counts: a job may be suspended."""
        state, spent, silent, last = self._state, 0.0, 0.0, time.monotonic()
        while not self._closed.wait(SIGN_INTERVAL / 2):
            now = time.monotonic()
            passed = min(now - last, 4 * SIGN_INTERVAL)
            spent = spent + passed if self._state is state else 0.0
            silent = silent + passed if self._last_well <= last else 0.0
            state, last = self._state, now
            if self._must_end(state, spent, silent):
                self._end_process()

    def _end_process(self) -> NoReturn:
        """End with the error of this rank, or that of another rank, or the loss of one."""
        known = [self._causes[state] for state in reversed(PeerState) if state in self._causes]
        silence = f"nothing heard of rank 0 for {self._count_silence()} s"
        error = known[0] if known else self._make_loss(silence)
        print_error(f"error: {error}")
        os._exit(error.exit_code)

    def _exchange_signs(self) -> None:
        """Give signs of life and learn of the other ranks, as long as the rendezvous answers."""
        while not self._closed.wait(SIGN_INTERVAL):
            with self._notice_lost_rendezvous():
                try:
                    self._exchange_once()
                except ClueError as error:  # a stranger writes to the rendezvous
                    self._enter(PeerState.LOST, error)
                    with suppress(ClueError):  # what was announced may be the stranger's, too
                        self._bulletin.announce_failure(self._describe_failure(error))
                    return

    def _exchange_once(self) -> None:
        signs = self._bulletin.exchange_signs()
        self._late = signs.late
        if signs.all_well:
            self._last_well = time.monotonic()
        self._read_announcements()

    def _read_announcements(self) -> None:
        if PeerState.TOLD not in self._causes and (failure := self._bulletin.read_failure()):
            self._enter(PeerState.TOLD, _make_error(failure))
        if PeerState.LOST not in self._causes and (message := self._bulletin.read_loss()):
            self._enter(PeerState.LOST, _make_lost_error(message))

    @contextmanager
    def _notice_lost_rendezvous(self) -> Iterator[None]:
        """Take the end of the rendezvous for that of rank 0, which serves it.

        Where a stranger writes to it, nothing that is read there can be relied on any more: this
        rank leaves with that error, as if another rank were lost.
        """
        try:
            yield
        except RuntimeError:
            self._enter(PeerState.LOST, self._make_loss("rank 0 has ended"))
        except ClueError as error:
            self._enter(PeerState.LOST, error)

    def _leave(self, error: BaseException) -> None:
        """Inform the other ranks that this one leaves.

        Raises:
            ClueError: what another rank announced, or a loss, where `error` came of it.
        """
        self._enter(PeerState.LEAVING, error)
        cause = None if isinstance(error, ClueError) else self._await_cause(error)
        with self._notice_lost_rendezvous():
            self._inform_others(error)
        if cause is not None:
            raise cause from error

    def _await_cause(self, error: BaseException) -> ClueError | None:
        """Find out why an error arose: a collective breaks off because another rank has gone."""
        limit = _CAUSE_LIMIT if isinstance(error, RuntimeError) else 0.0
        deadline = time.monotonic() + limit
        while True:
            with self._notice_lost_rendezvous():
                self._read_announcements()
                # Read first: a rank that has announced an error may already be late.
                if self._late is not None and limit:
                    self._enter(PeerState.LOST, self._make_loss("", error))
            cause = self._causes.get(PeerState.TOLD) or self._causes.get(PeerState.LOST)
            if cause is not None or time.monotonic() >= deadline:
                return cause
            time.sleep(SIGN_INTERVAL / 10)

    def _inform_others(self, error: BaseException) -> None:
        """Announce the failure, or else the loss; on rank 0, wait until the others have heard."""
        self._announce_failure(error)
        has_announced = PeerState.TOLD in self._causes
        if not has_announced:
            loss = self._causes.get(PeerState.LOST) or self._make_loss(
                f"rank {self._ranks.rank} has ended"
            )
            self._bulletin.announce_loss(loss.what)
        if self._ranks.is_first:  # the rendezvous ends with this process
            # A rank that is lost never hears; the others look at each of their signs.
            limit = self._silence_limit if has_announced else 2 * SIGN_INTERVAL
            deadline = time.monotonic() + limit
            while not self._bulletin.have_all_heard() and time.monotonic() < deadline:
                time.sleep(SIGN_INTERVAL / 10)

    def _announce_failure(self, error: BaseException) -> None:
        if isinstance(error, ClueError) and PeerState.TOLD not in self._causes:
            first = self._bulletin.announce_failure(self._describe_failure(error))
            self._enter(PeerState.TOLD, _make_error(first))

    def _describe_failure(self, error: ClueError) -> Failure:
        return Failure(self._ranks.rank, error.exit_code, str(error))

    def _make_loss(self, reason: str, evidence: BaseException | None = None) -> LostError:
        """Name the late ranks where they are known: the others end because of them."""
        if self._late is not None:
            reason = f"nothing heard of {self._late} for {self._count_silence()} s"
        return _make_lost_error(f"another rank is lost: {reason}", evidence)

    def _count_silence(self) -> str:
        """Count the seconds that a rank has been silent, as text."""
        before = LATE_AFTER if self._late is not None else 0.0  # until rank 0 called it late
        return f"{before + time.monotonic() - self._last_well:.0f}"


def _make_error(failure: Failure) -> ClueError:
    error = ClueError(f"rank {failure.rank}: {failure.message}")
    error.exit_code, error.on_every_rank = failure.exit_code, True
    return error


def _make_lost_error(message: str, evidence: BaseException | None = None) -> LostError:
    return LostError(
        message,
        got=None if evidence is None else shorten_error(evidence),
        fix="type the same command again, on the machines that are left: "
        "it goes on from the last checkpoint",
    )
