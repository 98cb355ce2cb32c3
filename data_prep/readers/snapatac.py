"""Fragments as SnapATAC2 keeps them: a CSR matrix of cells x bases of the genome, in obsm.

The chromosomes of uns["reference_sequences"] stand one behind another. An entry lies at the first
base of a fragment, and its value is the fragment's length; that of a single read from the reverse
strand lies at the last base, and is negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from clue_dist.errors import DataError
from clue_dist.store.location import Location
from data_prep.readers.h5_file import WRITE_ANEW, is_group, open_container, open_part
from data_prep.readers.h5_frame import read_index, read_values
from data_prep.readers.h5_matrix import require_inside_matrix, require_whole_matrix

FRAGMENT_KEYS = ("obsm/fragment_paired", "obsm/fragment_single")
_CHROMOSOMES = "uns/reference_sequences"


def find_fragments_key(root: Any) -> str | None:
    """Where the fragments of an AnnData lie, if it has any."""
    return next((key for key in FRAGMENT_KEYS if is_group(root.get(key))), None)


def read_stored_fragments(path: Location, key: str, n_entries: int) -> Iterator[pd.DataFrame]:
    """Read fragments, `n_entries` at a time, as columns chromosome, start, end and barcode.

    Raises:
        DataError: the matrix is damaged, or does not fit the cells or the chromosomes.
    """
    with open_container(path) as file:
        barcodes = np.array(read_index(file, "obs", str(path)), object)
        frame = open_part(file, _CHROMOSOMES)
        names = read_values(frame, "reference_seq_name").astype(str).to_numpy()
        lengths = read_values(frame, "reference_seq_length").to_numpy(np.int64)
        ends, matrix = np.cumsum(lengths), open_part(file, key)
        require_whole_matrix(matrix, len(barcodes))
        indptr = open_part(matrix, "indptr")[:].astype(np.int64)
        if (np.diff(indptr) < 0).any():
            raise DataError("indptr of the fragments is not sorted", where=path, fix=WRITE_ANEW)
        indices, data = (open_part(matrix, name) for name in ("indices", "data"))
        for first in range(0, len(data), n_entries):
            bases, sizes = (part[first : first + n_entries] for part in (indices, data))
            require_inside_matrix(bases, int(ends[-1]), "chromosomes", str(path))
            bases, sizes = bases.astype(np.int64), sizes.astype(np.int64)
            numbers = np.searchsorted(ends, bases, side="right")
            starts = bases - (ends - lengths)[numbers] + np.where(sizes < 0, sizes + 1, 0)
            entries = np.arange(first, first + len(bases))
            cells, codes = np.unique(
                np.searchsorted(indptr, entries, side="right") - 1, return_inverse=True
            )
            yield pd.DataFrame(
                {
                    "chromosome": pd.Categorical.from_codes(numbers, pd.Index(names)),
                    "start": starts,
                    "end": starts + abs(sizes),
                    "barcode": pd.Categorical.from_codes(codes, pd.Index(barcodes[cells])),
                }
            )
