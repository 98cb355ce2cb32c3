"""Arrays in files, and folders that exist whole or not at all, whoever else writes the same one."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.errors import DataError

_MAGIC = b"\x93NUMPY\x01\x00"  # the format .npy, version 1.0
_HEADER = re.compile(rb"\{'descr': '([^']+)', 'fortran_order': False, 'shape': \(([^)]*)\), \} *\n")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        DataError: a file is in the way, permission is lacking, the name is too long.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what, fix = "the folder cannot be made", "choose another --out"
        raise DataError(what, where=folder, got=error, fix=fix) from None


def save_array(path: Path, values: np.ndarray) -> None:
    """Write a .npy file.

    Unlike np.save, this raises wherever the disk is full, even where what does not fit is small.
    """
    values = np.ascontiguousarray(values)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
        file.write(values.data)


def load_array(path: Path) -> np.ndarray:
    """Map for reading what `save_array` has written.

    A conversion opens thousands of small files, and np.load takes five times as long. It also
    parses the header as Python source, which in Python 3.11 may fail where threads do so together.

    Raises:
        ValueError: the file is another one.
    """
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 10 + int.from_bytes(content[8:10], "little")  # of the values, behind the header
    header = _HEADER.match(content[10:start])
    if content[:8] != _MAGIC or header is None:
        raise ValueError(f"{path} is not as `save_array` writes it")
    shape = tuple(int(size) for size in header[2].split(b",") if size.strip())
    return np.ndarray(shape, np.dtype(header[1].decode()), content, start)


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


@contextmanager
def make_whole_folder(final: Path) -> Iterator[Path]:
    """Yield a new folder to fill, which becomes `final` at the end; a failure leaves nothing.

    If another worker was faster, its folder stays: a task that runs twice gives the same bytes.
    """
    temporary = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(final)
        except OSError:  # a folder that is not empty cannot be replaced
            if not final.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left unfinished under `folder`.

    The endings are those of this project, of zarr-python and of TensorStore.
    """
    endings = ("*.tmp", "*.partial", "*.__lock")
    for path in [path for ending in endings for path in folder.rglob(ending)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
