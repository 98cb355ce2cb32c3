"""Arrays in files (.npy, or several of these behind each other), which tasks leave for each other.

Few files with much in them: to make and to remove a file or folder takes a file system long.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

_MAGIC = b"\x93NUMPY\x01\x00"  # the format .npy, version 1.0
_ALIGNMENT = 64  # bytes; headers are padded to multiples of them, too
_PARSING = threading.Lock()
_HEADER = re.compile(rb"\{'descr': '([^']+)', 'fortran_order': False, 'shape': \(([^)]*)\), \} *\n")


def save_array(path: Path, values: np.ndarray) -> None:
    """Write a .npy file.

    Unlike np.save, this raises wherever the disk is full, even where what does not fit is small.
    """
    with path.open("wb") as file:
        append_array(file, values)


def append_array(file: IO[bytes], values: np.ndarray) -> None:
    """Write a .npy file behind what was written before."""
    values = np.ascontiguousarray(values)
    file.write(bytes(-file.tell() % _ALIGNMENT))
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
    file.write(values.data)


def load_array(path: Path) -> np.ndarray:
    """Map for reading what `save_array` has written; see `load_appended`."""
    return load_appended(path)[0]


def load_appended(path: Path) -> list[np.ndarray]:
    """Map for reading what `append_array` has written.

    A conversion opens hundreds of small files, and np.load takes five times as long. It also
    parses the header as Python source, which in Python 3.11 may fail where threads do so together.

    Raises:
        ValueError: the file is another one.
    """
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays: list[np.ndarray] = []
    end = 0
    while end < len(content):
        first = -(-end // _ALIGNMENT) * _ALIGNMENT  # of the next array, header included
        start = first + 10 + int.from_bytes(content[first + 8 : first + 10], "little")
        header = _HEADER.match(content[first + 10 : start])
        if content[first : first + 8] != _MAGIC or header is None:
            raise ValueError(f"{path} is not as `append_array` writes it")
        shape = tuple(int(size) for size in header[2].split(b",") if size.strip())
        arrays.append(np.ndarray(shape, np.dtype(header[1].decode()), content, start))
        end = start + arrays[-1].nbytes
    return arrays


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of a .npz file. One thread at a time does so: see `load_array`."""
    with _PARSING, np.load(path) as arrays:
        return dict(arrays)


def map_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Make a .npy file of zeros, to be filled in place, outside the memory of this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if 0 in shape:  # an empty file cannot be mapped
        save_array(path, np.zeros(shape, dtype))
        return np.zeros(shape, dtype)
    values: np.ndarray = np.lib.format.open_memmap(path, "w+", dtype, shape)
    # A full disk must show here: a write into mapped pages would be answered by a signal.
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return values


def flush_arrays(arrays: Iterable[np.ndarray]) -> None:
    """Bring mapped arrays to their files, where workers on other machines see them too."""
    for array in arrays:
        if isinstance(array, np.memmap):
            array.flush()
