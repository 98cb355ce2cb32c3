"""Cells in memory: which modality and which features they are of."""

from __future__ import annotations

from contextlib import nullcontext

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from clue_dist.errors import DataError
from clue_dist.inference.cells import name_modalities, open_cells
from clue_dist.inference.cells.named_counts import CellWarning
from clue_dist.inference.embed import embed_anndata
from clue_dist.store.manifest_parts import Modality
from tests.fakes import FakeTrainedModel, dense
from tests.unit.memory_helpers import LOADED, make_table, read_all


def test_a_modality_is_told_by_the_column_that_names_its_features():
    table = make_table()
    table.var = pd.DataFrame({"symbol": list(table.var_names)}, index=list("abcdefghij"))
    expected = make_table().X.toarray()
    for column in ("symbol", {"rna": "symbol"}):
        np.testing.assert_array_equal(read_all(table, feature_ids=column)["rna"], expected)


def test_a_mudata_names_its_modalities_itself():
    mdata = md.MuData({name: make_table(name) for name in ("rna", "adt")})
    with pytest.raises(DataError, match=r'MuData with rna, adt(.|\n)*`modalities=\["rna"\]`'):
        open_cells(mdata, LOADED, modality="rna")
    assert open_cells(mdata, LOADED, modalities=["rna"]).modalities == ["rna"]


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


def test_a_name_that_repeats_in_a_column_gives_way_to_that_of_the_feature():
    table = make_table()
    known = table.var_names.tolist()
    table.var["symbol"] = ["twice", "twice", *known[2:]]
    for columns in ("symbol", "gene_id,symbol"):
        found = read_all(table, feature_ids=columns)["rna"]
        assert found.tolist() == read_all(table)["rna"].tolist()


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


@pytest.mark.parametrize("has_peaks", [False, True])
def test_feature_types_are_named_as_the_model_names_modalities(tmp_path, has_peaks):
    """A conversion would call the proteins adt."""
    model = FakeTrainedModel({"rna": LOADED.modalities["rna"], "prot": LOADED.modalities["adt"]})
    types = {"Antibody Capture": make_table("adt"), "Gene Expression": make_table()}
    if has_peaks:
        types["Peaks"] = ad.AnnData(make_table().X[:, :2], make_table().obs)
    cells = ad.concat([*types.values()], axis=1)
    cells.obs["donor"] = list("abcde")
    cells.var["feature_types"] = [name for name, part in types.items() for _ in part.var_names]
    cells.write_h5ad(file := tmp_path / "cells.h5ad")
    with pytest.warns(CellWarning, match="Peaks") if has_peaks else nullcontext():
        named, modality = name_modalities(cells, model)
        words, _ = name_modalities(file, model)
    assert words == [f"rna={file}:Gene Expression", f"prot={file}:Antibody Capture"]
    assert modality is None
    assert list(named.mod) == ["rna", "prot"]
    assert named.obs["donor"].tolist() == list("abcde")
    for name, part in (("rna", "Gene Expression"), ("prot", "Antibody Capture")):
        assert list(named[name].var_names) == list(types[part].var_names)
        np.testing.assert_array_equal(named[name].X.toarray(), types[part].X.toarray())


def test_modalities_that_the_model_does_not_know_are_left_out():
    peaks = ad.AnnData(np.ones((5, 2)), make_table().obs, pd.DataFrame(index=["p1", "p2"]))
    with pytest.warns(UserWarning, match="does not know atac"):
        cells = open_cells(md.MuData({"rna": make_table(), "atac": peaks}), LOADED)
    assert cells.modalities == ["rna"]
    both = ad.concat([make_table(), peaks], axis=1)
    both.var["feature_types"] = ["Gene Expression"] * 10 + ["Peaks"] * 2
    with pytest.warns(UserWarning, match="does not know Peaks"):
        assert open_cells(both, LOADED).modalities == ["rna"]
    with (
        pytest.warns(UserWarning, match="does not know atac"),
        pytest.raises(DataError, match=r"knows none(.|\n)*rna, adt, clr"),
    ):
        open_cells(md.MuData({"atac": peaks}), LOADED)
    with pytest.raises(DataError, match="no such modality"):
        open_cells(make_table(), LOADED, modalities=["adt"])
    with pytest.raises(DataError, match="knows none"):
        open_cells(make_table(), LOADED, modality="peaks")
