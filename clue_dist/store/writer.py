"""Writes a store: arrays first (zarr-python), then shard by shard (TensorStore), the manifest last."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import tensorstore as ts
import zarr

from clue_dist.errors import StoreError
from clue_dist.files import sync_to_disk
from clue_dist.store import layout
from clue_dist.store.layout import ArraySpec
from clue_dist.store.manifest import FileDigest, Manifest, PackedModality
from clue_dist.store.rows import CodedRows


@dataclass(frozen=True)
class SegmentCells:
    """Consecutive cells of one stratum, in store order.

    modalities: rows per modality, `Coded` as the manifest says, or a dense (n, features) array; batch, label: (n,)
    int32 codes into the manifest's lists, -1 = unknown; barcodes: (n,) bytes, UTF-8.
    """

    modalities: dict[str, CodedRows | np.ndarray]
    batch: np.ndarray
    label: np.ndarray
    barcodes: np.ndarray


def create_store(root: Path, manifest: Manifest) -> None:
    """Create the groups and empty arrays of every stratum under `root`; existing shards stay."""
    root.mkdir(parents=True, exist_ok=True)
    zarr.open_group(root, mode="a", zarr_format=3)
    for name in manifest.strata:
        for spec in manifest.specify_arrays(name):
            if not (root / spec.path / "zarr.json").exists():
                _create_array(root, spec)


def write_shard(
    root: Path, manifest: Manifest, stratum: str, shard: int, cells: SegmentCells
) -> dict[str, FileDigest]:
    """Write shard number `shard` of every array of a stratum; returns the size and hash of each file.

    `cells` holds the shard's cells in order: shard_blocks * block_cells of them, fewer only in the last shard.
    Writing again gives the same bytes.
    """
    s, size = manifest.strata[stratum], manifest.block_cells
    per_shard = s.shard_blocks * size
    expected = min(per_shard, s.n_cells - shard * per_shard)
    if len(cells.barcodes) != expected:
        raise StoreError(
            "a shard got the wrong number of cells",
            where=f"{stratum} shard {shard}",
            got=len(cells.barcodes),
            expected=expected,
        )
    first = shard * s.shard_blocks
    n_blocks = layout.count_blocks(expected, size)

    written = {}
    for spec in manifest.specify_arrays(stratum):
        of, name = spec.path.split("/")[-2:]
        if of == "obs":
            data = _obs_array(name, cells, n_blocks, size, s.barcode_width)
        else:
            data = _modality_array(name, cells.modalities[of], n_blocks, size, s.packed[of])
        _write(root / spec.path, first, data)
        key = f"{spec.path}/c/{shard}" + "/0" * (len(spec.shape) - 1)
        written[key] = hash_file(root / key)
    return written


def _write(folder: Path, first: int, data: np.ndarray) -> None:
    """Write one whole shard from block `first` on, synced and renamed into place by TensorStore (twice zarr-python's
    speed, byte for byte the same file).
    """
    # Otherwise an all-zero chunk is left out, and a missing chunk could not be told from zeros.
    request = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "store_data_equal_to_fill_value": True,
    }
    try:
        array = ts.open(request, open=True, write=True).result()
        # It need not copy what stays as it is until the result is there.
        array[first : first + len(data)].write(
            data, can_reference_source_data_indefinitely=True
        ).result()
    except (ValueError, OSError) as error:
        got = str(error).split("[")[0]
        raise StoreError(
            "a shard cannot be written",
            where=folder,
            got=got,
            fix="if the disk is full, free some and go on",
        ) from None


def commit_store(partial: Path, final: Path, manifest: Manifest) -> Manifest:
    """Write the manifest into `partial`, with hashes of its metadata, then give the folder its final name.

    From here on the store exists.
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
    """Size and hash of every zarr.json of a store, or of those in a folder of it."""
    return {
        p.relative_to(root).as_posix(): hash_file(p)
        for p in sorted((root / below).rglob("zarr.json"))
    }


def hash_file(path: Path) -> FileDigest:
    """Size and SHA-256 of a file, read in pieces: large ones, as between two the interpreter's lock is taken, from
    training, too."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as f:
        while n := f.readinto(piece):
            digest.update(piece[:n])
        return FileDigest(bytes=f.tell(), sha256=digest.hexdigest())


PIECE = 8 << 20  # bytes


def _create_array(root: Path, spec: ArraySpec) -> None:
    zarr.create_array(
        store=str(root),
        name=spec.path,
        shape=spec.shape,
        chunks=spec.chunk,
        shards=spec.shard,
        dtype=spec.dtype,
        # crc32c comes last, so that a flipped bit raises before anything is decoded.
        compressors=[
            zarr.codecs.BloscCodec(**layout.make_blosc_options(spec)),
            zarr.codecs.Crc32cCodec(),
        ],
        fill_value=0,
    )


def _padded(values: np.ndarray, rows: int, dtype: str | np.dtype) -> np.ndarray:
    out = np.zeros((rows, *values.shape[1:]), dtype)
    out[: len(values)] = values
    return out


def _obs_array(name: str, cells: SegmentCells, n_blocks: int, size: int, width: int) -> np.ndarray:
    if name != "barcode":
        codes = cells.batch if name == "batch" else cells.label
        return _padded(codes, n_blocks * size, "int32").reshape(n_blocks, size)
    letters = cells.barcodes.astype(f"S{width}").view(np.uint8).reshape(-1, width)
    return _padded(letters, n_blocks * size, "uint8").reshape(n_blocks, size, width)


def _modality_array(
    name: str, rows: CodedRows | np.ndarray, n_blocks: int, size: int, packed: PackedModality
) -> np.ndarray:
    if isinstance(rows, np.ndarray):
        return _padded(rows, n_blocks * size, str(packed.values)).reshape(
            n_blocks, size, rows.shape[1]
        )
    if name == "lengths":
        return _padded(rows.lengths, n_blocks * size, "uint32").reshape(n_blocks, size, 3)
    edges = rows.compute_starts()[
        np.minimum(np.arange(n_blocks + 1) * size, rows.n_rows)
    ]  # (n_blocks + 1, 2)
    if name == "codes":
        return _blocked(rows.codes, edges[:, 0], packed.capacity, "uint8")
    return _blocked(rows.rest, edges[:, 1], packed.rest, str(packed.rest_type))


def _blocked(values: np.ndarray, edges: np.ndarray, width: int, dtype: str) -> np.ndarray:
    """Values between neighbouring edges, each run padded with zeros to `width`. (n_blocks, width)"""
    out = np.zeros((len(edges) - 1, width), dtype)
    for block, (lo, hi) in enumerate(pairwise(edges)):
        out[block, : hi - lo] = values[lo:hi]
    return out
