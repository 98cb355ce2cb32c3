"""Which modalities of a model an AnnData or MuData in memory holds, and where their counts lie."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd

from clue_dist.errors import DataError, list_names
from clue_dist.inference.cells.argument_names import OPEN_CELLS, ArgumentNames
from clue_dist.inference.load_model import TrainedModel
from clue_dist.kinds import TYPE_COLUMNS, choose_value, find_kinds, match_alias
from clue_dist.number_checks import require_number
from clue_dist.store.region_names import respell_regions
from clue_dist.store.unique_names import make_names_unique

MIN_KNOWN_IN_MEMORY = 0.5  # share of a modality's features that must be there, by default
_PACKAGE = f"{Path(__file__).parents[2]}{os.sep}"  # clue_dist


@dataclass(frozen=True)
class MemoryChoices:
    """What a person may choose of cells in memory; see `cells.open_cells`."""

    modality: str | None = None
    modalities: Sequence[str] | None = None
    layer: str | Mapping[str, str] | None = None
    feature_ids: str | Mapping[str, str] | None = None
    batch_key: str | Sequence[str] | None = None
    min_known: float = MIN_KNOWN_IN_MEMORY
    arguments: ArgumentNames = OPEN_CELLS

    def __post_init__(self) -> None:
        require_number("min_known", self.min_known, 0, 1)


@dataclass(frozen=True)
class NamedCounts:
    """Counts that are to be a modality of the model, and the AnnData that they come from."""

    where: str
    adata: ad.AnnData
    feature_type: str | None = None  # of the features of this modality; None: all of them
    key: str | None = None  # what a MuData calls the modality

    def find_columns(self, var: pd.DataFrame) -> np.ndarray:
        """Places of the modality's features in var, that of X or of raw.X, (n,) int64."""
        column = _find_type_column(var)
        if self.feature_type is None or column is None:
            return np.arange(len(var))
        return np.flatnonzero(var[column].astype(str) == self.feature_type)


def name_parts(
    source: ad.AnnData | md.MuData, trained_model: TrainedModel, choices: MemoryChoices
) -> dict[str, NamedCounts]:
    """Find the modalities that cells in memory hold, in the model's order, by its names.

    Raises:
        DataError: the model knows none of them, or it cannot be told which they are.
    """
    if isinstance(source, md.MuData):
        return _name_mudata_parts(source, trained_model, choices)
    if isinstance(source, ad.AnnData):
        return _name_anndata_parts(source, trained_model, choices)
    raise DataError(
        "not cells that a model can be asked about",
        got=type(source).__name__,
        expected="an AnnData, a MuData, a store, or a path",
    )


def list_chosen(names: str | Sequence[str] | None) -> list[str] | None:
    """List the names that are given, of which one may stand alone; None where none is given."""
    if names is None:
        return None
    return [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)


class CellWarning(UserWarning):
    """An answer about some cells is doubtful."""


def warn_of_cells(text: str) -> None:
    """Warn that an answer is doubtful. The warning points to the line that called the package."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, CellWarning, stacklevel=level)


def warn_of_unknown_modalities(names: Sequence[str]) -> None:
    """Warn that a model does not know modalities that cells have."""
    warn_of_cells(f"the model does not know {list_names(names)}, which counts for nothing")


def _name_mudata_parts(
    mdata: md.MuData, trained_model: TrainedModel, choices: MemoryChoices
) -> dict[str, NamedCounts]:
    """The modalities of a MuData, by what the model calls them, in the model's order."""
    if choices.modality is not None:
        raise DataError(
            f"`{choices.arguments.modality}` says what an AnnData holds",
            got=f"{choices.modality!r}, of a MuData with {list_names(mdata.mod)}",
            fix=f'`modalities=["{choices.modality}"]` of `embed` uses a part of the modalities; '
            "elsewhere leave it out, or give the AnnData itself",
        )
    known = trained_model.modalities
    found = {name: name for name in mdata.mod if name in known}
    for name in mdata.mod:
        kinds = find_kinds(name)
        alike = [m for m in known if m not in found and [known[m].kind] == kinds]
        if name not in known and len(alike) == 1:
            found[alike[0]] = name
    unknown = [name for name in mdata.mod if name not in found.values()]
    if unknown and choices.modalities is None:
        warn_of_unknown_modalities(unknown)
    parts = {
        name: NamedCounts(f"modality {found[name]}", mdata.mod[found[name]], key=found[name])
        for name in known
        if name in found
    }
    return _keep_chosen(parts, [*mdata.mod], trained_model, choices)


def _name_anndata_parts(
    adata: ad.AnnData, trained_model: TrainedModel, choices: MemoryChoices
) -> dict[str, NamedCounts]:
    """What an AnnData holds: the modality that is named, those of its feature types, or one."""
    known = trained_model.modalities
    if choices.modality is not None:
        parts = {choices.modality: NamedCounts("the AnnData", adata)}
        return _keep_chosen(parts, [choices.modality], trained_model, choices)
    if types := _split_by_type(adata, trained_model):
        found = {part.feature_type for part in types.values()}
        unknown = [name for name in _list_types(adata.var) if name not in found]
        if unknown and choices.modalities is None:
            warn_of_unknown_modalities(unknown)
        return _keep_chosen(types, [*types], trained_model, choices)
    shares = {
        name: _share_known(part.features, name_columns(adata, adata.var, name, choices))
        for name, part in known.items()
    }
    fitting = [name for name, share in shares.items() if share >= MIN_KNOWN_IN_MEMORY]
    fitting = fitting or [name for name, share in shares.items() if share > 0]
    if len(known) == 1:
        fitting = [*known]
    if len(fitting) != 1:
        listed = ", ".join(f"{share:.0%} of {name}" for name, share in shares.items())
        # To say the modality helps where some features are known.
        advice = {"modality": f'say it: `{{}}"{fitting[0]}"`'} if fitting else {}
        advice["feature_ids"] = "`{}` names a column of var that names features as the model does"
        raise DataError(
            "cannot tell which modality an AnnData holds",
            got=f"features known: {listed}",
            expected="those of one modality of the model",
            fix=choices.arguments.join_advice(**advice),
        )
    return _keep_chosen(
        {fitting[0]: NamedCounts("the AnnData", adata)}, fitting, trained_model, choices
    )


def _share_known(features: Sequence[str], names: Sequence[str]) -> float:
    given = set(respell_regions(names, features))
    return sum(feature in given for feature in features) / len(features)


def _split_by_type(adata: ad.AnnData, trained_model: TrainedModel) -> dict[str, NamedCounts]:
    """The columns of each feature type that is a modality of the model, by the model's name."""
    known, parts = trained_model.modalities, {}
    for name in _list_types(adata.var):
        kind = match_alias(name)
        alike = [m for m in known if m == name] or [m for m in known if known[m].kind == kind]
        if len(alike) == 1 and alike[0] not in parts:
            where = f"features of type {name!r}"
            parts[alike[0]] = NamedCounts(where, adata, name)
    return {name: parts[name] for name in known if name in parts}


def _list_types(var: pd.DataFrame) -> list[str]:
    """The types of features that var tells apart."""
    column = _find_type_column(var)
    return [] if column is None else [*dict.fromkeys(var[column].astype(str))]


def _find_type_column(var: pd.DataFrame) -> str | None:
    """The column of var that says what a feature is."""
    return next((column for column in TYPE_COLUMNS if column in var), None)


def _keep_chosen(
    parts: dict[str, NamedCounts],
    given: Sequence[str],
    trained_model: TrainedModel,
    choices: MemoryChoices,
) -> dict[str, NamedCounts]:
    """The parts that are asked for, or all of them; there must be some, and the model know them."""
    wanted = list(parts) if choices.modalities is None else list(choices.modalities)
    if not wanted and parts:
        raise DataError(
            "no modality is asked for",
            where="modalities",
            got="an empty list",
            expected=list_names(parts),
        )
    if absent := [name for name in wanted if name not in parts]:
        raise DataError(
            "the cells have no such modality",
            where=f"modalities={list(wanted)}",
            got=list_names(absent),
            expected=list_names(parts) or "none",
        )
    kept = {name: part for name, part in parts.items() if name in wanted}
    if not kept or not kept.keys() <= trained_model.modalities.keys():
        raise DataError(
            "the model knows none of these modalities",
            where=_name_choice(choices),
            got=list_names(given),
            expected=list_names(trained_model.modalities),
            fix="name the modalities as the model does",
        )
    return kept


def _name_choice(choices: MemoryChoices) -> str | None:
    """Name the argument that says what an AnnData holds, where it is given."""
    argument = choices.arguments.modality
    return f"{argument}{choices.modality!r}" if argument and choices.modality else None


def name_columns(
    adata: ad.AnnData, var: pd.DataFrame, modality: str, choices: MemoryChoices
) -> list[str]:
    """Names of a modality's features, (columns,): var_names, or those of a column of var.

    As in a conversion, a name that repeats gives way to that in var_names, and of several columns,
    "symbol,gene_id", the first counts that is there.
    """
    column = choose_value(choices.feature_ids, modality)
    if column is None:
        return [str(name) for name in var.index]
    chosen = next((each for each in column.split(",") if each in var), None)
    if chosen is None:
        raise DataError(
            "var has no such column",
            where=f"{choices.arguments.feature_ids}{column!r}",
            got=f"columns: {list_names(var.columns, 30) or 'none'}",
        )
    values = var[chosen]
    names = values.where(values.notna(), "").astype(str).tolist()
    return make_names_unique(names, [str(name) for name in var.index])
