"""Writes a store: empty arrays first, then shard by shard, the manifest last.

TensorStore writes the shards. What an array is, `layout` says to writer and reader alike: Zarr's
own package would say the same, and is a tenth of the start of a conversion or a rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from clue_dist.errors import StoreError
from clue_dist.files import sync_to_disk, write_file
from clue_dist.store import layout, location
from clue_dist.store.layout import ArraySpec
from clue_dist.store.manifest import Manifest
from clue_dist.store.manifest_parts import FileDigest, PackedModality
from clue_dist.store.obs_columns import name_kept_array
from clue_dist.store.rows import CodedRows

# Between two reads of this size, hashing needs the interpreter's lock, which training wants too.
_HASH_BUFFER_BYTES = 8 << 20


@dataclass(frozen=True)
class ShardCells:
    """The cells of one shard, in the order of the store."""

    # Of each modality the rows, coded as the manifest says; dense (n, features) where it is dense.
    modalities: dict[str, CodedRows | np.ndarray]
    batch: np.ndarray  # (n,) int32 codes into the manifest's batches, -1 = unknown
    label: np.ndarray  # (n,) int32 codes into the manifest's labels, -1 = unknown
    barcodes: np.ndarray  # (n,) bytes, UTF-8
    # Of each column that the store keeps, in the manifest's order, the values as stored, (n,).
    kept: list[np.ndarray] = field(default_factory=list)


def create_store(root: Path, manifest: Manifest) -> None:
    """Create the groups and empty arrays of a store; shards that are there stay.

    Args:
        root: the store's folder.
        manifest: what the store is to hold.
    """
    for name in manifest.strata:
        for spec in manifest.specify_arrays(name):
            _write_metadata(root / spec.path, layout.make_array_metadata(spec))
            for group in Path(spec.path).parents:
                _write_metadata(root / group, layout.GROUP_METADATA)


def _write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """Make the folder of an array or group, and say in it what it is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "zarr.json"
    if not path.exists():
        write_file(path, json.dumps(metadata, indent=2))


def write_shard(
    root: Path, manifest: Manifest, name: str, shard: int, cells: ShardCells
) -> dict[str, FileDigest]:
    """Write one shard of every array of a segment. Writing it again gives the same bytes.

    Args:
        root: the store's folder.
        manifest: what the store is to hold.
        name: the segment's name.
        shard: number of the shard.
        cells: the cells of the shard: shard_blocks * block_cells, fewer only in the last shard.

    Returns:
        Size and hash of each file, by path inside the store.

    Raises:
        StoreError: the cells are too many or too few, or the shard cannot be written.
    """
    segment, block_cells = manifest.strata[name], manifest.block_cells
    shard_cells = segment.shard_blocks * block_cells
    expected = min(shard_cells, segment.n_cells - shard * shard_cells)
    if len(cells.barcodes) != expected:
        raise StoreError(
            "a shard got the wrong number of cells",
            where=f"{name} shard {shard}",
            got=len(cells.barcodes),
            expected=expected,
        )
    n_blocks = layout.count_blocks(expected, block_cells)
    writes: dict[ArraySpec, ts.WriteFutures] = {}
    for spec in manifest.specify_arrays(name):
        modality, array = spec.path.split("/")[-2:]
        if modality == "obs":
            values = _arrange_obs(array, cells, n_blocks, block_cells, segment.barcode_width)
        else:
            rows, packed = cells.modalities[modality], segment.packed[modality]
            values = _arrange_modality(array, rows, n_blocks, block_cells, packed)
        writes[spec] = _start_write(root / spec.path, shard * segment.shard_blocks, values)
    for write in writes.values():
        write.exception()  # waits: after an error, nothing is written any more
    digests = {}
    for spec, write in writes.items():
        with _translate_shard_errors(root / spec.path):
            write.result()
        file = spec.name_shard_file(shard)
        digests[file] = hash_file(root / file)
    return digests


def _start_write(folder: Path, first: int, values: np.ndarray) -> ts.WriteFutures:
    """Begin to write the blocks of one whole shard of an array, from block `first` on.

    TensorStore syncs the file and renames it into place. It takes half the time of zarr-python, and
    the file is byte for byte the same.
    """
    request = {
        "driver": "zarr3",
        "kvstore": location.open_kvstore(folder),
        # Otherwise a chunk of zeros is left out, and looks like a chunk that was lost.
        "store_data_equal_to_fill_value": True,
    }
    with _translate_shard_errors(folder):
        array = ts.open(request, open=True, write=True).result()
        # The values do not change before the result is there: TensorStore need not copy them.
        return array[first : first + len(values)].write(
            values, can_reference_source_data_indefinitely=True
        )


@contextmanager
def _translate_shard_errors(folder: Path) -> Iterator[None]:
    """Turn what TensorStore raises into an error that says what a person can do."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise StoreError(
            "a shard cannot be written",
            where=folder,
            got=str(error).split("[")[0],
            fix="if the disk is full, free some space and run the same command again",
        ) from None


def commit_store(partial: Path, final: Path, manifest: Manifest) -> Manifest:
    """Write the manifest, and give the store its final name. From then on the store exists.

    Args:
        partial: the folder with all shards.
        final: the store's final folder.
        manifest: what the store holds, the digest of every shard included.

    Returns:
        The manifest as it was written.

    Raises:
        StoreError: there is something at `final` already.
    """
    signed = manifest.model_copy(update={"metadata": hash_metadata(partial)}).write(partial)
    if final.exists():
        raise StoreError(
            "something is already there", where=final, fix="choose another --out, or remove it"
        )
    partial.rename(final)
    sync_to_disk(final.parent)
    return signed


def hash_metadata(root: Path, below: str = "") -> dict[str, FileDigest]:
    """Take size and hash of every zarr.json of a store, or of those in one folder of it."""
    return {
        path.relative_to(root).as_posix(): hash_file(path)
        for path in sorted((root / below).rglob("zarr.json"))
    }


def hash_file(path: Path) -> FileDigest:
    """Take size and SHA-256 of a file."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASH_BUFFER_BYTES))
    with path.open("rb", buffering=0) as file:
        while n_read := file.readinto(buffer):
            digest.update(buffer[:n_read])
        return FileDigest(bytes=file.tell(), sha256=digest.hexdigest())


def _arrange_obs(
    array: str, cells: ShardCells, n_blocks: int, block_cells: int, barcode_width: int
) -> np.ndarray:
    """Arrange one array of obs in blocks, (n_blocks, B), or (n_blocks, B, width) of barcodes."""
    n_cells = n_blocks * block_cells
    if array != "barcode":
        columns = {"batch": cells.batch, "label": cells.label}
        columns |= {name_kept_array(number): column for number, column in enumerate(cells.kept)}
        values = columns[array]
        return _pad(values, n_cells, str(values.dtype)).reshape(n_blocks, block_cells)
    letters = cells.barcodes.astype(f"S{barcode_width}").view(np.uint8).reshape(-1, barcode_width)
    return _pad(letters, n_cells, "uint8").reshape(n_blocks, block_cells, barcode_width)


def _arrange_modality(
    array: str,
    rows: CodedRows | np.ndarray,
    n_blocks: int,
    block_cells: int,
    packed: PackedModality,
) -> np.ndarray:
    """Arrange one array of a modality in blocks, (n_blocks, ...)."""
    n_cells = n_blocks * block_cells
    if isinstance(rows, np.ndarray):
        values = _pad(rows, n_cells, str(packed.values))
        return values.reshape(n_blocks, block_cells, rows.shape[1])
    if array == "lengths":
        return _pad(rows.lengths, n_cells, "uint32").reshape(n_blocks, block_cells, 3)
    # Where the blocks start in codes and in rest, and where the last one ends: (n_blocks + 1, 2).
    first_rows = np.minimum(np.arange(n_blocks + 1) * block_cells, rows.n_rows)
    edges = rows.compute_starts()[first_rows]
    if array == "codes":
        return _pad_blocks(rows.codes, edges[:, 0], packed.capacity, "uint8")
    return _pad_blocks(rows.rest, edges[:, 1], packed.rest, str(packed.rest_type))


def _pad(values: np.ndarray, n_rows: int, dtype: str) -> np.ndarray:
    """Append rows of zeros up to `n_rows` rows."""
    out = np.zeros((n_rows, *values.shape[1:]), dtype)
    out[: len(values)] = values
    return out


def _pad_blocks(values: np.ndarray, edges: np.ndarray, width: int, dtype: str) -> np.ndarray:
    """Cut values at edges and append zeros to each part up to `width`, (n_blocks, width)."""
    out = np.zeros((len(edges) - 1, width), dtype)
    for block, (start, stop) in enumerate(pairwise(edges)):
        out[block, : stop - start] = values[start:stop]
    return out
