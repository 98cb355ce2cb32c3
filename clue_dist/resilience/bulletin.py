"""What the ranks tell each other at the rendezvous: signs of life, errors, losses.

Rank 0 looks at the signs of life of all ranks, and gives its own only while none of them is late.
So the other ranks look at one sign, that of rank 0, and a loss anywhere reaches all of them.
Whatever is read may have been written by a stranger: see `clue_dist.ranks.messages`.
"""

from __future__ import annotations

import re
import time
from typing import Any, NamedTuple

from clue_dist.ranks import Ranks
from clue_dist.ranks.messages import (
    EXIT_CODES,
    clean_text,
    decode_value,
    encode_value,
    make_foreign_value_error,
)

SIGN_INTERVAL = 0.5  # seconds between two signs of life
LATE_AFTER = 2.5  # seconds without a new sign until rank 0 calls a rank late

# Keys at the rendezvous; those of single ranks end with "/" and the rank.
_SIGN, _HEARD = "clue_dist/sign", "clue_dist/heard"
_LATE, _FAILURE, _LOSS = "clue_dist/late", "clue_dist/failure", "clue_dist/loss"
_LATE_RANKS = re.compile(r"rank \d+(, \d+)*")  # what may stand under _LATE


class Failure(NamedTuple):
    """An error that a rank announced, because it leaves with it."""

    rank: int  # the rank that announced it
    exit_code: int  # exit code of its process; the other ranks leave with the same
    message: str  # the whole text of the error


class Signs(NamedTuple):
    """What one look at the signs of life has shown."""

    all_well: bool  # every rank has given a new sign
    late: str | None  # the ranks that have not for LATE_AFTER seconds, as "rank 1, 2"


class Bulletin:
    """One rank's access to what the ranks write at the rendezvous.

    Every method raises RuntimeError where the process that serves the rendezvous has ended, and
    RankError where it reads what no rank of the job writes.
    """

    def __init__(self, ranks: Ranks, rendezvous: Any) -> None:
        self._ranks = ranks
        self._rendezvous = rendezvous
        self._sign = 0  # counts upward; what matters is that it changes
        self._last_signs: dict[int, tuple[bytes, float]] = {}  # by rank: the sign, when first seen

    def exchange_signs(self) -> Signs:
        """Give a sign of life and look at the signs of the other ranks."""
        self._sign += 1
        if not self._ranks.is_first:
            self._rendezvous.set(f"{_SIGN}/{self._ranks.rank}", str(self._sign))
            all_well = self._has_moved(0)
            return Signs(all_well, None if all_well else self._read_late_ranks())
        late = self._find_late_ranks()
        self._rendezvous.set(_LATE, encode_value(late))
        if late is None:
            self._rendezvous.set(f"{_SIGN}/0", str(self._sign))
        return Signs(late is None, late)

    def announce_failure(self, failure: Failure) -> Failure:
        """Tell the other ranks which error this rank leaves with.

        Returns:
            The failure that was announced first, by this rank or by another: it counts for all.
        """
        first = self._rendezvous.compare_set(_FAILURE, "", encode_value(failure))
        self._rendezvous.set(f"{_HEARD}/{self._ranks.rank}", "1")
        return _parse_failure(decode_value(first, f"key {_FAILURE}"))

    def read_failure(self) -> Failure | None:
        """Read the failure that a rank announced, and note that this rank has heard of it."""
        value = self._read(_FAILURE)
        if value is None:
            return None
        self._rendezvous.set(f"{_HEARD}/{self._ranks.rank}", "1")
        return _parse_failure(value)

    def have_all_heard(self) -> bool:
        """Tell whether every rank has heard of the failure."""
        keys = [f"{_HEARD}/{rank}" for rank in range(self._ranks.world)]
        return bool(self._rendezvous.check(keys))

    def announce_loss(self, message: str) -> None:
        """Tell the other ranks that a rank has ended, or is about to, without a failure."""
        self._rendezvous.compare_set(_LOSS, "", encode_value(message))

    def read_loss(self) -> str | None:
        """Read the loss that a rank announced."""
        message = self._read(_LOSS)
        if not isinstance(message, str | None):
            raise make_foreign_value_error(message, f"key {_LOSS}", "a sentence")
        return None if message is None else clean_text(message)

    def _read_late_ranks(self) -> str | None:
        """Read which ranks rank 0 calls late."""
        late = self._read(_LATE)
        if late is not None and not (isinstance(late, str) and _LATE_RANKS.fullmatch(late)):
            raise make_foreign_value_error(late, f"key {_LATE}", "numbers of ranks")
        return late

    def _find_late_ranks(self) -> str | None:
        now = time.monotonic()  # taken once: with many ranks, the last is looked at much later
        for rank in range(1, self._ranks.world):
            self._has_moved(rank)
        late = [rank for rank, (_, seen) in self._last_signs.items() if now - seen > LATE_AFTER]
        return f"rank {', '.join(map(str, late))}" if late else None

    def _has_moved(self, rank: int) -> bool:
        """Tell whether a rank has given another sign since the last look; the first look counts."""
        key = f"{_SIGN}/{rank}"
        # Signs are compared and nothing else, so that they need not be decoded.
        sign = self._rendezvous.get(key) if self._rendezvous.check([key]) else b""
        if rank in self._last_signs and self._last_signs[rank][0] == sign:
            return False
        self._last_signs[rank] = sign, time.monotonic()
        return True

    def _read(self, key: str) -> Any:
        """Read a value; None where nobody has written it. `get` alone would wait for it."""
        if not self._rendezvous.check([key]):
            return None
        return decode_value(self._rendezvous.get(key), f"key {key}")


def _parse_failure(value: Any) -> Failure:
    fits = (
        isinstance(value, list)
        and [type(field) for field in value] == [int, int, str]
        and value[1] in EXIT_CODES
    )
    if not fits:
        raise make_foreign_value_error(
            value, f"key {_FAILURE}", "a rank, an exit code and an error"
        )
    return Failure(value[0], value[1], clean_text(value[2]))
