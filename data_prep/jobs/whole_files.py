"""Folders that exist whole or not at all, whoever else writes the same one."""

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

_HEADER = re.compile(rb"\{'descr': '([^']+)', 'fortran_order': False, 'shape': \(([^)]*)\), \} *\n")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        DataError: a file is in the way, permission is lacking, the name is too long.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            "the folder cannot be made", where=folder, got=error, fix="choose another --out"
        ) from None


def save_array(path: Path, values: np.ndarray) -> None:
    """As np.save, which lets a full disk pass where what did not fit is small."""
    values = np.ascontiguousarray(values)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
        file.write(values.data)


def load_array(path: Path) -> np.ndarray:
    """What `save` has written, mapped for reading: as np.load, in a fifth of its time: there are thousands."""
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = 10 + int.from_bytes(content[8:10], "little")
    found = _HEADER.match(content[10:begin])
    if content[:8] != b"\x93NUMPY\x01\x00" or found is None:
        raise ValueError(f"{path} is not as `save` writes it")
    shape = tuple(int(n) for n in found[2].split(b",") if n.strip())
    return np.ndarray(shape, np.dtype(found[1].decode()), content, begin)


def map_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A new .npy file of zeros, to be filled in place: its pages need no memory of this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if 0 in shape:  # which cannot be mapped
        save_array(path, np.zeros(shape, dtype))
        return np.zeros(shape, dtype)
    out: np.ndarray = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with path.open(
        "r+b"
    ) as file:  # a disk that is full must say so here: to a write into pages it answers by a signal
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return out


def flush_arrays(arrays: Iterable[np.ndarray]) -> None:
    """What was written to mapped arrays is in their files, for workers of other machines too."""
    for array in arrays:
        if isinstance(array, np.memmap):
            array.flush()


@contextmanager
def make_whole_folder(final: Path) -> Iterator[Path]:
    """A new folder to fill, renamed to `final` at the end; whatever fails leaves nothing behind.

    If another worker was faster (a task that was run twice gives the same bytes), its folder stays.
    """
    temporary = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(final)
        except OSError:
            if not final.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left unfinished anywhere under `folder`: ours, zarr-python's and TensorStore's."""
    for path in [
        p for pattern in ("*.tmp", "*.partial", "*.__lock") for p in folder.rglob(pattern)
    ]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
