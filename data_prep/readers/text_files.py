"""Text files, gzipped or not; the first bytes of a file say which."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from clue_dist.errors import DataError

MOST_LETTERS = 2**20  # of a line: what is not text may have no line ends, and unpack to any size
_NOT_PLAIN = "\0\x0b\x0c"
_COMMENT = re.compile(r"^#.*\n?", re.MULTILINE)
UNREADABLE = (OSError, EOFError, UnicodeDecodeError, zlib.error)  # what damaged files raise


def open_text(path: Path) -> IO[str]:
    """Open a file for reading, through gzip where it is gzipped; a byte order mark is skipped."""
    with path.open("rb") as file:
        is_gzipped = file.read(2) == b"\x1f\x8b"
    if is_gzipped:
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


class PlainText:
    """A text without what pandas does not read as it is: it ends a field at a NUL, in silence.

    It takes vertical tabs and form feeds for blanks.
    """

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def read(self, size: int = -1) -> str:
        """Read so many letters.

        Raises:
            ValueError: one of them is no plain text.
        """
        text = self.file.read(size)
        if any(character in text for character in _NOT_PLAIN):
            raise ValueError("a control character")
        return text

    def __iter__(self) -> Iterator[str]:
        return iter(self.file)


class CommentFilter:
    """A text without the lines that begin with #, wherever they are; pandas reads it.

    Its own `comment` would also cut lines in two: ArchR's barcodes have a # in them.
    """

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def read(self, size: int = -1) -> str:
        """Read about so many letters, and to the end of the line."""
        while text := self.file.read(size):
            if not text.endswith("\n"):
                text += self.file.readline(MOST_LETTERS)
            if text.startswith("#") or "\n#" in text:
                text = _COMMENT.sub("", text)
            if text:
                return text
        return ""

    def __iter__(self) -> Iterator[str]:
        return (line for line in self.file if not line.startswith("#"))


def split_fields(line: str, separator: str) -> list[str]:
    """Split a line into fields, which may stand in quotes; none where a quote has no end."""
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return []


def read_lines(path: Path) -> list[str]:
    """The lines that are not blank, without their ends.

    Raises:
        DataError: the file cannot be read as text.
    """
    lines: list[str] = []
    try:
        with open_text(path) as file:
            while line := file.readline(MOST_LETTERS):
                if len(line) == MOST_LETTERS:
                    raise DataError(
                        "a file cannot be read",
                        where=path,
                        got=f"line {len(lines) + 1} begins {line[:40]!r}, and goes on for "
                        f"{MOST_LETTERS:,} letters or more",
                        fix="check what the file is",
                    )
                if line.strip():
                    lines.append(line.rstrip("\r\n"))
    except UNREADABLE as error:
        raise make_unreadable_error(path, error) from None
    return lines


def make_unreadable_error(path: Path, error: Exception) -> DataError:
    """Make of what reading a damaged file raises an error for people."""
    fix = "check that the file is complete"
    return DataError("a file cannot be read", where=path, got=str(error), fix=fix)
