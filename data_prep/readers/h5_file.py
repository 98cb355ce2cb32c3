"""HDF5 files, and Zarr folders that hold the same, which may be broken or hostile.

Before a part of a file is read, it must lie in that file and be of a size that the file can hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from clue_dist.errors import ClueError, DataError
from clue_dist.store.location import Location, RemoteLocation, translate_read_error
from data_prep.readers.text_files import make_unreadable_error
from data_prep.readers.zarr_file import (
    has_zarr,
    lies_in_zarr,
    locate_zarr,
    open_zarr,
    require_plain_codecs,
)

if TYPE_CHECKING:
    import zarr

with suppress(ImportError):  # it is optional; h5py knows its compressions once it is imported
    import hdf5plugin  # noqa: F401

_MOST_VALUES_OF_BYTE = 1000  # of a dataset, by its file: even zeros compress no better
_DEEPEST_GROUP = 8  # groups within groups, as a link may lead back to a group above
# Compressions that hdf5plugin adds, by the numbers under which they are registered.
_FILTERS = {
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstd",
    32026: "blosc2",
}
_PLAIN_ARRAYS = {("array", "0.2.0"), ("string-array", "0.2.0")}  # anndata's types and versions
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


@contextmanager
def open_container(location: Location) -> Iterator[h5py.File | zarr.Group]:
    """Open an HDF5 file, or a Zarr folder, here or behind a URL, for reading.

    Raises:
        DataError: in place of whatever h5py, Zarr or anndata raise while it is open.
        StoreError: a server fails.
    """
    if isinstance(location, Path) and not has_zarr(location):
        with open_h5(location) as file:
            yield file
        return
    try:
        yield open_zarr(location)
    except ClueError:
        raise
    except Exception as error:  # Zarr, TensorStore and anndata have no kind of error in common
        what, text = "part of the Zarr folder is missing or damaged", str(error)[:500]
        if isinstance(location, RemoteLocation) and isinstance(error, OSError | ValueError):
            raise translate_read_error(error, location, what, where=location) from error
        message = f"{type(error).__name__}: {text}"
        raise DataError(what, where=location, got=message, fix=WRITE_ANEW) from error


def is_array(part: Any) -> bool:
    """Whether a part of a file is an array, and not a group."""
    return hasattr(part, "shape")


def is_group(part: Any) -> bool:
    """Whether a part of a file is a group."""
    return hasattr(part, "keys")


def locate_part(part: Any) -> Location:
    """Where the file lies that a part is of."""
    if lies_in_zarr(part):
        return locate_zarr(part)
    return Path(part.file.filename)


def has_part(location: Location, *names: str) -> bool:
    """Whether a location is an HDF5 file or Zarr folder with a part of one of these names.

    Raises:
        DataError: the file cannot be read.
    """
    if not has_zarr(location) and not has_hdf5(location):
        return False
    with open_container(location) as file:
        return any(name in file for name in names)


def has_hdf5(path: Location) -> bool:
    """Whether a path is a file that begins as HDF5 does.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return isinstance(path, Path) and path.is_file() and bool(h5py.is_hdf5(path))
    except OSError as error:
        raise make_unreadable_error(Path(str(path)), error) from None


def open_part(parent: Any, name: str) -> Any:
    """A group or dataset of a file; of a dataset nothing is read yet.

    Raises:
        DataError: it lies in another file, or claims more values than its file can hold.
        KeyError: there is none of this name.
    """
    if lies_in_zarr(parent):
        part = parent[name]
        require_plain_codecs(part)
        return part
    part, path = parent[name], parent.file.filename
    if part.file.filename != path:
        what = "part of the file lies in another file"
        raise DataError(what, where=f"{path}: {name}", fix=WRITE_ANEW)
    if not isinstance(part, h5py.Dataset):
        return part
    if part.external or part.is_virtual:
        what = "values of the file lie in another file"
        raise DataError(what, where=name_part(part), fix=WRITE_ANEW)
    _require_filters(part)
    n_bytes = Path(path).stat().st_size
    if (part.size or 0) > _MOST_VALUES_OF_BYTE * max(n_bytes, 2**16):
        raise DataError(
            "a dataset says that it holds more than its file can",
            where=name_part(part),
            got=f"{part.size} values in a file of {n_bytes} bytes",
            fix=WRITE_ANEW,
        )
    return part


def _require_filters(dataset: h5py.Dataset) -> None:
    """Refuse a dataset that was compressed by a filter which is not there."""
    creation = dataset.id.get_create_plist()
    for number in range(creation.get_nfilters()):
        code, *_, name = creation.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            raise DataError(
                "the file is compressed in a way that HDF5 does not know by itself",
                where=name_part(dataset),
                got=_FILTERS.get(code) or name.decode(errors="replace") or f"filter {code}",
                fix="`python -m pip install hdf5plugin`, which reads it, or `pip install "
                "clue-dist[hdf5]`; on a cluster, wherever the workers run",
            )


def read_part(parent: Any, name: str) -> Any:
    """Read a part of a file as anndata does, once all that lies in it has passed `open_part`."""
    part = open_part(parent, name)
    if lies_in_zarr(part):
        require_plausible_size(part)
    elif _is_plain_array(part):
        return part.asstr()[()] if h5py.check_string_dtype(part.dtype) else part[()]
    else:
        _inspect_groups(part, set())
    from anndata.io import read_elem  # a third of the start, for columns that few files have

    return read_elem(part)


def _is_plain_array(part: Any) -> bool:
    """Whether a part of a file is an array of numbers or texts, which anndata leaves to h5py."""
    kind, version = (part.attrs.get(f"encoding-{name}") for name in ("type", "version"))
    return isinstance(part, h5py.Dataset) and (kind, version) in _PLAIN_ARRAYS


def require_plausible_size(part: Any) -> None:
    """Refuse a part of a Zarr folder that says that it holds more than lies there.

    An HDF5 file is looked at by `open_part`, which takes longer in a folder of many files.
    """
    if not lies_in_zarr(part):
        return
    location = locate_zarr(part)
    if isinstance(location, RemoteLocation):
        return
    n_bytes = sum(file.stat().st_size for file in (location / part.path).rglob("*"))
    arrays = [part] if is_array(part) else [array for _, array in part.arrays()]
    n_values = sum(array.size for array in arrays)
    if n_values > _MOST_VALUES_OF_BYTE * max(n_bytes, 2**16):
        raise DataError(
            "an array says that it holds more than its folder can",
            where=name_part(part),
            got=f"{n_values} values in {n_bytes} bytes",
            fix=WRITE_ANEW,
        )


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
    return f"{locate_part(part).name}: {part.name.lstrip('/')}"


def read_stretch(dataset: Any, start: int, stop: int) -> np.ndarray:
    """Values `start` to `stop` of a dataset with one axis.

    HDF5 copies values twice and lets one thread at a time do it. So where they lie in the file as
    they are, uncompressed, they are read past HDF5.
    """
    start, stop = max(start, 0), min(stop, dataset.shape[0])
    if lies_in_zarr(dataset):
        return np.asarray(dataset[start:stop])
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
