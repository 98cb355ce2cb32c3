"""AnnData and MuData in Zarr folders, versions 2 and 3, here and behind a URL."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from clue_dist.errors import DataError, StoreError
from tests.s3 import serve
from tests.unit.prep_helpers import (
    assert_same_counts,
    convert_files,
    make_anndata,
    make_counts,
    read_counts,
    read_field,
)

pytestmark = pytest.mark.usefixtures("small_tasks")


def _write_zarr(
    path: Path,
    counts: pd.DataFrame,
    version: int = 3,
    form: Callable[..., object] = sp.csr_matrix,
    **obs: object,
) -> Path:
    with ad.settings.override(zarr_write_format=version):
        make_anndata(counts, form, **obs).write_zarr(path, chunks=(7, counts.shape[1]))
    return path


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_anndata(tmp_path: Path, version: int, form: Callable[..., object]) -> None:
    counts = make_counts(40, 12)
    labels = pd.Categorical(["T", "B", None, "T"] * 10)
    path = _write_zarr(
        tmp_path / "a.zarr", counts, version, form, batch=["x", "y"] * 20, cell_type=labels
    )
    store = convert_files(tmp_path / "s.zarr", f"rna={path}")
    assert_same_counts(read_counts(store, "rna"), counts)
    assert read_field(store, "batch")["c3"] == "y"
    assert read_field(store, "label")["c2"] is None


def test_tables_in_obsm_and_layers(tmp_path: Path) -> None:
    rna, adt = make_counts(20, 6), make_counts(20, 3, prefix="CD", seed=1)
    adata = make_anndata(rna * 0.5)
    adata.layers["counts"] = sp.csr_matrix(rna.to_numpy())
    adata.obsm["protein_expression"] = adt
    adata.write_zarr(tmp_path / "a.zarr")
    path = tmp_path / "a.zarr"
    inputs = (f"rna={path}", f"adt={path}:obsm/protein_expression")
    store = convert_files(tmp_path / "s.zarr", *inputs, layers=["counts"])
    assert_same_counts(read_counts(store, "rna"), rna)
    assert_same_counts(read_counts(store, "adt"), adt)


def test_mudata(tmp_path: Path) -> None:
    rna, adt = make_counts(20, 6), make_counts(20, 3, prefix="CD", seed=1)
    mudata.set_options(pull_on_update=False)
    mudata.MuData({"rna": make_anndata(rna), "adt": make_anndata(adt)}).write_zarr(
        tmp_path / "m.zarr"
    )
    store = convert_files(tmp_path / "s.zarr", str(tmp_path / "m.zarr"))
    assert store.modalities == ["rna", "adt"]
    assert_same_counts(read_counts(store, "adt"), adt)


@pytest.mark.slow
@pytest.mark.parametrize("version", [2, 3])
def test_url(tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    counts = make_counts(20, 6)
    path = _write_zarr(tmp_path / "a.zarr", counts, version)
    with serve() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        url = server.upload(path, "deep/a.zarr")
        store = convert_files(tmp_path / "s.zarr", f"rna={url}")
        assert_same_counts(read_counts(store, "rna"), counts)
        assert store.manifest.provenance["inputs"][0]["file"] == "a.zarr"
        with pytest.raises((StoreError, DataError)):
            convert_files(tmp_path / "x.zarr", f"rna={url}s")


@pytest.mark.parametrize("array", ["data", "indices"])
def test_folder_that_was_half_copied(tmp_path: Path, array: str) -> None:
    path = _write_zarr(tmp_path / "a.zarr", make_counts(40, 12))
    (path / "X" / array / "c" / "0").unlink()
    with pytest.raises(DataError, match="chunks of the values are missing"):
        convert_files(tmp_path / "s.zarr", f"rna={path}")


def _write_small_chunks(path: Path, counts: pd.DataFrame) -> Path:
    """Write an AnnData whose indptr has chunks of five numbers; those of zeros are not written."""
    root = zarr.open_group(_write_zarr(path, counts))
    values = root["X/indptr"][:]
    del root["X/indptr"]
    root.create_array("X/indptr", data=values, chunks=(5,))
    zarr.consolidate_metadata(path)
    return path


@pytest.mark.parametrize("n_lost", [1, 2])
def test_first_chunks_of_indptr_that_were_lost(tmp_path: Path, n_lost: int) -> None:
    """What is left is a matrix of cells without counts, and of one that has them all."""
    path = _write_small_chunks(tmp_path / "a.zarr", make_counts(40, 12))
    for number in range(n_lost):
        (path / "X/indptr/c" / str(number)).unlink()
    with pytest.raises(DataError, match="chunks of indptr are missing"):
        convert_files(tmp_path / "s.zarr", f"rna={path}")


def test_cells_without_counts_have_no_chunks_of_indptr(tmp_path: Path) -> None:
    counts = make_counts(40, 12)
    counts.iloc[:15] = 0
    path = _write_small_chunks(tmp_path / "a.zarr", counts)
    assert not (path / "X/indptr/c/0").exists()
    store = convert_files(tmp_path / "s.zarr", f"rna={path}")
    assert_same_counts(read_counts(store, "rna"), counts.iloc[15:])


def test_array_that_claims_more_than_there_is(tmp_path: Path) -> None:
    path = _write_zarr(tmp_path / "a.zarr", make_counts(40, 12), 2)
    file = path / "obs" / "_index" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": [10**12]}))
    (path / ".zmetadata").unlink()
    with pytest.raises(DataError, match="says that it holds more"):
        convert_files(tmp_path / "s.zarr", f"rna={path}")


def test_store_is_no_input(tmp_path: Path) -> None:
    path = _write_zarr(tmp_path / "a.zarr", make_counts(40, 12))
    convert_files(tmp_path / "s.zarr", f"rna={path}")
    with pytest.raises(DataError, match="this is a store"):
        convert_files(tmp_path / "t.zarr", f"rna={tmp_path / 's.zarr'}")


def test_texts_that_are_said_to_be_truth_values(tmp_path: Path) -> None:
    """Each of them would be true. Zarr itself refuses them in version 2."""
    batch = pd.Categorical(["x", "y"] * 20)
    path = _write_zarr(tmp_path / "a.zarr", make_counts(40, 12), batch=batch)
    file = path / "obs/batch/categories/zarr.json"
    change = {"data_type": "bool", "fill_value": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    zarr.consolidate_metadata(path)
    with pytest.raises(DataError, match="an array of bool that is stored as texts"):
        convert_files(tmp_path / "s.zarr", f"rna={path}")


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    """To read them would run what they say."""
    path = _write_zarr(tmp_path / "a.zarr", make_counts(40, 12), 2)
    file = path / "obs" / "_index" / ".zarray"
    content = json.loads(file.read_text())
    content["filters"].append({"id": "pickle"})
    file.write_text(json.dumps(content))
    (path / ".zmetadata").unlink()
    with pytest.raises(DataError, match="Python objects"):
        convert_files(tmp_path / "s.zarr", f"rna={path}")
