"""What obs of an AnnData or MuData in memory says of its cells."""

from __future__ import annotations

from collections.abc import Sequence

import anndata as ad
import h5py
import mudata as md
import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype

from clue_dist.errors import (
    ConfigError,
    DataError,
    format_count,
    list_names,
    name_argument,
    suggest_names,
)
from clue_dist.inference.cells.named_counts import warn_of_cells
from clue_dist.store.batch_vocabulary import BATCH, UNKNOWN, BatchVocabulary
from clue_dist.store.obs_columns import MISSING_TEXTS, name_value

# What to do where cells do not say of which batch they are.
NAME_BATCHES = (
    "name the column that holds the batch: --batch-key at conversion, batch_key= in Python"
)


def collect_obs(source: ad.AnnData | md.MuData) -> pd.DataFrame:
    """Collect the columns of obs, (N) rows, each once.

    A MuData shows a column that several modalities have once for each, as `rna:donor` and
    `adt:donor`. Where they do not contradict each other they become one, `donor`.
    """
    obs = source.obs.copy()
    if isinstance(source, md.MuData):
        obs = _merge_columns(source, obs)
    for column, values in obs.items():
        # Cells without a value make objects of booleans and integers, which no file takes.
        nullable = {"boolean": "boolean", "integer": "Int64"}.get(infer_dtype(values, skipna=True))
        if values.dtype == object and nullable is not None:
            obs[column] = values.astype(nullable)
    return obs


def _merge_columns(source: md.MuData, obs: pd.DataFrame) -> pd.DataFrame:
    """Add the columns of modalities to those of all cells, one for each name where they agree."""
    for column in dict.fromkeys(name for adata in source.mod.values() for name in adata.obs):
        frames = {
            name: adata.obs[column].reindex(source.obs_names).astype(object)
            for name, adata in source.mod.items()
            if column in adata.obs
        }
        merged = next(iter(frames.values()))
        for values in frames.values():
            merged = merged.where(merged.notna(), values)
        if all((values.isna() | (values == merged)).all() for values in frames.values()):
            obs = obs.drop(columns=[f"{name}:{column}" for name in source.mod], errors="ignore")
            if column not in obs:
                obs[column] = merged.infer_objects()
    return obs


def require_writable_obs(obs: pd.DataFrame, ending: str) -> None:
    """Require that a file can hold what is known of cells, before anything is computed.

    Args:
        obs: (N) rows.
        ending: of the file.

    Raises:
        DataError: a column holds what no file takes, or has a name that none takes; names of
            cells repeat, which a MuData does not take.
    """
    if numbers := [name for name in obs if not isinstance(name, str)]:
        raise DataError(
            "columns of obs need texts as names",
            got=list_names(map(repr, numbers)),
            fix="`obs.columns = obs.columns.astype(str)`",
        )
    forbids_slash = ending == ".zarr"
    if unfit := [n for n in obs if n in ("", "_index") or (forbids_slash and "/" in str(n))]:
        raise DataError(
            f"a column of obs has a name that no {ending} takes",
            got=list_names(map(repr, unfit)),
            fix="`obs.rename(columns=...)`",
        )
    title = obs.index.name
    if title in obs and not (obs[title].astype(str) == obs.index.astype(str)).all():
        raise DataError(
            "a column of obs has the same name as the index, and other values",
            got=repr(title),
            fix="`obs.index.name = None`",
        )
    if ending == ".h5mu" and obs.index.has_duplicates:
        raise DataError(
            "cells of an .h5mu need names of their own",
            got=list_names(obs.index[obs.index.duplicated()].unique()),
            fix="`obs_names_make_unique()` first, or write an .h5ad",
        )
    _require_writable_values(obs)


def _require_writable_values(obs: pd.DataFrame) -> None:
    """Require that anndata can write each column of objects, by writing it into memory."""
    with h5py.File("obs", "w", driver="core", backing_store=False) as file:
        for name in obs:
            if getattr(obs[name].dtype, "kind", "O") not in "OMm":
                continue
            column = pd.DataFrame({name: obs[name].array}, index=[str(i) for i in range(len(obs))])
            table = ad.AnnData(obs=column)
            try:
                table.strings_to_categoricals()
                ad.io.write_elem(file, "obs", table.obs)
            except Exception as error:
                raise DataError(
                    "a column of obs holds what no file takes",
                    where=f"obs[{name!r}]",
                    got=infer_dtype(obs[name]),
                    fix="drop the column, or make it text: `.astype(str)`",
                ) from error


def list_obs_columns(source: ad.AnnData | md.MuData) -> list[str]:
    """List the columns of obs, of all cells and of each modality."""
    frames = [source.obs]
    if isinstance(source, md.MuData):
        frames += [adata.obs for adata in source.mod.values()]
    return [*dict.fromkeys(name for frame in frames for name in frame.columns)]


def find_levels(
    source: ad.AnnData | md.MuData,
    keys: str | Sequence[str] | None,
    known: BatchVocabulary,
) -> dict[str, list[str]] | None:
    """Find the levels of the batch of each cell.

    Args:
        source: the cells.
        keys: columns of obs, of all cells or of a modality: one for each covariate of the model, in
            their order, or some that are called as covariates are. By default those that are there
            of the covariates' own names; of an only covariate else `batch`.
        known: what the model knows.

    Returns:
        By covariate of the model (N,) names, "" where unknown; None where no column is named, and
        none of these is there.

    Raises:
        DataError: there is no such column; columns that are not the model's covariates.

    Warns of cells on whose batch modalities disagree.
    """
    frames = [source.obs]
    if isinstance(source, md.MuData):
        frames += [adata.obs.reindex(source.obs_names) for adata in source.mod.values()]
    chosen = _choose_columns(keys, known, list_obs_columns(source))
    if not chosen:
        return None
    levels = {name: [UNKNOWN] * source.n_obs for name in known.covariates}
    for covariate, column in chosen.items():
        n_disputed = 0
        for values in (frame[column] for frame in frames if column in frame):
            pairs = [*zip(levels[covariate], name_values(values), strict=True)]
            n_disputed += sum(bool(name and text and name != text) for name, text in pairs)
            levels[covariate] = [name or text for name, text in pairs]
        if n_disputed:
            cells = format_count(n_disputed, "cell")
            warn_of_cells(
                f"modalities disagree on the {covariate} of {cells}: the first one counts"
            )
    return levels


def _choose_columns(
    keys: str | Sequence[str] | None, known: BatchVocabulary, columns: list[str]
) -> dict[str, str]:
    """The column of each covariate that is read, by covariate."""
    covariates = list(known.covariates)
    if keys is None:
        named = {name: name for name in covariates if name in columns}
        if not named and not known.has_several and BATCH in columns:
            named = {covariates[0]: BATCH}
        return named
    given = [keys] if isinstance(keys, str) else list(keys)
    if not given:
        raise DataError(
            "no column of batches is named", where="batch_key", got=keys, fix="leave batch_key out"
        )
    chosen = dict(zip(covariates, given, strict=False))
    if len(given) != len(covariates):
        chosen = {name: name for name in given}
        if absent := [name for name in given if name not in covariates]:
            raise DataError(
                "the model knows batches by other covariates",
                where=f"batch_key={keys!r}",
                got=list_names(absent),
                expected=f"{list_names(covariates)}, or a column for each",
            )
    for column in chosen.values():
        if column not in columns:
            raise DataError(
                "obs has no such column",
                where=f"batch_key={keys!r}",
                got=f"columns: {list_names(columns, 30) or 'none'}",
                fix=suggest_names(column, columns),
            )
    return chosen


def read_named_column(obs: pd.DataFrame, argument: str, column: str, owner: str) -> np.ndarray:
    """Read the names that a column of obs gives to cells, (N,) texts; see `name_values`.

    Args:
        obs: (N) rows.
        argument: that the column was given as, for the message.
        column: its name.
        owner: of obs, for the message.

    Raises:
        ConfigError: there is no such column.
    """
    if not (isinstance(column, str) and column in obs):
        raise ConfigError(
            f"{owner} has no such column",
            where=name_argument(argument, column),
            got=f"columns: {list_names(obs.columns, 30) or 'none'}",
            fix=suggest_names(column, list(map(str, obs.columns))),
        )
    return name_values(obs[column])


def name_values(values: pd.Series) -> np.ndarray:
    """Name the values of a column as a store does, (N,) texts; see `name_value`.

    What is missing is "", and so is the text that a program has made of it.
    """
    codes, found = pd.factorize(values)
    names = ["" if name in MISSING_TEXTS else name for name in map(name_value, found)]
    return np.array([*names, ""], object)[codes]  # -1, missing, is the last
