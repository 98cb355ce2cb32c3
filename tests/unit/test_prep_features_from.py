"""Features of a store, a run or a shared model serve other cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from clue_dist.checkpoint.model_card import write_model_card
from clue_dist.config import Config
from clue_dist.errors import DataError, StoreError
from clue_dist.store.feature_reference import read_feature_reference
from data_prep.convert import format_conversion
from tests.unit.prep_helpers import (
    assert_same_counts,
    convert_files,
    make_anndata,
    make_counts,
    read_counts,
    write_h5ad,
    write_h5mu,
)


def test_features_from_another_store(tmp_path: Path) -> None:
    first = make_anndata(make_counts(20, 10), batch=["b2", "b9"] * 10)
    train = convert_files(
        tmp_path / "t.zarr",
        str(
            write_h5mu(tmp_path / "t.h5mu", rna=first, adt=make_anndata(make_counts(20, 4, 1, "p")))
        ),
    )
    assert train.manifest.batches == ["b2", "b9"]
    new = make_counts(30, 10, 2).rename(columns={"g2": "x1", "g5": "x2"}).iloc[:, ::-1]
    new.iloc[0] = 0
    new.iloc[0, new.columns.get_loc("x1")] = (
        5  # counts only in a feature that is dropped: empty once aligned
    )
    path = write_h5ad(tmp_path / "n.h5ad", new, batch=["a1", "b9", "b2"] * 10)
    query = convert_files(tmp_path / "q.zarr", f"rna={path}", features_from=tmp_path / "t.zarr")
    expected = new.reindex(columns=train.manifest.modalities["rna"].features, fill_value=0)
    assert_same_counts(read_counts(query, "rna"), expected[expected.sum(axis=1) > 0])
    assert query.manifest.modalities == {"rna": train.manifest.modalities["rna"]}
    assert query.manifest.batches == ["b2", "b9", "a1"]
    summary = format_conversion(query.manifest)
    assert "2 features missing, taken as zero (g2, g5)" in summary
    assert "2 features extra, left out (x2, x1)" in summary
    assert "1 cell without counts of rna" in summary
    with pytest.raises(DataError, match="does not have"):
        convert_files(tmp_path / "x.zarr", f"atac={path}", features_from=tmp_path / "t.zarr")
    with pytest.raises(DataError, match="are not new"):
        convert_files(
            tmp_path / "x.zarr",
            f"rna={path}",
            features_from=tmp_path / "t.zarr",
            new_modalities=("rna",),
        )
    alien = write_h5ad(tmp_path / "alien.h5ad", make_counts(5, 5, prefix="ENSG"))
    with pytest.raises(DataError, match="no feature of modality 'rna' is known"):
        convert_files(tmp_path / "y.zarr", f"rna={alien}", features_from=tmp_path / "t.zarr")
    with pytest.raises(StoreError, match="no store here"):
        convert_files(tmp_path / "z.zarr", f"rna={path}", features_from=tmp_path / "nothing.zarr")


def test_a_new_modality_stands_beside_those_of_a_reference(tmp_path: Path) -> None:
    rna, adt = make_counts(20, 6, 1), make_counts(20, 4, 2, prefix="p")
    files = [
        f"rna={write_h5ad(tmp_path / 'r.h5ad', rna)}",
        f"adt={write_h5ad(tmp_path / 'a.h5ad', adt)}",
    ]
    train = convert_files(tmp_path / "t.zarr", files[0], features=["rna=same"])
    more = convert_files(
        tmp_path / "m.zarr",
        *reversed(files),
        features_from=tmp_path / "t.zarr",
        new_modalities=("adt",),
    )
    assert list(more.manifest.modalities) == ["rna", "adt"]
    assert more.manifest.modalities["rna"] == train.manifest.modalities["rna"]
    assert_same_counts(read_counts(more, "adt"), adt)


def test_features_from_a_run_folder_or_a_shared_model(tmp_path: Path) -> None:
    table = make_anndata(make_counts(20, 10), batch=["b2", "b9"] * 10)
    train = convert_files(tmp_path / "t.zarr", str(write_h5mu(tmp_path / "t.h5mu", rna=table)))
    shared = tmp_path / "shared"
    write_model_card(shared, train, Config())
    new = write_h5ad(tmp_path / "n.h5ad", make_counts(30, 7, 2), batch=["a1", "b9", "b2"] * 10)
    fitted = [
        convert_files(tmp_path / f"{i}.zarr", f"rna={new}", features_from=reference)
        for i, reference in enumerate((tmp_path / "t.zarr", shared))
    ]
    assert fitted[1].fingerprint == fitted[0].fingerprint
    assert fitted[1].manifest.batches == ["b2", "b9", "a1"]
    assert fitted[1].manifest.modalities == train.manifest.modalities
    (shared / "model.json").write_text('{"modalities": {"rna": {"kind": "rna"}}, "batches": []}')
    with pytest.raises(StoreError, match=r"model.json[\s\S]*rna.storage[\s\S]*Field required"):
        convert_files(tmp_path / "x.zarr", f"rna={new}", features_from=shared)
    with pytest.raises(StoreError, match="no store here"):
        convert_files(tmp_path / "y.zarr", f"rna={new}", features_from=tmp_path)


def test_a_run_without_its_model_card_is_told_from_a_store(tmp_path: Path) -> None:
    run = tmp_path / "run"
    weights = run / "best" / "step-00000005"
    weights.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    with pytest.raises(StoreError, match=r"a run without its model\.json") as caught:
        read_feature_reference(run)
    assert caught.value.got == "config.json, best"
    assert "or give the store that it was trained on" in str(caught.value)
    (run / "model.json").write_text("{}")
    for inside in (weights, weights.parent):
        with pytest.raises(StoreError, match=f"give the run folder itself: {run}"):
            read_feature_reference(inside)
