"""Which cells end up where, what is refused, and what is counted."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from clue_dist.errors import DataError
from clue_dist.kinds import infer_kind
from data_prep.conversion import join_cells, row_lists, strata
from data_prep.convert import format_conversion
from data_prep.readers.source import CategoryCodes
from tests.unit.prep_helpers import (
    assert_same_counts,
    convert_files,
    make_anndata,
    make_counts,
    read_counts,
    read_field,
    write_h5ad,
    write_h5mu,
)


def test_cells_join_by_barcode_into_strata(tmp_path: Path) -> None:
    whole = {
        "rna": make_counts(60, 20),
        "adt": make_counts(60, 5, 1, "p"),
        "atac": make_counts(60, 30, 2, "k"),
    }
    parts = {
        "rna": whole["rna"].iloc[:40],
        "adt": whole["adt"].iloc[10:50],
        "atac": whole["atac"].iloc[30:],
    }
    given = [
        f"{m}={write_h5ad(tmp_path / f'{m}.h5ad', part.sample(frac=1, random_state=3))}"
        for m, part in parts.items()
    ]
    store = convert_files(tmp_path / "s.zarr", *given, block_cells=4)
    sizes = {name: s.n_cells for name, s in store.manifest.strata.items()}
    assert sizes == {"rna": 10, "rna+adt": 20, "rna+adt+atac": 10, "adt+atac": 10, "atac": 10}
    for m, part in parts.items():
        assert_same_counts(read_counts(store, m), part)


def test_order_is_shuffled_by_the_seed_and_blind_to_the_order_of_files(tmp_path: Path) -> None:
    counts = make_counts(200, 20)
    a, b = (
        write_h5ad(tmp_path / f"{n}.h5ad", part)
        for n, part in (("a", counts[:100]), ("b", counts[100:]))
    )
    first = convert_files(tmp_path / "1.zarr", f"rna={a}", f"rna={b}")
    again = convert_files(tmp_path / "2.zarr", f"rna={b}", f"rna={a}")
    other = convert_files(tmp_path / "3.zarr", f"rna={a}", f"rna={b}", seed=1)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    order = [int(c[1:]) for c in first.segments["rna"].read_metadata(np.arange(200)).barcodes]
    assert abs(np.corrcoef(order, np.arange(200))[0, 1]) < 0.2


def test_cells_joined_range_by_range_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rna, adt = make_counts(300, 20), make_counts(300, 5, 1, "p")
    tables = {
        "rna": make_anndata(rna[:250], donor=["x", "y"] * 125),
        "adt": make_anndata(adt[100:]),
    }
    path, columns = str(write_h5mu(tmp_path / "m.h5mu", **tables)), {"batch": "donor"}
    whole = convert_files(tmp_path / "1.zarr", path, block_cells=16, columns=columns)
    monkeypatch.setattr(row_lists, "TASK_ROWS", 40)
    monkeypatch.setattr(join_cells, "RANGE_ROWS", 60)
    monkeypatch.setattr(strata, "STEP_PLACES", 50)
    pieces = convert_files(tmp_path / "2.zarr", path, block_cells=16, columns=columns)
    assert pieces.fingerprint == whole.fingerprint
    assert_same_counts(read_counts(pieces, "rna"), rna[:250])
    assert_same_counts(read_counts(pieces, "adt"), adt[100:])
    twice = [f"rna={write_h5ad(tmp_path / f'{n}.h5ad', rna)}" for n in "ab"]
    with pytest.raises(DataError, match="300 barcodes more than once"):
        convert_files(tmp_path / "3.zarr", *twice)


def test_a_file_name_never_becomes_a_batch(tmp_path: Path) -> None:
    a, b = (write_h5ad(tmp_path / f"{n}.h5ad", make_counts(9, 5, cells=n)) for n in "ab")
    store = convert_files(tmp_path / "s.zarr", f"rna={a}", f"rna={b}")
    assert store.manifest.batches == []
    assert set(read_field(store, "batch").values()) == {None}


def test_duplicates_are_refused_and_prefixes_keep_them_apart(tmp_path: Path) -> None:
    a, b = make_counts(30, 10, 0), make_counts(30, 10, 1)
    files = [write_h5ad(tmp_path / f"{n}.h5ad", part) for n, part in (("a", a), ("b", b))]
    with pytest.raises(DataError) as caught:
        convert_files(tmp_path / "x.zarr", *(f"rna={f}" for f in files))
    assert "30 barcodes more than once" in str(caught.value)
    assert "c0, c1, c10, c11, c12, c13, c14, c15, c16, c17 ... and 20 more" in str(caught.value)
    assert "a.h5ad, b.h5ad" in str(caught.value)
    assert "lane1:" in str(caught.value)
    store = convert_files(tmp_path / "s.zarr", f"one:rna={files[0]}", f"two:rna={files[1]}")
    assert_same_counts(
        read_counts(store, "rna"), pd.concat([a.rename("one:{}".format), b.rename("two:{}".format)])
    )


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_a_barcode_twice_in_one_file(tmp_path: Path) -> None:
    counts = make_counts(10, 5)
    counts.index = ["c0", "c0", *counts.index[2:]]
    with pytest.raises(DataError, match="1 barcode more than once"):
        convert_files(tmp_path / "x.zarr", f"rna={write_h5ad(tmp_path / 'a.h5ad', counts)}")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "non-negative"),
        (0.5, "integers"),
        (np.nan, "finite"),
        (np.inf, "held exactly|finite"),
        (2.0**24 + 2, "16777216 cannot"),
    ],
)
@pytest.mark.parametrize(
    "form", [sp.csr_matrix, sp.csc_matrix, np.asarray], ids=["csr", "csc", "dense"]
)
def test_values_that_are_no_counts(
    tmp_path: Path, value: float, message: str, form: object
) -> None:
    counts = make_counts(30, 12).astype(float)
    counts.iloc[17, 5] = value
    path = write_h5ad(tmp_path / "a.h5ad", counts, form, "float64")
    with pytest.raises(DataError, match=message) as caught:
        convert_files(tmp_path / "x.zarr", f"rna={path}")
    for part in ("a.h5ad", "'c17'", "'g5'", f"{value}"):
        assert part in str(caught.value)


def test_empty_cells_lose_the_modality_or_go(tmp_path: Path) -> None:
    rna, adt = make_counts(40, 10), make_counts(40, 4, 1, "p")
    rna.iloc[:10] = 0
    adt.iloc[5:15] = 0
    store = convert_files(
        tmp_path / "s.zarr",
        str(write_h5mu(tmp_path / "m.h5mu", rna=make_anndata(rna), adt=make_anndata(adt))),
    )
    assert {n: s.n_cells for n, s in store.manifest.strata.items()} == {
        "rna": 5,
        "adt": 5,
        "rna+adt": 25,
    }
    assert_same_counts(read_counts(store, "rna"), rna[10:])
    assert_same_counts(read_counts(store, "adt"), adt[(adt.sum(axis=1) > 0)])
    assert store.manifest.provenance["cells"] == {
        "in": 40,
        "dropped": 5,
        "without_batch": 35,
        "without_label": 35,
    }
    assert [item["empty"] for item in store.manifest.provenance["inputs"]] == [10, 10]
    assert "dropped: 5 cells" in format_conversion(store.manifest)
    with pytest.raises(DataError, match="no cell has any count"):
        convert_files(tmp_path / "x.zarr", f"rna={write_h5ad(tmp_path / 'z.h5ad', rna[:10])}")


def test_a_modality_without_any_counts_is_refused(tmp_path: Path) -> None:
    rna, adt = make_counts(20, 10), make_counts(20, 4, 1, "p")
    given = [
        f"rna={write_h5ad(tmp_path / 'r.h5ad', rna)}",
        f"adt={write_h5ad(tmp_path / 'a.h5ad', adt * 0)}",
    ]
    with pytest.raises(
        DataError, match=r"no cell has any counts in modality 'adt'\n  where: a\.h5ad"
    ):
        convert_files(tmp_path / "s.zarr", *given)
    assert not list(tmp_path.glob("s.zarr*"))


def test_cells_that_change_stratum_are_shuffled_among_the_others(tmp_path: Path) -> None:
    rna, adt = make_counts(400, 10), make_counts(400, 4, 1, "p")
    adt.iloc[:200] = 0  # listed as paired, but only RNA is left
    adt = adt.iloc[:300]
    path = write_h5mu(tmp_path / "m.h5mu", rna=make_anndata(rna), adt=make_anndata(adt))
    store = convert_files(tmp_path / "s.zarr", str(path))
    moved = [int(c[1:]) < 200 for c in store.segments["rna"].read_metadata(np.arange(300)).barcodes]
    assert 40 < sum(moved[:90]) < 80  # 60 expected
    assert_same_counts(read_counts(store, "rna"), rna)


def test_sparse_rows_out_of_form(tmp_path: Path) -> None:
    """Unsorted columns, an entry given twice (adding up past its type) and stored zeros."""
    path = write_h5ad(tmp_path / "a.h5ad", make_counts(2, 6), dtype="uint8")
    with h5py.File(path, "r+") as file:
        for name, values in {
            "data": [200, 1, 100, 0, 7],
            "indices": [4, 2, 4, 1, 0],
            "indptr": [0, 3, 5],
        }.items():
            del file["X"][name]
            file["X"][name] = np.array(values, "uint8" if name == "data" else "int32")
    stored = read_counts(convert_files(tmp_path / "s.zarr", f"rna={path}"), "rna").sort_index()
    assert stored.to_numpy().tolist() == [[0, 0, 1, 0, 300, 0], [7, 0, 0, 0, 0, 0]]
    with h5py.File(path, "r+") as file:
        file["X/indices"][0] = 6
    with pytest.raises(DataError, match="points outside its features"):
        convert_files(tmp_path / "x.zarr", f"rna={path}")


def test_modalities_must_agree_on_batch(tmp_path: Path) -> None:
    rna, adt = make_counts(20, 10), make_counts(20, 4, 1, "p")
    batches = ["b0", "b1"] * 10
    agree = [np.nan, "b1", "", *batches[3:]]
    path = write_h5mu(
        tmp_path / "a.h5mu",
        rna=make_anndata(rna, batch=batches),
        adt=make_anndata(adt, batch=agree),
    )
    assert read_field(convert_files(tmp_path / "s.zarr", str(path)), "batch") == dict(
        zip(rna.index, batches, strict=True)
    )
    path = write_h5mu(
        tmp_path / "b.h5mu",
        rna=make_anndata(rna, batch=batches),
        adt=make_anndata(adt, batch=["b0"] * 20),
    )
    with pytest.raises(DataError, match="10 cells disagree on their batch") as caught:
        convert_files(tmp_path / "x.zarr", str(path))
    assert "c1: 'b1' and 'b0'" in str(caught.value)


def test_named_columns_are_read_and_one_that_no_file_has_is_refused(tmp_path: Path) -> None:
    path = write_h5ad(
        tmp_path / "a.h5ad", make_counts(6, 5), donor=list("xxyyzz"), kind=[1.0, 1, 2, 2, np.nan, 3]
    )
    store = convert_files(
        tmp_path / "s.zarr", f"rna={path}", columns={"batch": "donor", "label": "kind"}
    )
    assert store.manifest.batches == ["x", "y", "z"]
    assert list(read_field(store, "label").values()).count(None) == 1
    assert store.manifest.labels == ["1", "2", "3"]
    assert store.manifest.strata["rna"].label_counts == {"1": 2, "2": 2, "3": 1}
    with pytest.raises(DataError, match="columns: donor, kind"):
        convert_files(tmp_path / "x.zarr", f"rna={path}", columns={"batch": "dönor"})


def test_codes_of_any_column() -> None:
    for values in (
        ["b", None, "a", ""],
        pd.Categorical(["b", None, "a", ""]),
        np.array(["b", None, "a", np.nan], object),
    ):
        codes = CategoryCodes.encode_values(values)
        assert (codes.names, codes.codes.tolist()) == (["a", "b"], [1, -1, 0, -1])
    assert CategoryCodes.encode_values(np.array([2, 10, 2])).names == ["10", "2"]
    for values in ([1.5, 2.0, np.nan], pd.Categorical([1.5, 2.0, np.nan])):
        assert CategoryCodes.encode_values(values).names == ["1.5", "2"]
    assert CategoryCodes.encode_values(np.array([True, False])).names == ["False", "True"]


def test_kinds_from_names() -> None:
    known = {
        "rna_v3": "rna",
        "GEX": "rna",
        "Gene Expression": "rna",
        "my-prot": "adt",
        "cite": "adt",
        "ATAC.peaks": "atac",
        "Dense": "dense",
    }
    assert {name: infer_kind(name, {}) for name in known} == known
    for name in ("ternary", "cite_rna", "methylation"):
        with pytest.raises(DataError, match=f"--kind {name}=rna"):
            infer_kind(name, {})
    assert infer_kind("methylation", {"methylation": "dense"}) == "dense"
    with pytest.raises(DataError, match="unknown kind"):
        infer_kind("m", {"m": "denes"})


@pytest.mark.parametrize("name", ["a.b", "obs", "rna atac"])
def test_names_that_cannot_be_a_folder_or_a_parameter(tmp_path: Path, name: str) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", make_counts(20, 30))
    with pytest.raises(DataError, match="plain name"):
        convert_files(tmp_path / "s.zarr", f"{name}={path}", kinds={name: "rna"})


def test_features_in_another_order_are_put_in_order(tmp_path: Path) -> None:
    a, b = make_counts(20, 30), make_counts(20, 30, 1, cells="d")
    files = [write_h5ad(tmp_path / "a.h5ad", a), write_h5ad(tmp_path / "b.h5ad", b.iloc[:, ::-1])]
    assert_same_counts(
        read_counts(convert_files(tmp_path / "s.zarr", *(f"rna={f}" for f in files)), "rna"),
        pd.concat([a, b]),
    )


def test_other_features_need_a_choice(tmp_path: Path) -> None:
    a, b = make_counts(20, 30), make_counts(20, 30, 1, cells="d").rename(columns={"g3": "new"})
    given = [
        f"rna={write_h5ad(tmp_path / 'a.h5ad', a)}",
        f"rna={write_h5ad(tmp_path / 'b.h5ad', b)}",
    ]
    with pytest.raises(DataError, match=r"1 missing \(g3\); 1 extra \(new\)") as caught:
        convert_files(tmp_path / "x.zarr", *given)
    assert "--features intersection" in str(caught.value)
    both = pd.concat([a, b]).fillna(0)
    assert_same_counts(
        read_counts(convert_files(tmp_path / "i.zarr", *given, features=["intersection"]), "rna"),
        both.drop(columns=["g3", "new"]),
    )
    union = convert_files(tmp_path / "u.zarr", *given, features=["union"])
    assert_same_counts(read_counts(union, "rna"), both)
    assert [
        (i["features"]["missing"], i["features"]["extra"])
        for i in union.manifest.provenance["inputs"]
    ] == [
        (1, 0),
        (1, 0),
    ]


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_repeated_features_are_refused(tmp_path: Path) -> None:
    counts = make_counts(5, 4)
    counts.columns = ["a", "b", "a", "c"]
    with pytest.raises(DataError, match="1 feature name more than once"):
        convert_files(tmp_path / "x.zarr", f"rna={write_h5ad(tmp_path / 'a.h5ad', counts)}")


@pytest.mark.slow
def test_types_fit_the_data(tmp_path: Path) -> None:
    rna, adt = make_counts(30, 70_000, density=0.001), make_counts(30, 5, 1, "p")
    rna.iloc[0, 69_999] = 300
    rna.iloc[1, :-1] = 0
    rna.iloc[1, -1] = 1  # one gap of 69,999
    adt.iloc[2, 2] = 70_000
    path = write_h5mu(tmp_path / "m.h5mu", rna=make_anndata(rna), adt=make_anndata(adt))
    store = convert_files(tmp_path / "s.zarr", str(path))
    packed = store.manifest.strata["rna+adt"].packed
    assert (packed["rna"].bits, packed["rna"].rest_type, packed["adt"].values) == (
        2,
        "uint32",
        "uint32",
    )
    assert_same_counts(read_counts(store, "rna"), rna)
    assert_same_counts(read_counts(store, "adt"), adt)
