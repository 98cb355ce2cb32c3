"""HDF5 files that may be broken or hostile.

Before a part of a file is read, it must lie in that file and be of a size that the file can hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from anndata.io import read_elem

from clue_dist.errors import ClueError, DataError
from data_prep.readers.text_files import explain_unreadable

_MOST_VALUES = 1000  # of a dataset for each byte of its file: even zeros compress no better
_DEEPEST_GROUP = 8  # groups within groups, as a link may lead back to a group above
WRITE_ANEW = "write the file again, from what it was made of"  # how to mend a damaged file


@contextmanager
def open_h5(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading.

    Raises:
        DataError: in place of whatever h5py or anndata raise while the file is open.
    """
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        fix = "check that the file is complete"
        raise DataError("not a readable HDF5 file", where=path, got=str(error), fix=fix) from None
    with file:
        try:
            yield file
        except ClueError:
            raise
        except Exception as error:  # h5py and anndata have no kind of error in common
            raise DataError(
                "part of the file is missing or damaged",
                where=path,
                got=f"{type(error).__name__}: {error}"[:500],
                fix=WRITE_ANEW,
            ) from error


def has_part(path: Path, *names: str) -> bool:
    """Whether a path is an HDF5 file with a part of one of these names.

    Raises:
        DataError: the file cannot be read.
    """
    if not has_hdf5(path):
        return False
    with open_h5(path) as file:
        return any(name in file for name in names)


def has_hdf5(path: Path) -> bool:
    """Whether a path is a file that begins as HDF5 does.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return path.is_file() and bool(h5py.is_hdf5(path))
    except OSError as error:
        raise explain_unreadable(path, error) from None


def open_part(parent: Any, name: str) -> Any:
    """A group or dataset of a file; of a dataset nothing is read yet.

    Raises:
        DataError: it lies in another file, or claims more values than its file can hold.
        KeyError: there is none of this name.
    """
    part, path = parent[name], parent.file.filename
    if part.file.filename != path:
        what = "part of the file lies in another file"
        raise DataError(what, where=f"{path}: {name}", fix=WRITE_ANEW)
    if not isinstance(part, h5py.Dataset):
        return part
    if part.external or part.is_virtual:
        what = "values of the file lie in another file"
        raise DataError(what, where=name_part(part), fix=WRITE_ANEW)
    n_bytes = Path(path).stat().st_size
    if (part.size or 0) > _MOST_VALUES * max(n_bytes, 2**16):
        raise DataError(
            "a dataset says that it holds more than its file can",
            where=name_part(part),
            got=f"{part.size} values in a file of {n_bytes} bytes",
            fix=WRITE_ANEW,
        )
    return part


def read_part(parent: Any, name: str) -> Any:
    """Read a part of a file as anndata does, once all that lies in it has passed `open_part`."""
    part = open_part(parent, name)
    _inspect_groups(part, set())
    return read_elem(part)


def _inspect_groups(part: Any, seen: set[int], depth: int = 0) -> None:
    """Open all that lies in a part, so that `open_part` may refuse it.

    Args:
        part: a group, or a dataset, in which nothing lies.
        seen: addresses of groups. A group that lies in many others would be read as often, and the
            groups in it as often again, so it is refused the second time.
        depth: number of groups above.
    """
    if not isinstance(part, h5py.Group):
        return
    address = h5py.h5o.get_info(part.id).addr
    if depth > _DEEPEST_GROUP or address in seen:
        what = "groups within groups without an end"
        raise DataError(what, where=name_part(part), fix=WRITE_ANEW)
    seen.add(address)
    for name in part:
        _inspect_groups(open_part(part, name), seen, depth + 1)


def name_part(part: Any) -> str:
    """Name a part of a file for messages: `rna.h5ad: X/data`."""
    return f"{Path(part.file.filename).name}: {part.name.lstrip('/')}"


def read_stretch(dataset: h5py.Dataset, start: int, stop: int) -> np.ndarray:
    """Values `start` to `stop` of a dataset with one axis.

    HDF5 copies values twice and lets one thread at a time do it. So where they lie in the file as
    they are, uncompressed, they are read past HDF5.
    """
    start, stop = max(start, 0), min(stop, len(dataset))
    creation = dataset.id.get_create_plist()
    plain = creation.get_layout() == h5py.h5d.CHUNKED and not creation.get_nfilters()
    # On disk, texts and references are addresses of what lies elsewhere.
    plain = plain and dataset.dtype.kind in "iufb" and dataset.dtype.isnative
    if not plain or dataset.file.userblock_size or dataset.file.driver != "sec2":
        return dataset[start:stop]
    values, (width,) = np.empty(max(stop - start, 0), dataset.dtype), dataset.chunks
    with open(dataset.file.filename, "rb", buffering=0) as file:
        for first in range(start // width * width, stop, width):
            begin, end = max(first, start), min(first + width, stop)
            target = values[begin - start : end - start]
            chunk = dataset.id.get_chunk_info_by_coord((first,))
            if chunk.byte_offset is None:  # never written: HDF5 knows the value to fill it with
                target[:] = dataset[begin:end]
                continue
            file.seek(chunk.byte_offset + (begin - first) * values.itemsize)
            if file.readinto(target.data) != target.nbytes:
                raise OSError("the file ends within its data")
    return values
