"""Entries of a sparse matrix that come in any order (CSC, Matrix Market, fragments).

They are sorted by row, part by part, so that rows can be read: a range of rows is one run of
entries in each part. The number of entries in a part is bounded, and with it the memory.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse as sp

from data_prep.jobs.array_files import load_array, save_array
from data_prep.jobs.whole_folders import make_whole_folder

PART_ENTRIES = 8 * 2**20  # of a part, at most: they bound the memory of sorting


def write_sorted_part(
    folder: Path, rows: np.ndarray, columns: np.ndarray, values: np.ndarray
) -> None:
    """Write one part, a folder. rows, columns, values: (entries,)."""
    # Stable, so that entries of one row keep the order of the file, and the bytes are the same
    # whoever writes them.
    order = np.argsort(rows, kind="stable")
    with make_whole_folder(folder) as part:
        save_array(part / "rows.npy", rows[order])
        save_array(part / "columns.npy", columns[order].astype(np.int32, copy=False))
        save_array(part / "values.npy", values[order])


def list_sorted_parts(folder: Path) -> list[Path]:
    """The parts in a folder, which are numbered with six digits."""
    return sorted(folder.glob("[0-9]" * 6))


def read_sorted_rows(folder: Path, start: int, stop: int, n_columns: int) -> sp.csr_matrix:
    """Rows `start` to `stop` out of every part in a folder.

    Returns:
        (stop - start, n_columns). Within a row, columns are not sorted and may occur twice.
    """
    found = []
    for part in list_sorted_parts(folder):
        rows = load_array(part / "rows.npy")
        # Rows are sorted and mapped: bisection touches a few pages of the file.
        first, last = np.searchsorted(rows, [start, stop])
        if first < last:
            columns, values = (load_array(part / f"{name}.npy") for name in ("columns", "values"))
            found.append((rows[first:last] - start, columns[first:last], values[first:last]))
    found = found or [(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.uint8))]
    rows, columns, values = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    order = np.argsort(rows, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=stop - start))])
    return sp.csr_matrix((values[order], columns[order], indptr), shape=(stop - start, n_columns))
