"""One hostile input: what was done to it, what is tried with it, and how that may end."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn
from unittest import mock

from clue_dist.errors import ClueError
from clue_dist.process import run_main
from data_prep.cli.commands import main

End = Literal["refused", "right", "crashed"]


class Wrong(AssertionError):
    """Values were served that are not the input's, or something was taken that must be refused."""


@dataclass(frozen=True)
class Trial:
    """what: was done to the input; attempts: entry points by name, each of which may raise a ClueError, or `Wrong`;
    must_refuse: none of these attempts may take the input (a link, a fraction for a count, ...)."""

    what: str
    attempts: dict[str, Callable[[], object]]
    must_refuse: frozenset[str] = field(default_factory=frozenset)


def outcome(trial: Trial) -> dict[str, Any]:
    """All attempts: "crashed" if one of them did, else "refused" if one was, else "right"; and what they told."""
    ends: dict[str, End] = {}
    told: dict[str, str] = {}
    for name, attempt in trial.attempts.items():
        ends[name], told[name] = _end(attempt)
        if ends[name] == "right" and name in trial.must_refuse:
            ends[name], told[name] = "crashed", "taken, though it must be refused"
    worst: End = next((end for end in ("crashed", "refused") if end in ends.values()), "right")  # type: ignore[misc]
    return {
        "what": trial.what,
        "end": worst,
        "told": {n: t for n, t in told.items() if ends[n] == worst and t},
    }


def _end(attempt: Callable[[], object]) -> tuple[End, str]:
    try:
        attempt()
    except ClueError as error:
        clear = (
            error.exit_code == 2
            and bool(error.what)
            and (error.where is not None or error.got is not None)
        )
        return ("refused" if clear else "crashed"), str(error)
    except Wrong as error:
        return "crashed", f"wrong: {error}"
    except Exception as error:  # noqa: BLE001  whatever it is, it is what is looked for
        return "crashed", f"{type(error).__name__}: {error}"[:500]
    return "right", ""


def command(*words: object) -> str:
    """`python -m data_prep` as it is typed, in this process; what it printed.

    Raises:
        ClueError: it ended with exit code 2 and said why; whatever else left it.
    """
    output, errors = io.StringIO(), io.StringIO()
    argv = ["data_prep", *map(str, words)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            run_main(main)
        except SystemExit as end:
            code = end.code
    _, error, message = errors.getvalue().rpartition("error: ")
    if code == 0:
        return output.getvalue()
    if code == 2 and error and "Traceback" not in errors.getvalue():
        raise _Told(message.strip(), where=" ".join(argv))
    raise AssertionError(f"exit code {code}: {errors.getvalue()}")


class _Told(ClueError):
    """What a command line said; the error itself ended in it."""


def wrong(text: str) -> NoReturn:
    raise Wrong(text)
