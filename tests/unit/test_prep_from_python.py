"""Cells in memory become a store, as files do, and mistakes name no file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest

from clue_dist.errors import ConfigError, DataError, StoreError
from clue_dist.inference.cells import open_source
from clue_dist.store.reader import Store
from data_prep import from_python
from data_prep.from_python import ConversionRequest, convert_cells
from tests.unit.fit_helpers import make_mudata


def test_what_is_said_in_python_becomes_flags() -> None:
    request = ConversionRequest(
        batch_key="donor",
        layer={"rna": "counts"},
        feature_ids="gene_ids",
        kinds={"hto": "adt"},
        conversion=["--top", "rna=10"],
    )
    assert request.list_flags() == [
        *("--top", "rna=10", "--batch-key", "donor"),
        *("--layer", "rna=counts", "--feature-ids", "gene_ids", "--kind", "hto=adt"),
    ]


@pytest.mark.slow
def test_cells_in_memory_become_a_store(tmp_path: Path) -> None:
    mdata = make_mudata()
    mdata["rna"].uns["what"] = object()  # which no file takes
    mdata["rna"].layers["counts"] = mdata["rna"].X.copy()
    mdata["rna"].X = mdata["rna"].X * 0.5
    mdata.obs["donor"] = np.where(np.arange(mdata.n_obs) % 3, "d1", "d2")
    request = ConversionRequest(batch_key="donor", layer={"rna": "counts"})
    out = tmp_path / "s.zarr"
    for _ in range(2):  # the same cells are left as they are
        convert_cells(mdata, out, request)
    manifest = Store(out).manifest
    assert (manifest.n_cells, manifest.batches) == (60, ["d1", "d2"])
    assert list(manifest.labels) == sorted(mdata["rna"].obs["cell_type"].unique())
    with pytest.raises(StoreError, match="a store of other cells is here already"):
        convert_cells(make_mudata(50), out, request=ConversionRequest())
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


def test_the_layer_x_is_x(tmp_path: Path) -> None:
    table = make_mudata(20)["rna"]
    for layer in ("X", {"rna": "X"}):
        request = ConversionRequest(layer=layer, modality="rna")
        assert request.list_flags() == []
        written = from_python._write_cells(table, tmp_path, request)
        assert ad.read_h5ad(written).X.sum() == table.X.sum()


@pytest.mark.parametrize("ending", ["h5ad", "h5mu"])
def test_a_view_of_a_file_is_the_cells_that_it_shows(tmp_path: Path, ending: str) -> None:
    """A file stands for cells only as long as it says the same of them."""
    mdata, path = make_mudata(20), tmp_path / f"given.{ending}"
    (mdata if ending == "h5mu" else mdata["rna"]).write(path)
    source = open_source(path, leave_counts=True)
    request = ConversionRequest(batch_key="donor")
    assert from_python._name_input(source, tmp_path, request) == str(path)
    for change in ("view", "column"):
        shown = source[:6] if change == "view" else source
        if change == "column":
            shown.obs["donor"] = "d1"
        written = open_source(from_python._name_input(shown, tmp_path, request))
        assert list(written.obs_names) == list(shown.obs_names)
        assert ("donor" in written.obs) == (change == "column")
        counts = [table["rna"] if ending == "h5mu" else table for table in (shown, written)]
        assert counts[0].X[:].sum() == counts[1].X.sum() > 0
    assert source.isbacked


def test_an_interrupted_conversion_of_cells_in_memory_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial_folder = tmp_path / "s.zarr.partial"

    def interrupt(arguments: object) -> None:
        partial_folder.mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(from_python, "convert_as_typed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_cells(make_mudata(20), tmp_path / "s.zarr", ConversionRequest())
    assert list(tmp_path.iterdir()) == []
    # A job that another process has begun, or that files can go on with, stays.
    partial_folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert_cells(make_mudata(20), tmp_path / "s.zarr", ConversionRequest())
    assert list(tmp_path.iterdir()) == [partial_folder]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda table: ad.AnnData(obs=table.obs, var=table.var), "there are no counts"),
        (lambda table: ad.AnnData(table.X.toarray().astype(object)), "does not hold real numbers"),
        (lambda table: md.MuData({}), "there are no cells"),
    ],
)
def test_cells_without_counts_are_refused_before_a_file_is_written(
    tmp_path: Path, make: Callable[[ad.AnnData], ad.AnnData | md.MuData], message: str
) -> None:
    cells = make(make_mudata(20)["rna"])
    with pytest.raises(DataError, match=message) as raised:
        convert_cells(cells, tmp_path / "s.zarr", ConversionRequest(modality="rna"))
    assert str(tmp_path) not in str(raised.value)


def test_features_of_no_known_type_need_the_name_of_a_modality(tmp_path: Path) -> None:
    table = make_mudata(20)["rna"].copy()
    table.var["feature_types"] = "Custom"
    with pytest.raises(DataError, match=r"needs a modality's name\n  got: (.*), of types Custom"):
        convert_cells(table, tmp_path / "s.zarr", ConversionRequest())


@pytest.mark.slow
def test_what_is_left_out_of_cells_in_memory_names_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = make_mudata(20)["rna"].copy()
    table.var["feature_types"] = ["Gene Expression"] * 25 + ["Custom"] * 5
    convert_cells(table, tmp_path / "s.zarr", ConversionRequest())
    assert "cells in memory: 'Custom' (5 features) is left out" in capsys.readouterr().err


@pytest.mark.slow
def test_where_x_is_no_counts_raw_is_named(tmp_path: Path) -> None:
    table = make_mudata(20)["rna"].copy()
    table.raw = table.copy()
    table.X = table.X * 0.5
    with pytest.raises(DataError, match=r"--layer raw\.X"):
        convert_cells(table, tmp_path / "s.zarr", ConversionRequest(modality="rna"))


@pytest.mark.slow
def test_columns_that_flags_name_reach_the_store(tmp_path: Path) -> None:
    table = make_mudata()["rna"].copy()
    table.obs["day"] = pd.Timestamp("2020-02-02")
    flags = ["--keep-obs", "day"]
    convert_cells(table, tmp_path / "s.zarr", ConversionRequest(modality="rna", conversion=flags))
    assert list(Store(tmp_path / "s.zarr").manifest.obs_columns) == ["day"]


@pytest.mark.slow
def test_mistakes_of_a_conversion_are_errors_that_can_be_caught(tmp_path: Path) -> None:
    table = make_mudata()["rna"]
    request = ConversionRequest(modality="rna", conversion=["--nonsense"])
    with pytest.raises(ConfigError, match="unrecognized arguments: --nonsense"):
        convert_cells(table, tmp_path / "s.zarr", request)
    with pytest.raises(DataError, match="needs a modality's name"):
        convert_cells(table, tmp_path / "s.zarr", ConversionRequest())
    convert_cells(table, tmp_path / "s.zarr", ConversionRequest(modality="rna"))
    assert Store(tmp_path / "s.zarr").modalities == ["rna"]
