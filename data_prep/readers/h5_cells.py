"""The cells of an AnnData: barcodes, batch and label, and the other columns of obs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from clue_dist.store.location import Location
from data_prep.options import ObsColumns
from data_prep.readers.h5_file import locate_part, open_container, open_part
from data_prep.readers.h5_frame import (
    has_obs,
    list_columns,
    read_codes,
    read_index,
    read_names,
    read_typed_values,
)
from data_prep.readers.source import CategoryCodes, SlicedArray, encode_barcodes


@dataclass(frozen=True)
class AnnDataCells:
    """What a file says of the cells of one AnnData."""

    barcodes: SlicedArray  # (n,) bytes
    fields: dict[str, CategoryCodes]  # "batch" and "label", where there is such a column
    columns: list[str]  # all columns of obs
    kept: dict[str, StoredObsValues]  # all columns, each once, by the name that a store gives it


@dataclass(frozen=True)
class StoredObsValues:
    """A column of the obs of a file; see `ObsValues`."""

    path: Location
    group: str  # of the AnnData
    frame: str  # of the obs: that of the AnnData, or that which all modalities share
    column: str
    n_cells: int
    where: str  # the file, for messages

    def read_values(self) -> pd.Series:
        """Read the values of the cells of the AnnData, (n_cells,)."""
        with open_container(self.path) as file:
            frame = open_part(file, self.frame)
            if self.frame != "obs" or not self.group:
                return read_typed_values(frame, self.column, self.n_cells)
            shared = pd.Index(encode_barcodes(read_index(file, "obs", self.where), self.where))
            values = read_typed_values(frame, self.column, len(shared))
            barcodes = read_names(open_part(file, self.group), "obs", self.where)[:]
        values.index = shared
        return values.reindex(pd.Index(barcodes)).reset_index(drop=True)


def read_cells(
    file: Any, group: str, modality: str, obs_columns: ObsColumns, where: str
) -> AnnDataCells:
    """Read the cells of an AnnData.

    Args:
        file: the file.
        group: where the AnnData lies in it; "" where the file is nothing else.
        modality: the modality's name in a MuData, which columns of its obs may have before them.
        obs_columns: where batch and label are found.
        where: the file, for messages.
    """
    root = file[group] if group else file
    barcodes = read_names(root, "obs", where)
    fields = {}
    for field, column in obs_columns.by_field.items():
        codes = _read_field(file, group, modality, column, barcodes, where)
        if codes is not None:
            fields[field] = codes
    inner = f"{group}/obs".lstrip("/")
    columns = list_columns(root["obs"])
    places = {name: (inner, name) for name in columns}
    if group and has_obs(file):  # `_read_field` looks there, too
        shared = list_columns(file["obs"])
        columns += shared
        others = [f"{name}:" for name in file["mod"] if name != modality]
        for name in shared:
            if not name.startswith(tuple(others)):
                places.setdefault(name.removeprefix(f"{modality}:"), ("obs", name))
    path, n_cells = locate_part(root), len(barcodes)
    kept = {
        name: StoredObsValues(path, group, frame, column, n_cells, where)
        for name, (frame, column) in places.items()
    }
    return AnnDataCells(barcodes, fields, columns, kept)


def _read_field(
    file: Any, group: str, modality: str, column: str, barcodes: SlicedArray, where: str
) -> CategoryCodes | None:
    """A column of the modality's obs, else of the obs that the modalities of a MuData share.

    MuData's column is called as it is asked for, or has the modality before it, `rna:batch`.
    """
    root = file[group] if group else file
    if column in root["obs"]:
        return read_codes(root["obs"], column, len(barcodes))
    if not group or not has_obs(file):
        return None
    for name in (column, f"{modality}:{column}"):
        if name in file["obs"]:
            shared = pd.Index(encode_barcodes(read_index(file, "obs", where), where))
            # The shared obs lists the cells of all modalities; a cell that is not there has
            # index -1, and so an unknown code.
            codes = read_codes(file["obs"], name, len(shared))
            return codes.take_rows(shared.get_indexer(pd.Index(barcodes[:])))
    return None
