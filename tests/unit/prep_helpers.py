"""Small inputs in every format, and what a store must hold of them."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from clue_dist.store.reader import Store
from clue_dist.store.rows import CsrRows
from data_prep.cli.conversion_flags import choose_kept_cells
from data_prep.cli.feature_choices import parse_choices
from data_prep.cli.inputs import parse_inputs
from data_prep.conversion import counts as count_matrices
from data_prep.conversion import scatter
from data_prep.convert import convert_inputs
from data_prep.jobs.workers import ThreadPool
from data_prep.options import FIELDS, ObsColumns, PerModality, ReadingOptions
from data_prep.planned_cells import ConversionOptions
from data_prep.readers import sorted_entries

if TYPE_CHECKING:
    import pytest


def shrink_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tasks, parts and pieces, even for a few hundred cells."""
    monkeypatch.setattr(scatter, "TASK_ENTRIES", 500)
    monkeypatch.setattr(sorted_entries, "PART_ENTRIES", 300)
    monkeypatch.setattr(count_matrices, "STEP_ENTRIES", 200)


def make_counts(
    n: int, features: int, seed: int = 0, prefix: str = "g", cells: str = "c", density: float = 0.3
) -> pd.DataFrame:
    """Random counts, no cell empty. (n, features) int64"""
    rng = np.random.default_rng(seed)
    values = rng.poisson(3, (n, features)) * (rng.random((n, features)) < density)
    values[np.arange(n), rng.integers(features, size=n)] += 1
    return pd.DataFrame(
        values, [f"{cells}{i}" for i in range(n)], [f"{prefix}{j}" for j in range(features)]
    )


def make_anndata(
    counts: pd.DataFrame, form: Any = sp.csr_matrix, dtype: str = "float32", **obs: Any
) -> ad.AnnData:
    x = counts.to_numpy().astype(dtype)
    out = ad.AnnData(form(x))
    out.obs_names, out.var_names = counts.index.astype(str), counts.columns.astype(str)
    for column, values in obs.items():
        out.obs[column] = values
    return out


def write_h5ad(
    path: Path, counts: pd.DataFrame, form: Any = sp.csr_matrix, dtype: str = "float32", **obs: Any
) -> Path:
    make_anndata(counts, form, dtype, **obs).write_h5ad(path)
    return path


def write_h5mu(path: Path, **modalities: ad.AnnData) -> Path:
    import mudata

    mudata.set_options(pull_on_update=False)
    mudata.MuData(modalities).write(path)
    return path


def write_10x(
    path: Path, counts: pd.DataFrame, types: list[str], names: list[str] | None = None
) -> Path:
    """Features x cells as CSC; the columns of `counts` are the ids."""
    matrix = sp.csr_matrix(counts.to_numpy().astype("int32"))
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name, values in {
            "data": matrix.data,
            "indices": matrix.indices,
            "indptr": matrix.indptr,
        }.items():
            group[name] = values
        group["shape"] = np.array([counts.shape[1], counts.shape[0]])
        group["barcodes"] = np.array(counts.index, "S")
        columns = {"id": counts.columns, "name": names or counts.columns, "feature_type": types}
        for name, values in columns.items():
            group[f"features/{name}"] = np.array(values, "S")
    return path


def write_mtx(
    folder: Path, counts: pd.DataFrame, types: list[str], zipped: bool = True, seed: int = 0
) -> Path:
    """Entries in random order, counted from 1."""
    folder.mkdir()
    matrix = sp.coo_matrix(counts.to_numpy().T)
    order = np.random.default_rng(seed).permutation(matrix.nnz)
    entries = "".join(f"{matrix.row[i] + 1} {matrix.col[i] + 1} {matrix.data[i]}\n" for i in order)
    sizes = f"{counts.shape[1]} {counts.shape[0]} {matrix.nnz}"
    head = f"%%MatrixMarket matrix coordinate integer general\n% a comment\n{sizes}\n"
    features = "".join(f"{f}\t{f}\t{t}\n" for f, t in zip(counts.columns, types, strict=True))
    barcodes = "".join(f"{b}\n" for b in counts.index)
    for name, text in {
        "matrix.mtx": head + entries,
        "features.tsv": features,
        "barcodes.tsv": barcodes,
    }.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text)
    return folder


def convert_files(
    out: Path,
    *inputs: str,
    workers: int = 2,
    columns: dict[str, str] | None = None,
    layers: Sequence[str] = (),
    ids: Sequence[str] = (),
    barcodes: Sequence[str] = (),
    cut_sites: bool = False,
    features: Sequence[str] = (),
    bins: Sequence[str] = (),
    top: Sequence[str] = (),
    **options: Any,
) -> Store:
    """Convert and open; flags as the command line takes them."""
    keys, kinds = (
        ObsColumns(FIELDS | (columns or {}), frozenset(columns or {})),
        options.get("kinds", {}),
    )
    flags = (
        ("--layer", layers, "layers"),
        ("--feature-ids", ids, "columns"),
        ("--barcodes", barcodes, "lists"),
    )
    reading = ReadingOptions(
        keys, kinds, *(PerModality.parse_values(t, f, w) for f, t, w in flags), cut_sites
    )
    given = parse_inputs(list(inputs), reading)
    names = [source.modality for source in given]
    choices = parse_choices(names, kinds, features, bins, top, options.get("features_from"))
    convert_inputs(
        given,
        out,
        ConversionOptions(
            obs_columns=keys,
            feature_choices=choices,
            kept_cells=choose_kept_cells(given, reading.barcodes),
            **options,
        ),
        ThreadPool(workers),
    )
    return Store(out)


def read_counts(store: Store, modality: str) -> pd.DataFrame:
    """Everything a store holds of a modality: barcodes x features."""
    parts = []
    for reader in store.segments.values():
        if modality in reader.modalities:
            positions = np.arange(reader.n_cells)
            rows = reader.read_rows(modality, positions)
            values = rows.to_scipy().toarray() if isinstance(rows, CsrRows) else rows
            parts.append(pd.DataFrame(values, reader.read_metadata(positions).barcodes))
    out = pd.concat(parts)
    out.columns = pd.Index(store.manifest.modalities[modality].features)
    return out


def read_field(store: Store, field: str) -> dict[str, str | None]:
    """barcode -> name of its batch or label, None if unknown."""
    names = store.manifest.batches if field == "batch" else store.manifest.labels
    out: dict[str, str | None] = {}
    for reader in store.segments.values():
        obs = reader.read_metadata(np.arange(reader.n_cells))
        codes = obs.batch if field == "batch" else obs.label
        out |= {
            str(b): names[c] if c >= 0 else None for b, c in zip(obs.barcodes, codes, strict=True)
        }
    return out


def assert_same_counts(stored: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Equal as tables: same rows by name, same columns in the same order, same values."""
    assert list(stored.columns) == list(expected.columns)
    assert stored.index.is_unique
    assert set(stored.index) == set(expected.index)
    np.testing.assert_array_equal(stored.loc[expected.index].to_numpy(), expected.to_numpy())
