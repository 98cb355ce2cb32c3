"""Arrays that the ranks write together: each its own rows, which rank 0 then joins.

No array is ever in memory as a whole. The memory that reading one back takes is the system's file
cache, which gives way.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import scipy.sparse as sp

from clue_dist.errors import StoreError
from clue_dist.inference.output_files import translate_output_errors


@dataclass(frozen=True)
class ArrayFolder:
    """A folder with arrays to which the ranks append.

    Ranks never share a file: machines that write into the same page of a file over a network lose
    each other's rows.
    """

    folder: Path  # that all ranks see
    types: Mapping[str, Any]  # of the arrays, by name

    def write_share(self, pieces: Iterable[Mapping[str, np.ndarray]], rank: int) -> None:
        """Write this rank's rows into its own files, which are on the disk when this returns.

        Args:
            pieces: the next rows of each array, by its name.
            rank: number of this rank.
        """
        with ExitStack() as stack:
            with translate_output_errors(self.folder):
                files = {
                    name: stack.enter_context(self._find_path(name, rank).open("wb", buffering=0))
                    for name in self.types
                }
            for piece in pieces:
                with translate_output_errors(self.folder):
                    for name, rows in piece.items():
                        _write_rows(files[name], rows.astype(self.types[name], copy=False))
            with translate_output_errors(self.folder):
                for file in files.values():
                    os.fsync(file.fileno())

    def join_shares(self, world: int) -> None:
        """Append the rows of the other ranks to those of rank 0, whose files become the whole."""
        for name in self.types:
            first, *others = (self._find_path(name, rank) for rank in range(world))
            with translate_output_errors(self.folder), first.open("ab") as whole:
                for path in others:
                    with path.open("rb") as rows:
                        shutil.copyfileobj(rows, whole, 2**24)
                    path.unlink()
                whole.flush()
                os.fsync(whole.fileno())  # ranks on other machines read it, too

    def require_size(self, name: str, n_values: int) -> None:
        """Require that a joined array has as many values as all ranks had to write.

        Raises:
            StoreError: it has not.
        """
        found = self._find_path(name, 0).stat().st_size // np.dtype(self.types[name]).itemsize
        if found != n_values:
            raise StoreError(
                "rows of some rank are missing",
                where=self.folder,
                got=f"{found:,} values of {name}",
                expected=f"{n_values:,}",
            )

    def map_array(self, name: str) -> np.ndarray:
        """Map the values of a joined array into memory, in one row."""
        path, kind = self._find_path(name, 0), self.types[name]
        if not path.stat().st_size:  # nothing can be mapped
            return np.empty(0, kind)
        return np.asarray(np.memmap(path, kind, mode="r"))

    def _find_path(self, name: str, rank: int) -> Path:
        return self.folder / f"{name}-{rank:05d}"


def _write_rows(file: IO[bytes], rows: np.ndarray) -> None:
    """Write all bytes of an array.

    NumPy's own tofile() hides errors of the last few kilobytes, and a plain write may stop halfway.
    """
    left = np.ascontiguousarray(rows).data.cast("B")
    while left:
        left = left[file.write(left) :]


def arrange_rows(parts: Sequence[Any], order: np.ndarray, n_rows: int) -> Any:
    """Put rows where they belong; NaN, or zeros if they are sparse, in the others.

    Args:
        parts: one behind the other; all dense, or all sparse.
        order: (n,), the row of the result that each becomes.
        n_rows: of the result.

    Returns:
        (n_rows, width); the only part itself where its rows are in their places already.
    """
    if len(parts) == 1 and np.array_equal(order, np.arange(n_rows)):
        return parts[0]
    if sp.issparse(parts[0]):
        stacked = sp.vstack(parts, format="csr")
        place = sp.csr_matrix(
            (np.ones(len(order), np.float32), (order, np.arange(len(order)))),
            shape=(n_rows, len(order)),
        )
        return (place @ stacked).tocsr()
    ordered = np.full((n_rows, parts[0].shape[1]), np.nan, np.float32)
    first = 0
    for part in parts:
        ordered[order[first : first + len(part)]] = part
        first += len(part)
    return ordered
