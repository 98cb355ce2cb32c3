"""Where a result goes: the check of its folder, its lock, and the folder that ranks work in."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from io import FileIO
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError

from clue_dist.errors import ConfigError, name_argument
from clue_dist.files import parse_path, replace_file, translate_disk_errors
from clue_dist.process import skip_cleanup
from clue_dist.ranks import Ranks
from clue_dist.resilience.run_lock import take_file_lock

TABLE_FORMATS = (".csv", ".csv.gz", ".parquet")
_PARQUET_PACKAGES = ("pyarrow", "fastparquet")  # that pandas knows
_DISK_FIX = "free some space or mend the permissions, then run it again"


def require_output_folder(out: Path) -> None:
    """Require that the folder that `out` goes into is there.

    Raises:
        ConfigError: it is not, or is a file.
    """
    if not out.parent.is_dir():
        state = "is a file" if out.parent.exists() else "does not exist"
        raise ConfigError(
            "no such folder",
            where=name_argument("out", out),
            got=f"{out.parent} {state}",
            fix="mend the path, or make the folder",
        )


def require_output_format(out: Path, formats: Sequence[str]) -> None:
    """Require that `out` has one of the known endings, and that its folder is there.

    Raises:
        ConfigError: it has not, or the folder is not there, or no package can write the format.
    """
    if not out.name.endswith(tuple(formats)):
        raise ConfigError(
            "the output's ending says its format",
            where=name_argument("out", out),
            got=out.suffix or "no ending",
            expected=" or ".join(formats),
        )
    if out.suffix == ".parquet" and not any(map(find_spec, _PARQUET_PACKAGES)):
        raise ConfigError(
            "no package that writes parquet is installed",
            where=name_argument("out", out),
            expected=" or ".join(_PARQUET_PACKAGES),
            fix="`pip install pyarrow`, or write .csv.gz",
        )
    require_output_folder(out)


def require_table_path(out: Path) -> None:
    """Require that `out` has an ending that a table can be written to, and is in a folder.

    Raises:
        ConfigError: it has not, or the folder is not there.
    """
    require_output_format(out, TABLE_FORMATS)


def parse_output(out: str | Path | None, check: Callable[[Path], None]) -> Path | None:
    """Read where an answer goes, and check it before any work begins.

    Args:
        out: the path; None: the answer stays in memory.
        check: raises where the answer cannot be written there.

    Raises:
        ConfigError: the path cannot be used.
    """
    if out is None:
        return None
    path = parse_path(str(out))
    check(path)
    return path


def write_table(table: pd.DataFrame, out: Path, index_label: str | None = None) -> None:
    """Write a table as a whole.

    Args:
        table: its rows and columns.
        out: where to; its ending, one of TABLE_FORMATS, chooses the format.
        index_label: name of the index, as the first column; None: the index is left out.

    Raises:
        StoreError: the disk is full or refuses to be written; nothing is left there.
    """
    has_index = index_label is not None
    with replace_output(out) as temporary:
        if out.suffix == ".parquet":
            table.to_parquet(temporary, index=has_index)
        else:
            table.to_csv(temporary, index=has_index, index_label=index_label)


@contextmanager
def replace_output(out: Path) -> Iterator[Path]:
    """Yield a temporary path of the same ending; what is written there becomes `out` at the end.

    Raises:
        StoreError: the disk is full or refuses to be written; nothing is left there.
    """
    with translate_output_errors(out), replace_file(out, ending=out.suffix) as temporary:
        yield temporary


@contextmanager
def make_scratch_folder(out: Path, ranks: Ranks) -> Iterator[Path]:
    """Make a folder beside `out` that all ranks share. It is gone at the end, also after an error.

    What a killed process leaves of it is removed by the next one with the same `out`. Another job
    with the same `out` is refused until this one ends.

    Raises:
        ConfigError: some machine does not see the folder, or another job is at work there.
        StoreError: it cannot be made.
    """
    scratch = out.with_name(f".{out.name}.partial")

    def make_folder() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        with translate_output_errors(scratch):
            scratch.mkdir()

    def require_shared() -> None:
        if not scratch.is_dir():
            raise ConfigError(
                "not all machines see the folder of the output",
                where=scratch.parent,
                fix="put --out on a file system that every machine of the job mounts",
            )

    with _hold_output_lock(out, ranks):
        ranks.run_on_first(make_folder)
        try:
            ranks.run_on_all(require_shared)
            yield scratch
            ranks.barrier()  # the other ranks may still have the arrays open
        finally:
            if ranks.is_first:
                shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def translate_output_errors(where: Path) -> Iterator[None]:
    """Say in plain words that an output could not be written.

    Raises:
        StoreError: in place of every OSError, and of what h5py raises where HDF5 cannot write.
    """
    with translate_disk_errors(where, _DISK_FIX, every=True):
        hooks = sys.excepthook, sys.unraisablehook
        _mute_late_hdf5_errors()
        try:
            yield
        except SafetensorError as error:  # so it says that a file cannot be written
            raise OSError(str(error)) from error
        except (OSError, RuntimeError) as error:
            if not _comes_from_hdf5(error):
                raise
            # HDF5 tries again to write what is left when the process ends, and crashes.
            skip_cleanup()
            raise OSError(" ".join(str(error).split())) from error
        sys.excepthook, sys.unraisablehook = hooks


def _mute_late_hdf5_errors() -> None:
    """After the first error of HDF5, keep it from printing one for each object that it closes.

    It does so by both hooks, as late as the objects are: after an error, the muted hooks stay.
    """
    print_exception, print_unraisable = sys.excepthook, sys.unraisablehook

    def print_other(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not _comes_from_hdf5(error):
            print_exception(kind, error, trace)

    def print_other_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
        if not _comes_from_hdf5(unraisable.exc_value):
            print_unraisable(unraisable)

    sys.excepthook, sys.unraisablehook = print_other, print_other_unraisable


def _comes_from_hdf5(error: BaseException | None) -> bool:
    """Whether an error says that HDF5 could not write, with the system's number."""
    return isinstance(error, (OSError, RuntimeError)) and "errno = " in str(error)


@contextmanager
def _hold_output_lock(out: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the lock of an output on rank 0, in a file beside it that is gone at the end.

    Raises:
        ConfigError: another job holds the lock; raised on every rank.
        StoreError: the lock cannot be written.
    """
    path = out.with_name(f".{out.name}.lock")
    with ExitStack() as stack:
        holder = ranks.run_on_first(lambda: _take_output_lock(path, stack))
        if holder is not None:
            raise ConfigError(
                "another job is writing this output",
                where=name_argument("out", out),
                got=holder,
                fix=f"wait until it ends, end it, or choose another name; if its machine is dead, "
                f"remove {path}",
            )
        yield


def _take_output_lock(path: Path, stack: ExitStack) -> str | None:
    """Take a lock until `stack` is closed. Returns the holder's name where another job has it."""
    while True:
        with translate_output_errors(path):
            file = path.open("ab+", buffering=0)
            holder = take_file_lock(file, path)
        # The holder may have removed the file between our opening and locking it.
        if holder is None and _is_still_there(file, path):
            stack.callback(file.close)
            stack.callback(path.unlink, missing_ok=True)  # first, while the lock is held
            return None
        file.close()
        if holder is not None:
            return holder


def _is_still_there(file: FileIO, path: Path) -> bool:
    """Whether a file that is open is the one that its path names now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
