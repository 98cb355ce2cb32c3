"""A batch of cells: for each modality, the cells that have it and their rows in the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from clue_dist.errors import format_count

CSRArrays = tuple[np.ndarray, ...]  # indptr, indices, values


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

    def copy_entries(self, copy: Callable[[CSRArrays, CSRArrays], int]) -> SparseCounts:
        """Copy some of the entries, on a CPU.

        Args:
            copy: is given indptr, indices and values, and arrays as long as these to write to. It
                returns how many entries it copied.
        """
        parts = self.indptr, self.indices, self.values
        indptr, indices, values = made = tuple(torch.empty_like(part) for part in parts)
        given, written = (tuple(map(torch.Tensor.numpy, arrays)) for arrays in (parts, made))
        n_copied = copy(given, written)
        return replace(self, indptr=indptr, indices=indices[:n_copied], values=values[:n_copied])

    def sum_rows(self, values: Tensor) -> Tensor:
        """Sum one value per non-zero by row: (nnz,) -> (n,)."""
        # Nothing of it is checked a second time: whoever wrote `indptr` knows the lengths.
        return torch.segment_reduce(values, "sum", lengths=self.indptr.diff(), unsafe=True)

    def sum_rows_of_each(self, values: Tensor) -> Tensor:
        """Sum several values per non-zero by row: (..., nnz) -> (S, n), one after the other."""
        # Sums over the last axis of a matrix are far slower than those of vectors.
        n_sources = values.shape[:-1].numel()  # which -1 could not stand for where no entry is
        return torch.stack([self.sum_rows(one) for one in values.reshape(n_sources, -1)])


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
