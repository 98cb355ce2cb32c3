"""Errors that a person can act on.

Each says what happened, where, what was found, what was expected, and how to mend it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

# The exit code where a rank, a machine or the network was lost: starting again may mend it.
LOST = 76
# The exit code after a stop signal: saved, not finished, start again to go on (EX_TEMPFAIL).
STOPPED = 75


class ClueError(Exception):
    """A mistake in what a person gave, described so that it can be mended.

    Args:
        what: what happened, in a few words.
        where: the file, the setting or the object.
        got: what was found.
        expected: what should have been there.
        fix: what a person can do.
        mistake: the mistake for programs that mend it, an object of a type of its own.

    Only `what` is required. Each other part is printed on a line of its own, but for `mistake`.
    """

    exit_code = 2
    on_every_rank = False  # whether all ranks of a job raise it together

    def __init__(
        self,
        what: str,
        *,
        where: object | None = None,
        got: object | None = None,
        expected: object | None = None,
        fix: str | None = None,
        mistake: object | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.fix = what, where, got, expected, fix
        self.mistake = mistake
        super().__init__(what, where, got, expected, fix)

    def __str__(self) -> str:
        parts = {"where": self.where, "got": self.got, "expected": self.expected, "fix": self.fix}
        lines = [f"{name}: {text}" for name, text in parts.items() if text is not None]
        # What was found may have lines of its own: they must not look like parts of the message.
        return "\n".join([self.what, *("  " + "\n    ".join(line.splitlines()) for line in lines)])

    def __reduce__(self) -> tuple[Callable[..., ClueError], tuple[Any, ...]]:
        # Errors travel from Dask workers; keyword-only arguments need help to be unpickled.
        parts = {"where": self.where, "got": self.got, "expected": self.expected, "fix": self.fix}
        return _rebuild, (type(self), self.what, {**parts, "mistake": self.mistake})


def _rebuild(kind: type[ClueError], what: str, parts: dict[str, Any]) -> ClueError:
    return kind(what, **parts)


class ConfigError(ClueError):
    """A config file, a `--set`, or a combination of settings that cannot work."""

    on_every_rank = True


class RankError(ConfigError):
    """One rank cannot take part, perhaps that one alone."""

    on_every_rank = False


class LostError(ClueError):
    """Another rank or a machine was lost, or never came."""

    exit_code = LOST


class DataError(ClueError):
    """Input files that are not what they should be: counts, barcodes, features, modalities."""


class StoreError(ClueError):
    """A store that is incomplete, damaged, or not the one that was expected."""


class ServerError(StoreError):
    """The server of a store fails or refuses. The store itself may be sound."""

    exit_code = LOST


class ResumeError(ClueError):
    """A checkpoint or run folder that does not fit what is asked of it."""

    on_every_rank = True


class TrainingError(ClueError):
    """Training itself went wrong: loss or gradient stay not finite."""

    exit_code = 1
    on_every_rank = True


class SavingError(ClueError):
    """A file that a run must keep could not be written, as on a full disk."""

    exit_code = 1
    on_every_rank = True


class FolderError(SavingError):
    """The file system of the run folder fails, as a file server does for a while."""

    exit_code = LOST


def name_argument(name: str, given: object = None) -> str:
    """Name an argument of a call, and before it the option of the commands that says the same.

    Args:
        name: the argument, as `n_partners`, of which the option `--partners` leaves out the `n_`.
        given: its value, where the value is a name that tells more.
    """
    option = "--" + name.removeprefix("n_").rstrip("_").replace("_", "-")
    return f"{option}{'' if given is None else f' {given}'}, in Python `{name}`"


def shorten_error(error: BaseException) -> str:
    """Take the first line of what an error says, or its type where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def list_names(names: Iterable[object], limit: int = 10) -> str:
    """Write down the first `limit` names, then how many more there are."""
    names = list(names)
    more = f" ... and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(str(name) for name in names[:limit]) + more


def format_count(number: int, noun: str, plural: str | None = None) -> str:
    """Write down how many there are of something: "1 cell", "1,200 cells".

    Args:
        number: how many.
        noun: what one of them is called.
        plural: what several are called; by default the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def suggest_names(name: object, known: Sequence[str]) -> str | None:
    """Ask whether one of the known names was meant that are spelled alike; None if none is."""
    spelled = {other.casefold(): other for other in reversed(known)}
    near = difflib.get_close_matches(str(name).casefold(), spelled, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(spelled[other] for other in near)}?" if near else None
