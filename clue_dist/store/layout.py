"""What a store looks like on disk: names, array shapes, chunks, shards and codecs.

This module describes; it touches no file.

    STORE.zarr/
      manifest.json                written last: with it the store exists
      zarr.json
      strata/rna+adt/              a segment: cells that carry the same modalities
      strata/rna+adt.2/            a second segment of that stratum: cells that were appended
        obs/batch   (blocks, B)    int32 codes into the manifest's lists, -1 = unknown
        obs/label   (blocks, B)    the same
        obs/barcode (blocks, B, w) uint8: UTF-8, padded with zeros
        rna/lengths (blocks, B, 3) sparse modality: what each cell takes of the arrays below
        rna/codes   (blocks, C)    uint8: gap between columns and count of each non-zero
        rna/rest    (blocks, R)    gaps and counts that do not fit into a byte; see `rows`
        adt/values  (blocks, B, m) dense modality
      svd/                         optional; see `svd`

The first axis of every array counts blocks of B cells. The cells of a segment are shuffled, so
that a block is a random sample of them. C and R are those of the segment's largest block; the
others are padded with zeros, which the codecs make nearly free on disk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

FORMAT = "clue_dist.store"
VERSION = 2
MANIFEST = "manifest.json"
GROUP_METADATA = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
BLOCK_CELLS = 64
# A shard takes about SHARD_BYTES, before compression, in its largest modality. Where cells have few
# counts it would hold very many of them, whose barcodes take memory too: hence the second limit.
SHARD_BYTES = 64 * 2**20
SHARD_CELLS = 2**16
# Narrow arrays (lengths, obs) hold little of each cell: so many blocks share a chunk. Of wide ones
# each block is a chunk, and is read alone. A shard is a multiple of both.
NARROW_CHUNK_BLOCKS = 16
MAX_CHUNK_BYTES = 2**31 - 2**10  # before compression; Blosc takes no more
MAX_FEATURES = 2**23  # of a modality; sums of near gaps then stay within 32 bits
# Of a zarr.json, fifty times what one takes. TensorStore's parser of JSON overflows the stack on
# lists that are nested 200,000 deep.
MAX_METADATA_BYTES = 2**16
MAX_BARCODE_BYTES = 4096

Codec = Literal["balanced", "fast", "small"]

# The name of a modality becomes that of a folder, and the names of a stratum's modalities together
# become that of another.
MODALITY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MAX_STRATUM_NAME = 200
RESERVED_NAMES = {"obs"}


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array: its path inside the store, and how it is cut and compressed."""

    path: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]  # shape of a chunk
    shard: tuple[int, ...]  # shape of a shard
    dtype: str
    compressor: str  # the name that Blosc has for it

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk before compression."""
        return math.prod(self.chunk) * np.dtype(self.dtype).itemsize

    @property
    def is_narrow(self) -> bool:
        """Whether blocks share a chunk."""
        return self.chunk[0] > 1

    @property
    def feeds_training(self) -> bool:
        """Whether training reads it: counts and batch codes, not what else is known of a cell."""
        _, _, name = self.path.split("/", 2)
        return name == "obs/batch" or not name.startswith("obs/")

    @property
    def n_shards(self) -> int:
        """Number of shards, each of which is one file."""
        return -(-self.shape[0] // self.shard[0])

    @property
    def shard_bytes(self) -> int:
        """Most bytes that the file of a shard can have."""
        # Blosc and the checksum add 20 bytes to a chunk that does not compress, the index adds 16.
        return self.shard[0] // self.chunk[0] * (self.chunk_bytes + 64) + 64

    def name_shard_file(self, shard: int) -> str:
        """Return the path of a shard's file inside the store."""
        return f"{self.path}/c/{shard}" + "/0" * (len(self.shape) - 1)

    def list_shard_files(self) -> Iterator[str]:
        """Iterate over the paths of all shards inside the store."""
        return (self.name_shard_file(shard) for shard in range(self.n_shards))


def make_array_metadata(spec: ArraySpec) -> dict[str, Any]:
    """Return what the zarr.json of an array says, its fields in the order of zarr-python's files.

    Stores are to be the same bytes whatever writes them.
    """
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    item_bytes = np.dtype(spec.dtype).itemsize
    chunk_codecs = [
        little_endian if item_bytes > 1 else {"name": "bytes"},
        {"name": "blosc", "configuration": _make_blosc_options(spec.compressor, item_bytes)},
        # The checksum comes last: a flipped bit raises an error before anything is decompressed.
        {"name": "crc32c"},
    ]
    sharding = {
        "chunk_shape": list(spec.chunk),
        "codecs": chunk_codecs,
        "index_codecs": [little_endian, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "shape": list(spec.shape),
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.shard)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def name_segment(modalities: list[str], segment: int = 1) -> str:
    """Name a segment of a stratum: `rna+adt` the first, `rna+adt.2` the second.

    Args:
        modalities: what the cells carry, in the manifest's order.
        segment: number of the segment in its stratum, from 1 on.
    """
    return "+".join(modalities) + (f".{segment}" if segment > 1 else "")


def name_stratum(segment: str) -> str:
    """Name the stratum of a segment: `rna+adt` for `rna+adt.2`."""
    return segment.partition(".")[0]


def choose_unsigned(largest: int) -> str:
    """Name the narrowest unsigned type that holds `largest`."""
    return next(t for t in ("uint8", "uint16", "uint32", "uint64") if largest <= np.iinfo(t).max)


def count_blocks(n_cells: int, block_cells: int) -> int:
    """Count the blocks that `n_cells` cells fill, the last one perhaps in part."""
    return -(-n_cells // block_cells)


def choose_shard_blocks(cell_bytes: float, n_cells: int, block_cells: int) -> int:
    """Return how many blocks a shard holds: a multiple of NARROW_CHUNK_BLOCKS near SHARD_BYTES.

    Args:
        cell_bytes: bytes of a cell, before compression, in the largest modality of its segment.
        n_cells: cells of the segment.
        block_cells: cells of a block.
    """
    wanted = max(int(SHARD_BYTES / max(cell_bytes * block_cells, 1)), 1)
    return min(_round_up(wanted), limit_shard_blocks(n_cells, block_cells))


def limit_shard_blocks(n_cells: int, block_cells: int) -> int:
    """Return the most blocks that a shard may hold, whatever SHARD_BYTES was at conversion."""
    limit = min(max(SHARD_CELLS // block_cells, 1), count_blocks(n_cells, block_cells))
    return max(_round_up(limit), NARROW_CHUNK_BLOCKS)


def _round_up(n_blocks: int) -> int:
    """Round up to whole chunks of the narrow arrays."""
    return -(-n_blocks // NARROW_CHUNK_BLOCKS) * NARROW_CHUNK_BLOCKS


def choose_compressor(codec: Codec, lz4_is_idle: bool = False) -> str:
    """Name the Blosc compressor of an array.

    Args:
        codec: what the person who converts asked for.
        lz4_is_idle: whether lz4 finds nothing to compress. So it is with the gaps of binary rows,
            whose bytes are all in use and seldom repeat; zstd makes them a fifth smaller. Elsewhere
            lz4 decompresses several times as fast as zstd.
    """
    return "zstd" if codec == "small" or (codec == "balanced" and lz4_is_idle) else "lz4"


def _make_blosc_options(compressor: str, item_bytes: int) -> dict[str, Any]:
    """Return the options of Blosc for the chunks of an array; it shuffles bytes of wide types."""
    return {
        "typesize": item_bytes,
        "cname": compressor,
        "clevel": 5,
        "shuffle": "shuffle" if item_bytes > 1 else "noshuffle",
        "blocksize": 0,
    }
