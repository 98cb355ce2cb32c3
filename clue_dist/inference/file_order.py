"""An embedding in the order of a file that its cells came from, with the barcodes of that file."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr

from clue_dist.errors import ConfigError, DataError, format_count, shorten_error
from clue_dist.files import parse_path
from clue_dist.process import print_error
from clue_dist.store.manifest import is_store

_HDF5_ENDINGS = (".h5ad", ".h5mu")


def parse_like(text: str) -> tuple[str, Path]:
    """Read `[DATASET:]FILE`, as inputs of a conversion are typed.

    Returns:
        The data set, "" where none is named, and the file.
    """
    dataset, colon, rest = text.partition(":")
    if colon and not Path(text).exists():
        return dataset, parse_path(rest)
    return "", parse_path(text)


def read_cell_names(path: Path) -> pd.Index:
    """Read the names of the cells of a file, in its order.

    Args:
        path: an .h5ad, .h5mu or .zarr; or a text with a name on each line.

    Raises:
        DataError: it is none of these.
    """
    if not path.exists():
        raise DataError("no such file", where=f"--like {path}", fix="check the path")
    if is_store(path):
        raise DataError(
            "a store has an order of its own, and not that of a file",
            where=f"--like {path}",
            expected="the file that it was made of",
        )
    try:
        if path.suffix in _HDF5_ENDINGS:
            with h5py.File(path) as file:
                return pd.Index(ad.io.read_elem(file["obs"]).index.astype(str))
        if path.is_dir():
            return pd.Index(ad.io.read_elem(zarr.open_group(path, mode="r")["obs"]).index)
        return pd.Index(path.read_text("utf-8").split())
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            "the names of its cells cannot be read",
            where=f"--like {path}",
            got=shorten_error(error),
            expected=".h5ad, .h5mu, .zarr, or a text with a barcode on each line",
        ) from error


def require_file_order(out: Path, like: str) -> None:
    """Require that an embedding at `out` can have the order of a file.

    Raises:
        ConfigError: it is a MuData, which has an order of its own.
        DataError: the file cannot be read.
    """
    if out.suffix == ".h5mu":
        raise ConfigError(
            "a MuData puts its cells in an order of its own",
            where=f"--like {like}",
            got=f"--out {out}",
            fix="--out OUT.h5ad, or OUT.zarr",
        )
    read_cell_names(parse_like(like)[1])


def restore_file_order(table: ad.AnnData, like: str) -> ad.AnnData:
    """Bring an embedding into the order of a file. Cells that it lacks get NaN.

    Args:
        table: the embedding; its cells are named by barcode, `DATASET:BARCODE` where data sets
            were named.
        like: `[DATASET:]FILE`.

    Raises:
        DataError: no cell of the file was embedded, or barcodes do not tell the cells apart.
    """
    dataset, path = parse_like(like)
    names = read_cell_names(path)
    column = table.obs.get("barcode")
    known = table.obs_names if column is None else pd.Index(column)
    wanted = names if not dataset else f"{dataset}:" + names
    rows = _find_rows(known, wanted, like)
    obs = table.obs.drop(columns="barcode", errors="ignore").set_axis(known)
    if (rows < 0).any():
        obs = _allow_missing_values(obs)
    obs = obs.reindex(wanted).set_axis(names)
    obsm = {key: _take_rows(np.asarray(values), rows) for key, values in table.obsm.items()}
    return ad.AnnData(obs=obs, obsm=obsm, uns=dict(table.uns))


def _find_rows(known: pd.Index, wanted: pd.Index, like: str) -> np.ndarray:
    """Find the cells of a file in an embedding; warns of cells that only one of them has.

    Args:
        known: names of the embedded cells.
        wanted: names of the cells of the file.
        like: the file, for messages.

    Returns:
        The row of each cell of the file, -1 where it was not embedded.
    """
    _, path = parse_like(like)
    if known.has_duplicates:
        raise DataError(
            "cells that share a barcode cannot be told apart",
            where=f"--like {like}",
            got=known[known.duplicated()][0],
            fix="name the data set of each file at conversion, `lane1:FILE`, and here likewise",
        )
    rows = known.get_indexer(wanted)
    n_missing = int((rows < 0).sum())
    if n_missing == len(rows):
        raise DataError(
            "no cell of the file was embedded",
            where=f"--like {like}",
            got=f"names like {wanted[0] if len(wanted) else 'none'}",
            expected=f"names like {known[0]}",
            fix="the store's names may have a data set before them: --like DATASET:FILE",
        )
    if n_missing:
        print_error(
            f"warning: NaN for {format_count(n_missing, 'cell')} of {path} that the store lacks"
        )
    n_left_out = len(known) - len(np.unique(rows[rows >= 0]))
    if n_left_out:
        print_error(
            f"warning: left out: {format_count(n_left_out, 'embedded cell')} that {path} lacks"
        )
    return np.asarray(rows)


def _allow_missing_values(obs: pd.DataFrame) -> pd.DataFrame:
    """Bring plain integers and booleans, which have no missing value, to types that have one."""
    nullable = {"b": "boolean", "i": "Int64"}
    plain = [name for name in obs if isinstance(obs[name].dtype, np.dtype)]
    kinds = {name: obs[name].dtype.kind for name in plain}
    return obs.astype({name: nullable[kind] for name, kind in kinds.items() if kind in nullable})


def _take_rows(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Take rows of (N, width); where a row is -1, the result has NaN."""
    taken = values[rows]
    taken[rows < 0] = np.nan
    return taken
