"""The arrays of a segment, read block by block through TensorStore.

A chunk that is missing, truncated or altered raises an error; it is never served as zeros.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from clue_dist.errors import StoreError
from clue_dist.store import layout, location
from clue_dist.store.layout import ArraySpec
from clue_dist.store.location import Location, RemoteLocation
from clue_dist.store.manifest import Manifest
from clue_dist.store.rows import CHECK_FIX

# TensorStore caches nothing: the loader keeps the blocks that it needs, and keeps them once.
_CONTEXT = {"cache_pool": {"total_bytes_limit": 0}, **location.RETRIES}
# But behind a URL it keeps chunks of the narrow arrays that training reads pass by pass, of which a
# window needs a few bytes: a request costs the server more than these. They are 4 bytes a cell, and
# 12 more for each sparse modality, so that those of 4 million cells of RNA are asked for once.
NARROW_CACHE_BYTES = 64 * 2**20  # of a segment, at most


class SegmentArrays:
    """The arrays of one segment, by their names in it, as "rna/codes".

    Args:
        root: where the store lies.
        manifest: the store's manifest.
        segment: the segment's name.

    Raises:
        StoreError: an array cannot be opened, or does not fit the manifest.
    """

    def __init__(self, root: Location, manifest: Manifest, segment: str) -> None:
        self.root, self.segment, self.block_cells = root, segment, manifest.block_cells
        self.specs = {
            spec.path.removeprefix(f"strata/{segment}/"): spec
            for spec in manifest.specify_arrays(segment)
        }
        self._context = ts.Context(_CONTEXT)
        self._narrow_context = self._context
        if isinstance(root, RemoteLocation):
            cache = {"cache_pool": {"total_bytes_limit": NARROW_CACHE_BYTES}}
            self._narrow_context = ts.Context(_CONTEXT | cache)
        self._arrays = {name: self._open(spec) for name, spec in self.specs.items()}
        # Shards that were found to be plain files, by array.
        self._plain_shards: dict[str, set[int]] = {name: set() for name in self.specs}

    def read_blocks(self, name: str, blocks: np.ndarray) -> np.ndarray:
        """Read whole blocks of an array.

        Args:
            name: the array.
            blocks: numbers of the blocks, (n,).

        Returns:
            (n, ...).

        Raises:
            StoreError: part of the store is missing or damaged.
        """
        return self.read_together([name], blocks)[0]

    def read_together(self, names: Sequence[str], blocks: np.ndarray) -> list[np.ndarray]:
        """Read the same blocks of several arrays at the same time; see `read_blocks`."""
        futures = []
        for name in names:
            self.require_plain_shards(name, blocks)
            futures.append(self._arrays[name][np.asarray(blocks, np.int64)].read())
        return [
            np.asarray(self.finish_read(name, blocks, future))
            for name, future in zip(names, futures, strict=True)
        ]

    def require_plain_shards(self, name: str, blocks: np.ndarray) -> None:
        """Check that the shards of these blocks are files, and no larger than they can be.

        TensorStore may read a shard whole. Each shard is looked at once.

        Args:
            name: the array.
            blocks: numbers of blocks, (n,).

        Raises:
            StoreError: a shard is a link, say, or too large.
        """
        spec, known = self.specs[name], self._plain_shards[name]
        new = set((np.asarray(blocks) // spec.shard[0]).tolist()) - known
        for shard in new:
            location.require_plain_files(
                self.root, spec.name_shard_file(shard), max_bytes=spec.shard_bytes
            )
        known |= new

    def start_read(self, name: str, blocks: np.ndarray, target: ts.TensorStore) -> Any:
        """Begin to read whole blocks of an array into memory.

        The caller has called `require_plain_shards`; that may take a while, and this does not.

        Args:
            name: the array.
            blocks: numbers of the blocks, (n,).
            target: where to put them, (n, ...).

        Returns:
            A future, for `finish_read`.
        """
        return target.write(self._arrays[name][np.asarray(blocks, np.int64)])

    def finish_read(self, name: str, blocks: np.ndarray, future: Any) -> Any:
        """Wait for blocks that are being read.

        Args:
            name: the array that they are read from.
            blocks: their numbers, for the error message.
            future: what began to read them.

        Returns:
            What the future gives.

        Raises:
            StoreError: part of the store is missing or damaged.
        """
        try:
            return future.result()
        except (ValueError, OSError) as error:
            first, last = int(blocks.min()), int(blocks.max())
            span = f"{first} to {last}" if len(blocks) > 1 else str(first)
            cells = f"{first * self.block_cells} to {(last + 1) * self.block_cells - 1}"
            raise location.translate_read_error(
                error,
                self.root,
                "part of the store is missing or damaged",
                where=f"{self.root}: segment {self.segment}, array {name}, "
                f"blocks {span} (cells {cells})",
                fix=CHECK_FIX,
            ) from None

    def _open(self, spec: ArraySpec) -> Any:
        """Open an array, if its zarr.json says what the manifest makes of it."""
        folder = self.root / spec.path
        what = "an array of the store cannot be opened"
        try:
            # TensorStore would read it without a limit, and its parser of JSON ends the process
            # where lists are nested too deep.
            content = location.read_file(
                self.root,
                f"{spec.path}/zarr.json",
                max_bytes=layout.MAX_METADATA_BYTES,
            )
            if content is None:
                raise ValueError("zarr.json is missing")
            request = {
                "driver": "zarr3",
                "kvstore": location.open_kvstore(self.root, spec.path),
                "metadata": json.loads(content),
                "assume_metadata": True,
                "fill_missing_data_reads": False,  # a missing chunk is an error, not zeros
            }
            is_read_again = spec.is_narrow and spec.feeds_training
            context = self._narrow_context if is_read_again else self._context
            array = ts.open(
                request, read=True, open=True, context=context, recheck_cached_data=False
            ).result()
        except (ValueError, OverflowError, RuntimeError, OSError) as error:
            raise location.translate_read_error(
                error, self.root, what, where=folder, fix=CHECK_FIX
            ) from None
        found = array.spec().to_json()["metadata"]
        expected = _normalise_metadata(layout.make_array_metadata(spec))
        if differing := [key for key, value in expected.items() if found.get(key) != value]:
            raise StoreError(
                "an array does not fit the manifest",
                where=folder,
                got={key: found.get(key) for key in differing},
                expected={key: expected[key] for key in differing},
                fix=CHECK_FIX,
            )
        return array


def _normalise_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return what TensorStore makes of a zarr.json; it leaves out what says nothing."""
    request = {"driver": "zarr3", "kvstore": {"driver": "memory"}, "metadata": metadata}
    normalised: dict[str, Any] = ts.Spec(request).to_json()["metadata"]
    return normalised
