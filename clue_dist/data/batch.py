"""A batch of cells: for each modality, the cells that have it and their rows in the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from clue_dist.data.buffers import BufferPool
from clue_dist.data.timing import time_phase
from clue_dist.errors import format_count
from clue_dist.store.reader import Store
from clue_dist.store.rows import LocatedRows


@dataclass(frozen=True)
class SparseCounts:
    """Raw counts of n cells as CSR."""

    indptr: Tensor  # (n + 1,) int32, where each cell's non-zeros begin and end
    indices: Tensor  # (nnz,) int32, feature of each non-zero
    # (nnz,) float32. Not to be written to: where all counts are 1, batches share these values.
    values: Tensor
    n_features: int
    has_zeros: bool = False  # whether some values are 0, as those are that training hides

    def __repr__(self) -> str:
        n_cells = len(self.indptr) - 1
        return f"SparseCounts({n_cells:,} x {self.n_features:,}, {len(self.indices):,} non-zeros)"

    @cached_property
    def entry_rows(self) -> Tensor:
        """The row of each non-zero, (nnz,) int64."""
        lengths = self.indptr.diff()
        rows = torch.arange(len(lengths), device=self.indptr.device)
        return rows.repeat_interleave(lengths, output_size=len(self.indices))

    @cached_property
    def totals(self) -> Tensor:
        """Total counts of each cell, (n,)."""
        return self.sum_rows(self.values)

    def replace_values(self, values: Tensor, has_zeros: bool | None = None) -> SparseCounts:
        """The same layout with other values, (nnz,): the row of each stays known.

        Args:
            values: the values.
            has_zeros: whether some of them are 0; by default as before.
        """
        same = replace(
            self, values=values, has_zeros=self.has_zeros if has_zeros is None else has_zeros
        )
        if "entry_rows" in self.__dict__:
            same.__dict__["entry_rows"] = self.entry_rows
        return same

    def count_detected(self) -> Tensor:
        """How many features each cell has, (n,)."""
        if self.has_zeros:
            return self.sum_rows((self.values > 0).to(self.values.dtype))
        return self.indptr.diff()

    def map_tensors(self, transform: Callable[[Tensor], Tensor]) -> SparseCounts:
        """The same counts with every tensor replaced by its transform."""
        indptr, indices, values = map(transform, (self.indptr, self.indices, self.values))
        return replace(self, indptr=indptr, indices=indices, values=values)

    def sum_rows(self, values: Tensor) -> Tensor:
        """Sum one value per non-zero by row: (nnz,) -> (n,)."""
        # Nothing of it is checked a second time: whoever wrote `indptr` knows the lengths.
        return torch.segment_reduce(values, "sum", lengths=self.indptr.diff(), unsafe=True)


# A tensor is (n, features) float32: the store keeps the modality dense, or dense counts are wanted.
Counts = SparseCounts | Tensor


@dataclass(frozen=True)
class CodedCounts:
    """Raw counts of n cells as the store codes them (`store.rows`), on their way to a GPU.

    `device_batches` expands them there into `SparseCounts`, which all else works with.
    """

    starts: Tensor  # (n + 1, 2) int32, where each cell begins in codes and in rest
    codes: Tensor  # (nnz,) uint8
    rest: Tensor  # (r,), of an unsigned type
    bits: Tensor  # (n,) uint8, bits of a code that hold the count
    n_features: int
    where: str  # where they come from, for error messages

    def map_tensors(self, transform: Callable[[Tensor], Tensor]) -> CodedCounts:
        """The same counts with every tensor replaced by its transform."""
        starts, codes, rest, bits = map(transform, (self.starts, self.codes, self.rest, self.bits))
        return replace(self, starts=starts, codes=codes, rest=rest, bits=bits)


def compute_library_size(counts: Counts) -> Tensor:
    """Total counts of each cell, (n,), at least 1."""
    total = counts.sum(1) if isinstance(counts, Tensor) else counts.totals
    return total.clamp_min(1.0)


@dataclass(frozen=True)
class ObservedModality:
    """What was measured in one modality, of the n cells of a batch that have it."""

    rows: Tensor  # (n,) int64, the cells' rows in the batch
    profiles: Counts | CodedCounts  # of the n cells; coded on their way to a GPU alone
    paired: Tensor  # (p,) int64, which of the n cells have other modalities, too

    @property
    def counts(self) -> Counts:
        """The n profiles, which are not coded."""
        assert not isinstance(self.profiles, CodedCounts), "`device_batches` expands these first"
        return self.profiles

    def map_tensors(self, transform: Callable[[Tensor], Tensor]) -> ObservedModality:
        """The same profiles and rows with every tensor replaced by its transform."""
        rows, profiles = transform(self.rows), self.profiles
        if isinstance(profiles, Tensor):
            return ObservedModality(rows, transform(profiles), transform(self.paired))
        return ObservedModality(rows, profiles.map_tensors(transform), transform(self.paired))


# By two modalities a < b, numbers in model order: (p,) int64, rows of the cells that have both.
PairRows = dict[tuple[int, int], Tensor]


def find_pair_rows(observed: Tensor) -> PairRows:
    """Find the cells that have two modalities, for all that some cell has both of.

    On a GPU this waits for the device, so that it is done where a batch is built.

    Args:
        observed: (B, K) bool.
    """
    pairs = combinations(range(observed.shape[1]), 2)
    rows = {(a, b): (observed[:, a] & observed[:, b]).nonzero()[:, 0] for a, b in pairs}
    return {pair: cells for pair, cells in rows.items() if len(cells)}


@dataclass(frozen=True)
class Batch:
    """B cells, of K modalities."""

    observed: Tensor  # (B, K) bool
    batch_code: Tensor  # (B,) int64, the biological batch; -1: unknown
    modalities: dict[str, ObservedModality]  # in model order; without those that no cell has
    known_pairs: PairRows | None = None  # None: they follow from `observed`

    def __repr__(self) -> str:
        parts = [f"{name}: {len(part.rows):,}" for name, part in self.modalities.items()]
        return f"Batch({format_count(self.n_cells, 'cell')}; {', '.join(parts)})"

    @property
    def n_cells(self) -> int:
        """B."""
        return len(self.observed)

    @property
    def pair_rows(self) -> PairRows:
        """The cells that have two modalities, see `find_pair_rows`."""
        return find_pair_rows(self.observed) if self.known_pairs is None else self.known_pairs

    def map_tensors(self, transform: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor replaced by its transform."""
        modalities = {name: part.map_tensors(transform) for name, part in self.modalities.items()}
        pairs = {pair: transform(rows) for pair, rows in self.pair_rows.items()}
        return Batch(transform(self.observed), transform(self.batch_code), modalities, pairs)

    def list_tensors(self) -> list[Tensor]:
        """List every tensor, in the order in which `map_tensors` takes them."""
        tensors: list[Tensor] = []

        def note_tensor(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        self.map_tensors(note_tensor)
        return tensors

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; a copy out of pinned memory goes on while the caller does."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class BatchPart:
    """n cells of one stratum on their way into a batch."""

    rows: dict[str, LocatedRows | np.ndarray]  # by modality; still coded where stored sparse
    batch_code: np.ndarray  # (n,) int32


def assemble_batch(
    modalities: Sequence[str],
    parts: Sequence[BatchPart],
    buffers: BufferPool | None = None,
    dense: bool = False,
    coded: bool = False,
) -> Batch:
    """Build one batch out of parts of several strata, one part behind the other.

    Args:
        modalities: names, in model order.
        parts: the cells.
        buffers: memory to build in; fresh memory by default.
        dense: whether sparse counts are to become tensors (n, features), too.
        coded: whether sparse counts are to be `CodedCounts`, in a batch that is for
            `device_batches` alone.
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
            profiles = _stack_profiles(stored, buffers, dense, coded)
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
    parts: list[LocatedRows | np.ndarray], buffers: BufferPool, dense: bool, coded: bool
) -> Counts | CodedCounts:
    """Lay the rows of all parts one behind the other, decoded unless they are to stay coded."""
    stored_dense = [part for part in parts if isinstance(part, np.ndarray)]
    if stored_dense:
        return torch.from_numpy(np.concatenate(stored_dense).astype(np.float32, copy=False))
    sparse = [part for part in parts if isinstance(part, LocatedRows)]
    if dense:
        return _decode_dense_counts(sparse, buffers)
    if coded:
        return _stack_codes(sparse, buffers)
    lengths = np.concatenate([part.count_nonzeros() for part in sparse])
    indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    indices = buffers.lend_array(int(indptr[-1]), np.int32)
    binary = not any(part.bits for part in sparse)
    values = None if binary else buffers.lend_array(len(indices), np.float32)
    first = 0
    for part in sparse:
        last = first + len(part.row)
        part.decode(indptr[first : last + 1], indices, values)
        first = last
    return SparseCounts(
        torch.from_numpy(indptr.astype(np.int32)),
        torch.from_numpy(indices),
        buffers.share_ones(len(indices)) if values is None else torch.from_numpy(values),
        sparse[0].n_features,
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
