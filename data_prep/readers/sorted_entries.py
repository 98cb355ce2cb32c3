"""Entries that come in any order (CSC, Matrix Market), sorted part by part so that rows can be read.

Each part holds a bounded number of entries, sorted by row; a range of rows is one run in each part.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse as sp

from data_prep.jobs.whole_files import make_whole_folder, save_array

PART_ENTRIES = 8 * 2**20


def write_sorted_part(
    folder: Path, rows: np.ndarray, columns: np.ndarray, values: np.ndarray
) -> None:
    """Write one part. rows, columns, values: (n,)."""
    order = np.argsort(rows, kind="stable")
    with make_whole_folder(folder) as part:
        save_array(part / "rows.npy", rows[order])
        save_array(part / "columns.npy", columns[order].astype(np.int32, copy=False))
        save_array(part / "values.npy", values[order])


def read_sorted_rows(folders: list[Path], lo: int, hi: int, n_columns: int) -> sp.csr_matrix:
    """Rows lo to hi out of every part, as their entries come: unsorted, some perhaps twice."""
    pieces = []
    for folder in folders:
        rows = np.load(folder / "rows.npy", mmap_mode="r")
        i, j = np.searchsorted(rows, [lo, hi])
        if i < j:
            columns, values = (
                np.load(folder / f"{name}.npy", mmap_mode="r")[i:j]
                for name in ("columns", "values")
            )
            pieces.append((rows[i:j] - lo, columns, values))
    pieces = pieces or [(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.uint8))]
    rows, columns, values = (np.concatenate([p[k] for p in pieces]) for k in range(3))
    order = np.argsort(rows, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=hi - lo))])
    return sp.csr_matrix((values[order], columns[order], indptr), shape=(hi - lo, n_columns))
