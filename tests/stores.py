"""Tiny stores for tests: random counts in the segments that are asked for, without a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from clue_dist.kinds import KINDS
from clue_dist.store import layout, writer
from clue_dist.store.manifest import Manifest
from clue_dist.store.manifest_parts import FileDigest, Modality, PackedModality, Segment
from clue_dist.store.reader import Store
from clue_dist.store.rows import COUNT_BITS, CodedRows, CsrRows, code_rows


@dataclass(frozen=True)
class _Names:
    """Names of what a store has of its cells."""

    batches: list[str]
    labels: list[str]


def make_store(
    path: Path,
    cells: Mapping[str, int] | None = None,
    features: Mapping[str, int] | None = None,
    kinds: Mapping[str, str] | None = None,
    seed: int = 0,
    block_cells: int = 16,
    batches: int = 2,
    labels: int = 3,
) -> Store:
    """Write a store at `path`; equal arguments give equal bytes.

    Counts depend on the cell's label, so that the modalities of a cell agree. Features are called
    `rna-0`, ..., barcodes `rna+adt-0`, ..., batches `batch-0`, ..., labels `type-0`, ...

    Args:
        path: The store's folder.
        cells: Number of cells of each segment.
        features: Number of features of each modality, in the manifest's order.
        kinds: Kind of each modality; by default the one of its name, or dense.
        seed: Another seed gives other counts.
        block_cells: Cells of a block.
        batches: Number of batches.
        labels: Number of labels.
    """
    cells = cells or {"rna+adt": 100, "rna": 50}
    features = features or {"rna": 30, "adt": 8}
    rng = np.random.default_rng(seed)
    kind_of = {m: (kinds or {}).get(m, m if m in KINDS else "dense") for m in features}
    modalities = {
        m: Modality(
            kind=kind_of[m],
            storage=KINDS[kind_of[m]].storage,
            features=[f"{m}-{i}" for i in range(n)],
        )
        for m, n in features.items()
    }
    rates = {m: rng.gamma(0.5, 2.0, (max(labels, 1), n)) for m, n in features.items()}
    drawn = {
        name: _draw_cells(rng, name, n, modalities, rates, batches, labels)
        for name, n in cells.items()
    }
    names = _Names([f"batch-{i}" for i in range(batches)], [f"type-{i}" for i in range(labels)])
    manifest = Manifest(
        block_cells=block_cells,
        modalities=modalities,
        batches=names.batches,
        labels=names.labels,
        strata={
            name: _describe_segment(name, segment_cells, block_cells, names)
            for name, segment_cells in drawn.items()
        },
        shards={},
    )
    _write_store(path, manifest, drawn)
    return Store(path)


def _write_store(path: Path, manifest: Manifest, cells: Mapping[str, writer.ShardCells]) -> None:
    """Write the cells of each segment, shard by shard."""
    partial = path.with_name(path.name + ".partial")
    writer.create_store(partial, manifest)
    shards: dict[str, FileDigest] = {}
    for name, segment in manifest.strata.items():
        shard_cells = segment.shard_blocks * manifest.block_cells
        for i in range(-(-segment.n_cells // shard_cells)):
            part = _slice_cells(cells[name], slice(i * shard_cells, (i + 1) * shard_cells))
            shards |= writer.write_shard(partial, manifest, name, i, part)
    writer.commit_store(partial, path, manifest.model_copy(update={"shards": shards}))


def _draw_cells(
    rng: np.random.Generator,
    name: str,
    n: int,
    modalities: dict[str, Modality],
    rates: dict[str, np.ndarray],
    batches: int,
    labels: int,
) -> writer.ShardCells:
    """Draw the cells of a segment."""
    label = rng.integers(0, labels, n).astype(np.int32) if labels else np.full(n, -1, np.int32)
    batch = rng.integers(0, batches, n).astype(np.int32) if batches else np.full(n, -1, np.int32)
    rows: dict[str, CodedRows | np.ndarray] = {}
    for m in layout.name_stratum(name).split("+"):
        counts = rng.poisson(rates[m][np.maximum(label, 0)])
        counts[:, 0] += 1  # no empty cells
        kind = KINDS[modalities[m].kind]
        if kind.real_values:
            rows[m] = rng.normal(counts).astype(np.float32)
        elif kind.storage == "dense":
            rows[m] = counts.astype(np.uint16)
        else:
            # Accessibility is binary here, so that tests see both ways to code rows.
            is_binary = kind.binnable
            rows[m] = _code_counts(np.minimum(counts, 1) if is_binary else counts, is_binary)
    barcodes = np.array([f"{name}-{i}".encode() for i in range(n)])
    return writer.ShardCells(rows, batch, label, barcodes)


def _code_counts(counts: np.ndarray, is_binary: bool) -> CodedRows:
    """Code counts, (n, features)."""
    sparse = sp.csr_matrix(counts)
    rows = CsrRows(
        sparse.indptr.astype(np.int64),
        sparse.indices.astype(np.int32),
        sparse.data.astype(np.float32),
        counts.shape[1],
    )
    return code_rows(rows, 0 if is_binary else COUNT_BITS)


def _describe_segment(
    name: str, cells: writer.ShardCells, block_cells: int, names: _Names
) -> Segment:
    """Return what the manifest says of a segment; many cells are cut into several shards."""
    n, chunk = len(cells.barcodes), layout.NARROW_CHUNK_BLOCKS
    return Segment(
        modalities=layout.name_stratum(name).split("+"),
        n_cells=n,
        shard_blocks=2 * chunk if n > 2 * chunk * block_cells else chunk,
        barcode_width=max(len(barcode) for barcode in cells.barcodes),
        packed={m: describe_packing(rows, block_cells) for m, rows in cells.modalities.items()},
        batch_counts={b: int((cells.batch == i).sum()) for i, b in enumerate(names.batches)},
        label_counts={t: int((cells.label == i).sum()) for i, t in enumerate(names.labels)},
    )


def describe_packing(rows: CodedRows | np.ndarray, block_cells: int) -> PackedModality:
    """Return how rows have to be packed."""
    if isinstance(rows, np.ndarray):
        return PackedModality(values=str(rows.dtype))  # type: ignore[arg-type]
    return PackedModality(
        capacity=_find_largest_block(rows.lengths[:, 0], block_cells),
        bits=rows.bits,  # type: ignore[arg-type]
        rest=_find_largest_block(rows.lengths[:, 1] + 2 * rows.lengths[:, 2], block_cells),
        rest_type=str(rows.rest.dtype),  # type: ignore[arg-type]
    )


def _find_largest_block(lengths: np.ndarray, block_cells: int) -> int:
    """Return the largest sum of lengths, (n_cells,), in a block; at least 1."""
    edges = np.arange(0, len(lengths), block_cells)
    return int(np.add.reduceat(lengths.astype(np.int64), edges).max(initial=1))


def slice_rows(rows: CodedRows | np.ndarray, part: slice) -> CodedRows | np.ndarray:
    """Return some of the rows, coded as they are."""
    return rows[part] if isinstance(rows, np.ndarray) else rows.slice_rows(part)


def _slice_cells(cells: writer.ShardCells, part: slice) -> writer.ShardCells:
    """Return some of the cells."""
    rows = {m: slice_rows(r, part) for m, r in cells.modalities.items()}
    return writer.ShardCells(rows, cells.batch[part], cells.label[part], cells.barcodes[part])
