"""A batch of cells: per modality only the cells that have it, and which row of the batch each one is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clue_dist.data.buffers import BufferPool
from clue_dist.data.timing import time_phase
from clue_dist.store.reader import Store
from clue_dist.store.rows import LocatedRows


@dataclass(frozen=True)
class SparseCounts:
    """Raw counts as CSR. indptr: (n + 1,) int32; indices: (nnz,) int32; values: (nnz,) float32, not to be written to:
    where all counts are 1, batches share them."""

    indptr: Tensor
    indices: Tensor
    values: Tensor
    n_features: int

    def list_entry_rows(self) -> Tensor:
        """The row each non-zero belongs to, (nnz,) int64."""
        lengths = self.indptr.diff()
        rows = torch.arange(len(lengths), device=self.indptr.device)
        return rows.repeat_interleave(lengths, output_size=len(self.indices))

    def sum_rows(self, values: Tensor) -> Tensor:
        """Sum of one value per non-zero, by row: (nnz,) -> (n,)."""
        out = values.new_zeros(len(self.indptr) - 1)
        return out.index_add(0, self.list_entry_rows(), values)


Counts = (
    SparseCounts | Tensor
)  # Tensor: (n, features) float32, where the store keeps the modality dense


def compute_library_size(counts: Counts) -> Tensor:
    """Total counts of each cell, (n,), at least 1."""
    total = counts.sum(1) if isinstance(counts, Tensor) else counts.sum_rows(counts.values)
    return total.clamp_min(1.0)


@dataclass(frozen=True)
class ObservedModality:
    """What was measured in one modality. rows: (n,) int64, which cells of the batch; counts: their n profiles;
    paired: (p,) int64, which of the n belong to cells with other modalities too."""

    rows: Tensor
    counts: Counts
    paired: Tensor


@dataclass(frozen=True)
class Batch:
    """B cells. observed: (B, K) bool; batch_code: (B,) int64, -1 = unknown; modalities: by name, in model order."""

    observed: Tensor
    batch_code: Tensor
    modalities: dict[str, ObservedModality]

    @property
    def n_cells(self) -> int:
        return len(self.observed)

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `move` applied to every tensor."""

        def counts(c: Counts) -> Counts:
            if isinstance(c, Tensor):
                return move(c)
            return replace(c, indptr=move(c.indptr), indices=move(c.indices), values=move(c.values))

        modalities = {
            m: ObservedModality(move(o.rows), counts(o.counts), move(o.paired))
            for m, o in self.modalities.items()
        }
        return Batch(move(self.observed), move(self.batch_code), modalities)

    def to(self, device: torch.device | str) -> Batch:
        return self.map_tensors(lambda t: t.to(device, non_blocking=True))

    @time_phase("pin")
    def pin_memory(self) -> Batch:
        return self.map_tensors(Tensor.pin_memory)


@dataclass(frozen=True)
class BatchPart:
    """Cells of one stratum on their way into a batch. rows: per modality, still coded where sparse; batch_code: (n,)
    int32."""

    rows: dict[str, LocatedRows | np.ndarray]
    batch_code: np.ndarray


def assemble_batch(
    modalities: Sequence[str],
    parts: Sequence[BatchPart],
    buffers: BufferPool | None = None,
    dense: bool = False,
) -> Batch:
    """One batch out of parts of several strata, laid one behind the other. `modalities`: in model order; dense: counts
    of all of them as (n, features) float32."""
    buffers = buffers or BufferPool()
    sizes = [len(p.batch_code) for p in parts]
    starts = np.cumsum([0, *sizes])
    observed = np.zeros((starts[-1], len(modalities)), bool)
    out: dict[str, ObservedModality] = {}
    for k, name in enumerate(modalities):
        having = [i for i, p in enumerate(parts) if name in p.rows]
        for i in having:
            observed[starts[i] : starts[i + 1], k] = True
        if having:
            rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in having])
            paired = np.flatnonzero(
                np.concatenate([np.full(sizes[i], len(parts[i].rows) > 1) for i in having])
            )
            counts = _stack([parts[i].rows[name] for i in having], buffers, dense)
            out[name] = ObservedModality(torch.from_numpy(rows), counts, torch.from_numpy(paired))
    code = np.concatenate([p.batch_code for p in parts]).astype(np.int64)
    return Batch(torch.from_numpy(observed), torch.from_numpy(code), out)


def read_batch(
    store: Store, stratum: str, positions: np.ndarray, modalities: Sequence[str] | None = None
) -> Batch:
    """Any cells of one stratum as a batch, read straight from the store. `modalities`: in model order, the store's
    by default; it names all that the stratum carries."""
    reader = store.segments[stratum]
    rows = {m: reader.read_located_rows(m, positions) for m in reader.modalities}
    return assemble_batch(
        modalities or store.modalities, [BatchPart(rows, reader.read_codes("batch", positions))]
    )


@time_phase("gather")
def _stack(rows: list[LocatedRows | np.ndarray], buffers: BufferPool, dense: bool) -> Counts:
    stored_dense = [r for r in rows if isinstance(r, np.ndarray)]
    if stored_dense:
        return torch.from_numpy(np.concatenate(stored_dense).astype(np.float32, copy=False))
    sparse = [r for r in rows if isinstance(r, LocatedRows)]
    if dense:
        n, n_features = sum(len(r.row) for r in sparse), sparse[0].n_features
        out = buffers.lend_array(n * n_features, np.float32).reshape(n, n_features)
        first = 0
        for r in sparse:
            r.decode_dense(out[first : first + len(r.row)])
            first += len(r.row)
        return torch.from_numpy(out)
    indptr = np.concatenate(
        [[0], np.cumsum(np.concatenate([r.count_nonzeros() for r in sparse]), dtype=np.int64)]
    )
    indices = buffers.lend_array(int(indptr[-1]), np.int32)
    binary = not any(r.bits for r in sparse)
    values = None if binary else buffers.lend_array(len(indices), np.float32)
    first = 0
    for r in sparse:
        last = first + len(r.row)
        r.decode(indptr[first : last + 1], indices, values)
        first = last
    return SparseCounts(
        torch.from_numpy(indptr.astype(np.int32)),
        torch.from_numpy(indices),
        buffers.share_ones(len(indices)) if values is None else torch.from_numpy(values),
        sparse[0].n_features,
    )
