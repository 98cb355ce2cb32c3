"""A matrix in HDF5: dense, CSR or CSC, checked before anything of it is used."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
import scipy.sparse as sp

from clue_dist.errors import DataError
from data_prep.readers.h5_file import ANEW, name_part, open_part, read_stretch
from data_prep.readers.source import require_real_numbers

_PROBE = 10_000  # values looked at to guess whether a matrix holds counts
MISFIT = "the sparse matrix is damaged: its indptr does not fit its data"


def require_whole_matrix(matrix: Any, n: int) -> None:
    """indptr of n rows (CSR) or columns (CSC), and as many indices as values; else a DataError."""
    indptr, indices, data = (open_part(matrix, name) for name in ("indptr", "indices", "data"))
    shapes = {part.name.rpartition("/")[2]: part.shape for part in (indptr, indices, data)}
    one_axis = all(shape is not None and len(shape) == 1 for shape in shapes.values())
    if not one_axis or shapes["indptr"] != (n + 1,) or shapes["indices"] != shapes["data"]:
        raise DataError(
            MISFIT, where=name_part(matrix), got=shapes, expected=f"an indptr of {n + 1}", fix=ANEW
        )
    if data.dtype.kind not in "iufb":
        raise DataError(
            "values that are no numbers",
            where=name_part(data),
            got=data.dtype,
            expected="counts",
            fix=ANEW,
        )
    if any(part.dtype.kind not in "iu" for part in (indptr, indices)):
        got = f"{indptr.dtype} and {indices.dtype}"
        raise DataError(
            "indptr and indices are no integers", where=name_part(matrix), got=got, fix=ANEW
        )
    ends = int(indptr[0]), int(indptr[-1])
    if ends != (0, len(data)):
        raise DataError(
            MISFIT, where=name_part(matrix), got=ends, expected=(0, len(data)), fix=ANEW
        )


def require_inside_matrix(indices: np.ndarray, n: int, what: str, where: str) -> None:
    if len(indices) and not 0 <= indices.min() <= indices.max() < n:
        got, expected = f"{indices.min()} to {indices.max()}", f"0 to {n - 1}"
        raise DataError(
            f"the sparse matrix points outside its {what}", where=where, got=got, expected=expected
        )


def read_csr_slice(matrix: Any, lo: int, hi: int, n_columns: int, where: str) -> sp.csr_matrix:
    """Rows of a matrix that `require_whole` has seen."""
    indptr = open_part(matrix, "indptr")[lo : hi + 1].astype(np.int64)
    start, stop = int(indptr[0]), int(indptr[-1])
    where = f"{where}, rows {lo} to {hi - 1}"
    if start < 0 or stop > len(matrix["data"]) or (np.diff(indptr) < 0).any():
        raise DataError(MISFIT, where=where, fix=ANEW)
    indices, values = (
        read_stretch(open_part(matrix, name), start, stop) for name in ("indices", "data")
    )
    require_inside_matrix(indices, n_columns, "features", where)
    values = require_real_numbers(values, where)
    return sp.csr_matrix((values, indices, indptr - start), shape=(hi - lo, n_columns), copy=False)


def read_format(matrix: Any) -> str:
    if isinstance(matrix, h5py.Dataset):
        return "array"
    name = matrix.attrs.get("encoding-type", "")
    name = name or {"csr": "csr_matrix", "csc": "csc_matrix"}.get(
        matrix.attrs.get("h5sparse_format", ""), ""
    )
    if name not in ("csr_matrix", "csc_matrix"):
        raise DataError(
            "a matrix in a form this reader does not know",
            where=name_part(matrix),
            got=name or "a group that says no encoding-type",
            expected="array, CSR or CSC",
            fix=ANEW,
        )
    return str(name)


def read_shape(matrix: Any) -> tuple[int, int]:
    shape = (
        matrix.shape
        if read_format(matrix) == "array"
        else matrix.attrs.get("shape", matrix.attrs.get("h5sparse_shape"))
    )
    if np.shape(shape) != (2,):
        raise DataError(
            "a matrix that is not one of cells x features",
            where=name_part(matrix),
            got="no shape" if shape is None else f"shape {tuple(np.ravel(shape).tolist())}",
            expected="two axes",
            fix=ANEW,
        )
    return int(shape[0]), int(shape[1])


def looks_like_counts(matrix: Any) -> bool:
    if isinstance(matrix, h5py.Dataset):
        whole = matrix.size and matrix.ndim == 2
        values = matrix[: max(1, _PROBE // matrix.shape[1])] if whole else np.empty(0)
    else:
        values = open_part(matrix, "data")[:_PROBE]
    return bool(
        len(values)
        and np.isfinite(values).all()
        and (values >= 0).all()
        and (values == np.floor(values)).all()
    )
