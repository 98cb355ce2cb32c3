"""Cells in memory that a model can and cannot be asked about, and what is said of them."""

from __future__ import annotations

import warnings

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from clue_dist.commands import model_arguments
from clue_dist.errors import ClueError, DataError
from clue_dist.inference.cells import open_cells, open_source
from clue_dist.inference.cells.memory_obs import require_writable_obs
from clue_dist.inference.cells.named_counts import warn_of_cells
from clue_dist.inference.embed import embed_anndata, embed_cells
from clue_dist.ranks import Ranks
from clue_dist.store.batch_vocabulary import BatchVocabulary
from clue_dist.store.manifest_parts import Modality
from tests.fakes import FakeTrainedModel, dense


def name_features(modality: str, number: int) -> list[str]:
    return [f"{modality}-{i}" for i in range(number)]


LOADED = FakeTrainedModel(
    {
        "rna": Modality(kind="rna", storage="sparse", features=name_features("rna", 10)),
        "adt": Modality(kind="adt", storage="dense", features=name_features("adt", 4)),
        "clr": Modality(kind="dense", storage="dense", features=name_features("clr", 3)),
    },
    batch_vocabulary=BatchVocabulary.from_lists(["1", "2"]),
)


def make_table(modality: str = "rna", cells: int = 5, number: int | None = None) -> ad.AnnData:
    """Counts 1, 2, ... of all features of a modality, or of the first ones."""
    number = number or LOADED.modalities[modality].n_features
    counts = np.arange(1.0, cells * number + 1).reshape(cells, number)
    names = pd.DataFrame(index=[f"cell-{i}" for i in range(cells)])
    return ad.AnnData(
        sp.csr_matrix(counts), names, pd.DataFrame(index=name_features(modality, number))
    )


def read_all(source, **choices) -> dict[str, np.ndarray]:
    """Counts of every cell that has them, by modality, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        cells = open_cells(source, LOADED, **choices)
    batches = [cells.read_slice(cell_slice) for cell_slice in cells.slice_cells(100)]
    return {
        name: np.concatenate(
            [dense(b.modalities[name].counts).numpy() for b in batches if name in b.modalities]
        )
        for name in cells.modalities
    }


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


def test_a_modality_is_told_by_the_column_that_names_its_features():
    table = make_table()
    table.var = pd.DataFrame({"symbol": list(table.var_names)}, index=list("abcdefghij"))
    expected = make_table().X.toarray()
    for column in ("symbol", {"rna": "symbol"}):
        np.testing.assert_array_equal(read_all(table, feature_ids=column)["rna"], expected)


def test_layers_that_may_hold_the_counts_are_named():
    table = make_table()
    table.layers["counts"], table.raw = table.X.copy(), table
    table.X = table.X * 0.5
    with pytest.raises(DataError, match=r"the layer with them \(there are counts, raw\.X\)"):
        open_cells(table, LOADED)
    np.testing.assert_array_equal(read_all(table, layer="counts")["rna"], make_table().X.toarray())


def test_a_mudata_names_its_modalities_itself():
    mdata = md.MuData({name: make_table(name) for name in ("rna", "adt")})
    with pytest.raises(DataError, match=r'MuData with rna, adt(.|\n)*`modalities=\["rna"\]`'):
        open_cells(mdata, LOADED, modality="rna")
    assert open_cells(mdata, LOADED, modalities=["rna"]).modalities == ["rna"]


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


def test_missing_features_are_zero_counted_and_named():
    table = make_table()[:, [*range(7), 9]].copy()
    with pytest.warns(UserWarning, match=r"2 of 10 features are missing .*rna-7, rna-8"):
        cells = open_cells(table, LOADED)
    (cell_slice,) = cells.slice_cells(10)
    counts = dense(cells.read_slice(cell_slice).modalities["rna"].counts).numpy()
    np.testing.assert_array_equal(counts[:, [7, 8]], 0)
    np.testing.assert_array_equal(counts[:, 9], make_table().X.toarray()[:, 9])


def test_more_than_half_missing_is_refused_with_a_way_on():
    few = make_table(number=4)
    with pytest.raises(DataError, match=r"4 of 10 features(.|\n)*feature_ids=(.|\n)*min_known=0"):
        open_cells(few, LOADED, modality="rna")
    with pytest.warns(UserWarning, match="6 of 10 features are missing"):
        assert open_cells(few, LOADED, modality="rna", min_known=0).n_cells == 5


def test_a_column_of_var_names_the_features():
    table = make_table()
    table.var = pd.DataFrame({"ids": table.var_names}, index=[f"x{i}" for i in range(10)])
    with pytest.raises(DataError, match="cannot tell which modality"):
        open_cells(table, LOADED)
    found = read_all(table, modality="rna", feature_ids={"rna": "ids"})
    np.testing.assert_array_equal(found["rna"], make_table().X.toarray())
    with pytest.raises(DataError, match=r"no such column(.|\n)*columns: ids"):
        open_cells(table, LOADED, modality="rna", feature_ids="gene")


def test_regions_may_be_spelled_otherwise():
    peaks = [f"chr1:{start}-{start + 50}" for start in range(100, 700, 100)]
    loaded = FakeTrainedModel({"atac": Modality(kind="atac", storage="sparse", features=peaks)})
    names = pd.DataFrame(index=[peak.replace(":", "-") for peak in peaks])
    table = ad.AnnData(sp.csr_matrix(np.eye(6)), var=names)
    for choices in ({}, {"modality": "atac"}):
        cells = open_cells(table, loaded, **choices)
        (cell_slice,) = cells.slice_cells(10)
        counts = dense(cells.read_slice(cell_slice).modalities["atac"].counts)
        np.testing.assert_array_equal(counts, np.eye(6))


def test_features_that_repeat_are_refused():
    table = make_table()
    table.var_names = ["rna-0", "rna-0", *table.var_names[2:]]
    with pytest.raises(DataError, match=r"1 feature name more than once(.|\n)*rna-0"):
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


def test_feature_types_of_10x_tell_modalities_apart():
    both = ad.concat([make_table(), make_table("adt")], axis=1)
    both.var["feature_types"] = ["Gene Expression"] * 10 + ["Antibody Capture"] * 4
    found = read_all(both)
    np.testing.assert_array_equal(found["rna"], make_table().X.toarray())
    np.testing.assert_array_equal(found["adt"], make_table("adt").X.toarray())
    assert list(read_all(both, modalities=["adt"])) == ["adt"]
    joint = embed_anndata(LOADED, both, open_cells(both, LOADED))
    assert joint.shape == both.obsm["X_clue_adt"].shape == both.obsm["X_clue_rna"].shape


def test_raw_counts_of_several_modalities_go_by_their_own_features():
    both = ad.concat([make_table(), make_table("adt")], axis=1)
    both.var["feature_types"] = ["Gene Expression"] * 10 + ["Antibody Capture"] * 4
    raw = both.copy()
    for types in (True, False):
        if not types:
            del raw.var["feature_types"]
        some = both[:, [8, 9, 10, 11, 12, 13]].copy()  # as after a choice of variable genes
        some.raw = raw
        found = read_all(some, layer="raw.X")
        np.testing.assert_array_equal(found["rna"], make_table().X.toarray())
        np.testing.assert_array_equal(found["adt"], make_table("adt").X.toarray())


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


def test_a_name_that_repeats_in_a_column_gives_way_to_that_of_the_feature():
    table = make_table()
    known = table.var_names.tolist()
    table.var["symbol"] = ["twice", "twice", *known[2:]]
    for columns in ("symbol", "gene_id,symbol"):
        found = read_all(table, feature_ids=columns)["rna"]
        assert found.tolist() == read_all(table)["rna"].tolist()


def test_a_warning_points_to_the_line_that_asks():
    with pytest.warns(UserWarning, match="missing") as caught:
        open_cells(make_table(number=9), LOADED)
    assert [warning.filename for warning in caught] == [__file__]


def test_commands_print_warnings_of_cells_without_a_line_of_code(capsys):
    with model_arguments._print_cell_warnings(Ranks()):
        warn_of_cells("doubtful")
    assert capsys.readouterr().err == "warning: doubtful\n"


def test_an_anndata_of_several_modalities_without_types_is_refused():
    both = ad.concat([make_table(), make_table("adt")], axis=1)
    with pytest.raises(DataError, match=r"100% of rna, 100% of adt(.|\n)*modality="):
        open_cells(both, LOADED)
    assert list(read_all(both, modality="adt")) == ["adt"]


def test_an_unpaired_mudata_is_taken_as_it_is():
    other = make_table("adt", cells=3)
    other.obs_names = [f"other-{i}" for i in range(3)]
    mdata = md.MuData({"rna": make_table(), "adt": other})
    cells = open_cells(mdata, LOADED)
    assert cells.n_cells == 8
    assert {s.modalities: s.n_cells for s in cells.slice_cells(100)} == {("rna",): 5, ("adt",): 3}
    embed_anndata(LOADED, mdata, cells)
    assert list(mdata.obs.loc[["cell-0", "other-2"], "clue_modalities"]) == ["rna", "adt"]
    assert mdata["adt"].obsm["X_clue"].shape == (3, 9)


@pytest.mark.parametrize("is_backed", [False, True])
def test_cells_may_lie_in_another_order_in_a_modality(tmp_path, is_backed):
    order = [0, 2, 1, 3, 4]
    adt = make_table("adt")
    adt.X = adt.X.toarray()
    mdata = md.MuData({"rna": make_table(), "adt": adt[order].copy()})
    assert list(mdata["adt"].obs_names) != list(mdata.obs_names)
    if is_backed:
        mdata.write(tmp_path / "cells.h5mu")
        mdata = md.read_h5mu(tmp_path / "cells.h5mu", backed="r")
    read = open_cells(mdata, LOADED)
    batch = read.read_slice(read.slice_cells(100)[0])
    np.testing.assert_array_equal(dense(batch.modalities["adt"].counts), adt.X)
    np.testing.assert_array_equal(dense(batch.modalities["rna"].counts), make_table().X.toarray())


def test_a_modality_without_cells_is_left_out():
    other = make_table("adt", cells=3)
    other.obs_names = [f"other-{i}" for i in range(3)]
    mdata = md.MuData({"rna": make_table(), "adt": other})
    assert open_cells(mdata[:5], LOADED).modalities == ["rna"]
    with pytest.raises(DataError, match="there are no cells"):
        open_cells(mdata[:0], LOADED)


def test_a_modality_may_have_another_name_of_its_kind():
    mdata = md.MuData({"gex": make_table(), "Protein": make_table("adt")})
    assert list(read_all(mdata)) == ["rna", "adt"]


def test_modalities_that_the_model_does_not_know_are_left_out():
    peaks = ad.AnnData(np.ones((5, 2)), make_table().obs, pd.DataFrame(index=["p1", "p2"]))
    with pytest.warns(UserWarning, match="does not know atac"):
        cells = open_cells(md.MuData({"rna": make_table(), "atac": peaks}), LOADED)
    assert cells.modalities == ["rna"]
    with (
        pytest.warns(UserWarning, match="does not know atac"),
        pytest.raises(DataError, match=r"knows none(.|\n)*rna, adt, clr"),
    ):
        open_cells(md.MuData({"atac": peaks}), LOADED)
    with pytest.raises(DataError, match="no such modality"):
        open_cells(make_table(), LOADED, modalities=["adt"])
    with pytest.raises(DataError, match="knows none"):
        open_cells(make_table(), LOADED, modality="peaks")


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


def test_names_of_cells_must_tell_them_apart():
    table = make_table()
    table.obs_names = ["a", "a", "b", "c", "d"]
    assert open_cells(table, LOADED).n_cells == 5  # alone it needs no names
    with pytest.raises(DataError, match="cells of a MuData need names of their own"):
        open_cells(md.MuData({"rna": table, "adt": make_table("adt")}), LOADED)


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
