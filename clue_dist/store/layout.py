"""What is on disk: names, array shapes, chunks, shards and codecs of a store. No file is touched here.

    STORE.zarr/
      zarr.json  manifest.json                    the manifest is written last: it is the commit
      strata/<rna+adt>/                           one folder per stratum: the cells that carry the same modalities
      strata/<rna+adt.2>/                         a second segment of them: cells that were appended later
        obs/batch, obs/label     (blocks, B)      int32 codes into the manifest's lists, -1 = unknown
        obs/barcode              (blocks, B, w)   uint8, padded with zeros
        rna/lengths              (blocks, B, 3)   sparse modality: what each cell has of both arrays below
        rna/codes                (blocks, C)      uint8, gap between columns and count of each non-zero (see `rows`)
        rna/rest                 (blocks, R)      gaps and counts that do not fit into a byte
        adt/values               (blocks, B, m)   dense modality
      svd/                                        may be there: see `svd`

Every array's first axis is the block: B cells in random order, so that a block is a random draw of its stratum.
Blocks of a sparse modality are padded to the stratum's largest, C and R; codecs make that nearly free on disk.
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
BLOCK_CELLS = 64
SHARD_BYTES = 64 * 2**20  # raw bytes of the largest modality of one shard ...
SHARD_CELLS = (
    2**16
)  # ... and the most cells, where each has few counts: their names take memory too
MAX_CHUNK_BYTES = 2**31 - 2**10  # raw bytes of a chunk: Blosc takes no more
MAX_FEATURES = 2**23  # of a modality: sums of near gaps stay within 32 bits
MAX_METADATA_BYTES = 2**20  # of a zarr.json, which takes a thousandth of it
MAX_BARCODE_BYTES = 4096  # of the longest
CHUNK_ROWS = 16  # blocks that share one chunk in the narrow arrays (lengths, obs); shards hold a multiple of it

Codec = Literal["balanced", "fast", "small"]

MODALITY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # modality names become folders ...
MAX_STRATUM_NAME = 200  # ... as all of a stratum's do together
RESERVED_NAMES = {"obs"}


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array: its path inside the store and how it is cut and coded."""

    path: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    shard: tuple[int, ...]
    dtype: str
    compressor: str  # as Blosc calls it

    @property
    def chunk_bytes(self) -> int:
        """Raw."""
        return math.prod(self.chunk) * np.dtype(self.dtype).itemsize

    @property
    def n_shards(self) -> int:
        return -(-self.shape[0] // self.shard[0])

    @property
    def shard_bytes(self) -> int:
        """Of a shard's file at most: Blosc and checksum add 20 bytes to a chunk it finds nothing in, the index 16."""
        return self.shard[0] // self.chunk[0] * (self.chunk_bytes + 64) + 64

    def name_shard_file(self, shard: int) -> str:
        """The name of a shard in the store."""
        return f"{self.path}/c/{shard}" + "/0" * (len(self.shape) - 1)

    def list_shard_files(self) -> Iterator[str]:
        """Names of all its shards."""
        return (self.name_shard_file(shard) for shard in range(self.n_shards))


def make_array_metadata(spec: ArraySpec) -> dict[str, Any]:
    """What an array's zarr.json says, as TensorStore reads it; attributes and names of axes aside."""
    size = np.dtype(spec.dtype).itemsize
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    options = make_blosc_options(spec)
    if size == 1:  # has no order of bytes, nor anything to shuffle
        del options["typesize"]
    compressed = [
        little if size > 1 else {"name": "bytes"},
        {"name": "blosc", "configuration": options},
    ]
    shards = {
        "chunk_shape": list(spec.chunk),
        "codecs": [*compressed, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(spec.shape),
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.shard)}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": shards}],
    }


def name_segment(modalities: list[str], segment: int = 1) -> str:
    """`["rna", "adt"]` -> `rna+adt`, or `rna+adt.2`; the order is the manifest's order of modalities."""
    return "+".join(modalities) + (f".{segment}" if segment > 1 else "")


def name_stratum(stratum: str) -> str:
    """What the segments of cells with the same modalities have in common: `rna+adt.2` -> `rna+adt`."""
    return stratum.partition(".")[0]


def choose_unsigned(largest: int) -> str:
    """The narrowest unsigned type that holds `largest`."""
    return next(t for t in ("uint8", "uint16", "uint32", "uint64") if largest <= np.iinfo(t).max)


def count_blocks(n_cells: int, block_cells: int) -> int:
    return -(-n_cells // block_cells)


def choose_shard_blocks(cell_bytes: float, n_cells: int, block_cells: int) -> int:
    """Blocks in a shard so that `cell_bytes` a cell come to about SHARD_BYTES, of SHARD_CELLS at most; a multiple of
    CHUNK_ROWS."""
    wanted = max(int(SHARD_BYTES / max(cell_bytes * block_cells, 1)), 1)
    most = limit_shard_blocks(n_cells, block_cells)
    return min(-(-wanted // CHUNK_ROWS) * CHUNK_ROWS, most)


def limit_shard_blocks(n_cells: int, block_cells: int) -> int:
    """Where each cell takes next to nothing: whatever SHARD_BYTES was when a store was written."""
    most = min(max(SHARD_CELLS // block_cells, 1), count_blocks(n_cells, block_cells))
    return max(1, -(-most // CHUNK_ROWS)) * CHUNK_ROWS


def specify_narrow_array(
    path: str, n_blocks: int, shard: int, tail: tuple[int, ...], dtype: str, compressor: str
) -> ArraySpec:
    """An array with little per cell: CHUNK_ROWS blocks to a chunk."""
    return ArraySpec(
        path, (n_blocks, *tail), (CHUNK_ROWS, *tail), (shard, *tail), dtype, compressor
    )


def specify_wide_array(
    path: str, n_blocks: int, shard: int, tail: tuple[int, ...], dtype: str, compressor: str
) -> ArraySpec:
    """An array with much per cell: one block to a chunk, so that a read touches nothing else."""
    return ArraySpec(path, (n_blocks, *tail), (1, *tail), (shard, *tail), dtype, compressor)


def choose_compressor(codec: Codec, lz4_is_idle: bool = False) -> str:
    """lz4 decompresses several times as fast as zstd, but finds nothing in the gaps of binary rows, whose bytes are all
    in use and seldom repeat; zstd needs a fifth less for them."""
    return "zstd" if codec == "small" or (codec == "balanced" and lz4_is_idle) else "lz4"


def make_blosc_options(spec: ArraySpec) -> dict[str, Any]:
    """Options of the Blosc codec of an array's chunks; bytes of wide types are shuffled."""
    size = np.dtype(spec.dtype).itemsize
    shuffle = "shuffle" if size > 1 else "noshuffle"
    return {
        "cname": spec.compressor,
        "clevel": 5,
        "shuffle": shuffle,
        "typesize": size,
        "blocksize": 0,
    }
