"""Reading HDF5 that may be broken or hostile: a part lies in its file, and is of a size that it can be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from anndata.io import read_elem

from clue_dist.errors import ClueError, DataError

_MOST = 1000  # values of a dataset for each byte of its file: compressed zeros come to less
_DEEPEST = 8  # groups: a link may lead back to one above
ANEW = "write the file again, from what it was made of"


@contextmanager
def open_h5(path: Path) -> Iterator[h5py.File]:
    """Open for reading; what HDF5 cannot read becomes a DataError."""
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(
            "not a readable HDF5 file",
            where=path,
            got=str(error),
            fix="check that the file is complete",
        ) from None
    with file:
        try:
            yield file
        except ClueError:
            raise
        except Exception as error:  # of h5py and anndata, which have no kind of error in common
            got = f"{type(error).__name__}: {error}"[:500]
            raise DataError(
                "part of the file is missing or damaged", where=path, got=got, fix=ANEW
            ) from error


def open_part(parent: Any, name: str) -> Any:
    """A part of a file, which lies in it and is of a size that it can be.

    Raises:
        DataError: it lies in another file; it says that it holds absurdly many values.
        KeyError: there is none.
    """
    part, path = parent[name], parent.file.filename
    if part.file.filename != path:
        raise DataError("part of the file lies in another file", where=f"{path}: {name}", fix=ANEW)
    if not isinstance(part, h5py.Dataset):
        return part
    if part.external or part.is_virtual:
        raise DataError("values of the file lie in another file", where=name_part(part), fix=ANEW)
    if (part.size or 0) > _MOST * max(Path(path).stat().st_size, 2**16):
        got = f"{part.size} values in a file of {Path(path).stat().st_size} bytes"
        raise DataError(
            "a dataset says that it holds more than its file can",
            where=name_part(part),
            got=got,
            fix=ANEW,
        )
    return part


def read_part(parent: Any, name: str) -> Any:
    """A part of a file as anndata reads it, after a look at all of it; raises as `part_of`."""
    part = open_part(parent, name)
    _look_into(part, set())
    return read_elem(part)


def _look_into(part: Any, seen: set[int], depth: int = 0) -> None:
    """seen: addresses of groups. One that lies in many would be read as often, and those within it as often again."""
    if not isinstance(part, h5py.Group):
        return
    address = h5py.h5o.get_info(part.id).addr
    if depth > _DEEPEST or address in seen:
        raise DataError("groups within groups without an end", where=name_part(part), fix=ANEW)
    seen.add(address)
    for name in part:
        _look_into(open_part(part, name), seen, depth + 1)


def name_part(part: Any) -> str:
    """A part of a file, for messages."""
    return f"{Path(part.file.filename).name}: {part.name.lstrip('/')}"


def read_stretch(dataset: h5py.Dataset, lo: int, hi: int) -> np.ndarray:
    """Values lo to hi of a dataset with one axis; straight from the file where they lie there as they are.

    HDF5 copies them twice, and lets one thread at a time do it.
    """
    lo, hi = max(lo, 0), min(hi, len(dataset))
    form = dataset.id.get_create_plist()
    plain = form.get_layout() == h5py.h5d.CHUNKED and not form.get_nfilters()
    # Texts and references are addresses of something else.
    plain = plain and dataset.dtype.kind in "iufb" and dataset.dtype.isnative
    if not plain or dataset.file.userblock_size or dataset.file.driver != "sec2":
        return dataset[lo:hi]
    out, (width,) = np.empty(max(hi - lo, 0), dataset.dtype), dataset.chunks
    with open(dataset.file.filename, "rb", buffering=0) as file:
        for first in range(lo // width * width, hi, width):
            begin, end = max(first, lo), min(first + width, hi)
            chunk = dataset.id.get_chunk_info_by_coord((first,))
            if chunk.byte_offset is None:  # never written: HDF5 knows what to give
                out[begin - lo : end - lo] = dataset[begin:end]
                continue
            file.seek(chunk.byte_offset + (begin - first) * out.itemsize)
            if file.readinto(out[begin - lo : end - lo].data) != (end - begin) * out.itemsize:
                raise OSError("the file ends within its data")
    return out
