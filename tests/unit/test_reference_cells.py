"""Cells that travel with a model: what its folder holds of them, and that they serve elsewhere."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from clue_dist.api.trained_run import Run, load
from clue_dist.commands import export, match, transfer
from clue_dist.errors import ConfigError, DataError
from clue_dist.inference import new_batches
from clue_dist.inference.cells.named_counts import CellWarning
from clue_dist.inference.export import export_run
from clue_dist.inference.query import select_modalities
from clue_dist.inference.reference_cells import REFERENCE_FILE, ReferenceCells
from clue_dist.store.reader import Store
from tests.stores import make_store
from tests.unit.run_helpers import commit_weights, make_run
from tests.unit.test_cells_in_memory import read_mudata

FEATURES = {"rna": 30, "adt": 8}
CELLS = {"rna+adt": 70, "rna": 41, "adt": 20}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run, in a folder that nobody else has."""
    folder = tmp_path_factory.mktemp("reference")
    make_store(folder / "old.zarr", CELLS, FEATURES)
    return load(make_run(folder / "run", folder / "old.zarr"))


def assert_same_answers(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Where variances are asked for, too, z is computed another way, and rounded otherwise."""
    pd.testing.assert_frame_equal(found, expected, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def query(run: Run) -> Store:
    return make_store(run.folder.parent / "new.zarr", {"rna": 30}, {"rna": 30}, batches=4, seed=0)


@pytest.fixture(scope="module")
def shared(run: Run) -> Run:
    """The same model in a folder that holds its cells, and whoever has it lacks their counts."""
    run.export(run.folder.parent / "shared", cells=run.folder.parent / "old.zarr")
    return load(run.folder.parent / "shared")


def test_labels_and_partners_come_from_the_cells_of_the_folder(
    run: Run, shared: Run, query: Store
) -> None:
    store = run.folder.parent / "old.zarr"
    assert isinstance(shared.reference, ReferenceCells)
    expected = run.transfer(store, query, "cell_type")
    assert_same_answers(shared.transfer(None, query, "cell_type"), expected)
    assert expected.is_calibrated.all()
    pairs = run.match(query, "rna", "adt", reference=store, n_partners=3)
    found = shared.match(query, "rna", "adt", reference=shared.reference, n_partners=3)
    assert_same_answers(found, pairs)
    assert set(found.cell) == {f"rna-{i}" for i in range(30)}
    assert all(name.startswith(("adt", "rna+adt")) for name in found.partner)


def test_the_folder_holds_z_and_obs_and_no_counts_or_paths(run: Run, shared: Run) -> None:
    file = shared.folder / REFERENCE_FILE
    table = ad.read_h5ad(file)
    assert table.X is None
    assert table.n_vars == len(table.layers) == 0
    assert set(table.obsm) == {"X_clue", "X_clue_rna", "X_clue_adt"}
    assert set(table.obs) == {"batch", "cell_type", "clue_modalities"}
    assert str(run.folder.parent).encode() not in file.read_bytes()
    card = (shared.folder / "README.md").read_text()
    for text in ("z of 131 cells", "batch, cell_type, clue_modalities", "run.transfer(None"):
        assert text in card
    assert "cells.h5ad" in repr(shared)
    assert "131 embedded cells with rna, adt" in repr(shared.reference)


def test_an_embedding_may_stand_for_its_cells(run: Run, query: Store, tmp_path: Path) -> None:
    z = run.embed(run.folder.parent / "old.zarr", out=tmp_path / "z.h5ad")
    assert isinstance(z, Path)
    export_run(run.folder, tmp_path / "shared", cells=z)
    expected = run.transfer(run.folder.parent / "old.zarr", query, "cell_type")
    for reference in (z, tmp_path / "shared" / REFERENCE_FILE):
        assert_same_answers(run.transfer(reference, query, "cell_type"), expected)


def test_an_embedding_that_does_not_serve_is_refused(
    run: Run, query: Store, tmp_path: Path
) -> None:
    both = run.embed(run.folder.parent / "old.zarr", out=tmp_path / "z.h5mu")
    with pytest.raises(DataError, match=r"in a MuData is no reference(.|\n)*--out z\.h5ad"):
        run.transfer(both, query, "cell_type")
    (tmp_path / "z.h5mu").unlink()
    joint = run.embed(run.folder.parent / "old.zarr", out=tmp_path / "z.h5ad", per_modality=False)
    with pytest.raises(DataError, match="lacks z from single modalities"):
        run.transfer(joint, query, "cell_type")
    table = ad.read_h5ad(tmp_path / "z.h5ad")
    table.uns["clue_dist"]["checkpoint"] = "step-00000004"
    table.write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(DataError, match="other weights"):
        run.export(tmp_path / "shared", cells=tmp_path / "other.h5ad")
    assert {path.name for path in tmp_path.iterdir()} == {"z.h5ad", "other.h5ad"}


def test_a_joint_z_by_another_formula_is_doubtful(run: Run, query: Store, tmp_path: Path) -> None:
    weights = dict(run.trained_model.model.state_dict())
    for name in weights:
        if name.endswith(("space.weight", "space.joint_weight")):
            weights[name] = torch.ones_like(weights[name])
    shutil.copytree(run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("best"))
    commit_weights(tmp_path / "run" / "best" / "step-00000005", weights)
    store = run.folder.parent / "old.zarr"
    run = load(tmp_path / "run")  # whose modalities have a common space
    now, earlier = tmp_path / "z.h5ad", tmp_path / "earlier.h5ad"
    run.embed(store, out=now)
    table = ad.read_h5ad(now)
    del table.uns["clue_dist"]["joint_formula"]  # as before it was written down
    table.write_h5ad(earlier)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CellWarning)
        run.transfer(now, query)
    for ask in (
        lambda: run.transfer(earlier, query),
        lambda: run.export(tmp_path / "shared", cells=earlier),
        lambda: run.match(query, "rna", "adt", reference=earlier),
    ):
        with pytest.warns(CellWarning, match="by the formula of this version(.|\n)*export it anew"):
            ask()
    table[table.obs.clue_modalities != "rna+adt"].write_h5ad(earlier)  # where nothing is joined
    with warnings.catch_warnings():
        warnings.simplefilter("error", CellWarning)
        run.match(query, "rna", "adt", reference=earlier)


def test_without_cells_of_its_own_a_run_refers_to_its_training_store(
    run: Run, query: Store, tmp_path: Path
) -> None:
    expected = run.transfer(run.folder.parent / "old.zarr", query, "cell_type")
    assert_same_answers(run.transfer(None, query, "cell_type"), expected)
    run.export(tmp_path / "plain")
    with pytest.raises(ConfigError, match="brings no reference cells"):
        load(tmp_path / "plain").transfer(None, query, "cell_type")


def test_a_model_that_learns_batches_keeps_its_cells(
    shared: Run, query: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_batches, "STEPS", 2)
    tuned = shared.fine_tune(query, tmp_path / "tuned")
    before, after = (run.transfer(None, query, "cell_type") for run in (shared, tuned))
    assert_same_answers(before, after)


def test_the_commands_ask_the_cells_of_the_folder(
    shared: Run, query: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(shared.folder, folder)
    words = ["--run", str(folder), "--store", str(query.root), "--out"]
    monkeypatch.setattr(sys, "argv", ["transfer", *words, str(tmp_path / "labels.csv")])
    transfer.main()
    labels = pd.read_csv(tmp_path / "labels.csv", index_col="cell")
    expected = shared.transfer(None, query, "cell_type")
    np.testing.assert_array_equal(labels.label, expected.label.astype(str))
    words += [str(tmp_path / "pairs.csv"), "--first", "rna", "--second", "adt"]
    words += ["--reference", str(folder / REFERENCE_FILE)]
    monkeypatch.setattr(sys, "argv", ["match", *words])
    match.main()
    pairs = pd.read_csv(tmp_path / "pairs.csv")
    found = shared.match(query, "rna", "adt", reference=shared.reference)
    assert list(pairs.partner) == list(found.partner)


def refuse(ask: Callable[[], object]) -> str:
    """What a person is told to do about cells that are refused."""
    with pytest.raises(DataError) as raised:
        ask()
    assert raised.value.fix is not None
    return raised.value.fix


def test_advice_names_the_arguments_of_the_method_that_is_called(run: Run, query: Store) -> None:
    known = read_mudata(query)["rna"]
    paired = read_mudata(Store(run.folder.parent / "old.zarr"))
    both = ad.concat([paired["rna"], paired["adt"]], axis=1)
    few, normalised, strange = known[:, :9].copy(), known.copy(), known.copy()
    normalised.X = normalised.X * 0.3
    strange.var_names = [f"gene-{i}" for i in range(strange.n_vars)]
    assert refuse(lambda: run.embed(strange)).startswith("`feature_ids=` names a column of var")
    assert '`reference_modality="rna"`' in refuse(lambda: run.transfer(both, known))
    assert '`query_modality="rna"`' in refuse(lambda: run.transfer(known, both))
    assert '`cells_modality="rna"`' in refuse(lambda: run.impute(both, "adt"))
    assert '`modality="rna"`' in refuse(lambda: run.embed(both))
    fix = refuse(lambda: run.match(known, "rna", "adt", reference=both))
    assert fix == (
        'a MuData says it: `mudata.MuData({"rna": adata})`; `reference_feature_ids=` names a '
        "column of var that names features as the model does"
    )
    fix = refuse(lambda: run.transfer(few, known, reference_modality="rna"))
    assert "`reference_feature_ids=`" in fix
    assert "`min_known=0`" in fix
    assert "`reference_layer=`" in refuse(lambda: run.transfer(normalised, known))
    assert "`layer=`" in refuse(lambda: run.transfer(known, normalised))
    # One word stands for both kinds of cells, until the reference has one of its own.
    known.layers["counts"] = known.X.copy()
    for layers, typed in (({}, "layer="), ({"reference_layer": {"rnaa": "X"}}, "reference_layer=")):
        with pytest.raises(DataError, match="no such modality") as raised:
            run.transfer(known, known, layer={"rnaa": "counts"}, **layers)
        assert str(raised.value.where).startswith(typed)


def test_advice_on_cells_to_export_names_no_argument(
    run: Run, query: Store, tmp_path: Path
) -> None:
    normalised = read_mudata(query)["rna"]
    normalised.X = normalised.X * 0.3
    fix = refuse(lambda: run.export(tmp_path / "shared", cells=normalised))
    assert fix.endswith(
        "convert the cells into a store, or embed them into an .h5ad, and say it there"
    )
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize("command", ["transfer", "match"])
def test_advice_on_a_file_of_counts_names_what_the_command_takes(
    run: Run, query: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    few = read_mudata(query)["rna"][:, :2].copy()
    few.write_h5ad(tmp_path / "few.h5ad")
    words = ["--run", str(run.folder), "--store", str(query.root)]
    words += ["--out", str(tmp_path / "out.csv"), "--reference", str(tmp_path / "few.h5ad")]
    if command == "match":
        words += ["--first", "rna", "--second", "adt"]
    monkeypatch.setattr(sys, "argv", [command, *words])
    fix = refuse({"transfer": transfer, "match": match}[command].main)
    assert fix == (
        "convert the cells into a store, and say it there: `clue prep convert NAME=FILE "
        "--features-from RUN --out STORE`; `--min-known 0` takes the cells all the same"
    )


def test_a_reference_may_have_modalities_that_the_model_does_not_know(
    run: Run,
    query: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cells = {"rna+adt": 70, "rna": 41, "atac": 9}
    store = make_store(tmp_path / "more.zarr", cells, FEATURES | {"atac": 12}, seed=3)
    with pytest.warns(CellWarning, match="the model does not know atac"):
        found = run.transfer(store, query)
    known = select_modalities(store, ["rna", "adt"])
    assert_same_answers(found, run.transfer(known, query))
    words = ["--run", str(run.folder), "--out", str(tmp_path / "shared")]
    monkeypatch.setattr(sys, "argv", ["export", *words, "--with-cells", str(store.root)])
    export.main()
    assert capsys.readouterr().err == (
        "warning: the model does not know atac, which counts for nothing\n"
        "warning: left out: 9 cells without rna, adt\n"
    )
    assert len(load(tmp_path / "shared").reference.read_obs()) == 111
