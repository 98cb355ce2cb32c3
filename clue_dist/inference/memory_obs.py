"""What obs of an AnnData or MuData in memory says of its cells."""

from __future__ import annotations

from collections.abc import Iterator

import anndata as ad
import h5py
import mudata as md
import pandas as pd
from pandas.api.types import infer_dtype

from clue_dist.errors import DataError, list_names

BATCH_COLUMN = "batch"  # of obs, where no other is named


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
        DataError: a column holds what no file takes; names repeat, which a MuData does not take.
    """
    if ending == ".h5mu" and obs.index.has_duplicates:
        raise DataError(
            "cells of an .h5mu need names of their own",
            got=list_names(obs.index[obs.index.duplicated()].unique()),
            fix="`obs_names_make_unique()` first, or write an .h5ad",
        )
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


def find_batches(
    source: ad.AnnData | md.MuData, key: str | None, trained_key: str = ""
) -> list[str] | None:
    """Find the batch of each cell.

    Args:
        source: the cells.
        key: column of obs, of all cells or of a modality; by default the first that is there of
            `trained_key` and `batch`.
        trained_key: the column that gave the batches that a model was trained on.

    Returns:
        (N,) names, "" where unknown; None where no column is named, and none of these is there.

    Raises:
        DataError: there is no such column.
    """
    frames = [source.obs]
    if isinstance(source, md.MuData):
        frames += [adata.obs.reindex(source.obs_names) for adata in source.mod.values()]
    wanted = [trained_key, BATCH_COLUMN] if key is None else [key]
    column = next((name for name in wanted if any(name in frame for frame in frames)), None)
    found = [frame[column] for frame in frames if column in frame]
    if not found:
        if key is None:
            return None
        columns = dict.fromkeys(name for frame in frames for name in frame.columns)
        raise DataError(
            "obs has no such column",
            where=f"batch_key={key!r}",
            got=f"columns: {list_names(columns, 30) or 'none'}",
        )
    names = [""] * source.n_obs
    for values in found:
        names = [name or text for name, text in zip(names, _write_names(values), strict=True)]
    return names


def _write_names(values: pd.Series) -> Iterator[str]:
    """Values as a store names them: 1.0 is the same as 1, and what is missing is ""."""
    for value in values:
        if pd.isna(value):
            yield ""
        elif isinstance(value, float) and value.is_integer():
            yield str(int(value))
        else:
            yield str(value)
