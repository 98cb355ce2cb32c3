"""AnnData whose counts do not lie in X: layers, raw, and the fragments of SnapATAC2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from clue_dist.errors import DataError
from data_prep.options import InputArgument
from data_prep.readers import fragments
from data_prep.readers.formats import describe_file
from data_prep.suggested_command import guess_command
from tests.unit.prep_helpers import (
    assert_same_counts,
    convert_files,
    make_anndata,
    make_counts,
    read_counts,
)
from tests.unit.test_prep_fragments import count_bins, make_fragments


def _make_layers(**layers: pd.DataFrame) -> ad.AnnData:
    first = make_anndata(next(iter(layers.values())))
    adata = ad.AnnData(obs=first.obs, var=first.var)
    for name, values in layers.items():
        adata.layers[name] = sp.csr_matrix(values.to_numpy().astype("float32"))
    return adata


def _write_zarr_without_x(adata: ad.AnnData, path: Path) -> None:
    """As newer versions of anndata, which write an X of type null."""
    with ad.settings.override(zarr_write_format=3):
        adata.write_zarr(path)
    group = zarr.open_group(path, mode="r+")
    if "X" not in group:
        array = group.create_array("X", shape=(), dtype="bool")
        array.attrs["encoding-type"] = "null"


@pytest.mark.parametrize("write", [ad.AnnData.write_h5ad, _write_zarr_without_x])
def test_the_only_layer_is_read(tmp_path: Path, write: Callable[[ad.AnnData, Path], None]) -> None:
    counts, path = make_counts(20, 8), tmp_path / "a.h5ad"
    write(_make_layers(counts=counts), path)
    assert_same_counts(
        read_counts(convert_files(tmp_path / "s.zarr", f"rna={path}"), "rna"), counts
    )


def test_one_of_several_layers_is_asked_for(tmp_path: Path) -> None:
    counts, path = make_counts(20, 8), tmp_path / "a.h5ad"
    _make_layers(a_norm=counts * 0.5, counts=counts).write_h5ad(path)
    with pytest.raises(DataError, match=r"layers: counts, a_norm(.|\n)*--layer rna=counts"):
        convert_files(tmp_path / "s.zarr", f"rna={path}")
    store = convert_files(tmp_path / "s.zarr", f"rna={path}", layers=["counts"])
    assert_same_counts(read_counts(store, "rna"), counts)


def test_layers_in_a_mudata(tmp_path: Path) -> None:
    counts, path = make_counts(20, 8), tmp_path / "m.h5mu"
    mudata.set_options(pull_on_update=False)
    rna, adt = _make_layers(counts=counts), make_anndata(make_counts(20, 4, 1, "p"))
    mudata.MuData({"rna": rna, "adt": adt}).write(path)
    assert_same_counts(read_counts(convert_files(tmp_path / "s.zarr", str(path)), "rna"), counts)


def test_file_without_any_matrix(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    adata = ad.AnnData(obs=make_anndata(make_counts(20, 8)).obs)
    adata.obsm["X_umap"] = np.zeros((20, 2))
    adata.write_h5ad(path)
    with pytest.raises(DataError, match=r"no matrix of cells x features(.|\n)*obsm: X_umap"):
        convert_files(tmp_path / "s.zarr", f"rna={path}")


@pytest.mark.parametrize("typed", ["adt={}", "adt={}:obsm/proteins"])
def test_the_only_table_of_obsm_is_read(tmp_path: Path, typed: str) -> None:
    counts, path = make_counts(20, 8), tmp_path / "a.h5ad"
    adata = ad.AnnData(obs=make_anndata(counts).obs)
    adata.obsm["X_umap"], adata.obsm["proteins"] = np.full((20, 2), 0.5), counts
    adata.write_h5ad(path)
    store = convert_files(tmp_path / "s.zarr", typed.format(path))
    assert_same_counts(read_counts(store, "adt"), counts)
    with pytest.raises(DataError, match=r"write it as `adt=a\.h5ad`"):
        convert_files(tmp_path / "x.zarr", str(path))


def _write_snapatac(path: Path, table: pd.DataFrame, single: bool = False) -> Path:
    """Write fragments as SnapATAC2 does; single reads lie on both strands, by turns."""
    names, length = ["chr1", "chr2", "chr10", "chrX"], 50_000
    cells = sorted(set(table["barcode"]))
    size = (table["end"] - table["start"]).to_numpy()
    base = table["chromosome"].map(names.index).to_numpy() * length + table["start"].to_numpy()
    if single:
        base[::2] += size[::2] - 1
        size[::2] *= -1
    row = table["barcode"].map(cells.index).to_numpy()
    order = np.lexsort((base, row))
    indptr = np.searchsorted(row[order], np.arange(len(cells) + 1))
    shape = (len(cells), length * len(names))
    adata = ad.AnnData(obs=pd.DataFrame(index=cells))
    matrix = sp.csr_matrix((size[order], base[order], indptr), shape=shape)
    adata.obsm["fragment_single" if single else "fragment_paired"] = matrix
    chromosomes = {"reference_seq_name": names, "reference_seq_length": [length] * len(names)}
    adata.uns["reference_sequences"] = pd.DataFrame(chromosomes, index=list("0123"))
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["var"]
    return path


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("cut_sites", [False, True])
def test_fragments_of_snapatac(
    tmp_path: Path, single: bool, cut_sites: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fragments, "CHUNK_LINES", 70)
    table = make_fragments(500)
    path = _write_snapatac(tmp_path / "a.h5ad", table, single)
    flags = {"bins": ["atac=1000"], "cut_sites": cut_sites}
    store = convert_files(tmp_path / "s.zarr", f"atac={path}", **flags)  # type: ignore[arg-type]
    assert_same_counts(read_counts(store, "atac"), count_bins(table, cut_sites))


def test_fragments_of_snapatac_are_described(tmp_path: Path) -> None:
    path = _write_snapatac(tmp_path / "a.h5ad", make_fragments(500))
    file = describe_file(path)
    assert file.parts[0].barcodes[:2] == ["c0", "c1"]
    command = guess_command([InputArgument(str(path), path)], {0: file})
    assert command.words == [f"atac={path}", "--bins", "atac=5000"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("indices", 10**6, "outside its chromosomes"),
        ("indices", -1, "outside its chromosomes"),
        ("data", 0, "not a fragment"),
        ("indptr", 10**6, "not sorted"),
    ],
)
def test_damaged_fragments_of_snapatac(tmp_path: Path, name: str, value: int, said: str) -> None:
    path = _write_snapatac(tmp_path / "a.h5ad", make_fragments(500))
    with h5py.File(path, "r+") as file:
        file[f"obsm/fragment_paired/{name}"][3] = value
    with pytest.raises(DataError, match=said):
        convert_files(tmp_path / "s.zarr", f"atac={path}", bins=["atac=1000"])
