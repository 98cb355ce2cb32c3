"""Assemble batches out of rows of the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from clue_dist.data.batch import (
    Batch,
    CodedCounts,
    Counts,
    ObservedModality,
    SparseCounts,
    find_pair_rows,
)
from clue_dist.data.buffers import BufferPool
from clue_dist.data.timing import time_phase
from clue_dist.store.reader import Store
from clue_dist.store.rows import LocatedRows

# What counts that are stored sparse become in a batch: `SparseCounts`, tensors (n, features), or
# `CodedCounts`, in a batch that is for `device_batches` alone.
CountsForm = Literal["sparse", "dense", "coded"]


@dataclass(frozen=True)
class BatchPart:
    """n cells of one stratum on their way into a batch."""

    rows: dict[str, LocatedRows | np.ndarray]  # by modality; still coded where stored sparse
    batch_code: np.ndarray  # (n,) int32


def assemble_batch(
    modalities: Sequence[str],
    parts: Sequence[BatchPart],
    buffers: BufferPool | None = None,
    form: CountsForm = "sparse",
) -> Batch:
    """Build one batch out of parts of several strata, one part behind the other.

    Args:
        modalities: names, in model order.
        parts: the cells.
        buffers: memory to build in; fresh memory by default.
        form: what counts that are stored sparse become.
    """
    buffers = buffers or BufferPool()
    sizes = [len(part.batch_code) for part in parts]
    starts = np.cumsum([0, *sizes])
    observed = np.zeros((starts[-1], len(modalities)), bool)
    measured: dict[str, ObservedModality] = {}
    for k, name in enumerate(modalities):
        having = [i for i, part in enumerate(parts) if name in part.rows]
        for i in having:
            observed[starts[i] : starts[i + 1], k] = True
        if having:
            rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in having])
            paired = np.flatnonzero(
                np.concatenate([np.full(sizes[i], len(parts[i].rows) > 1) for i in having])
            )
            stored = [parts[i].rows[name] for i in having]
            profiles = _stack_profiles(stored, buffers, form)
            measured[name] = ObservedModality(
                torch.from_numpy(rows), profiles, torch.from_numpy(paired)
            )
    code = np.concatenate([part.batch_code for part in parts]).astype(np.int64)
    has_modality = torch.from_numpy(observed)
    pairs = find_pair_rows(has_modality)
    return Batch(has_modality, torch.from_numpy(code), measured, pairs)


def read_batch(
    store: Store, segment: str, positions: np.ndarray, modalities: Sequence[str] | None = None
) -> Batch:
    """Read any cells of one segment straight from the store.

    Args:
        store: an open store.
        segment: its name; the first segment of a stratum has the stratum's name.
        positions: (n,), cells of it, in any order.
        modalities: names in model order, all of the segment's among them; the store's by default.
    """
    return assemble_batch(
        modalities or store.modalities, [read_batch_part(store, segment, positions)]
    )


def read_batch_part(store: Store, segment: str, positions: np.ndarray) -> BatchPart:
    """Read cells of one segment, as `read_batch` does, to be put into a batch with others."""
    reader = store.segments[segment]
    rows = {name: reader.read_located_rows(name, positions) for name in reader.modalities}
    return BatchPart(rows, reader.read_codes("batch", positions))


@time_phase("gather")
def _stack_profiles(
    parts: list[LocatedRows | np.ndarray], buffers: BufferPool, form: CountsForm
) -> Counts | CodedCounts:
    """Lay the rows of all parts one behind the other."""
    stored_dense = [part for part in parts if isinstance(part, np.ndarray)]
    if stored_dense:
        return torch.from_numpy(np.concatenate(stored_dense).astype(np.float32, copy=False))
    sparse = [part for part in parts if isinstance(part, LocatedRows)]
    if form == "dense":
        return _decode_dense_counts(sparse, buffers)
    if form == "coded":
        return _stack_codes(sparse, buffers)
    return _decode_sparse_counts(sparse, buffers)


def _decode_sparse_counts(parts: list[LocatedRows], buffers: BufferPool) -> SparseCounts:
    """The rows of all parts one behind the other, decoded."""
    lengths = np.concatenate([part.count_nonzeros() for part in parts])
    indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    indices = buffers.lend_array(int(indptr[-1]), np.int32)
    binary = not any(part.bits for part in parts)
    values = None if binary else buffers.lend_array(len(indices), np.float32)
    first = 0
    for part in parts:
        last = first + len(part.row)
        part.decode(indptr[first : last + 1], indices, values)
        first = last
    return SparseCounts(
        torch.from_numpy(indptr.astype(np.int32)),
        torch.from_numpy(indices),
        buffers.share_ones(len(indices)) if values is None else torch.from_numpy(values),
        parts[0].n_features,
    )


def _stack_codes(parts: list[LocatedRows], buffers: BufferPool) -> CodedCounts:
    """The rows of all parts one behind the other, still coded."""
    sizes = [part.measure_codes() for part in parts]
    starts = np.concatenate([[[0, 0]], np.cumsum(np.concatenate(sizes), 0)])
    codes = buffers.lend_array(int(starts[-1, 0]), np.uint8)
    rest_type = np.result_type(*(part.blocks.rest for part in parts))
    rest = buffers.lend_array(int(starts[-1, 1]), rest_type)
    first = 0
    for part in parts:
        last = first + len(part.row)
        part.copy_codes(starts[first : last + 1], codes, rest)
        first = last
    bits = np.repeat([np.uint8(part.bits) for part in parts], [len(size) for size in sizes])
    return CodedCounts(
        torch.from_numpy(starts.astype(np.int32)),
        torch.from_numpy(codes),
        torch.from_numpy(rest),
        torch.from_numpy(bits),
        parts[0].n_features,
        "; ".join(dict.fromkeys(part.where for part in parts)),
    )


def _decode_dense_counts(parts: list[LocatedRows], buffers: BufferPool) -> Tensor:
    """The rows of all parts as one tensor (n, features)."""
    n_cells, n_features = sum(len(part.row) for part in parts), parts[0].n_features
    counts = buffers.lend_array(n_cells * n_features, np.float32).reshape(n_cells, n_features)
    first = 0
    for part in parts:
        last = first + len(part.row)
        part.decode_dense(counts[first:last])
        first = last
    return torch.from_numpy(counts)
