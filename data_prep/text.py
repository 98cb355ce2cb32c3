"""Small text files, gzipped or not, told by what is in them."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import IO

from clue_dist.errors import DataError

UNREADABLE = (OSError, EOFError, UnicodeDecodeError, zlib.error)  # what reading a damaged file may raise


def open_text(path: Path) -> IO[str]:
    """Open for reading, through gzip where the file is gzipped."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt") if zipped else path.open()


def lines_of(path: Path) -> list[str]:
    """The lines that hold anything, without their ends.

    Raises:
        DataError: the file cannot be read as text.
    """
    try:
        with open_text(path) as file:
            return [line.rstrip("\r\n") for line in file if line.strip()]
    except UNREADABLE as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> DataError:
    fix = "check that the file is complete"
    return DataError("a text file cannot be read", where=path, got=str(error), fix=fix)
