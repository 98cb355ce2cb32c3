"""MuData files (.h5mu, .zarr): each modality is an AnnData in a group of its own."""

from __future__ import annotations

import re

from clue_dist.kinds import find_kinds
from clue_dist.store.layout import MODALITY_NAME
from clue_dist.store.location import Location
from data_prep.options import InputArgument, ReadingOptions
from data_prep.readers.file_parts import FilePart
from data_prep.readers.h5_file import has_part, open_container, open_part
from data_prep.readers.h5_matrix import read_matrix_shape
from data_prep.readers.h5ad import AnnDataSource, choose_layer, has_matrix, list_choices

_PLAIN_WORDS = re.compile(r"[\w-]+( [\w-]+)*")  # "Gene Expression"


def is_h5mu(path: Location) -> bool:
    """Whether a file is a MuData."""
    return has_part(path, "mod")


def list_h5mu_parts(path: Location) -> list[FilePart]:
    """A part for each modality of a MuData."""
    with open_container(path) as file:
        group = file["mod"]
        # HDF5 lists groups by the alphabet; newer MuData also writes down the order it had.
        names = [str(name) for name in group.attrs.get("mod-order", list(group))]
        parts = []
        for name in names:
            # A name that a store cannot take, "Surface protein", say, gives way to its kind's; the
            # others are refused later, if they are asked for.
            kinds = find_kinds(name) if _PLAIN_WORDS.fullmatch(name) else []
            is_clear = not MODALITY_NAME.fullmatch(name) and len(kinds) == 1
            modality = kinds[0] if is_clear else name
            root, n_features = open_part(group, name), None
            if has_matrix(root):  # else there are layers alone
                n_features = read_matrix_shape(open_part(root, "X"))[1]
            choices = tuple(list_choices(root))
            parts.append(FilePart(name, modality, n_features=n_features, layers=choices))
        return parts


def open_h5mu(
    argument: InputArgument, modality: str, part: FilePart, options: ReadingOptions
) -> AnnDataSource:
    """The source of one modality of a MuData."""
    return AnnDataSource(
        argument.path,
        modality,
        argument.dataset,
        f"mod/{part.key}",
        choose_layer(argument.path, f"mod/{part.key}", options.layers.get_value(modality)),
        options.obs_columns.select_modality(modality),
        options.id_columns.get_value(modality),
    )
