"""Tiny stores for tests, written by clue_dist.store.writer itself: random counts for the strata that are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from clue_dist.kinds import KINDS
from clue_dist.store import layout, writer
from clue_dist.store.manifest import (
    FileDigest,
    Manifest,
    Modality,
    PackedModality,
    Segment,
    find_largest_block,
)
from clue_dist.store.reader import Store
from clue_dist.store.rows import COUNT_BITS, CodedRows, CsrRows, code_rows


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
    """A committed store at `path`; equal arguments give equal bytes.

    cells: stratum -> number of cells; features: modality -> number, in the manifest's order; kinds: by name where
    it is rna, adt or atac, else dense. Counts depend on the cell's label, so that modalities of a cell agree.
    Features are `rna-0`, ...; barcodes `rna+adt-0`, ...; batches `batch-0`, ...; labels `type-0`, ...
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
    drawn = {s: _draw(rng, s, n, modalities, rates, batches, labels) for s, n in cells.items()}
    batch_names, label_names = (
        [f"batch-{i}" for i in range(batches)],
        [f"type-{i}" for i in range(labels)],
    )
    manifest = Manifest(
        block_cells=block_cells,
        modalities=modalities,
        batches=batch_names,
        labels=label_names,
        strata={
            s: _stratum(s, c, modalities, block_cells, batch_names, label_names)
            for s, c in drawn.items()
        },
        shards={},
    )
    partial = path.with_name(path.name + ".partial")
    writer.create_store(partial, manifest)
    shards: dict[str, FileDigest] = {}
    for name, stratum in manifest.strata.items():
        per_shard = stratum.shard_blocks * block_cells
        for i in range(-(-stratum.n_cells // per_shard)):
            part = _part(drawn[name], slice(i * per_shard, (i + 1) * per_shard))
            shards |= writer.write_shard(partial, manifest, name, i, part)
    writer.commit_store(partial, path, manifest.model_copy(update={"shards": shards}))
    return Store(path)


def _draw(
    rng: np.random.Generator,
    stratum: str,
    n: int,
    modalities: dict[str, Modality],
    rates: dict[str, np.ndarray],
    batches: int,
    labels: int,
) -> writer.SegmentCells:
    label = rng.integers(0, labels, n).astype(np.int32) if labels else np.full(n, -1, np.int32)
    batch = rng.integers(0, batches, n).astype(np.int32) if batches else np.full(n, -1, np.int32)
    rows: dict[str, CodedRows | np.ndarray] = {}
    for m in layout.name_stratum(stratum).split("+"):
        counts = rng.poisson(rates[m][np.maximum(label, 0)])
        counts[:, 0] += 1  # no empty cells
        if modalities[m].storage == "dense":
            is_count = not KINDS[modalities[m].kind].real_values
            rows[m] = (
                counts.astype(np.uint16) if is_count else rng.normal(counts).astype(np.float32)
            )
            continue
        if modalities[m].kind == "atac":
            counts = np.minimum(counts, 1)
        sparse = sp.csr_matrix(counts)
        values = sparse.data.astype(np.float32)
        csr = CsrRows(
            sparse.indptr.astype(np.int64), sparse.indices.astype(np.int32), values, counts.shape[1]
        )
        rows[m] = code_rows(csr, 0 if modalities[m].kind == "atac" else COUNT_BITS)
    return writer.SegmentCells(
        rows, batch, label, np.array([f"{stratum}-{i}".encode() for i in range(n)])
    )


def _stratum(
    name: str,
    cells: writer.SegmentCells,
    modalities: dict[str, Modality],
    block_cells: int,
    batches: list[str],
    labels: list[str],
) -> Segment:
    n = len(cells.barcodes)
    return Segment(
        modalities=layout.name_stratum(name).split("+"),
        n_cells=n,
        shard_blocks=2 * layout.CHUNK_ROWS
        if n > 2 * layout.CHUNK_ROWS * block_cells
        else layout.CHUNK_ROWS,
        barcode_width=max(len(b) for b in cells.barcodes),
        packed={m: packed_of(rows, block_cells) for m, rows in cells.modalities.items()},
        batch_counts={b: int((cells.batch == i).sum()) for i, b in enumerate(batches)},
        label_counts={t: int((cells.label == i).sum()) for i, t in enumerate(labels)},
    )


def packed_of(rows: CodedRows | np.ndarray, block_cells: int) -> PackedModality:
    """How rows have to be packed."""
    if isinstance(rows, np.ndarray):
        return PackedModality(values=str(rows.dtype))  # type: ignore[arg-type]
    return PackedModality(
        capacity=find_largest_block(rows.lengths[:, 0], block_cells),
        bits=rows.bits,  # type: ignore[arg-type]
        rest=find_largest_block(rows.lengths[:, 1] + 2 * rows.lengths[:, 2], block_cells),
        rest_type=str(rows.rest.dtype),  # type: ignore[arg-type]
    )


def part_of(rows: CodedRows | np.ndarray, part: slice) -> CodedRows | np.ndarray:
    """Some of the rows, as they are."""
    if isinstance(rows, np.ndarray):
        return rows[part]
    starts, (lo, hi, _) = rows.compute_starts(), part.indices(rows.n_rows)
    (first, first_rest), (last, last_rest) = starts[lo], starts[hi]
    return CodedRows(
        rows.codes[first:last], rows.rest[first_rest:last_rest], rows.lengths[part], rows.bits
    )


def _part(cells: writer.SegmentCells, part: slice) -> writer.SegmentCells:
    rows = {m: part_of(r, part) for m, r in cells.modalities.items()}
    return writer.SegmentCells(rows, cells.batch[part], cells.label[part], cells.barcodes[part])
