"""Matrices on their way into one file: each rank writes its rows, and rank 0 puts them together.

No matrix is ever in memory as a whole. The memory that reading one back takes is the system's file
cache, which gives way.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import scipy.sparse as sp

from clue_dist.errors import StoreError
from clue_dist.inference.output_files import translate_output_errors
from clue_dist.inference.stream import write_rows

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
    def arrays(self) -> Mapping[str, Any]:
        """Types of the arrays of a matrix, by name."""
        return SPARSE if self.is_sparse else DENSE

    def write_share(self, pieces: Iterator[Mapping[str, np.ndarray]], rank: int) -> None:
        """Write this rank's rows into its own files, which are on the disk when this returns.

        Args:
            pieces: rows (n, n_features) by name of the matrix, piece by piece, in order.
            rank: number of this rank.
        """
        with ExitStack() as stack:
            with translate_output_errors(self.folder):
                files = {
                    (name, array): stack.enter_context(
                        self._find_path(name, array, rank).open("wb", buffering=0)
                    )
                    for name in self.names
                    for array in self.arrays
                }
            for piece in pieces:
                with translate_output_errors(self.folder):
                    for name, rows in piece.items():
                        self._write_piece({a: files[name, a] for a in self.arrays}, rows)
            with translate_output_errors(self.folder):
                for file in files.values():
                    os.fsync(file.fileno())

    def _write_piece(self, files: Mapping[str, IO[bytes]], rows: np.ndarray) -> None:
        if not self.is_sparse:
            write_rows(files["values"], rows)
            return
        sparse = sp.csr_matrix(rows)
        write_rows(files["data"], sparse.data)
        write_rows(files["indices"], sparse.indices.astype(np.int32, copy=False))
        write_rows(files["lengths"], np.diff(sparse.indptr).astype(np.int64))

    def _find_path(self, name: str, array: str, rank: int) -> Path:
        return self.folder / f"{name}-{array}-{rank:05d}"

    def join_shares(self, world: int) -> None:
        """Append the rows of all ranks to those of rank 0."""
        for name in self.names:
            for array in self.arrays:
                first, *others = (self._find_path(name, array, rank) for rank in range(world))
                with translate_output_errors(self.folder), first.open("ab") as whole:
                    for path in others:
                        with path.open("rb") as rows:
                            shutil.copyfileobj(rows, whole, 2**24)
                        path.unlink()

    def map_matrix(self, name: str, n_rows: int) -> np.ndarray | sp.csr_matrix:
        """Map the joined rows of a matrix into memory.

        Raises:
            StoreError: rows of some rank are missing.
        """
        if self.is_sparse:
            lengths = self._map_array(name, "lengths")
            data, indices = self._map_array(name, "data"), self._map_array(name, "indices")
            indptr = np.concatenate([[0], np.cumsum(lengths)])
            self._require_size(name, len(lengths), n_rows)
            self._require_size(name, len(data), int(indptr[-1]))
            matrix = sp.csr_matrix((n_rows, self.n_features), dtype=np.float32)
            # The constructor would look at every element.
            matrix.data, matrix.indices, matrix.indptr = data, indices, indptr
            return matrix
        values = self._map_array(name, "values")
        self._require_size(name, len(values), n_rows * self.n_features)
        return values.reshape(n_rows, self.n_features)

    def _map_array(self, name: str, array: str) -> np.ndarray:
        path, kind = self._find_path(name, array, 0), self.arrays[array]
        if not path.stat().st_size:  # nothing can be mapped
            return np.empty(0, kind)
        return np.asarray(np.memmap(path, kind, mode="r"))

    def _require_size(self, name: str, found: int, expected: int) -> None:
        if found != expected:
            raise StoreError(
                "rows of some rank are missing",
                where=self.folder,
                got=f"{found:,} values of {name}",
                expected=f"{expected:,}",
            )
