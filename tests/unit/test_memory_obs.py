"""Cells in memory: their names, their batches, and other columns of obs."""

from __future__ import annotations

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest

from clue_dist.errors import DataError
from clue_dist.inference.cells import open_cells
from clue_dist.inference.cells.memory_obs import name_values, require_writable_obs
from clue_dist.inference.embed import embed_cells
from data_prep.readers.source import CategoryCodes
from tests.unit.memory_helpers import LOADED, make_table


def test_columns_of_one_modality_are_fit_for_a_file(tmp_path):
    other = make_table("adt", cells=3)
    other.obs_names = [f"other-{i}" for i in range(3)]
    other.obs["is_doublet"], other.obs["n_lanes"] = True, 2
    obs = open_cells(md.MuData({"rna": make_table(), "adt": other}), LOADED).read_obs()
    assert (obs["is_doublet"].dtype, obs["n_lanes"].sum()) == ("boolean", 6)
    for ending in (".h5ad", ".h5mu"):
        require_writable_obs(obs, ending)
    ad.AnnData(obs=obs).write_h5ad(tmp_path / "obs.h5ad")


def test_columns_and_names_that_no_file_takes_are_refused_before_any_work(tmp_path):
    table = make_table()
    table.obs["what"] = [{"any": "thing"}] * 5
    with pytest.raises(DataError, match=r"no file takes(.|\n)*what"):
        embed_cells(LOADED, open_cells(table, LOADED), tmp_path / "z.h5ad", run="r")
    for name, endings in (("", ".h5ad"), ("_index", ".h5mu"), ("a/b", ".zarr"), ("cell", ".h5ad")):
        table = make_table()
        table.obs.index.name = "cell"
        table.obs[name] = 1.5
        with pytest.raises(DataError, match=f"column of obs has (.|\\n)*got: '{name}'"):
            embed_cells(LOADED, open_cells(table, LOADED), tmp_path / f"z{endings}", run="r")
    table = make_table()
    table.obs_names = ["cell"] * 5
    with pytest.raises(DataError, match="names of their own"):
        embed_cells(LOADED, open_cells(table, LOADED), tmp_path / "z.h5mu", run="r")
    table = make_table()
    table.obs[0] = 1
    with pytest.raises(DataError, match=r"need texts as names\n  got: 0"):
        embed_cells(LOADED, open_cells(table, LOADED), tmp_path / "z.h5ad", run="r")
    assert list(tmp_path.iterdir()) == []


def test_modalities_that_disagree_on_a_batch_are_told():
    mdata = md.MuData({"rna": make_table(), "adt": make_table("adt")})
    for name, batch in (("rna", ["a", "a", None, "b", "b"]), ("adt", ["a", "b", "b", "b", None])):
        mdata[name].obs["batch"] = batch
    with pytest.warns(UserWarning, match="disagree on the batch of 1 cell: the first one counts"):
        obs = open_cells(mdata, LOADED).read_obs()
    assert obs["batch"].tolist() == ["a", "a", "b", "b", "b"]


def test_batches_are_named_as_in_a_store():
    table = make_table()
    table.obs["donor"] = [1.0, 2.0, np.nan, 3.0, 1.0]
    cells = open_cells(table, LOADED, batch_key="donor")
    (cell_slice,) = cells.slice_cells(10)
    assert cells.read_slice(cell_slice).batch_code.tolist() == [0, 1, -1, 2, 0]
    assert cells.batches.names == ["1", "2", "3"]
    obs = cells.read_obs()
    assert obs["batch"].tolist()[:2] == ["1", "2"]
    assert obs["batch"].isna().tolist() == [False, False, True, False, False]
    with pytest.raises(DataError, match=r"obs has no such column(.|\n)*columns: donor"):
        open_cells(table, LOADED, batch_key="lane")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.5, 2.0, np.nan, 1.5], ["1.5", "2", "", "1.5"]),
        ([2.0, np.nan, 1.0, 2.0], ["2", "", "1", "2"]),
        ([2, 2.0, True, "2"], ["2", "2", "True", "2"]),
    ],
)
def test_each_value_is_named_alone(values, expected):
    """As in a store, whichever other values of a column are there."""
    whole = pd.Series(values)
    assert name_values(whole).tolist() == expected
    for column in (whole, whole[:2], whole[2:]):
        stored = CategoryCodes.encode_values(column)
        named = [[*stored.names, ""][code] for code in stored.codes[:]]
        assert named == name_values(column).tolist()
        assert named == [expected[row] for row in column.index]


def test_a_text_that_stands_for_a_missing_value_names_nothing():
    """As of `obs["donor"].astype(str)`; a store of these cells knows the same names."""
    values = pd.Series(["d1", None, "d2", np.nan, "d1", ""], dtype=object)
    for column in (values, values.astype(str), values.astype(str).astype("category")):
        names = name_values(column)
        assert names.tolist() == ["d1", "", "d2", "", "d1", ""]
        stored = CategoryCodes.encode_values(column)
        assert [[*stored.names, ""][code] for code in stored.codes[:]] == names.tolist()
    table = make_table()
    table.obs["donor"] = values.astype(str)[:5].to_numpy()
    cells = open_cells(table, LOADED, batch_key="donor")
    assert cells.batches.names == ["d1", "d2"]
    assert cells.read_obs()["batch"].isna().tolist() == [False, True, False, True, False]


def test_names_of_cells_must_tell_them_apart():
    table = make_table()
    table.obs_names = ["a", "a", "b", "c", "d"]
    assert open_cells(table, LOADED).n_cells == 5  # alone it needs no names
    with pytest.raises(DataError, match="cells of a MuData need names of their own"):
        open_cells(md.MuData({"rna": table, "adt": make_table("adt")}), LOADED)
