"""Errors a person can act on: what happened, where, what was found, what was expected, how to mend it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

LOST = 76  # exit code where a rank, a machine or the network was lost: starting again may mend it


class ClueError(Exception):
    """A mistake in what the user gave (exit code 2), told so that it can be mended.

    Only `what` is required; the other parts are printed one a line where they are known.
    """

    exit_code = 2
    on_every_rank = False  # whether all ranks of a job raise it together
    before_joining = False  # whether a single rank may raise it before the ranks have joined

    def __init__(
        self,
        what: str,
        *,
        where: object | None = None,
        got: object | None = None,
        expected: object | None = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.fix = what, where, got, expected, fix
        super().__init__(what, where, got, expected, fix)

    def __str__(self) -> str:
        parts = {"where": self.where, "got": self.got, "expected": self.expected, "fix": self.fix}
        return "\n".join([self.what, *(f"  {name}: {text}" for name, text in parts.items() if text is not None)])

    def __reduce__(self) -> tuple[Callable[..., ClueError], tuple[Any, ...]]:
        # Errors cross process borders (Dask workers); keyword-only arguments need help to unpickle.
        return _rebuild, (type(self), self.args)


def _rebuild(kind: type[ClueError], args: tuple[Any, ...]) -> ClueError:
    what, where, got, expected, fix = args
    return kind(what, where=where, got=got, expected=expected, fix=fix)


class ConfigError(ClueError):
    """A config file, a `--set`, or a combination of settings that cannot work."""

    on_every_rank = True


class RankError(ConfigError):
    """One rank cannot take part, perhaps that one alone: it speaks for itself, even before the ranks have joined."""

    on_every_rank = False
    before_joining = True


class DataError(ClueError):
    """Input files that are not what they should be: counts, barcodes, features, modalities."""


class StoreError(ClueError):
    """A store that is incomplete, damaged, or not the one that was expected."""


class ServerError(StoreError):
    """The server of a store fails or refuses: nothing is said about the store itself."""


class ResumeError(ClueError):
    """A checkpoint or run folder that does not fit what is asked of it."""

    on_every_rank = True


class TrainingError(ClueError):
    """Training itself went wrong: loss or gradient stay not finite."""

    exit_code = 1
    on_every_rank = True


class SavingError(ClueError):
    """What a run must keep could not be written: a full disk, a folder that may not be written any more."""

    exit_code = 1
    on_every_rank = True


@contextmanager
def writing(what: str, where: Path) -> Iterator[None]:
    """What the system refuses inside, told as an error that a person can mend.

    Raises:
        SavingError: anything but another ClueError went wrong, as the other ranks must hear of it.
    """
    try:
        yield
    except ClueError:
        raise
    except Exception as error:
        raise SavingError(
            f"{what} could not be written",
            where=where,
            got=error,
            fix="make room or make the folder writable, then type the same command: "
            "it goes on from the last checkpoint that was committed",
        ) from error


def listed(names: Iterable[object], limit: int = 10) -> str:
    """The first `limit` names, then how many more there are."""
    names = list(names)
    more = f" ... and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(str(n) for n in names[:limit]) + more


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a command line; print a `ClueError` without its traceback and exit with its code.

    What every rank meets alike is printed by rank 0 alone.
    """
    try:
        main()
    except ClueError as error:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        if rank == "0" or ((_joined() or error.before_joining) and not error.on_every_rank):
            prefix = "" if rank == "0" else f"rank {rank}: "
            print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
        if _joined():  # threads of a live process group may abort the interpreter's own way out, and change the code
            sys.stdout.flush()
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    except Exception:
        if not _joined():
            raise
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(LOST)  # at once: the others wait for this rank
    sys.exit(0)


def _joined() -> bool:
    """Whether this process is one of a group; before that, all ranks do and meet the same."""
    group = sys.modules.get("torch.distributed")
    return group is not None and group.is_available() and group.is_initialized()
