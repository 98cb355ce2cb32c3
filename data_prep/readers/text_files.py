"""Small text files, gzipped or not, told by what is in them."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import IO

from clue_dist.errors import DataError

LINE = 2**20  # letters of a line, at most: what is no text may have none, and unpack to any size
UNREADABLE = (
    OSError,
    EOFError,
    UnicodeDecodeError,
    zlib.error,
)  # what reading a damaged file may raise


def open_text(path: Path) -> IO[str]:
    """Open for reading, through gzip where the file is gzipped; a mark of byte order is no part of the text."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return (
        gzip.open(path, "rt", encoding="utf-8-sig") if zipped else path.open(encoding="utf-8-sig")
    )


def read_lines(path: Path) -> list[str]:
    """The lines that hold anything, without their ends.

    Raises:
        DataError: the file cannot be read as text.
    """
    lines: list[str] = []
    try:
        with open_text(path) as file:
            while line := file.readline(LINE):
                if len(line) == LINE:
                    got = f"line {len(lines) + 1} begins {line[:40]!r}, and goes on for {LINE:,} letters or more"
                    raise DataError(
                        "a file cannot be read", where=path, got=got, fix="check what the file is"
                    )
                if line.strip():
                    lines.append(line.rstrip("\r\n"))
    except UNREADABLE as error:
        raise explain_unreadable(path, error) from None
    return lines


def explain_unreadable(path: Path, error: Exception) -> DataError:
    fix = "check that the file is complete"
    return DataError("a file cannot be read", where=path, got=str(error), fix=fix)
