"""The front door: a run says what it holds, and gives the same whatever holds the cells."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest

import clue_dist
from clue_dist.api import Run, load
from clue_dist.checkpoint.model_card import read_model_card, write_model_card
from clue_dist.errors import ConfigError, DataError, StoreError
from clue_dist.inference import describe_run
from clue_dist.inference.cells.named_counts import CellWarning
from clue_dist.store.reader import Store
from data_prep import from_python
from data_prep.from_python import ConversionRequest
from tests.stores import make_store
from tests.unit.fit_helpers import make_mudata
from tests.unit.run_helpers import make_run, make_setup
from tests.unit.test_cells_in_memory import CELLS, read_mudata


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the store `s.zarr` and the run `run` on it."""
    folder = tmp_path_factory.mktemp("api")
    make_store(folder / "s.zarr", cells=CELLS)
    make_run(folder / "run", folder / "s.zarr")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return load(str(folder / "run"))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[ConversionRequest]:
    """What conversions of cells in memory are asked for; each ends with the error "enough"."""
    requests: list[ConversionRequest] = []

    def convert(data: object, out: Path, request: ConversionRequest, name: str) -> None:
        requests.append(request)
        raise DataError("enough")

    monkeypatch.setattr(from_python, "convert_cells", convert)
    return requests


@pytest.mark.slow
def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, clue_dist; assert {'fit', 'load', 'Run'} <= set(dir(clue_dist)); "
        "print([m for m in ('torch', 'numpy', 'pandas', 'anndata') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_lone_modality_needs_no_common_space(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr", cells={"rna": 60}, features={"rna": 30})
    make_run(tmp_path / "run", tmp_path / "s.zarr")
    assert "\n  z: 6 dimensions" in repr(load(tmp_path / "run"))
    assert "common space" not in repr(load(tmp_path / "run"))


def test_names_of_the_front_door_are_those_of_the_package() -> None:
    assert clue_dist.load is load
    assert clue_dist.Run is Run
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = clue_dist.laod


def test_a_run_says_what_it_holds(folder: Path, run: Run) -> None:
    scores = {"step": 5, "split": "validation", "score": 0.25, "foscttm/rna-adt": 0.25}
    (folder / "run" / "metrics.jsonl").write_text(f"{json.dumps(scores)}\n")
    lines = repr(run).splitlines()
    assert lines == [
        f"Run {folder / 'run'} (step-00000005)",
        "  rna: 30 features",
        "  adt: 8 features",
        "  batches: 2 (batch-0, batch-1)",
        f"  trained on: 131 cells (70 rna+adt, 41 rna, 20 adt) of {folder / 's.zarr'}",
        "  validation: FOSCTTM of held-out pairs, rna-adt 0.25 (0 is perfect, 0.5 is chance)",
        "  z: 12 dimensions, no common space of the modalities",
    ]


def test_a_run_does_not_ask_a_server_what_it_holds(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(describe_run, "parse_location", lambda place: pytest.fail(place))
    config = run.trained_model.config.model_copy(update={"store": "s3://cells/s.zarr"})
    remote = replace(run.trained_model, config=config)
    assert "trained on: 131 cells of s3://cells/s.zarr" in repr(Run(folder / "run", remote))


def test_a_run_keeps_the_column_that_gave_its_batches(folder: Path, tmp_path: Path) -> None:
    setup = make_setup(folder / "s.zarr")
    notes = {"provenance": {"columns": {"batch": "donor"}}}
    setup.store.manifest = setup.store.manifest.model_copy(update=notes)
    write_model_card(tmp_path, setup.store, setup.config)
    assert read_model_card(tmp_path).batch_key == "donor"


def test_a_run_whose_store_and_metrics_are_gone_says_the_rest(folder: Path) -> None:
    make_store(folder / "gone.zarr", cells=CELLS)
    make_run(folder / "lone", folder / "gone.zarr")
    (folder / "gone.zarr").rename(folder / "moved.zarr")
    text = repr(load(folder / "lone"))
    assert f"trained on: 131 cells of {folder / 'gone.zarr'}" in text
    assert "validation" not in text


def test_cells_in_memory_lie_where_those_of_the_store_do(folder: Path, run: Run) -> None:
    mdata = read_mudata(Store(folder / "s.zarr"))
    joint = run.embed(mdata)
    found = run.embed(str(folder / "s.zarr"))
    order = mdata.obs_names.get_indexer(found.obs_names)
    np.testing.assert_allclose(joint[order], found.obsm["X_clue"], atol=1e-6)
    np.testing.assert_allclose(mdata.obsm["X_clue_var"][order], found.obsm["X_clue_var"], atol=1e-6)
    assert (found.obsm["X_clue_var"] > 0).all()
    assert list(mdata.obs["clue_modalities"].iloc[order]) == list(found.obs["clue_modalities"])
    table = mdata["adt"]
    order = found.obs_names.get_indexer(table.obs_names)
    np.testing.assert_allclose(table.obsm["X_clue"], found.obsm["X_clue_adt"][order], atol=1e-6)


def test_an_embedding_is_written_where_out_says(folder: Path, run: Run, tmp_path: Path) -> None:
    out = run.embed(Store(folder / "s.zarr"), out=str(tmp_path / "z.h5mu"))
    written, found = md.read_h5mu(out), run.embed(folder / "s.zarr")
    order = written.obs_names.get_indexer(found.obs_names)
    np.testing.assert_array_equal(written.obsm["X_clue"][order], found.obsm["X_clue"])
    assert [path.name for path in tmp_path.iterdir()] == ["z.h5mu"]
    table = read_mudata(Store(folder / "s.zarr"))["rna"]
    table.write_h5ad(tmp_path / "rna.h5ad")
    run.embed(tmp_path / "rna.h5ad", out=tmp_path / "rna_z.h5ad")
    np.testing.assert_allclose(
        ad.read_h5ad(tmp_path / "rna_z.h5ad").obsm["X_clue"], run.embed(table), atol=1e-6
    )
    returned = run.embed(tmp_path / "rna.h5ad")
    assert isinstance(returned, ad.AnnData)
    np.testing.assert_allclose(returned.obsm["X_clue"], table.obsm["X_clue"], atol=1e-6)
    for write in (run.embed, partial(run.impute, modality="adt")):
        with pytest.raises(ConfigError, match="would replace what is read"):
            write(tmp_path / "rna.h5ad", out=tmp_path / "rna.h5ad")


def test_scores_are_a_table_and_cells_that_were_trained_on_are_told(
    run: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = run.evaluate(folder / "s.zarr")
    assert "The model was trained on this store" in capsys.readouterr().err
    assert scores["rna->adt"]["cells"] == 70
    assert "foscttm" in repr(scores)
    assert sorted(path.name for path in folder.glob("*scores*")) == []


def test_doubts_about_scores_are_told_once(
    run: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = run.evaluate(folder / "s.zarr")
    print(scores)
    told = capsys.readouterr()
    assert (told.out + told.err).count("trained on this store") == 1


def test_scores_that_are_none_are_refused_where_they_are_given(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scores cannot be read") as raised:
        run.export(tmp_path / "shared", {"foscttm": 0.1})
    assert raised.value.where == "scores"
    assert list(tmp_path.iterdir()) == []


def test_warnings_of_cells_point_to_the_line_that_calls(folder: Path, run: Run) -> None:
    table = read_mudata(Store(folder / "s.zarr"))["rna"][:, 1:].copy()
    with pytest.warns(CellWarning, match="is missing") as caught:
        run.embed(table)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_view_of_a_file_is_refused_before_any_work(
    folder: Path, run: Run, tmp_path: Path
) -> None:
    read_mudata(Store(folder / "s.zarr"))["rna"].write_h5ad(tmp_path / "rna.h5ad")
    view = ad.read_h5ad(tmp_path / "rna.h5ad", backed="r")[:9]
    with pytest.raises(DataError, match="a view of a file"):
        run.embed(view)
    run.embed(view, out=tmp_path / "z.h5ad")
    np.testing.assert_array_equal(
        ad.read_h5ad(tmp_path / "z.h5ad").obsm["X_clue"], run.embed(view.to_memory())
    )


def test_the_modality_of_an_anndata_to_score_is_found_as_for_an_embedding(
    folder: Path, run: Run, requests: list[ConversionRequest]
) -> None:
    table = read_mudata(Store(folder / "s.zarr"))["rna"]
    with pytest.raises(DataError, match="enough"):
        run.evaluate(table)
    assert requests.pop().modality == "rna"
    strange = table.copy()
    strange.var_names = [f"gene-{i}" for i in range(table.n_vars)]
    for other, choices in ((strange, {}), (table, {"modality": "rn"})):
        messages = []
        for ask in (run.embed, run.evaluate):
            with pytest.raises(DataError) as raised:
                ask(other.copy(), **choices)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
    table.var["feature_types"] = "Gene Expression"
    with pytest.raises(DataError, match="enough"):
        run.evaluate(table)
    assert requests.pop().modality is None  # the conversion reads feature types itself


def test_the_modality_of_a_file_to_score_is_found_too(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def convert(arguments: argparse.Namespace) -> None:
        commands.append(arguments.inputs)
        raise DataError("enough")

    monkeypatch.setattr(from_python, "convert_as_typed", convert)
    file = tmp_path / "cells.h5ad"
    read_mudata(Store(folder / "s.zarr"))["adt"].write_h5ad(file)
    for cells in (file, f"adt={file}", [f"adt={file}"]):
        with pytest.raises(DataError, match="enough"):
            run.evaluate(cells)
    assert commands == [[f"adt={file}"]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("is_file", [False, True])
def test_modalities_to_score_are_found_as_for_an_embedding(
    folder: Path, run: Run, tmp_path: Path, is_file: bool
) -> None:
    """Proteins have another name, and the model does not know what the guides are."""
    mdata = read_mudata(Store(folder / "s.zarr"))
    expected = run.evaluate(mdata)
    rna, proteins = mdata["rna"], mdata["adt"]
    guides = ad.AnnData(rna.X[:, :3], rna.obs, pd.DataFrame(index=["g1", "g2", "g3"]))
    cells = md.MuData({"guides": guides, "prot": proteins, "rna": rna})
    if is_file:
        cells.write(tmp_path / "cells.h5mu")
    with pytest.warns(CellWarning, match="the model does not know guides"):
        scores = run.evaluate(tmp_path / "cells.h5mu" if is_file else cells)
    assert scores["rna->adt"] == expected["rna->adt"]


@pytest.mark.slow
@pytest.mark.parametrize("is_file", [False, True])
def test_feature_types_to_score_are_found_as_for_an_embedding(
    folder: Path, run: Run, tmp_path: Path, is_file: bool
) -> None:
    """The model does not know what the peaks are."""
    mdata = read_mudata(Store(folder / "s.zarr"))
    paired = mdata["rna"].obs_names.intersection(mdata["adt"].obs_names)
    rna, proteins = mdata["rna"][paired].copy(), mdata["adt"][paired].copy()
    expected = run.evaluate(md.MuData({"rna": rna, "adt": proteins}))
    peaks = ad.AnnData(rna.X[:, :3], rna.obs, pd.DataFrame(index=["p1", "p2", "p3"]))
    parts = {"Peaks": peaks, "Antibody Capture": proteins, "Gene Expression": rna}
    cells = ad.concat([*parts.values()], axis=1)
    cells.obs = rna.obs
    cells.var["feature_types"] = [name for name, part in parts.items() for _ in part.var_names]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.warns(CellWarning, match="the model does not know Peaks") as warned:
        scores = run.evaluate(tmp_path / "cells.h5ad" if is_file else cells)
    assert sum("Peaks" in str(each.message) for each in warned) == 1
    assert scores["rna->adt"] == expected["rna->adt"]


def test_cells_to_score_are_converted_as_fit_converts_them(
    run: Run, requests: list[ConversionRequest]
) -> None:
    choices = {"layer": "counts", "feature_ids": "ids", "batch_key": "donor", "label_key": "type"}
    with pytest.raises(DataError, match="enough"):
        run.evaluate(make_mudata(20)["rna"], kinds={"hto": "adt"}, modality="rna", **choices)
    for mistake in ({"out": "scores.csv"}, {"max_cells": 1}):  # which comes before the conversion
        with pytest.raises(ConfigError, match=r"\.json|2 or more"):
            run.evaluate(make_mudata(20)["rna"], modality="rna", **mistake)
    features = ["--features-from", str(run.folder)]
    assert requests == [
        ConversionRequest("donor", "type", "counts", "ids", {"hto": "adt"}, "rna", features)
    ]


@pytest.mark.slow
def test_what_is_told_of_cells_in_memory_names_no_file(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    mdata = read_mudata(Store(folder / "s.zarr"))
    assert run.evaluate(mdata)["about"]["store"] == "cells in memory"
    assert capsys.readouterr().out.startswith("cells in memory: 131 cells, fingerprint")
    rna = mdata["rna"]
    rna.var_names = [name if i < 2 else f"other-{i}" for i, name in enumerate(rna.var_names)]
    with pytest.raises(StoreError, match="next to none of the model's features") as raised:
        run.evaluate(mdata)
    assert raised.value.where == "cells in memory: modality rna"
    assert raised.value.got == "cells in memory.h5mu/mod/rna: 2 of 30 features known"
    rna.X = -rna.X
    with pytest.raises(DataError, match="counts must be raw") as raised:
        run.evaluate(mdata)
    assert str(raised.value.where).startswith("cells in memory.h5mu/mod/rna, cell ")


def test_the_modality_of_an_anndata_is_named_beside_the_one_asked_for(
    folder: Path, run: Run
) -> None:
    table = read_mudata(Store(folder / "s.zarr"))["rna"]
    names = pd.DataFrame(index=Store(folder / "s.zarr").manifest.modalities["adt"].features)
    proteins = ad.AnnData(np.ones((table.n_obs, len(names))), table.obs[[]], names)
    both = ad.concat([table, proteins], axis=1, merge="first")
    with pytest.raises(DataError, match="cells_modality="):
        run.impute(both, "adt")
    np.testing.assert_array_equal(
        run.impute(both, "adt", cells_modality="rna").X, run.impute(table, "adt").X
    )
    both.obs["half"] = np.where(np.arange(both.n_obs) % 2, "a", "b")
    ways = {"groupby": "half", "modality": "adt", "pairs": 10}
    assert set(run.differential(both, cells_modality="rna", **ways)) == {"a", "b"}
    labels = run.transfer(both, both, "half", reference_modality="rna", query_modality="rna")
    assert len(labels) == both.n_obs
