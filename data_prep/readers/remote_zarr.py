"""Zarr folders behind a URL, as zarr-python reads them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import tensorstore as ts
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype

from clue_dist.store.location import RETRIES, RemoteLocation, open_kvstore


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
