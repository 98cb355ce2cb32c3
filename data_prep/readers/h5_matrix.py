"""A matrix in HDF5 or Zarr, dense, CSR or CSC, which is checked before anything of it is used."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

from clue_dist.errors import DataError
from data_prep.readers.h5_file import WRITE_ANEW, is_array, name_part, open_part, read_stretch
from data_prep.readers.source import PROBED_VALUES, looks_whole, require_real_numbers
from data_prep.readers.zarr_file import has_missing_chunks

MISFIT = "the sparse matrix is damaged: its indptr does not fit its data"
_PROBED_INDICES = 2**20  # of a row that may be several

# Before anndata had encoding types, h5sparse wrote sparse matrices.
_H5SPARSE = {"csr": "csr_matrix", "csc": "csc_matrix"}


def require_whole_matrix(matrix: Any, n_major: int) -> None:
    """Refuse a sparse matrix whose arrays do not fit together.

    Args:
        matrix: a group of indptr, indices and data.
        n_major: rows of a CSR matrix, columns of a CSC matrix.

    Raises:
        DataError: they do not fit, or are not of numbers.
    """
    indptr, indices, data = (open_part(matrix, name) for name in ("indptr", "indices", "data"))
    where = name_part(matrix)
    shapes = {part.name.rpartition("/")[2]: part.shape for part in (indptr, indices, data)}
    one_axis = all(shape is not None and len(shape) == 1 for shape in shapes.values())
    if not one_axis or shapes["indptr"] != (n_major + 1,) or shapes["indices"] != shapes["data"]:
        expected = f"an indptr of {n_major + 1}"
        raise DataError(MISFIT, where=where, got=shapes, expected=expected, fix=WRITE_ANEW)
    if data.dtype.kind not in "iufb":
        raise DataError(
            "values that are no numbers",
            where=name_part(data),
            got=data.dtype,
            expected="counts",
            fix=WRITE_ANEW,
        )
    if any(part.dtype.kind not in "iu" for part in (indptr, indices)):
        raise DataError(
            "indptr and indices are no integers",
            where=where,
            got=f"{indptr.dtype} and {indices.dtype}",
            fix=WRITE_ANEW,
        )
    for part in (data, indices):
        # Indices are zeros throughout a chunk only where there is one feature, or one cell.
        if has_missing_chunks(part) and (part is data or 1 not in read_matrix_shape(matrix)):
            what, fix = "chunks of the values are missing", "copy the folder, or write it anew"
            raise DataError(what, where=name_part(part), fix=fix)
    ends, n_entries = (int(indptr[0]), int(indptr[-1])), data.shape[0]
    if ends != (0, n_entries):
        raise DataError(MISFIT, where=where, got=ends, expected=(0, n_entries), fix=WRITE_ANEW)
    _require_first_row(indptr, indices)


def _require_first_row(indptr: Any, indices: Any) -> None:
    """Refuse a matrix in Zarr whose first chunks of indptr were lost.

    They are read as zeros: as rows without values, and one row with the values of all of these. Its
    indices then begin anew where that of the next row began. Chunks that hold zeros alone are not
    written, so that absence alone says nothing.
    """
    if not has_missing_chunks(indptr):
        return
    width = indptr.chunks[0]
    for first in range(0, indptr.shape[0], width):
        values = indptr[first : first + width]
        if values.any():
            break
    else:
        return
    stop = min(int(values[np.flatnonzero(values)[0]]), _PROBED_INDICES)
    if first and (np.diff(read_stretch(indices, 0, stop).astype(np.int64)) <= 0).any():
        what, fix = "chunks of indptr are missing", "copy the folder, or write it anew"
        raise DataError(what, where=name_part(indptr), fix=fix)


def require_inside_matrix(indices: np.ndarray, size: int, what: str, where: str) -> None:
    """Refuse indices, (n,), that are not below `size`, the number of `what` (cells, features)."""
    if len(indices) and not 0 <= indices.min() <= indices.max() < size:
        raise DataError(
            f"the sparse matrix points outside its {what}",
            where=where,
            got=f"{indices.min()} to {indices.max()}",
            expected=f"0 to {size - 1}",
        )


def read_csr_slice(matrix: Any, start: int, stop: int, n_columns: int, where: str) -> sp.csr_matrix:
    """Rows `start` to `stop` of a CSR matrix that has passed `require_whole_matrix`.

    Raises:
        DataError: these rows are damaged.
    """
    # Its ends were checked once for the matrix; what lies between them is checked here.
    indptr = open_part(matrix, "indptr")[start : stop + 1].astype(np.int64)
    first, last = int(indptr[0]), int(indptr[-1])
    where = f"{where}, rows {start} to {stop - 1}"
    if first < 0 or last > matrix["data"].shape[0] or (np.diff(indptr) < 0).any():
        raise DataError(MISFIT, where=where, fix=WRITE_ANEW)
    indices, values = (
        read_stretch(open_part(matrix, name), first, last) for name in ("indices", "data")
    )
    require_inside_matrix(indices, n_columns, "features", where)
    values = require_real_numbers(values, where)
    shape = (stop - start, n_columns)
    return sp.csr_matrix((values, indices, indptr - first), shape=shape, copy=False)


def read_matrix_format(matrix: Any) -> str:
    """`array`, `csr_matrix` or `csc_matrix`.

    Raises:
        DataError: it is none of these.
    """
    if is_array(matrix):
        return "array"
    name = matrix.attrs.get("encoding-type", "")
    name = name or _H5SPARSE.get(matrix.attrs.get("h5sparse_format", ""), "")
    if name not in ("csr_matrix", "csc_matrix"):
        raise DataError(
            "a matrix in a form this reader does not know",
            where=name_part(matrix),
            got=name or "a group that says no encoding-type",
            expected="array, CSR or CSC",
            fix=WRITE_ANEW,
        )
    return str(name)


def read_matrix_shape(matrix: Any) -> tuple[int, int]:
    """Cells and features.

    Raises:
        DataError: the matrix has no two axes.
    """
    if read_matrix_format(matrix) == "array":
        shape = matrix.shape
    else:
        shape = matrix.attrs.get("shape", matrix.attrs.get("h5sparse_shape"))
    if np.shape(shape) != (2,):
        raise DataError(
            "a matrix that is not one of cells x features",
            where=name_part(matrix),
            got="no shape" if shape is None else f"shape {tuple(np.ravel(shape).tolist())}",
            expected="two axes",
            fix=WRITE_ANEW,
        )
    return int(shape[0]), int(shape[1])


def looks_like_counts(matrix: Any) -> bool:
    """Whether the first values of a matrix are whole and not negative."""
    if not is_array(matrix):
        values = open_part(matrix, "data")[:PROBED_VALUES]
    elif matrix.size and matrix.ndim == 2:
        values = matrix[: max(1, PROBED_VALUES // matrix.shape[1])]
    else:
        return False
    return looks_whole(values)
