"""What is on disk: names, array shapes, chunks, shards and codecs of a store. No file is touched here.

    STORE.zarr/
      zarr.json  manifest.json                    the manifest is written last: it is the commit
      strata/<rna+adt>/                           one group per stratum: the cells that carry the same modalities
        obs/batch, obs/label     (blocks, B)      int32 codes into the manifest's lists, -1 = unknown
        obs/barcode              (blocks, B, w)   uint8, padded with zeros
        rna/lengths              (blocks, B)      non-zeros of each cell
        rna/deltas, rna/counts   (blocks, C)      sparse modality: gaps between column indices; counts minus one
        adt/values               (blocks, B, m)   dense modality

Every array's first axis is the block: B cells in random order, so that a block is a random draw of its stratum.
A block of a sparse modality is padded to the stratum's capacity C; codecs make the padding nearly free on disk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

FORMAT = "clue_dist.store"
VERSION = 1
MANIFEST = "manifest.json"
BLOCK_CELLS = 64
SHARD_BYTES = 64 * 2**20  # raw bytes of the largest modality of one shard
CHUNK_ROWS = 16  # blocks that share one chunk in the narrow arrays (lengths, obs); shards hold a multiple of it

Kind = Literal["rna", "adt", "atac", "dense"]
Storage = Literal["sparse", "dense"]
STORAGE: dict[str, Storage] = {"rna": "sparse", "atac": "sparse", "adt": "dense", "dense": "dense"}

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # modality names become folders
RESERVED = {"obs"}


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array: its path inside the store and how it is cut and coded."""

    path: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    shard: tuple[int, ...]
    dtype: str


def stratum_name(modalities: list[str]) -> str:
    """`["rna", "adt"]` -> `rna+adt`; the order is the manifest's order of modalities."""
    return "+".join(modalities)


def unsigned(largest: int) -> str:
    """The narrowest unsigned type that holds `largest`."""
    return next(t for t in ("uint8", "uint16", "uint32", "uint64") if largest <= np.iinfo(t).max)


def index_type(largest_gap: int) -> str:
    """Gaps are uint16, or uint32 where one needs it."""
    return "uint16" if largest_gap <= np.iinfo(np.uint16).max else "uint32"


def blocks_of(n_cells: int, block_cells: int) -> int:
    return -(-n_cells // block_cells)


def shard_blocks(cell_bytes: float, n_cells: int, block_cells: int) -> int:
    """Blocks in a shard so that `cell_bytes` a cell come to about SHARD_BYTES; a multiple of CHUNK_ROWS."""
    wanted = int(SHARD_BYTES / max(cell_bytes * block_cells, 1))
    needed = blocks_of(n_cells, block_cells)
    return max(1, -(-min(max(wanted, 1), needed) // CHUNK_ROWS)) * CHUNK_ROWS


def narrow(path: str, n_blocks: int, shard: int, tail: tuple[int, ...], dtype: str) -> ArraySpec:
    """An array with little per cell: CHUNK_ROWS blocks to a chunk."""
    return ArraySpec(path, (n_blocks, *tail), (CHUNK_ROWS, *tail), (shard, *tail), dtype)


def wide(path: str, n_blocks: int, shard: int, tail: tuple[int, ...], dtype: str) -> ArraySpec:
    """An array with much per cell: one block to a chunk, so that a read touches nothing else."""
    return ArraySpec(path, (n_blocks, *tail), (1, *tail), (shard, *tail), dtype)


def blosc(dtype: str, preset: str) -> dict[str, Any]:
    """Options of the Blosc codec of an array's chunks: `fast` lz4 or `small` zstd; bytes of wide types are shuffled."""
    size = np.dtype(dtype).itemsize
    cname = {"fast": "lz4", "small": "zstd"}[preset]
    shuffle = "shuffle" if size > 1 else "noshuffle"
    return {"cname": cname, "clevel": 5, "shuffle": shuffle, "typesize": size, "blocksize": 0}
