"""Zarr folders, versions 2 and 3, here or behind a URL, opened as groups of zarr-python.

That package takes a sixth of the start, and is imported once such a folder is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py

from clue_dist.errors import DataError
from clue_dist.store.location import Location, RemoteLocation

if TYPE_CHECKING:
    import zarr

# The file in the root of a Zarr folder, of version 3 and of version 2.
ROOT_FILES = ("zarr.json", ".zgroup")


def has_zarr(location: Location) -> bool:
    """Whether a location is a Zarr folder; any URL may be one, and opening it tells."""
    if isinstance(location, RemoteLocation):
        return True
    return location.is_dir() and any((location / name).is_file() for name in ROOT_FILES)


def lies_in_zarr(part: Any) -> bool:
    """Whether an array or a group is one of Zarr, and not of HDF5."""
    return not isinstance(part, h5py.HLObject)


def open_zarr(location: Location) -> zarr.Group:
    """Open the root of a Zarr folder for reading; of its arrays nothing is read yet."""
    import zarr
    from zarr.storage import LocalStore

    if isinstance(location, RemoteLocation):
        from data_prep.readers.remote_zarr import RemoteStore

        return zarr.open_group(RemoteStore(location), mode="r")
    return zarr.open_group(LocalStore(location, read_only=True), mode="r")


def identify_zarr(location: Location) -> dict[str, Any]:
    """What changes when a Zarr folder is written again; JSON-able."""
    path: dict[str, Any] = {"path": str(location)}
    if isinstance(location, RemoteLocation):
        from data_prep.readers.remote_zarr import RemoteStore

        values = RemoteStore(location).values
        versions = [values.read(name).result().stamp.generation.hex() for name in ROOT_FILES]
        return path | {"versions": versions}
    stats = [(location / name).stat() for name in ROOT_FILES if (location / name).is_file()]
    return path | {"files": [[stat.st_size, stat.st_mtime_ns] for stat in stats]}


def has_missing_chunks(array: Any) -> bool:
    """Whether chunks of an array are absent, which are read as zeros; http does not tell.

    Of arrays that may well hold zeros alone, absence says nothing: such chunks are not written.
    """
    if not lies_in_zarr(array) or not array.store_path.store.supports_listing:
        return False
    return bool(array.nchunks_initialized < array.nchunks)


def require_plain_codecs(part: Any) -> None:
    """Refuse arrays that are stored as what they are not.

    To unpickle Python objects may run any code, and texts that are read as truth values are true.

    Raises:
        DataError: an array in the part, a group or an array, holds Python objects, or numbers that
            are stored as texts.
    """
    if not hasattr(part, "shape"):
        for _, array in part.arrays():
            require_plain_codecs(array)
        return
    metadata = part.metadata.to_dict()
    codecs = [*(metadata.get("filters") or ()), metadata.get("compressor")]
    names = " ".join(str(codec).lower() for codec in [*codecs, *metadata.get("codecs", ())])
    if "pickle" in names:
        what = "an array of Python objects, which only running them would read"
    elif "vlen" in names and part.dtype.kind in "biufc":
        what = f"an array of {part.dtype} that is stored as texts"
    else:
        return
    raise DataError(what, where=f"{locate_zarr(part)}: {part.name}", fix="write it anew")


def locate_zarr(part: Any) -> Location:
    """The location that was opened to come to a part."""
    store = part.store_path.store
    location: Location = getattr(store, "location", None) or Path(store.root)
    return location
