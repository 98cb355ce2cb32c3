"""What obs of an AnnData or MuData in memory says of its cells."""

from __future__ import annotations

from collections.abc import Iterator

import anndata as ad
import mudata as md
import pandas as pd

from clue_dist.errors import DataError, list_names

BATCH_COLUMN = "batch"  # of obs, where no other is named


def collect_obs(source: ad.AnnData | md.MuData) -> pd.DataFrame:
    """Collect the columns of obs, (N) rows, each once.

    A MuData shows a column that several modalities have once for each, as `rna:donor` and
    `adt:donor`. Where they do not contradict each other they become one, `donor`.
    """
    obs = source.obs.copy()
    if isinstance(source, ad.AnnData):
        return obs
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
