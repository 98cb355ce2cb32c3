"""Cells of an AnnData or MuData in memory, as a model is asked about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from clue_dist.data.batch import Batch, ObservedModality
from clue_dist.errors import DataError, format_count, list_names, suggest_names
from clue_dist.inference.cells.aligned_counts import AlignedCounts, align_features
from clue_dist.inference.cells.argument_names import ArgumentNames
from clue_dist.inference.cells.memory_obs import collect_obs, find_levels
from clue_dist.inference.cells.named_counts import (
    MemoryChoices,
    NamedCounts,
    name_columns,
    name_parts,
    warn_of_cells,
)
from clue_dist.inference.cells.store_cells import CellSlice
from clue_dist.inference.load_model import TrainedModel
from clue_dist.kinds import choose_value
from clue_dist.number_checks import require_number
from clue_dist.store.batch_vocabulary import BATCH, UNKNOWN, BatchVocabulary, combine_levels
from clue_dist.store.region_names import respell_regions


class MemoryCells:
    """Cells in memory; those without any counts are in no slice.

    Args:
        obs: what is known of the cells, (N) rows.
        counts: by modality.
        rows: by modality (N,), the row of each cell in its counts, -1 where it was not measured.
        trained_model: the model that is asked.
        batches: the biological batches that codes name.
        batch_codes: (N,) int64; -1: unknown.
        tables: by modality, the AnnData that its counts are of.
    """

    def __init__(
        self,
        obs: pd.DataFrame,
        counts: Mapping[str, AlignedCounts],
        rows: Mapping[str, np.ndarray],
        trained_model: TrainedModel,
        batches: BatchVocabulary,
        batch_codes: np.ndarray,
        tables: Mapping[str, ad.AnnData],
    ) -> None:
        self.modalities = [name for name in trained_model.modalities if name in counts]
        self.n_cells = len(obs)
        self.batches = batches
        self._obs, self._counts, self._rows, self._batch_codes = obs, counts, rows, batch_codes
        self._all_modalities = list(trained_model.modalities)
        self.tables = tables

    def __repr__(self) -> str:
        return f"{format_count(self.n_cells, 'cell')} with {list_names(self.modalities)} in memory"

    def describe_source(self) -> dict[str, Any]:
        """Say where the cells come from."""
        return {"store": "", "fingerprint": "", "modalities": self.modalities}

    def slice_cells(self, batch_size: int) -> list[CellSlice]:
        """Cut the cells into slices of the same modalities, of `batch_size` cells at most.

        Args:
            batch_size: cells of a slice, at least one.

        Raises:
            ConfigError: `batch_size` is no such number.
        """
        require_number("batch_size", batch_size, 1, whole=True)
        observed = np.stack([self._rows[name] >= 0 for name in self.modalities], axis=1)
        patterns, pattern_of_cell = np.unique(observed, axis=0, return_inverse=True)
        slices = []
        for number, pattern in enumerate(patterns):
            if not pattern.any():
                continue
            carried = tuple(m for m, has in zip(self.modalities, pattern, strict=True) if has)
            rows = np.flatnonzero(pattern_of_cell.ravel() == number)
            slices += [
                CellSlice(carried, rows[start : start + batch_size])
                for start in range(0, len(rows), batch_size)
            ]
        return slices

    def read_slice(self, cells: CellSlice) -> Batch:
        """Read the cells of a slice; columns of `observed` are in the model's order."""
        everyone = torch.arange(cells.n_cells)
        paired = everyone if len(cells.modalities) > 1 else everyone[:0]
        measured = {
            name: ObservedModality(
                everyone, self._counts[name].read_counts(self._rows[name][cells.rows]), paired
            )
            for name in cells.modalities
        }
        pattern = torch.tensor([name in measured for name in self._all_modalities])
        return Batch(
            pattern.repeat(cells.n_cells, 1),
            torch.from_numpy(self._batch_codes[cells.rows]),
            measured,
        )

    def read_obs(self) -> pd.DataFrame:
        """Return obs of the AnnData or MuData, (N) rows; `batch` holds what the model was told."""
        return self._obs.copy()


def collect_memory_cells(
    source: ad.AnnData | md.MuData, trained_model: TrainedModel, choices: MemoryChoices
) -> MemoryCells:
    """Bring cells in memory to what a model knows; see `cells.open_cells`.

    Warns of features that are missing, of modalities that are left out, and of cells without any
    counts.

    Raises:
        DataError: they cannot be brought there.
    """
    _require_modalities(source, trained_model, choices)
    named = name_parts(source, trained_model, choices)
    # A view may be left without any cell of a modality.
    named = {name: part for name, part in named.items() if part.adata.n_obs}
    counts, rows = {}, {}
    for name, part in named.items():
        counts[name] = _align_part(part, name, trained_model, choices)
        rows[name] = _find_rows(source, part.adata)
    for name, aligned in counts.items():
        empty = aligned.mark_empty()
        rows[name] = np.where((rows[name] >= 0) & ~empty[rows[name]], rows[name], -1)
    _report_empty(source, rows)
    levels = find_levels(source, choices.batch_key, trained_model.batch_vocabulary)
    batches, codes = combine_levels(levels or {BATCH: [UNKNOWN] * source.n_obs})
    obs = collect_obs(source)
    if levels is not None:
        obs[BATCH] = pd.Categorical.from_codes(codes, categories=pd.Index(batches.names))
        obs = obs.assign(**batches.decode_levels(codes))
    tables = {name: part.adata for name, part in named.items()}
    return MemoryCells(obs, counts, rows, trained_model, batches, codes, tables)


def _require_modalities(
    source: ad.AnnData | md.MuData, trained_model: TrainedModel, choices: MemoryChoices
) -> None:
    """Require that what is chosen by modality is chosen of modalities that there are."""
    known = [*trained_model.modalities, *(source.mod if isinstance(source, md.MuData) else ())]
    typed = choices.arguments
    for argument, given in (
        (typed.layer, choices.layer),
        (typed.feature_ids, choices.feature_ids),
    ):
        absent = [n for n in given if n not in known] if isinstance(given, Mapping) else []
        if absent:
            raise DataError(
                "no such modality",
                where=f"{argument}{given!r}",
                got=list_names(absent),
                expected=list_names(dict.fromkeys(known)),
                fix=suggest_names(absent[0], known),
            )


def _align_part(
    part: NamedCounts, name: str, trained_model: TrainedModel, choices: MemoryChoices
) -> AlignedCounts:
    """The counts of one part as the model takes them; warns of features that are missing."""
    layer = choose_value(choices.layer, name)
    matrix, var, where = _choose_matrix(part, layer, name, choices.arguments)
    names = name_columns(part.adata, var, name, choices)
    modality = trained_model.modalities[name]
    used = part.find_columns(var)
    used_names = respell_regions([names[i] for i in used], modality.features)
    used_places, warning = align_features(
        where, used_names, modality, choices.min_known, choices.arguments
    )
    places = np.full(len(names), -1, np.int32)
    places[used] = used_places
    if warning is not None:
        warn_of_cells(warning)
    if sp.issparse(matrix) and matrix.format != "csr":
        matrix = matrix.tocsr()  # which is read by rows, again and again
    others = [other for other in _list_layers(part.adata) if other != layer]
    return AlignedCounts(
        where,
        matrix,
        part.adata.obs_names,
        var.index,
        places,
        modality,
        others,
        choices.arguments,
    )


def _choose_matrix(
    part: NamedCounts, layer: str | None, name: str, arguments: ArgumentNames
) -> tuple[Any, pd.DataFrame, str]:
    """The matrix with the raw counts, var of its columns, and what it is called in messages."""
    adata = part.adata
    layers = _list_layers(adata)
    if layer is None and adata.X is None and len(layers) == 1:
        layer = next(iter(layers))
    if layer in (None, "X") and adata.X is not None:
        return adata.X, adata.var, f"{part.where}, X"
    if layer not in layers:
        raise DataError(
            "there is no such matrix",
            where=f"{part.where}: {'X' if layer is None else f'layer {layer!r}'}",
            got=f"layers: {list_names(layers) or 'none'}",
            fix=arguments.join_advice(
                layer=f'name one of them: `{{}}{{"{name}": "{next(iter(layers))}"}}`'
            )
            if layers
            else f"leave `{arguments.layer}` out"
            if layer
            else "put the counts into X",
        )
    if layer == "raw.X":
        return layers[layer], adata.raw.var, f"{part.where}, raw.X"
    return layers[layer], adata.var, f"{part.where}, layer {layer!r}"


def _list_layers(adata: ad.AnnData) -> dict[str, Any]:
    """List the matrices of an AnnData beside X, by name."""
    raw = {} if adata.raw is None else {"raw.X": adata.raw.X}
    return dict(adata.layers) | raw


def _find_rows(source: ad.AnnData | md.MuData, adata: ad.AnnData) -> np.ndarray:
    """The row of each cell of the source in one of its AnnData, (N,) int64; -1: not there."""
    if adata is source:
        return np.arange(source.n_obs)
    for names in (source.obs_names, adata.obs_names):
        if names.has_duplicates:
            raise DataError(
                "cells of a MuData need names of their own",
                got=list_names(names[names.duplicated()].unique()),
                fix="`adata.obs_names_make_unique()` for each modality, with the same names for "
                "the same cells, then make the MuData again",
            )
    rows = adata.obs_names.get_indexer(source.obs_names)
    if (rows >= 0).sum() < adata.n_obs:
        raise DataError(
            "a modality has cells that the MuData does not list",
            got=list_names(adata.obs_names.difference(source.obs_names)),
            fix="`mdata.update()` lists them",
        )
    return rows.astype(np.int64)


def _report_empty(source: ad.AnnData | md.MuData, rows: Mapping[str, np.ndarray]) -> None:
    """Warn of cells without any counts, which get no answer; refuse cells that all have none."""
    if not source.n_obs:
        raise DataError("there are no cells", got=f"{type(source).__name__} with n_obs = 0")
    measured = np.zeros(source.n_obs, bool)
    for row in rows.values():
        measured |= row >= 0
    empty = source.obs_names[~measured]
    if len(empty) == source.n_obs:
        raise DataError(
            "no cell has counts of features that the model knows",
            got=f"{format_count(source.n_obs, 'cell')} without",
            expected=f"counts of {list_names(rows)}",
        )
    if len(empty):
        warn_of_cells(
            f"no answer but NaN for {format_count(len(empty), 'cell')} without counts that the "
            f"model knows ({list_names(empty)})"
        )
