"""Files that hold several modalities: which parts there are, and how each of them is picked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import h5py
import mudata as md
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from clue_dist.errors import DataError
from data_prep.cli.inputs import parse_inputs
from data_prep.options import PerModality, ReadingOptions
from data_prep.readers.formats import describe_file
from data_prep.readers.source import Source
from tests.unit.prep_helpers import (
    make_anndata,
    make_counts,
    shrink_tasks,
    write_10x,
    write_h5ad,
    write_h5mu,
)

TYPES = ["Gene Expression"] * 6 + ["Antibody Capture"] * 3 + ["CRISPR Guide Capture"] * 2


def _open(*inputs: str, types: tuple[str, ...] = (), **kinds: str) -> dict[str, Source]:
    """The source of each modality of some inputs."""
    feature_types = PerModality.parse_values(types, "--feature-type")
    options = ReadingOptions(kinds=kinds, feature_types=feature_types)
    sources = cast(list[Source], parse_inputs(inputs, options))
    return {source.modality: source for source in sources}


def _read_table(source: Source, scratch: Path) -> pd.DataFrame:
    """All that a source holds, with its names."""
    head = source.read_head()
    for part in range(source.count_parts()):
        source.prepare_part(part, scratch)
    rows = source.read_rows(0, head.n_rows, scratch)
    values = rows if isinstance(rows, np.ndarray) else rows.toarray()
    barcodes = np.char.decode(head.barcodes[:], "utf-8")
    return pd.DataFrame(values, barcodes, head.features)


def _check_table(source: Source, expected: pd.DataFrame, scratch: Path) -> None:
    pd.testing.assert_frame_equal(_read_table(source, scratch), expected, check_dtype=False)


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_h5ad_with_types_of_features_is_split(
    tmp_path: Path,
    form: Callable[..., object],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shrink_tasks(monkeypatch)
    counts, path = make_counts(30, 11), tmp_path / "multi.h5ad"
    adata = make_anndata(counts, form)
    adata.var["feature_types"] = pd.Categorical(TYPES)
    adata.write_h5ad(path)
    sources = _open(str(path))
    assert list(sources) == ["rna", "adt"]
    _check_table(sources["rna"], counts.iloc[:, :6], tmp_path / "rna")
    _check_table(sources["adt"], counts.iloc[:, 6:9], tmp_path / "adt")
    assert "guide=" in capsys.readouterr().err
    _check_table(_open(f"gex={path}")["gex"], counts.iloc[:, :6], tmp_path / "gex")


def test_h5ad_types_that_are_no_modalities_do_not_split_it(tmp_path: Path) -> None:
    counts, path = make_counts(20, 4), tmp_path / "a.h5ad"
    adata = make_anndata(counts)
    adata.var["feature_types"] = ["protein_coding", "lncRNA", "protein_coding", "snRNA"]
    adata.write_h5ad(path)
    _check_table(_open(f"rna={path}")["rna"], counts, tmp_path)


def test_types_as_other_tools_write_them(tmp_path: Path) -> None:
    counts, path = make_counts(20, 4), tmp_path / "neurips.h5ad"
    adata = make_anndata(counts)
    adata.var["feature_types"] = ["GEX", "ADT", "GEX", "ATAC"]
    adata.write_h5ad(path)
    assert list(_open(str(path))) == ["rna", "adt", "atac"]


def test_every_type_of_a_10x_file_can_be_reached(tmp_path: Path) -> None:
    counts = make_counts(30, 11)
    path = write_10x(tmp_path / "multi.h5", counts, TYPES)
    guides = counts.iloc[:, 9:]
    for given in (
        _open(f"guide={path}", guide="adt"),
        _open(f"hto={path}", types=("hto=CRISPR Guide Capture",), hto="adt"),
        _open(f"hto={path}:crispr guide capture", hto="adt"),
    ):
        (source,) = given.values()
        _check_table(source, guides, tmp_path)
    with pytest.raises(DataError, match=r"no such part[\s\S]*CRISPR Guide Capture"):
        _open(f"guide={path}:Peaks", guide="adt")
    # Which of the parts a kind alone means is not known: guides are stored as proteins are.
    with pytest.raises(DataError, match="no such modality"):
        _open(f"hto={path}", hto="adt")


def test_h5mu_with_names_of_10x(tmp_path: Path) -> None:
    rna, adt = make_counts(20, 5), make_counts(20, 3, seed=1)
    tables = {"Gene Expression": make_anndata(rna), "Antibody Capture": make_anndata(adt)}
    path = write_h5mu(tmp_path / "m.h5mu", **tables)
    assert list(_open(str(path))) == ["rna", "adt"]
    for given in (f"adt={path}", f"adt={path}:Antibody Capture"):
        _check_table(_open(given)["adt"], adt, tmp_path)


def test_h5mu_with_names_that_tell_their_kind(tmp_path: Path) -> None:
    tables = {name: make_anndata(make_counts(20, 5)) for name in ("scRNA", "surface protein")}
    path = write_h5mu(tmp_path / "m.h5mu", **tables)
    assert list(_open(str(path))) == ["scRNA", "adt"]
    tables["dsb-normalised protein"] = tables["surface protein"]
    with pytest.raises(DataError, match="two parts of the file would become adt"):
        _open(str(write_h5mu(tmp_path / "n.h5mu", **tables)))


def test_h5mu_names_that_a_store_can_take_stay(tmp_path: Path) -> None:
    tables = {"rna": make_anndata(make_counts(20, 5)), "prot": make_anndata(make_counts(20, 3))}
    path = write_h5mu(tmp_path / "m.h5mu", **tables)
    assert list(_open(str(path))) == ["rna", "prot"]
    assert list(_open(f"adt={path}")) == ["adt"]


@pytest.mark.parametrize("form", ["frame", "array", "csr"])
def test_proteins_in_obsm(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    rna, adt, path = (
        make_counts(20, 5),
        make_counts(20, 3, seed=1, prefix="CD"),
        tmp_path / "c.h5ad",
    )
    adata = make_anndata(rna, batch=["a", "b"] * 10)
    table = {"frame": adt, "array": adt.to_numpy(), "csr": sp.csr_matrix(adt.to_numpy())}[form]
    adata.obsm["protein_expression"] = table
    adata.obsm["X_pca"] = np.random.default_rng(0).normal(size=(20, 2))
    adata.uns["protein_names"] = list(adt.columns)
    adata.write_h5ad(path)
    _open(f"rna={path}")
    told = capsys.readouterr().err
    assert "adt=" in told
    assert "c.h5ad:obsm/protein_expression" in told
    assert "X_pca" not in told
    source = _open(f"adt={path}:obsm/protein_expression")["adt"]
    _check_table(source, adt, tmp_path)
    assert source.read_head().fields["batch"].names == ["a", "b"]


def test_damaged_obsm_that_nobody_asked_for_does_not_matter(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", make_counts(20, 5))
    with h5py.File(path, "a") as file:
        file.require_group("obsm").create_group("odd").attrs["encoding-type"] = "csr_matrix"
        file["obsm"]["texts"] = np.array([["a", "b"]] * 20, object)
    assert list(_open(f"rna={path}")) == ["rna"]
    with pytest.raises(DataError, match="no such part"):
        _open(f"adt={path}:obsm/odd")


def test_description_of_a_file(tmp_path: Path) -> None:
    counts = make_counts(30, 11)
    found = describe_file(write_10x(tmp_path / "multi.h5", counts, TYPES))
    assert found.format.name == "10x .h5"
    assert [(part.part.modality, part.n_features) for part in found.parts] == [
        ("rna", 6),
        ("adt", 3),
        (None, 2),
    ]
    assert all(part.holds_counts and part.n_cells == 30 for part in found.parts)
    assert found.parts[0].barcodes == list(counts.index)


def _write_old_tenx(path: Path, **genomes: pd.DataFrame) -> Path:
    """As Cell Ranger 2 writes it: a group for each genome."""
    with h5py.File(path, "w") as file:
        for name, counts in genomes.items():
            matrix, group = sp.csr_matrix(counts.to_numpy()), file.create_group(name)
            for part in ("data", "indices", "indptr"):
                group[part] = getattr(matrix, part)
            group["shape"] = np.array(counts.shape[::-1])
            group["barcodes"] = np.array(counts.index, "S")
            group["genes"] = np.array([f"ENSG{i}" for i in range(counts.shape[1])], "S")
            group["gene_names"] = np.array(counts.columns, "S")
    return path


def test_10x_file_of_cell_ranger_2(tmp_path: Path) -> None:
    counts = make_counts(20, 6)
    path = _write_old_tenx(tmp_path / "one.h5", GRCh38=counts)
    _check_table(_open(str(path))["rna"], counts, tmp_path)
    mouse = make_counts(10, 3, seed=1)
    path = _write_old_tenx(tmp_path / "two.h5", hg19=counts, mm10=mouse)
    _check_table(_open(f"rna={path}:mm10")["rna"], mouse, tmp_path)
    with pytest.raises(DataError, match="hg19, mm10"):
        _open(f"rna={path}")


def test_coordinates_in_obsm_are_no_proteins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adata = make_anndata(make_counts(20, 5))
    adata.obsm["spatial"] = np.arange(40).reshape(20, 2)
    adata.obsm["fragments"] = sp.csr_matrix((20, 10**6), dtype=np.int32)
    adata.write_h5ad(tmp_path / "a.h5ad")
    _open(f"rna={tmp_path / 'a.h5ad'}")
    assert capsys.readouterr().err == ""


def test_h5mu_whose_modalities_have_layers_alone(tmp_path: Path) -> None:
    counts = make_counts(20, 5)
    adata = make_anndata(counts)
    adata.layers["counts"] = adata.X.copy()
    path = write_h5mu(tmp_path / "m.h5mu", rna=adata)
    with h5py.File(path, "r+") as file:
        del file["mod/rna/X"]
    layers = PerModality.parse_values(["counts"], "--layer")
    (source,) = parse_inputs([str(path)], ReadingOptions(layers=layers))
    _check_table(cast(Source, source), counts, tmp_path)


def test_a_mudata_without_modalities_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cells.h5mu"
    md.MuData({}).write(path)
    with pytest.raises(DataError, match="holds no modality"):
        parse_inputs([str(path)], ReadingOptions())
