"""Exit codes; words that are no command line; printing that survives a closed terminal."""

from __future__ import annotations

import argparse
import atexit
import gc
import io
import locale
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from clue_dist.errors import LOST, ClueError, ConfigError
from clue_dist.files import DISK_FULL

_has_joined = False  # whether this process is, or was, one of the ranks of a job
_skips_cleanup = False  # whether to avoid the interpreter's own way out


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run the `main` of a command line and end the process.

    A `ClueError` is printed without its traceback, and its exit code becomes that of the process.
    An error that every rank raises alike is printed by rank 0 alone.
    """
    _speak_utf8()
    # Where rank 0 has left, torch warns with a page of C++ frames that hides the error itself.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        main()
    except ClueError as error:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        # Before the ranks have joined, all those of a machine find the same: one of them prints.
        prints = _has_joined or local_rank == "0"
        if rank == "0" or (prints and not error.on_every_rank):
            prefix = "" if rank == "0" else f"rank {rank}: "
            print_error(f"{prefix}error: {error}")
        _end_process(error.exit_code, at_once=True)
    except Exception:  # noqa: BLE001  it is printed with all that is known of it
        print_error(traceback.format_exc())
        world = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        _end_process(1 if world == "1" else LOST, at_once=True)
    except SystemExit as exit_request:
        if not isinstance(exit_request.code, int):
            raise
        _end_process(exit_request.code)
    _end_process(0)


class CommandParser(argparse.ArgumentParser):
    """A parser that complains as all of the package does: no page of usage, by one rank alone."""

    def error(self, message: str) -> NoReturn:
        """Refuse the words of a command line.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(message, fix=f"`{self.prog} --help` lists what it takes")


@contextmanager
def postpone_collections() -> Iterator[None]:
    """Keep the garbage collector from running while much is imported.

    It would look through hundreds of thousands of objects again and again, which is a fifth of a
    rank's start. They live as long as the process, so that later collections leave them out, too.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def _speak_utf8() -> None:
    """Read arguments and files, and print, as UTF-8, whatever the locale is.

    Under a locale without UTF-8 the process starts again in Python's UTF-8 mode. What else it may
    start, as workers are, inherits that mode.
    """
    if locale.getencoding().lower() not in ("utf-8", "utf8") and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # The name of a file may hold bytes that are no UTF-8 at all. A stream that was a file
            # and became a pipe is changed, and complains.
            with suppress(OSError):
                stream.reconfigure(errors="backslashreplace")


def print_error(text: str) -> None:
    """Print to stderr; a terminal that was closed or a full disk does not end the process."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def print_line(text: str) -> None:
    """Print to stdout; what goes wrong does not end the process, as in `print_error`."""
    try:
        print(text, flush=True)
    except OSError as error:
        # What a full disk does not take stays in the buffer and is written later. Any other error
        # means that nobody reads any more.
        if error.errno not in DISK_FULL:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


@contextmanager
def silence_mudata() -> Iterator[None]:
    """Keep mudata from warning of objects that it is our part to make and to read.

    It warns of names that modalities share, as RNA and proteins share CD4, and of what its next
    version changes. A person has heard that of the cells themselves, and cannot change our calls.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"mudata\.")
        yield


def mark_as_rank() -> None:
    """Note that this process becomes a rank of a job, for `run_main`."""
    global _has_joined
    _has_joined = True


def skip_cleanup() -> None:
    """Note that the interpreter's own way out is to be avoided, for `run_main`.

    A library may be in a state in which it crashes as it cleans up; or there is nothing to clean
    up but memory.
    """
    global _skips_cleanup
    _skips_cleanup = True


def _end_process(code: int, at_once: bool = False) -> NoReturn:
    """End the process with an exit code.

    A rank of a job does not leave by the interpreter's own way out: threads of its process group,
    even of a group that it has left, now and then abort there and change the exit code.

    Args:
        code: the exit code.
        at_once: skip what is registered to run at exit. The other ranks wait for this one, and
            threads that hang in a file would hold it up.
    """
    if not (_has_joined or _skips_cleanup):
        sys.exit(code)
    try:
        if not at_once:
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
    finally:
        os._exit(code)
