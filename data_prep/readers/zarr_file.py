"""Zarr folders, versions 2 and 3, here or behind a URL, opened as groups of zarr-python."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import tensorstore as ts
import zarr
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from clue_dist.errors import DataError
from clue_dist.store.location import RETRIES, Location, RemoteLocation, open_kvstore

# The file in the root of a Zarr folder, of version 3 and of version 2.
ROOT_FILES = ("zarr.json", ".zgroup")


def has_zarr(location: Location) -> bool:
    """Whether a location is a Zarr folder; any URL may be one, and opening it tells."""
    if isinstance(location, RemoteLocation):
        return True
    return location.is_dir() and any((location / name).is_file() for name in ROOT_FILES)


def open_zarr(location: Location) -> zarr.Group:
    """Open the root of a Zarr folder for reading; of its arrays nothing is read yet."""
    if isinstance(location, RemoteLocation):
        return zarr.open_group(RemoteStore(location), mode="r")
    return zarr.open_group(LocalStore(location, read_only=True), mode="r")


def identify_zarr(location: Location) -> dict[str, Any]:
    """What changes when a Zarr folder is written again; JSON-able."""
    path: dict[str, Any] = {"path": str(location)}
    if isinstance(location, RemoteLocation):
        values = RemoteStore(location).values
        versions = [values.read(name).result().stamp.generation.hex() for name in ROOT_FILES]
        return path | {"versions": versions}
    stats = [(location / name).stat() for name in ROOT_FILES if (location / name).is_file()]
    return path | {"files": [[stat.st_size, stat.st_mtime_ns] for stat in stats]}


def has_missing_chunks(array: Any) -> bool:
    """Whether chunks of an array are absent, which are read as zeros; http does not tell.

    Of arrays that may well hold zeros alone, absence says nothing: such chunks are not written.
    """
    if not isinstance(array, zarr.Array) or not array.store_path.store.supports_listing:
        return False
    return bool(array.nchunks_initialized < array.nchunks)


def require_plain_codecs(part: Any) -> None:
    """Refuse arrays that are stored as what they are not.

    To unpickle Python objects may run any code, and texts that are read as truth values are true.

    Raises:
        DataError: an array in the part, a group or an array, holds Python objects, or numbers that
            are stored as texts.
    """
    if isinstance(part, zarr.Group):
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
    return store.location if isinstance(store, RemoteStore) else Path(store.root)


class RemoteStore(Store):  # type: ignore[misc]  # zarr is not typed here
    """What zarr-python reads a URL from: TensorStore, with the settings that stores have, too."""

    supports_writes = False
    supports_deletes = False
    supports_partial_writes = False

    def __init__(self, location: RemoteLocation) -> None:
        super().__init__(read_only=True)
        self.location = location
        specification = open_kvstore(location)
        self.values = ts.KvStore.open(specification, context=ts.Context(RETRIES)).result()

    def __str__(self) -> str:
        return str(self.location)

    def __repr__(self) -> str:
        return str(self.location)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteStore) and other.location == self.location

    @property
    def supports_listing(self) -> bool:
        return not self.location.url.startswith("http")

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        found = await self.values.read(key)
        if found.state == "missing":
            return None
        return prototype.buffer.from_bytes(found.value[_find_slice(byte_range)])

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return (await self.values.read(key)).state != "missing"

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        if self.supports_listing:
            stop = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
            for key in await self.values.list(ts.KvStore.KeyRange(prefix, stop)):
                yield key.decode()

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        names = [key[len(folder) :].split("/")[0] async for key in self.list_prefix(folder)]
        for name in dict.fromkeys(names):
            yield name

    async def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError("inputs are not written to")

    async def delete(self, key: str) -> None:
        raise NotImplementedError("inputs are not written to")


def _find_slice(byte_range: ByteRequest | None) -> slice:
    """The bytes of a value that are asked for."""
    if isinstance(byte_range, RangeByteRequest):
        return slice(byte_range.start, byte_range.end)
    if isinstance(byte_range, OffsetByteRequest):
        return slice(byte_range.offset, None)
    if isinstance(byte_range, SuffixByteRequest):
        return slice(-byte_range.suffix, None)
    return slice(None)
