"""Matrices on their way into one file, dense or sparse, as arrays that the ranks write together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from clue_dist.inference.array_folder import ArrayFolder

# The arrays of a matrix, and their types: of a dense one its values, of a sparse one its non-zeros,
# their columns, and how many each row has.
DENSE = {"values": np.float32}
SPARSE = {"data": np.float32, "indices": np.int32, "lengths": np.int64}


@dataclass(frozen=True)
class MatrixFolder:
    """A folder with rows of several matrices of the same shape."""

    folder: Path  # that all ranks see
    names: Sequence[str]  # of the matrices
    n_features: int
    is_sparse: bool

    @property
    def arrays(self) -> ArrayFolder:
        """The arrays of all matrices, as "X-values"."""
        types = SPARSE if self.is_sparse else DENSE
        return ArrayFolder(
            self.folder,
            {f"{name}-{array}": kind for name in self.names for array, kind in types.items()},
        )

    def write_share(self, pieces: Iterator[Mapping[str, np.ndarray]], rank: int) -> None:
        """Write this rank's rows; see `ArrayFolder.write_share`.

        Args:
            pieces: rows (n, n_features) by name of the matrix, piece by piece, in order.
            rank: number of this rank.
        """
        self.arrays.write_share(map(self._list_arrays, pieces), rank)

    def _list_arrays(self, piece: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same rows as arrays."""
        if not self.is_sparse:
            return {f"{name}-values": rows for name, rows in piece.items()}
        arrays = {}
        for name, rows in piece.items():
            sparse = sp.csr_matrix(rows)
            arrays[f"{name}-data"], arrays[f"{name}-indices"] = sparse.data, sparse.indices
            arrays[f"{name}-lengths"] = np.diff(sparse.indptr)
        return arrays

    def map_matrix(self, name: str, n_rows: int) -> np.ndarray | sp.csr_matrix:
        """Map the joined rows of a matrix into memory.

        Raises:
            StoreError: rows of some rank are missing.
        """
        arrays = self.arrays
        if not self.is_sparse:
            arrays.require_size(f"{name}-values", n_rows * self.n_features)
            return arrays.map_array(f"{name}-values").reshape(n_rows, self.n_features)
        arrays.require_size(f"{name}-lengths", n_rows)
        indptr = np.concatenate([[0], np.cumsum(arrays.map_array(f"{name}-lengths"))])
        arrays.require_size(f"{name}-data", int(indptr[-1]))
        matrix = sp.csr_matrix((n_rows, self.n_features), dtype=np.float32)
        # The constructor would look at every element.
        matrix.data, matrix.indices = (arrays.map_array(f"{name}-{a}") for a in ("data", "indices"))
        matrix.indptr = indptr
        return matrix
