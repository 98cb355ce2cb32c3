"""Folders of Matrix Market files that were changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np


def file_of(files: dict[str, Path], rng: np.random.Generator, folder: Path) -> str:
    """A file that is missing, or is something else."""
    name = list(files)[rng.integers(len(files))]
    path = files[name]
    path.unlink()
    kind = int(rng.integers(5))
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to(path.name)
    elif kind == 4:
        path.symlink_to(folder / "nowhere")
    return (
        f"{name}: {('gone', 'a folder', 'a pipe', 'a link to itself', 'a link to nothing')[kind]}"
    )


def _lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    return lambda content: b"\n".join(change(content.split(b"\n")))


def _header(line: bytes) -> Callable[[bytes], bytes]:
    return _lines(lambda lines: [line, *lines[1:]])


def _sizes(sizes: bytes) -> Callable[[bytes], bytes]:
    return _lines(lambda lines: [*lines[:2], sizes, *lines[3:]])


def _entry(entry: bytes) -> Callable[[bytes], bytes]:
    """Instead of the fifth entry."""
    return _lines(lambda lines: [*lines[:7], entry, *lines[8:]])


def _more(*entries: bytes) -> Callable[[bytes], bytes]:
    """Entries more, and told so in the sizes."""

    def change(lines: list[bytes]) -> list[bytes]:
        features, cells, n = lines[2].split()
        return [
            *lines[:2],
            b"%b %b %d" % (features, cells, int(n) + len(entries)),
            *lines[3:-1],
            *entries,
            b"",
        ]

    return _lines(change)


_BANNER = b"%%MatrixMarket matrix coordinate integer general"
MTX: dict[str, tuple[str, Callable[[bytes], bytes], bool]] = {
    "no header": ("matrix", _lines(lambda lines: lines[2:]), True),
    "a header of an array": (
        "matrix",
        _header(b"%%MatrixMarket matrix array integer general"),
        True,
    ),
    "complex": ("matrix", _header(b"%%MatrixMarket matrix coordinate complex general"), True),
    "a pattern": ("matrix", _header(b"%%MatrixMarket matrix coordinate pattern general"), True),
    "symmetric": ("matrix", _header(b"%%MatrixMarket matrix coordinate integer symmetric"), True),
    "called real": ("matrix", _header(b"%%MatrixMarket matrix coordinate real general"), False),
    "no sizes": ("matrix", _lines(lambda lines: [*lines[:2], *lines[3:]]), True),
    "sizes that are no numbers": ("matrix", _sizes(b"a b c"), True),
    "sizes in other digits": ("matrix", _sizes("²⁰ ⁴⁰ ²⁵⁰".encode()), True),
    "negative sizes": ("matrix", _sizes(b"-20 -40 -250"), True),
    "fractional sizes": ("matrix", _sizes(b"20.5 40.5 250.5"), True),
    "absurd sizes": ("matrix", _sizes(b"1000000000000 1000000000000 1000000000000"), True),
    "absurdly many entries": ("matrix", _sizes(b"20 40 1000000000000000000"), True),
    "a number of 5,000 digits": ("matrix", _sizes(b"20 40 " + b"9" * 5000), True),
    "too few entries told": ("matrix", _sizes(b"20 40 10"), True),
    "no entries told": ("matrix", _sizes(b"20 40 0"), True),
    "turned": ("matrix", _sizes(b"40 20 250"), True),
    "only sizes": ("matrix", lambda content: _BANNER + b"\n20 40 0\n", True),
    "only a banner": ("matrix", lambda content: _BANNER, True),
    "only comments": ("matrix", lambda content: _BANNER + b"\n" + b"% a\n" * 50, True),
    "nothing": ("matrix", lambda content: b"", True),
    "a fraction": ("matrix", _entry(b"1 1 0.5"), True),
    "NaN": ("matrix", _entry(b"1 1 nan"), True),
    "infinite": ("matrix", _entry(b"1 1 inf"), True),
    "negative": ("matrix", _entry(b"1 1 -2"), True),
    "a count of 30 digits": ("matrix", _entry(b"1 1 " + b"9" * 30), True),
    "a count above 2^24": ("matrix", _entry(b"1 1 16777217"), True),
    "a text for a count": ("matrix", _entry(b"1 1 many"), True),
    "true for a count": ("matrix", _entry(b"1 1 True"), True),
    "no count": ("matrix", _entry(b"1 1"), True),
    "a column more": ("matrix", _entry(b"1 1 1 1"), True),
    "an empty line": ("matrix", _entry(b""), True),
    "a quote that never ends": ("matrix", _entry(b'1 1 "1'), True),
    "quotes": ("matrix", _entry(b'1 1 "1"'), False),
    "NUL": ("matrix", _entry(b"1 1 \0"), True),
    "no UTF-8": ("matrix", _entry(b"1 1 \xff"), True),
    "a feature beyond the last": ("matrix", _more(b"21 1 1"), True),
    "a cell beyond the last": ("matrix", _more(b"1 41 1"), True),
    "counted from 0": ("matrix", _more(b"0 1 1"), True),
    "a negative cell": ("matrix", _more(b"1 -1 1"), True),
    "a fractional cell": ("matrix", _more(b"1 1.5 1"), True),
    "a cell beyond 64 bits": ("matrix", _more(b"1 99999999999999999999999 1"), True),
    "an entry twice": ("matrix", _more(b"1 1 2", b"1 1 3"), False),
    "zeros that are stored": ("matrix", _more(b"1 1 0", b"2 1 0"), False),
    "a sum too large": ("matrix", _more(b"1 1 16777216", b"1 1 16777216"), True),
    "a sum beyond 64 bits": ("matrix", _more(*[b"1 1 9223372036854775807"] * 2, b"1 1 2"), True),
    "comments between": ("matrix", _more(b"1 1 1 % a comment"), False),
    "carriage returns": ("matrix", lambda content: content.replace(b"\n", b"\r\n"), False),
    "tabs": ("matrix", lambda content: content.replace(b" ", b"\t"), False),
    "no last line end": ("matrix", lambda content: content.rstrip(), False),
    "cut in an entry": ("matrix", lambda content: content[:-4], True),
    "a mark of byte order": ("matrix", lambda content: b"\xef\xbb\xbf" + content, False),
    "in UTF-16": ("matrix", lambda content: content.decode().encode("utf-16"), True),
    "one endless line": ("matrix", lambda content: content + b"1" * 5_000_000, True),
    "no features": ("features", lambda content: b"", True),
    "a feature less": ("features", _lines(lambda lines: lines[1:]), True),
    "a feature twice": ("features", _lines(lambda lines: [lines[1], *lines[1:]]), True),
    "features of one column": (
        "features",
        _lines(lambda lines: [line.split(b"\t")[0] for line in lines]),
        True,
    ),
    "types that say nothing": (
        "features",
        lambda content: content.replace(b"Gene Expression", b"?"),
        False,
    ),
    "features that are no UTF-8": ("features", lambda content: b"\xff" + content, True),
    "features with NUL": ("features", lambda content: content.replace(b"g1\t", b"g\0\t"), False),
    "empty names of features": (
        "features",
        lambda content: content.replace(b"g1\tg1", b"\t"),
        False,
    ),
    "no barcodes": ("barcodes", lambda content: b"", True),
    "a barcode less": ("barcodes", _lines(lambda lines: lines[1:]), True),
    "a barcode twice": ("barcodes", _lines(lambda lines: [lines[1], *lines[1:]]), True),
    "barcodes that are no UTF-8": ("barcodes", lambda content: b"\xff" + content, True),
    "barcodes with NUL": ("barcodes", lambda content: content.replace(b"c1\n", b"c1\0\n"), False),
    "barcodes of NUL": ("barcodes", lambda content: content.replace(b"c1\n", b"\0\n"), False),
    "barcodes with a mark of byte order": (
        "barcodes",
        lambda content: b"\xef\xbb\xbf" + content,
        False,
    ),
    "an endless barcode": (
        "barcodes",
        lambda content: content.replace(b"c1\n", b"x" * 5_000_000 + b"\n"),
        True,
    ),
    "a barcode of 5,000 letters": (
        "barcodes",
        lambda content: content.replace(b"c1\n", b"x" * 5000 + b"\n"),
        True,
    ),
    "barcodes like paths": (
        "barcodes",
        lambda content: content.replace(b"c1\n", b"../../c1\n"),
        False,
    ),
}
