"""Values in memory that a model can and cannot be asked about, and what is said of them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from clue_dist.commands import model_arguments
from clue_dist.errors import ClueError, DataError
from clue_dist.inference.cells import open_cells, open_source
from clue_dist.inference.cells.named_counts import warn_of_cells
from clue_dist.inference.embed import embed_anndata
from clue_dist.ranks import Ranks
from tests.unit.memory_helpers import LOADED, make_table, read_all


@pytest.mark.parametrize("value", [-1.0, 0.5, np.nan, np.inf, 2.0**25])
def test_a_value_that_is_no_count_is_refused_by_cell_and_feature(value):
    table = make_table()
    table.X[3, 7] = value
    with pytest.raises(DataError, match=r"cell 'cell-3', feature 'rna-7'"):
        open_cells(table, LOADED)


def test_an_infinite_value_is_no_large_count():
    table = make_table()
    table.X[3, 7] = np.inf
    with pytest.raises(DataError, match="finite integers"):
        open_cells(table, LOADED)


def test_cells_or_modalities_that_are_none_are_refused():
    with pytest.raises(DataError, match=r"there are no cells\n.*AnnData with n_obs = 0"):
        open_cells(make_table()[:0].copy(), LOADED)
    with pytest.raises(DataError, match=r"an empty list\n  expected: rna"):
        open_cells(make_table(), LOADED, modalities=[])


def test_layers_that_may_hold_the_counts_are_named():
    table = make_table()
    table.layers["counts"], table.raw = table.X.copy(), table
    table.X = table.X * 0.5
    with pytest.raises(DataError, match=r"the layer with them \(there are counts, raw\.X\)"):
        open_cells(table, LOADED)
    np.testing.assert_array_equal(read_all(table, layer="counts")["rna"], make_table().X.toarray())


def test_values_that_are_nearly_whole_are_rounded():
    table = make_table()
    table.X = table.X.toarray() + 1e-4
    np.testing.assert_array_equal(read_all(table)["rna"], make_table().X.toarray())


def test_integers_and_tiny_negative_zeros_are_counts():
    table = make_table()
    dense = table.X.toarray()
    for values in (table.X.astype(np.int16), *map(dense.astype, (np.float16, ">f4", ">i4"))):
        table.X = values
        np.testing.assert_array_equal(read_all(table)["rna"], make_table().X.toarray())
    table = make_table()
    table.X[0, 0] = -1e-9
    assert read_all(table)["rna"][0, 0] == 0


def test_real_values_are_free_but_finite():
    table = make_table("clr")
    table.X = np.asarray(table.X.toarray()) - 7.25
    np.testing.assert_allclose(read_all(table)["clr"], make_table("clr").X.toarray() - 7.25)
    table.X[1, 2] = np.nan
    with pytest.raises(DataError, match="cell 'cell-1', feature 'clr-2'"):
        open_cells(table, LOADED)


def test_layers_go_by_name():
    table = make_table()
    table.layers["counts"] = table.X.copy()
    table.X = table.X / 3
    assert list(read_all(table, layer="counts")) == ["rna"]
    assert list(read_all(table, layer={"rna": "counts"})) == ["rna"]
    with pytest.raises(DataError, match=r"no such matrix(.|\n)*layers: counts"):
        open_cells(table, LOADED, layer="raw")
    with pytest.raises(DataError, match=r"no such modality\n  where: layer=(.|\n)*mean rna\?"):
        open_cells(table, LOADED, layer={"rnaa": "counts"})
    table.raw = make_table()
    np.testing.assert_array_equal(read_all(table, layer="raw.X")["rna"], make_table().X.toarray())
    table = make_table()
    table.layers["counts"] = table.X.copy()
    table.X = None  # the only matrix there is
    assert list(read_all(table)) == ["rna"]


def test_a_warning_points_to_the_line_that_asks():
    with pytest.warns(UserWarning, match="missing") as caught:
        open_cells(make_table(number=9), LOADED)
    assert [warning.filename for warning in caught] == [__file__]


def test_commands_print_warnings_of_cells_without_a_line_of_code(capsys):
    with model_arguments.print_cell_warnings(Ranks()):
        warn_of_cells("doubtful")
    assert capsys.readouterr().err == "warning: doubtful\n"


def test_cells_without_counts_have_no_place():
    table = make_table()
    table.X[2] = 0
    table.X.eliminate_zeros()
    with pytest.warns(UserWarning, match=r"NaN for 1 cell without .*cell-2"):
        cells = open_cells(table, LOADED)
    joint = embed_anndata(LOADED, table, cells)
    assert np.isnan(joint).any(axis=1).tolist() == [False, False, True, False, False]
    assert table.obs["clue_modalities"].tolist() == ["rna", "rna", "", "rna", "rna"]
    table.X = sp.csr_matrix(table.shape)
    with pytest.raises(DataError, match="no cell has counts"):
        open_cells(table, LOADED)


@pytest.mark.parametrize("source", [np.ones((2, 2)), None])
def test_other_objects_are_refused(source):
    with pytest.raises(DataError, match="not cells that a model can be asked about"):
        open_cells(source, LOADED)


def test_files_are_read_and_what_is_none_is_said(tmp_path):
    make_table().write_h5ad(tmp_path / "t.h5ad")
    assert open_cells(str(tmp_path / "t.h5ad"), LOADED).n_cells == 5
    with pytest.raises(DataError, match="no such file"):
        open_cells(tmp_path / "u.h5ad", LOADED)
    left = open_source(tmp_path / "t.h5ad", leave_counts=True)
    assert left.isbacked
    np.testing.assert_array_equal(read_all(left)["rna"], make_table().X.toarray())
    (tmp_path / "v.h5mu").write_bytes(b"no HDF5")
    with pytest.raises(DataError, match="cannot be read"):
        open_cells(tmp_path / "v.h5mu", LOADED)
    with pytest.raises(ClueError, match="no store here"):
        open_cells(tmp_path / "nowhere.zarr", LOADED)
    make_table().write_zarr(tmp_path / "cells.zarr")
    with pytest.raises(DataError, match=r"and no store\n[\s\S]*`anndata\.read_zarr\('"):
        open_cells(tmp_path / "cells.zarr", LOADED)


def test_what_is_opened_says_what_it_is():
    cells = open_cells(make_table(), LOADED)
    assert repr(cells) == "5 cells with rna in memory"
    batch = cells.read_slice(cells.slice_cells(10)[0])
    assert repr(batch) == "Batch(5 cells; rna: 5)"
    assert repr(batch.modalities["rna"].counts) == "SparseCounts(5 x 10, 50 non-zeros)"
    assert repr(LOADED.modalities["adt"]) == "Modality(adt, 4 features)"
