"""MuData files (.h5mu): each modality is an AnnData in a group of its own."""

from __future__ import annotations

from pathlib import Path

from clue_dist.errors import DataError, list_names
from data_prep.options import InputArgument, ReadingOptions
from data_prep.readers.h5_file import has_part, open_h5
from data_prep.readers.h5ad import AnnDataSource


def is_h5mu(path: Path) -> bool:
    """Whether a file is a MuData."""
    return has_part(path, "mod")


def open_h5mu(argument: InputArgument, options: ReadingOptions) -> list[AnnDataSource]:
    """A source for each modality of the file, or for the one that a person names.

    Raises:
        DataError: the file does not have that modality.
    """
    with open_h5(argument.path) as file:
        group = file["mod"]
        # HDF5 lists groups by the alphabet; newer MuData also writes down the order it had.
        modalities = [str(name) for name in group.attrs.get("mod-order", list(group))]
    if argument.modality is not None:
        if argument.modality not in modalities:
            raise DataError(
                "the file has no such modality",
                where=argument.text,
                got=list_names(modalities),
                expected=argument.modality,
            )
        modalities = [argument.modality]
    return [
        AnnDataSource(
            argument.path,
            modality,
            argument.dataset,
            f"mod/{modality}",
            options.layers.get_value(modality),
            options.obs_columns,
            options.id_columns.get_value(modality),
        )
        for modality in modalities
    ]
