"""Whole files: each is written under a temporary name and renamed into place.

A reader therefore sees the old file or the new one, never half of one. What the system refuses on
the way becomes one of our errors, which says what a person can do.

Two files grow while they are open and are synced by their own modules: metrics.jsonl (train.sinks)
and the rows of an answer under way (inference.array_folder).
"""

from __future__ import annotations

import errno
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clue_dist.errors import ClueError, ConfigError, FolderError, SavingError, StoreError

TEMPORARY_ENDING = ".tmp"  # ends the name of every file that is not whole yet
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
WRITE_REFUSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG})
# Errors of a file server that is away for a while: starting the job again may mend them.
PASSING = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.EREMOTEIO,
    }
)
MOST_TEXT = 500  # characters that an error shows of another one
_DISK_TROUBLE = (DISK_FULL | WRITE_REFUSED | {errno.EIO}) - {errno.EPERM}


@contextmanager
def replace_file(
    path: Path, *, durable: bool = False, unique: bool = False, ending: str = TEMPORARY_ENDING
) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there becomes `path` at the end.

    Args:
        path: the file to write or to replace.
        durable: whether the content must be on the disk before the rename. Where the machine dies
            in between, an unsynced file may be there under its final name and yet be empty.
        unique: whether another process may write the same file at the same time. A fixed temporary
            name is kinder otherwise: what a killed process left is overwritten by the next one.
        ending: what the temporary name ends with; some libraries choose a format by it.
    """
    random = f".{uuid.uuid4().hex[:8]}" if unique else ""
    temporary = path.with_name(f"{path.name}{random}{ending}")
    try:
        yield temporary
        if durable:
            sync_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(
    path: Path, content: str | bytes, *, durable: bool = False, unique: bool = False
) -> None:
    """Write text (as UTF-8) or bytes as a whole file; see `replace_file`."""
    with replace_file(path, durable=durable, unique=unique) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def apply_umask(path: Path) -> Iterator[None]:
    """Give a file that a library writes inside the permissions that the umask leaves.

    Some libraries write under a temporary name which only the user may read, and rename that.
    """
    path.touch()
    permissions = stat.S_IMODE(path.stat().st_mode)
    yield
    # Only where it differs: some file systems refuse every chmod.
    if stat.S_IMODE(path.stat().st_mode) != permissions:
        path.chmod(permissions)


def sync_to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def translate_disk_errors(where: Path, fix: str, *, every: bool = False) -> Iterator[None]:
    """Say in plain words that the disk is full or refuses to be written.

    Args:
        where: the file or folder, for the message.
        fix: what a person can do.
        every: whether every OSError inside comes of writing; else only those of a disk count.

    Raises:
        StoreError: in place of such an OSError.
    """
    try:
        yield
    except OSError as error:
        # When NumPy cannot write everything, its error has a text but no errno.
        of_disk = error.errno in _DISK_TROUBLE or "written" in str(error)
        if not (every or of_disk):
            raise
        what = "the disk is full or refuses to be written"
        raise StoreError(what, where=where, got=error, fix=fix) from error


@contextmanager
def translate_write_errors(what: str, where: Path) -> Iterator[None]:
    """Turn what goes wrong while a run's files are written into an error that all ranks hear of.

    Args:
        what: the thing that is written, for the message.
        where: its folder.

    Raises:
        SavingError: in place of anything but another ClueError.
        FolderError: where starting the job again may mend it.
    """
    try:
        yield
    except ClueError:
        raise
    except Exception as error:
        number = _find_errno(error)
        kind = FolderError if number in PASSING else SavingError
        refused = number in DISK_FULL | WRITE_REFUSED
        fix = "make room or make the folder writable, then " if refused else ""
        raise kind(
            f"{what} could not be written",
            where=where,
            # The text of an error, not its repr: that of a UnicodeDecodeError holds a whole file.
            got=error if number is not None else f"{type(error).__name__}: {error}"[:MOST_TEXT],
            fix=f"{fix}type the same command: it goes on from the last committed checkpoint",
        ) from error


def _find_errno(error: Exception) -> int | None:
    """The system's number of an error; safetensors has it in its text alone."""
    match = re.search(r"\(os error (\d+)\)", str(error))
    if match:
        return int(match[1])
    return error.errno if isinstance(error, OSError) else None


def expand_home(text: str) -> str:
    """Replace `~` or `~NAME` at the beginning of a path by that home folder.

    A shell does so only where the path is a word of its own, not in `store=~/s.zarr` or in a file.

    Raises:
        ValueError: nobody has that name, or no home folder.
    """
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        name = text.partition("/")[0]
        raise ValueError(f"{name} is no home folder; a folder of that name is written ./{name}")
    return expanded


def require_utf8_path(path: str) -> None:
    """Refuse a path that is no UTF-8, as TensorStore and safetensors do once they write there.

    Raises:
        ValueError: it is none; the text says how to mend that.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError("the path is no UTF-8: rename it, or make a link to it") from None


def parse_path(text: str) -> Path:
    """A path as a person typed it, which need not exist. It also serves as a `type` of argparse.

    Raises:
        ConfigError: the system cannot even look, as the name is too long or a folder on the way
            may not be read; or `~NAME` is no home folder.
    """
    expanded = text
    try:
        expanded = expand_home(text)
        os.lstat(expanded)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise ConfigError(
            "a path that cannot be used", where=text[:200], got=error, fix="mend the path"
        ) from None
    return Path(expanded)
