"""From the levels of each cell, one of each covariate, to the batch that they make up.

WORK/cells/joined/0003/batch:donor.npy    code of the donor of each cell, -1 = unknown
WORK/cells/joined/0003/batch.npy          code of its batch, a combination of levels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from clue_dist.errors import DataError
from clue_dist.store.batch_vocabulary import UNKNOWN, BatchVocabulary, name_batches
from data_prep.jobs.array_files import load_array, save_array
from data_prep.options import COVARIATE

MANY_LEVELS = 100  # of more new levels than this, each should have some cells:
CELLS_OF_LEVEL = 10  # so many on average


def combine_covariates(
    folders: Sequence[Path], names: Mapping[str, list[str]], known: Mapping[str, Sequence[str]]
) -> BatchVocabulary:
    """Write the batch of each cell beside its levels. This process does it alone, range by range.

    Args:
        folders: of the ranges of cells, with the codes of their levels.
        names: of the field of each covariate, the levels that codes are indices of.
        known: by covariate the level of each batch that has a code already; empty lists where
            there is none.

    Returns:
        The batches: those known, then the others that occur, in the order of their levels.

    Raises:
        DataError: a covariate has nearly as many levels as there are cells; two batches would have
            one name.
    """
    fields = [COVARIATE + name for name in known]
    levels = [[UNKNOWN, *names[field]] for field in fields]
    sizes = tuple(len(listed) for listed in levels)
    keys = [_load_keys(folder, fields, sizes) for folder in folders]
    _refuse_many_levels(known, levels, sum(len(part) for part in keys))
    places = [{level: place for place, level in enumerate(listed)} for listed in levels]
    rows = [
        [place[level] for place, level in zip(places, row, strict=True)]
        for row in zip(*known.values(), strict=True)
    ]
    listed_keys = [int(np.ravel_multi_index(row, sizes)) for row in rows]
    # A cell of which no level is known has key 0, and no batch.
    new_keys = {key for part in keys for key in np.unique(part).tolist()} - {0, *listed_keys}
    every_key = np.array([0, *listed_keys, *sorted(new_keys)], np.int64)
    order = np.argsort(every_key)
    for folder, part in zip(folders, keys, strict=True):
        codes = order[np.searchsorted(every_key, part, sorter=order)] - 1
        save_array(folder / "batch.npy", codes.astype(np.int32))
    columns = np.unravel_index(every_key[1:], sizes)
    covariates = {
        name: [listed[place] for place in column.tolist()]
        for name, listed, column in zip(known, levels, columns, strict=True)
    }
    return BatchVocabulary(name_batches(list(zip(*covariates.values(), strict=True))), covariates)


def _load_keys(folder: Path, fields: Sequence[str], sizes: tuple[int, ...]) -> np.ndarray:
    """Load one number for the levels of each cell of a range, (n,) int64."""
    codes = [load_array(folder / f"{field}.npy").astype(np.int64) + 1 for field in fields]
    return np.ravel_multi_index(codes, sizes)


def _refuse_many_levels(
    known: Mapping[str, Sequence[str]], levels: Sequence[Sequence[str]], n_cells: int
) -> None:
    """Refuse a covariate that cannot be one, as barcodes or measured values."""
    for (name, before), listed in zip(known.items(), levels, strict=True):
        seen = set(before)
        new = [level for level in listed if level and level not in seen]
        if len(new) > MANY_LEVELS and len(new) * CELLS_OF_LEVEL > n_cells:
            raise DataError(
                "a covariate has nearly as many levels as there are cells",
                where=f"--batch-key {name}",
                got=f"{len(new):,} levels of {n_cells:,} cells, such as {new[0]}",
                expected=f"{CELLS_OF_LEVEL} cells of a level or more",
                fix="name a column of categories",
            )
