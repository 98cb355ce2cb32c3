"""Rows of a sparse matrix, and the kernels that pack them into blocks and gather them out again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numba import njit


@dataclass(frozen=True)
class Csr:
    """Sparse rows. indptr: (n + 1,) int64; indices: (nnz,) int32, sorted in a row; values: (nnz,) float32.

    The writer takes any integer types.
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    n_features: int

    @property
    def n_rows(self) -> int:
        return len(self.indptr) - 1

    def scipy(self) -> sp.csr_matrix:
        return sp.csr_matrix((self.values, self.indices, self.indptr), shape=(self.n_rows, self.n_features))


@njit(nogil=True, cache=True)
def pack(indptr, indices, values, block_cells, deltas, counts):  # type: ignore[no-untyped-def]
    """Rows -> blocks: gaps between column indices (a row's first counts from column 0), and counts minus one.

    Fills deltas (blocks, C) and counts (blocks, C), zeros so far; counts has no columns for binary data.
    """
    binary = counts.shape[1] == 0
    for row in range(len(indptr) - 1):
        block = row // block_cells
        target = indptr[row] - indptr[block * block_cells]
        before = np.int64(0)
        for i in range(indptr[row], indptr[row + 1]):
            column = np.int64(indices[i])
            deltas[block, target] = column - before
            before = column
            if not binary:
                counts[block, target] = np.int64(values[i]) - 1
            target += 1


@njit(nogil=True, cache=True)
def row_starts(lengths: np.ndarray) -> np.ndarray:
    """lengths (blocks, B) -> where each row starts inside its block, (blocks, B + 1) int64."""
    blocks, size = lengths.shape
    out = np.zeros((blocks, size + 1), np.int64)
    for b in range(blocks):
        for i in range(size):
            out[b, i + 1] = out[b, i] + lengths[b, i]
    return out


@njit(nogil=True, cache=True)
def gather(deltas, counts, starts, block, row, indptr, indices, values):  # type: ignore[no-untyped-def]
    """Undelta the asked rows out of decoded blocks.

    deltas, counts: (slots, C), counts has no columns for binary data; starts: (slots, B + 1);
    block, row: (n,) slot and row in it; indptr: (n + 1,); fills indices (nnz,) int32, values (nnz,) float32.
    """
    binary = counts.shape[1] == 0
    for i in range(len(block)):
        slot = block[i]
        source = starts[slot, row[i]]
        column = 0
        for target in range(indptr[i], indptr[i + 1]):
            column += deltas[slot, source]
            indices[target] = column
            values[target] = 1.0 if binary else np.float32(counts[slot, source]) + np.float32(1.0)
            source += 1
