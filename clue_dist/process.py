"""How a process of ours begins, speaks and ends: exit codes, errors told once, output that nobody reads any more."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from clue_dist.errors import LOST, ClueError
from clue_dist.files import DISK_FULL

_has_joined = False  # whether this process is, or was, one of several


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a command line; print a `ClueError` without its traceback and exit with its code.

    What every rank meets alike is printed by rank 0 alone.
    """
    try:
        main()
    except ClueError as error:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        # Before the ranks have joined, those of a machine see the same.
        if rank == "0" or (not error.on_every_rank and (_has_joined or local == "0")):
            prefix = "" if rank == "0" else f"rank {rank}: "
            print_error(f"{prefix}error: {error}")
        _leave(error.exit_code, at_once=True)
    except Exception:  # noqa: BLE001  printed with all that is known of it
        print_error(traceback.format_exc())
        several = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1"
        _leave(LOST if several else 1, at_once=True)
    except SystemExit as left:
        if not isinstance(left.code, int):
            raise
        _leave(left.code)
    _leave(0)


def print_error(text: str) -> None:
    """Print to stderr; where nobody listens any more (a terminal that was closed, a full disk) the process goes on."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def print_line(text: str) -> None:
    """Print to stdout; as `say`, a process never ends of it. What a full disk does not take now comes later."""
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno not in DISK_FULL:  # nobody reads any more
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def mark_as_rank() -> None:
    """This process becomes one of several: what `run_main` must know."""
    global _has_joined
    _has_joined = True


def _leave(code: int, at_once: bool = False) -> NoReturn:
    """End the process. One of several does not go by the interpreter's own way out: threads of its process group, even
    of one it has left, now and then abort it there, and change the exit code of a run that went well.

    at_once: the others wait for this rank. It may hold them up with nothing, as with threads that hang in a file.
    """
    if not _has_joined:
        sys.exit(code)
    try:
        if not at_once:
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
    finally:
        os._exit(code)
