"""Which features a modality gets: lists, columns of var, genome bins; and what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from clue_dist.errors import DataError, StoreError
from data_prep import inspect
from data_prep.cli.feature_choices import parse_choices
from data_prep.options import FeatureChoice
from data_prep.readers.genome_bins import bin_peaks, order_along_genome
from tests.unit.prep_helpers import (
    assert_same_counts,
    convert_files,
    make_anndata,
    make_counts,
    read_counts,
    write_10x,
    write_h5ad,
    write_h5mu,
    write_mtx,
)


def with_var(path: Path, counts: pd.DataFrame, **columns: object) -> str:
    adata = make_anndata(counts)
    for name, values in columns.items():
        adata.var[name] = values
    adata.write_h5ad(path)
    return f"rna={path}"


# ---- a list ----


@pytest.mark.parametrize("zipped", [False, True])
def test_a_list_decides_features_and_order(tmp_path: Path, zipped: bool) -> None:
    a, b = make_counts(20, 8), make_counts(20, 8, 1, cells="d").rename(columns={"g3": "new"})
    given = [f"rna={write_h5ad(tmp_path / f'{n}.h5ad', c)}" for n, c in (("a", a), ("b", b))]
    wanted, path = ["g5", "new", "g0", "nowhere", "g3"], tmp_path / "genes.txt"
    text = "".join(f"{name}\tmore\n" for name in wanted).encode()
    path.write_bytes(gzip.compress(text) if zipped else text)
    store = convert_files(tmp_path / "s.zarr", *given, features=[f"rna={path}"])
    expected = pd.concat([a, b]).fillna(0).reindex(columns=wanted, fill_value=0)
    assert_same_counts(read_counts(store, "rna"), expected[expected.sum(axis=1) > 0])
    notes = [item["features"] for item in store.manifest.provenance["inputs"]]
    assert [n["first_missing"] for n in notes] == [["new", "nowhere"], ["nowhere", "g3"]]


def test_another_list_is_another_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, path = (
        f"rna={write_h5ad(tmp_path / 'a.h5ad', make_counts(20, 8))}",
        tmp_path / "genes.txt",
    )
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.convert.commit_store", lambda *_: 1 / 0)
        path.write_text("g1\ng2\n")
        with pytest.raises(ZeroDivisionError):
            convert_files(tmp_path / "s.zarr", given, features=[str(path)])
    path.write_text("g1\ng3\n")
    with pytest.raises(StoreError, match="a change of features"):
        convert_files(tmp_path / "s.zarr", given, features=[str(path)])
    path.write_text("g1\ng2\n")
    assert convert_files(tmp_path / "s.zarr", given, features=[str(path)]).manifest.modalities[
        "rna"
    ].features == ["g1", "g2"]


def test_each_modality_has_its_own_choice(tmp_path: Path) -> None:
    rna, adt = make_counts(20, 8), make_counts(20, 4, 1, "p")
    first = write_h5mu(tmp_path / "a.h5mu", rna=make_anndata(rna), adt=make_anndata(adt))
    more = {"rna": rna.rename("d{}".format), "adt": adt.rename("d{}".format)}
    parts = {"rna": more["rna"].drop(columns="g1"), "adt": more["adt"].drop(columns="p2")}
    second = write_h5mu(tmp_path / "b.h5mu", **{m: make_anndata(c) for m, c in parts.items()})
    features = ["intersection", "adt=union"]
    store = convert_files(tmp_path / "s.zarr", str(first), str(second), features=features)
    assert store.manifest.modalities["rna"].features == [g for g in rna.columns if g != "g1"]
    assert store.manifest.modalities["adt"].features == list(adt.columns)
    text = inspect.format_facts(inspect.collect_facts(tmp_path / "s.zarr"))
    assert "  rna: intersection of its files\n  adt: union of its files\n" in text


# ---- names ----


def test_names_come_from_a_column_where_a_file_has_it(tmp_path: Path) -> None:
    """One file by symbols, one by Ensembl ids: they share nothing until a column says otherwise."""
    counts, ids = make_counts(40, 6), [f"ENSG{i:011d}" for i in range(6)]
    a = with_var(tmp_path / "a.h5ad", counts[:20], gene_ids=ids, strand="+")
    b = with_var(tmp_path / "b.h5ad", counts[20:].set_axis(ids, axis=1))
    for features in ([], ["intersection"], ["union"]):
        with pytest.raises(DataError, match="share no feature") as caught:
            convert_files(tmp_path / "x.zarr", a, b, features=features)
        for words in (
            "names (g0, g1, g2 ... and 3 more) and Ensembl ids (",
            "--feature-ids rna=COLUMN",
            "a.h5ad: gene_ids, strand; of b",
        ):
            assert words in str(caught.value)
    store = convert_files(tmp_path / "s.zarr", a, b, ids=["rna=gene_ids"])
    assert_same_counts(read_counts(store, "rna"), counts.set_axis(ids, axis=1))
    assert [item["names"] for item in store.manifest.provenance["inputs"]] == [
        "gene_ids",
        "var_names",
    ]
    assert "named by gene_ids" in inspect.format_facts(inspect.collect_facts(tmp_path / "s.zarr"))
    with pytest.raises(DataError, match="no file has the column of var asked for") as caught:
        convert_files(tmp_path / "y.zarr", a, b, ids=["ensembl"])
    assert "columns: gene_ids, strand" in str(caught.value)


@pytest.mark.parametrize("together", ["intersection", "union"])
def test_files_that_name_few_genes_alike_are_refused(tmp_path: Path, together: str) -> None:
    """Where a gene has no symbol, many annotations call it by its id."""
    one = make_counts(20, 10)
    two = make_counts(20, 10, 1, cells="d").rename(
        columns={f"g{i}": f"ENSG0000{i}" for i in range(10)}
    )
    one = one.rename(columns={"g8": "ENSG00008", "g9": "ENSG00009"})
    files = [f"rna={write_h5ad(tmp_path / f'{i}.h5ad', x)}" for i, x in enumerate((one, two))]
    with pytest.raises(
        DataError, match=r"share 2 features alone(.|\n)*names(.|\n)*Ensembl ids(.|\n)*--feature-ids"
    ):
        convert_files(tmp_path / "s.zarr", *files, features=[together])
    versions = two.rename(columns={f: f"{f}.3" for f in two.columns})
    write_h5ad(tmp_path / "0.h5ad", versions.rename(index=lambda c: f"e{c}"))
    with pytest.raises(DataError, match=r"Ensembl ids with versions \("):
        convert_files(tmp_path / "s.zarr", *files, features=[together])


def test_names_that_are_empty_or_repeat_give_way(tmp_path: Path) -> None:
    counts = make_counts(20, 6)
    given = with_var(tmp_path / "a.h5ad", counts, symbol=["A", "B", "A", None, "", "C"])
    store = convert_files(tmp_path / "s.zarr", given, ids=["ensembl_id,symbol"])
    assert store.manifest.modalities["rna"].features == ["g0", "B", "g2", "g3", "g4", "C"]


@pytest.mark.parametrize("form", ["h5", "mtx"])
def test_ids_of_10x(tmp_path: Path, form: str) -> None:
    counts, names = make_counts(30, 3, prefix="ENSG"), ["A", "B", "C"]
    if form == "h5":
        path = write_10x(tmp_path / "a.h5", counts, ["Gene Expression"] * 3, names)
    else:
        path = write_mtx(tmp_path / "a", counts, ["Gene Expression"] * 3, zipped=False)
        lines = [f"{i}\t{n}\tGene Expression\n" for i, n in zip(counts.columns, names, strict=True)]
        (path / "features.tsv").write_text("".join(lines))
    for ids, expected in (
        ([], names),
        (["gene_ids"], list(counts.columns)),
        (["rna=gene_symbols"], names),
    ):
        store = convert_files(
            tmp_path / f"{len(ids)}{expected[0]}{'='.join(ids)}.zarr", str(path), ids=ids
        )
        assert store.manifest.modalities["rna"].features == expected


def test_panels_without_overlap_may_be_united(tmp_path: Path) -> None:
    a, b = make_counts(10, 4, prefix="CD"), make_counts(10, 3, 1, "IG", "d")
    given = [f"adt={write_h5ad(tmp_path / f'{n}.h5ad', c)}" for n, c in (("a", a), ("b", b))]
    assert_same_counts(
        read_counts(convert_files(tmp_path / "s.zarr", *given, features=["union"]), "adt"),
        pd.concat([a, b]).fillna(0),
    )


# ---- bins ----


def test_bins_hold_the_middle_of_a_region() -> None:
    names = [
        "chr1:999-1001",
        "chr1-999-1000",
        "chr1_0_10",
        "chrUn_KI270742v1_2000_2010",
        "2:5000-5900",
    ]
    expected = [
        "chr1:1000-2000",
        "chr1:0-1000",
        "chr1:0-1000",
        "chrUn_KI270742v1:2000-3000",
        "2:5000-6000",
    ]
    assert bin_peaks(names, 1000, "x") == expected
    with pytest.raises(DataError, match="2 features named otherwise") as caught:
        bin_peaks([*names, "ATAD3A", "chr1:1000"], 1000, "peaks.h5ad")
    assert "such as ATAD3A, chr1:1000\n" in str(caught.value)


def test_bins_lie_along_the_genome() -> None:
    expected = [
        "chr1:0-10",
        "chr2:0-10",
        "chr2:90-100",
        "chr2:100-110",
        "chr10:0-10",
        "chrM:0-10",
        "chrX:0-10",
    ]
    assert order_along_genome(set(expected)) == expected


def test_files_with_other_peaks_meet_in_bins(tmp_path: Path) -> None:
    """Peaks of a bin are added up, past the type they are stored in."""
    a = pd.DataFrame(
        {"chr1:0-100": [200, 1], "chr1:300-500": [100, 0], "chr2:0-9": [0, 5]}, ["c0", "c1"]
    )
    b = pd.DataFrame({"chr1_950_1000": [3], "chr1_1000_1100": [4], "chr10_1_2": [7]}, ["d0"])
    for form in (sp.csr_matrix, sp.csc_matrix, np.asarray):
        given = [
            f"atac={write_h5ad(tmp_path / f'{n}.h5ad', c, form, 'uint8')}"
            for n, c in (("a", a), ("b", b))
        ]
        with pytest.raises(DataError, match="share no feature"):
            convert_files(tmp_path / "x.zarr", *given, features=["same"])
        store = convert_files(tmp_path / f"{form.__name__}.zarr", *given, bins=["atac=1000"])
        names = ["chr1:0-1000", "chr1:1000-2000", "chr2:0-1000", "chr10:0-1000"]
        rows = [[300, 0, 0, 0], [1, 0, 5, 0], [3, 4, 0, 7]]
        assert_same_counts(
            read_counts(store, "atac"), pd.DataFrame(rows, ["c0", "c1", "d0"], names)
        )
        assert inspect.collect_facts(store.root)["modalities"]["atac"]["non_zeros"] == 6
    assert "  atac: union of its files; bins of 1,000 bp\n" in inspect.format_facts(
        inspect.collect_facts(tmp_path / "asarray.zarr")
    )
    new = convert_files(
        tmp_path / "n.zarr", given[0], bins=["atac=1000"], features_from=tmp_path / "asarray.zarr"
    )
    assert new.manifest.modalities["atac"].features == names
    with pytest.raises(DataError, match="bins need the same `--bins`"):
        convert_files(
            tmp_path / "m.zarr",
            given[0],
            bins=["atac=500"],
            features_from=tmp_path / "asarray.zarr",
        )


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix])
def test_an_entry_given_twice_adds_up_past_its_type(tmp_path: Path, form: type) -> None:
    """CSC parts too are added up in a wider type than theirs."""
    twice = sp.coo_matrix((np.array([200, 100, 1], "uint8"), ([0, 0, 1], [1, 1, 0])), (2, 3))
    axis = twice.row if form is sp.csr_matrix else twice.col
    order, starts = (
        np.argsort(axis, kind="stable"),
        np.searchsorted(np.sort(axis), np.arange(4 - (axis is twice.row))),
    )
    other = twice.col if form is sp.csr_matrix else twice.row
    matrix = form((twice.data[order], other[order], starts), shape=(2, 3))
    ad.AnnData(matrix, pd.DataFrame(index=["a", "b"]), pd.DataFrame(index=list("xyz"))).write_h5ad(
        tmp_path / "a.h5ad"
    )
    stored = read_counts(
        convert_files(tmp_path / "s.zarr", f"rna={tmp_path / 'a.h5ad'}"), "rna"
    ).sort_index()
    assert stored.to_numpy().tolist() == [[0, 300, 0], [1, 0, 0]]


# ---- what makes no sense ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"features": ["unoin"]}, "no such choice of features"),
        ({"features": ["union", "same"]}, "two values for one modality"),
        ({"features": ["rna=union", "rnaa=same"]}, "no such modality"),
        ({"features": ["LIST"]}, "a list of features belongs to one modality"),
        ({"features": ["rna=TWICE"]}, "names some more than once"),
        ({"features": ["rna=EMPTY"]}, "a list of features is empty"),
        ({"top": ["4000"]}, "not NAME=NUMBER"),
        ({"top": ["rna=many"]}, "not a number from 1 on"),
        ({"top": ["rna=0"]}, "not a number from 1 on"),
        ({"top": ["adt=10"]}, "not for this kind"),
        ({"bins": ["rna=5000"]}, "not for this kind"),
        ({"top": ["rna=5"], "reference": Path("s.zarr")}, "`--top` would be left undone"),
        ({"features": ["union"], "reference": Path("s.zarr")}, "`--features` would be left undone"),
    ],
)
def test_choices_that_make_no_sense(tmp_path: Path, flags: dict, message: str) -> None:
    for name, text in {"LIST": "a\n", "TWICE": "a\nb\na\n", "EMPTY": "\n"}.items():
        (tmp_path / name).write_text(text)
        flags = {
            k: [t.replace(name, str(tmp_path / name)) for t in v] if k == "features" else v
            for k, v in flags.items()
        }
    with pytest.raises(DataError, match=message):
        parse_choices(["rna", "adt", "atac"], {}, **flags)


def test_choices() -> None:
    found = parse_choices(
        ["rna", "atac", "rna"], {}, ["union", "rna=same"], ["atac=500"], ["rna=9", "atac=8"]
    )
    assert found == {
        "rna": FeatureChoice("same", top_features=9),
        "atac": FeatureChoice("union", bin_width=500, top_features=8),
    }
    beside = parse_choices(
        ["rna", "atac"], {}, top=["atac=8"], reference=Path("s.zarr"), added=["atac"]
    )
    assert beside == {"rna": FeatureChoice(), "atac": FeatureChoice(top_features=8)}
    assert parse_choices(["atac"], {}, bins=["atac=500"])["atac"].effective_mode == "union"
