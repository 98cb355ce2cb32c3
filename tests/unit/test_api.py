"""The front door: a run says what it holds, and gives the same whatever holds the cells."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import torch.distributed as dist

import clue_dist
from clue_dist.api import Run, load, training_call
from clue_dist.checkpoint.model_card import read_model_card, write_model_card
from clue_dist.errors import ClueError, ConfigError, DataError, StoreError
from clue_dist.inference import describe_run
from clue_dist.inference.cells import open_source
from clue_dist.inference.cells.named_counts import CellWarning
from clue_dist.resilience.stop_signals import StopFlag
from clue_dist.store.reader import Store
from data_prep import from_python
from data_prep.from_python import ConversionRequest, convert_cells
from data_prep.simulate import SimulationSpec, build_mudata, parse_features
from tests.stores import make_store
from tests.unit.run_helpers import make_run, make_setup
from tests.unit.test_cells_in_memory import CELLS, read_mudata

SMALL = {
    "train.epochs": 2,
    "model.latent": 4,
    "model.trunk.hidden": 8,
    "model.decoder.hidden": 8,
    "data.batch_size": 32,
    "train.validate_every": 5,
    "log.tensorboard": False,
}


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


def test_cells_to_score_are_converted_as_fit_converts_them(
    run: Run, requests: list[ConversionRequest]
) -> None:
    choices = {"layer": "counts", "feature_ids": "ids", "batch_key": "donor", "label_key": "type"}
    with pytest.raises(DataError, match="enough"):
        run.evaluate(make_mudata(20)["rna"], kinds={"hto": "adt"}, modality="rna", **choices)
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


def test_what_is_said_in_python_becomes_flags() -> None:
    request = ConversionRequest(
        batch_key="donor",
        layer={"rna": "counts"},
        feature_ids="gene_ids",
        kinds={"hto": "adt"},
        conversion=["--top", "rna=10"],
    )
    assert request.list_flags() == [
        *("--top", "rna=10", "--batch-key", "donor"),
        *("--layer", "rna=counts", "--feature-ids", "gene_ids", "--kind", "hto=adt"),
    ]


def make_mudata(cells: int = 60) -> md.MuData:
    spec = SimulationSpec.from_features(
        parse_features(["rna:30", "adt:6"]), {}, cells=cells, paired=0.5, seed=0
    )
    return build_mudata(spec)


@pytest.mark.slow
def test_cells_in_memory_become_a_store(tmp_path: Path) -> None:
    mdata = make_mudata()
    mdata["rna"].uns["what"] = object()  # which no file takes
    mdata["rna"].layers["counts"] = mdata["rna"].X.copy()
    mdata["rna"].X = mdata["rna"].X * 0.5
    mdata.obs["donor"] = np.where(np.arange(mdata.n_obs) % 3, "d1", "d2")
    request = ConversionRequest(batch_key="donor", layer={"rna": "counts"})
    out = tmp_path / "s.zarr"
    for _ in range(2):  # the same cells are left as they are
        convert_cells(mdata, out, request)
    manifest = Store(out).manifest
    assert (manifest.n_cells, manifest.batches) == (60, ["d1", "d2"])
    assert list(manifest.labels) == sorted(mdata["rna"].obs["cell_type"].unique())
    with pytest.raises(StoreError, match="a store of other cells is here already"):
        convert_cells(make_mudata(50), out, request=ConversionRequest())
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


def test_the_layer_x_is_x(tmp_path: Path) -> None:
    table = make_mudata(20)["rna"]
    for layer in ("X", {"rna": "X"}):
        request = ConversionRequest(layer=layer, modality="rna")
        assert request.list_flags() == []
        written = from_python._write_cells(table, tmp_path, request)
        assert ad.read_h5ad(written).X.sum() == table.X.sum()


@pytest.mark.parametrize("ending", ["h5ad", "h5mu"])
def test_a_view_of_a_file_is_the_cells_that_it_shows(tmp_path: Path, ending: str) -> None:
    """A file stands for cells only as long as it says the same of them."""
    mdata, path = make_mudata(20), tmp_path / f"given.{ending}"
    (mdata if ending == "h5mu" else mdata["rna"]).write(path)
    source = open_source(path, leave_counts=True)
    request = ConversionRequest(batch_key="donor")
    assert from_python._name_input(source, tmp_path, request) == str(path)
    for change in ("view", "column"):
        shown = source[:6] if change == "view" else source
        if change == "column":
            shown.obs["donor"] = "d1"
        written = open_source(from_python._name_input(shown, tmp_path, request))
        assert list(written.obs_names) == list(shown.obs_names)
        assert ("donor" in written.obs) == (change == "column")
        counts = [table["rna"] if ending == "h5mu" else table for table in (shown, written)]
        assert counts[0].X[:].sum() == counts[1].X.sum() > 0
    assert source.isbacked


def test_an_interrupted_conversion_of_cells_in_memory_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial_folder = tmp_path / "s.zarr.partial"

    def interrupt(arguments: object) -> None:
        partial_folder.mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(from_python, "convert_as_typed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_cells(make_mudata(20), tmp_path / "s.zarr", ConversionRequest())
    assert list(tmp_path.iterdir()) == []
    # A job that another process has begun, or that files can go on with, stays.
    partial_folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert_cells(make_mudata(20), tmp_path / "s.zarr", ConversionRequest())
    assert list(tmp_path.iterdir()) == [partial_folder]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda table: ad.AnnData(obs=table.obs, var=table.var), "there are no counts"),
        (lambda table: ad.AnnData(table.X.toarray().astype(object)), "does not hold real numbers"),
        (lambda table: md.MuData({}), "there are no cells"),
    ],
)
def test_cells_without_counts_are_refused_before_a_file_is_written(
    tmp_path: Path, make: Callable[[ad.AnnData], ad.AnnData | md.MuData], message: str
) -> None:
    cells = make(make_mudata(20)["rna"])
    with pytest.raises(DataError, match=message) as raised:
        convert_cells(cells, tmp_path / "s.zarr", ConversionRequest(modality="rna"))
    assert str(tmp_path) not in str(raised.value)


def test_features_of_no_known_type_need_the_name_of_a_modality(tmp_path: Path) -> None:
    table = make_mudata(20)["rna"].copy()
    table.var["feature_types"] = "Custom"
    with pytest.raises(DataError, match=r"needs a modality's name\n  got: (.*), of types Custom"):
        convert_cells(table, tmp_path / "s.zarr", ConversionRequest())


@pytest.mark.slow
def test_what_is_left_out_of_cells_in_memory_names_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = make_mudata(20)["rna"].copy()
    table.var["feature_types"] = ["Gene Expression"] * 25 + ["Custom"] * 5
    convert_cells(table, tmp_path / "s.zarr", ConversionRequest())
    assert "cells in memory: 'Custom' (5 features) is left out" in capsys.readouterr().err


@pytest.mark.slow
def test_where_x_is_no_counts_raw_is_named(tmp_path: Path) -> None:
    table = make_mudata(20)["rna"].copy()
    table.raw = table.copy()
    table.X = table.X * 0.5
    with pytest.raises(DataError, match=r"--layer raw\.X"):
        convert_cells(table, tmp_path / "s.zarr", ConversionRequest(modality="rna"))


def test_a_folder_that_cannot_hold_a_run_is_refused_before_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="run folder cannot be written"):
        training_call._find_store(make_mudata(20), ConversionRequest(), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_columns_that_flags_name_reach_the_store(tmp_path: Path) -> None:
    table = make_mudata()["rna"].copy()
    table.obs["day"] = pd.Timestamp("2020-02-02")
    flags = ["--keep-obs", "day"]
    convert_cells(table, tmp_path / "s.zarr", ConversionRequest(modality="rna", conversion=flags))
    assert list(Store(tmp_path / "s.zarr").manifest.obs_columns) == ["day"]


@pytest.mark.slow
def test_mistakes_of_a_conversion_are_errors_that_can_be_caught(tmp_path: Path) -> None:
    table = make_mudata()["rna"]
    request = ConversionRequest(modality="rna", conversion=["--nonsense"])
    with pytest.raises(ConfigError, match="unrecognized arguments: --nonsense"):
        convert_cells(table, tmp_path / "s.zarr", request)
    with pytest.raises(DataError, match="needs a modality's name"):
        convert_cells(table, tmp_path / "s.zarr", ConversionRequest())
    convert_cells(table, tmp_path / "s.zarr", ConversionRequest(modality="rna"))
    assert Store(tmp_path / "s.zarr").modalities == ["rna"]


def test_training_in_a_thread_hears_no_signals() -> None:
    before = signal.getsignal(signal.SIGTERM)
    errors: list[BaseException] = []

    def open_flag() -> None:
        try:
            with StopFlag() as stop:
                assert not stop
        except BaseException as error:  # noqa: BLE001  it is looked at below
            errors.append(error)

    thread = threading.Thread(target=open_flag)
    thread.start()
    thread.join()
    assert errors == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_flag_knows_whether_a_person_interrupted() -> None:
    for number, interrupted in ((signal.SIGINT, True), (signal.SIGTERM, False)):
        with StopFlag() as stop:
            signal.raise_signal(number)
            assert stop
            assert stop.was_interrupted == interrupted


def test_mistakes_in_settings_come_before_the_cells_are_touched(tmp_path: Path) -> None:
    for settings, config in (({"train.lrr": 1}, "atlas"), ({}, {"train": {"lrr": 1}})):
        with pytest.raises(ClueError, match=r"did you mean `train.lr`\?"):
            clue_dist.fit(make_mudata(), tmp_path / "run", config=config, settings=settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_interrupt_saves_and_is_raised(tmp_path: Path) -> None:
    """As the stop button of a notebook does it, once training is under way."""

    def interrupt() -> None:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    endless = SMALL | {"train.epochs": 10_000, "train.patience": 0}
    with pytest.raises(KeyboardInterrupt, match="the same call goes on"):
        clue_dist.fit(make_mudata(), tmp_path / "run", settings=endless)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/COMMIT.json"))


@pytest.mark.slow
def test_fit_trains_in_this_process_and_again(tmp_path: Path) -> None:
    mdata = make_mudata(300)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    first = clue_dist.fit(mdata, tmp_path / "first", settings=SMALL)
    dist.destroy_process_group()  # as other code in the process may do
    second = clue_dist.fit(tmp_path / "first.zarr", tmp_path / "second", settings=SMALL)
    assert "FOSCTTM of held-out pairs" in repr(first)
    np.testing.assert_array_equal(first.embed(mdata), second.embed(mdata))
    assert np.isfinite(mdata.obsm["X_clue_var"]).all()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    again = clue_dist.fit(mdata, tmp_path / "first", settings=SMALL)
    assert again.trained_model.name == first.trained_model.name
    scores = first.evaluate(mdata)
    assert 0 <= scores["rna->adt"]["global"]["foscttm"] <= 1
