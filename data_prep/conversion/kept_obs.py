"""Columns of obs that a store keeps: their types over all inputs, and their values, cell by cell.

The order of a source's keys is written down once, so that a shard finds its cells in every source.
Where several sources know a cell's value, the first one that was named says it.

    WORK/sources/000/kept-0.npy          of a source: the values of column 0, as the store has them
    WORK/sources/000/sorted_keys.npy     the keys of its rows, ascending, and the row of each
    WORK/sources/000/key_rows.npy
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clue_dist.errors import DataError, list_names
from clue_dist.store.batch_vocabulary import TAKEN_COLUMNS
from clue_dist.store.obs_columns import KeptColumn, name_kept_array
from data_prep.jobs.array_files import load_array, save_array
from data_prep.readers.source import CategoryCodes, SourceHead

ALL = "all"  # stands for every column


def plan_kept_columns(
    heads: Sequence[SourceHead], wanted: Sequence[str], known: Mapping[str, KeptColumn]
) -> dict[str, KeptColumn]:
    """Find the type of each column that is kept, over all sources.

    Args:
        heads: head of each source.
        wanted: names of columns, or `all` alone.
        known: columns of the store that cells are added to; their types and codes stay.

    Returns:
        The columns by name: those known first, the others by the alphabet.

    Raises:
        DataError: no input has a column that was asked for, or a column holds values of another
            type than that of the store.
    """
    found = {name for head in heads for name in head.kept_columns}
    names = sorted(found - TAKEN_COLUMNS) if list(wanted) == [ALL] else list(dict.fromkeys(wanted))
    if absent := [name for name in names if name not in found and name not in known]:
        raise DataError(
            "no input has a column that is to be kept",
            where="--keep-obs",
            got=list_names(absent),
            expected=list_names(sorted(found), 30) or "files with obs",
        )
    columns = dict(known)
    for name in names:
        sources = [head.kept_columns[name] for head in heads if name in head.kept_columns]
        columns[name] = _settle_column(name, [s.read_values() for s in sources], known.get(name))
    return columns


def _settle_column(name: str, values: Sequence[pd.Series], known: KeptColumn | None) -> KeptColumn:
    """Find the type of one column over all its sources, and its categories."""
    kinds = {_classify_values(part) for part in values} - {"empty"}
    if known is not None and known.kind != "category":
        fits = kinds <= {known.kind} or (known.kind == "number" and kinds == {"integer"})
        if not fits:
            raise DataError(
                "a column that the store keeps holds other values in these files",
                where=f"column {name} of obs",
                got=list_names(sorted(kinds)),
                expected=known.kind,
                fix="convert all files again, or rename the column",
            )
        return known
    if known is None and kinds in ({"boolean"}, {"integer"}, {"number"}, {"integer", "number"}):
        kind: Any = "number" if "number" in kinds else kinds.pop()
        return KeptColumn(kind=kind)
    listed = [] if known is None else known.categories
    texts = {text for part in values for text in CategoryCodes.encode_values(part).names}
    return KeptColumn(kind="category", categories=listed + sorted(texts - set(listed)))


def _classify_values(values: pd.Series) -> str:
    """Say which kind of column fits some values; "empty" fits every kind."""
    present = values.dropna()
    if not len(present):
        return "empty"
    if isinstance(values.dtype, pd.CategoricalDtype):
        return "category"
    inferred = pd.api.types.infer_dtype(present, skipna=True)
    if inferred == "integer":
        low, high = int(present.min()), int(present.max())
        return "integer" if low > -(2**63) and high < 2**63 else "number"
    return {"boolean": "boolean", "floating": "number", "mixed-integer-float": "number"}.get(
        inferred, "category"
    )


def write_kept_values(
    columns: Mapping[str, KeptColumn], heads: Sequence[SourceHead], row_folders: Sequence[Path]
) -> None:
    """Write the values of every source, as the store has them, for the tasks that gather them.

    Args:
        columns: what is kept, by name.
        heads: head of each source.
        row_folders: folder of each source, in which the keys of its rows lie.
    """
    for head, folder in zip(heads, row_folders, strict=True):
        present = [name for name in columns if name in head.kept_columns]
        if not present:
            continue
        keys = np.asarray(load_array(folder / "keys.npy"))
        order = np.argsort(keys)
        save_array(folder / "sorted_keys.npy", keys[order])
        save_array(folder / "key_rows.npy", order)
        for number, (name, column) in enumerate(columns.items()):
            if name in present:
                values = encode_kept_values(column, head.kept_columns[name].read_values())
                save_array(folder / f"{name_kept_array(number)}.npy", values)


def encode_kept_values(column: KeptColumn, values: pd.Series) -> np.ndarray:
    """Encode values of a column as the store has them, (n,)."""
    if column.kind == "category":
        encoded = CategoryCodes.encode_values(values)
        places = {text: code for code, text in enumerate(column.categories)}
        codes = np.array([*(places[text] for text in encoded.names), -1], np.int32)
        return codes[encoded.codes[:]]
    filled: Any = np.full(len(values), column.missing, column.dtype)
    is_known = values.notna().to_numpy(bool)
    filled[is_known] = values[is_known].to_numpy().astype(column.dtype)
    return np.asarray(filled)


def gather_kept_values(
    columns: Mapping[str, KeptColumn], row_folders: Sequence[Path], keys: np.ndarray
) -> list[np.ndarray]:
    """Gather the values of some cells from all sources.

    Args:
        columns: what is kept, by name.
        row_folders: folder of each source, in the order in which they were named.
        keys: spool keys of the cells, (n,).

    Returns:
        Of each column the values, (n,).
    """
    gathered = [np.full(len(keys), column.missing, column.dtype) for column in columns.values()]
    is_open = [np.ones(len(keys), bool) for _ in gathered]  # no source has said a value yet
    for folder in row_folders if columns else []:
        if not (folder / "sorted_keys.npy").exists():
            continue
        sorted_keys = load_array(folder / "sorted_keys.npy")
        places = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
        has_row = sorted_keys[places] == keys
        rows = load_array(folder / "key_rows.npy")[places]
        for number, column in enumerate(columns.values()):
            file = folder / f"{name_kept_array(number)}.npy"
            if not file.exists():
                continue
            values = load_array(file)[rows]
            is_missing = np.isnan(values) if column.kind == "number" else values == column.missing
            taken = has_row & is_open[number] & ~is_missing
            gathered[number][taken] = values[taken]
            is_open[number] &= ~taken
    return gathered
