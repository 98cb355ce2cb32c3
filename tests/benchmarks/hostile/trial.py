"""One hostile input: what was done to it, what is tried with it, and how that may end."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

from clue_dist.errors import ClueError
from clue_dist.process import run_main
from data_prep.cli.commands import main


class WrongValues(AssertionError):
    """Values were served that are not the input's, or something was taken that must be refused."""


@dataclass(frozen=True)
class Trial:
    """A hostile input."""

    what: str  # was done to it
    attempts: dict[str, Callable[[], object]]  # entry points; each may raise ClueError, WrongValues
    must_refuse: Iterable[str] = ()  # attempts that may not take it (a link, a fraction, ...)

    def find_outcome(self) -> dict[str, Any]:
        """Make all attempts: "crashed" if one did, else "refused" if one was, else "right"."""
        ends: dict[str, tuple[str, str]] = {}
        for name, attempt in self.attempts.items():
            ends[name] = _try_attempt(attempt)
            if ends[name][0] == "right" and name in self.must_refuse:
                ends[name] = ("crashed", "taken, though it must be refused")
        found = {end for end, _ in ends.values()}
        worst = next((end for end in ("crashed", "refused") if end in found), "right")
        told = {name: text for name, (end, text) in ends.items() if end == worst and text}
        return {"what": self.what[:300], "end": worst, "told": told}


def _try_attempt(attempt: Callable[[], object]) -> tuple[str, str]:
    try:
        attempt()
    except ClueError as error:
        places = error.where is not None or error.got is not None
        clear = error.exit_code == 2 and error.what and places
        return ("refused" if clear else "crashed"), str(error)
    except WrongValues as error:
        return "crashed", f"wrong: {error}"
    except Exception as error:  # noqa: BLE001  whatever it is, it is what is looked for
        return "crashed", f"{type(error).__name__}: {error}"[:500]
    return "right", ""


class _Refusal(ClueError):
    """What a command line said; the error itself ended in it."""


def run_data_prep(*words: object) -> str:
    """Run `python -m data_prep` as it is typed, in this process; what it printed.

    Raises:
        ClueError: it ended with exit code 2 and said why; any other end is an AssertionError.
    """
    output, errors, code = io.StringIO(), io.StringIO(), None
    argv = ["data_prep", *map(str, words)]
    redirect = (contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors))
    with mock.patch.object(sys, "argv", argv), redirect[0], redirect[1]:
        try:
            run_main(main)
        except SystemExit as end:
            code = end.code
    _, error, message = errors.getvalue().rpartition("error: ")
    if code == 0:
        return output.getvalue()
    if code == 2 and error and "Traceback" not in errors.getvalue():
        raise _Refusal(message.strip(), where=" ".join(argv))
    raise AssertionError(f"exit code {code}: {errors.getvalue()}")
