"""What a person is told who types what the pages say, and sometimes types it wrong."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest

import clue_dist
from clue_dist.api import Run, comparison_methods, trained_run, training_call
from clue_dist.errors import ConfigError, DataError, ResumeError, StoreError
from clue_dist.inference import output_files, report
from clue_dist.inference.cells import find_batch_columns, open_source
from clue_dist.inference.score_tables import Scores
from clue_dist.store.batch_vocabulary import BatchVocabulary
from clue_dist.store.layout import MANIFEST
from clue_dist.store.reader import Store
from data_prep import from_python
from data_prep.from_python import ConversionRequest, convert_cells
from tests.stores import make_store

DONORS = BatchVocabulary(["d1", "d2"], {"donor": ["d1", "d2"]})


@pytest.fixture
def mdata() -> md.MuData:
    """Twenty cells, of which both modalities have a feature of one name."""
    obs = pd.DataFrame({"donor": ["d1", "d2"] * 10}, index=[f"c{i}" for i in range(20)])
    tables = {
        name: ad.AnnData(np.ones((20, 2), np.float32), obs.copy(), pd.DataFrame(index=features))
        for name, features in (("rna", ["CD4", "ACTB"]), ("adt", ["CD4", "CD8"]))
    }
    with md.set_options(pull_on_update=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return md.MuData(tables)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose model is never asked."""
    return Run(tmp_path, SimpleNamespace(name="step-00000005"))  # type: ignore[arg-type]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Words of the command lines that conversions would run."""
    lines: list[list[str]] = []
    monkeypatch.setattr(from_python, "_run_conversion", lambda words, name: lines.append(words))
    return lines


@pytest.mark.parametrize("argument", ["batch_key", "label_key"])
def test_a_column_that_cells_in_memory_lack_is_refused(
    mdata: md.MuData, tmp_path: Path, typed: list[list[str]], argument: str
) -> None:
    with pytest.raises(DataError, match=rf"{argument}='Donor'(.|\n)*did you mean donor\?"):
        convert_cells(mdata, tmp_path / "s.zarr", ConversionRequest(**{argument: "Donor"}))
    for known in ("donor", "none", "adt=donor"):
        convert_cells(mdata, tmp_path / "s.zarr", ConversionRequest(**{argument: known}))
    assert len(typed) == 3


def test_a_column_that_files_lack_is_refused_before_training(
    mdata: md.MuData, tmp_path: Path
) -> None:
    path = tmp_path / "rna.h5ad"
    mdata["rna"].write_h5ad(path)
    with pytest.raises(DataError, match=r"no input has the batch column(.|\n)*did you mean donor"):
        clue_dist.fit([f"rna={path}"], tmp_path / "run", batch_key="donors")
    assert not (tmp_path / "run.zarr").exists()


def test_an_anndata_without_feature_types_needs_a_name(
    mdata: md.MuData, tmp_path: Path, typed: list[list[str]]
) -> None:
    table = mdata["rna"].copy()
    with pytest.raises(DataError, match=r"needs a modality's name(.|\n)*`modality=\"rna\"`"):
        convert_cells(table, tmp_path / "s.zarr", ConversionRequest())
    convert_cells(table, tmp_path / "s.zarr", ConversionRequest(modality="rna"))
    table.var["feature_types"] = "Gene Expression"
    convert_cells(table, tmp_path / "s.zarr", ConversionRequest())
    assert len(typed) == 2


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("rna=a.h5ad adt=b.h5ad", r"several files are a list(.|\n)*'rna=a.h5ad', 'adt=b.h5ad'"),
        ([ad.AnnData(), ad.AnnData()], r"list of AnnData(.|\n)*mudata\.MuData"),
        ({"rna": ad.AnnData()}, r"got: dict\n(.|\n)*mudata\.MuData"),
        (pd.DataFrame({"a": [1]}), "got: DataFrame\n"),
        (["a.h5ad", 3], "got: list of int, str"),
    ],
)
def test_what_is_no_input_is_refused_with_a_way_on(
    given: Any, advice: str, tmp_path: Path, typed: list[list[str]]
) -> None:
    with pytest.raises(DataError, match=advice):
        convert_cells(given, tmp_path / "s.zarr", ConversionRequest())
    assert not typed


def test_layers_and_columns_of_var_that_cells_in_memory_lack_are_refused(
    mdata: md.MuData, tmp_path: Path, typed: list[list[str]]
) -> None:
    mdata["rna"].layers["counts"] = mdata["rna"].X.copy()
    for table in mdata.mod.values():
        table.var["gene_id"] = table.var_names

    def convert(**choices: Any) -> None:
        convert_cells(mdata, tmp_path / "s.zarr", ConversionRequest(**choices))

    with pytest.raises(DataError, match=r"layer='count' of rna\n  got: layers: counts\n.*counts\?"):
        convert(layer={"rna": "count"})
    with pytest.raises(DataError, match=r"layer='counts' of adt\n  got: layers: none\n.*a dict"):
        convert(layer="counts")
    with pytest.raises(DataError, match=r"of rna\n  got: columns: gene_id\n.*mean gene_id\?"):
        convert(feature_ids="gene_ids")
    convert(layer={"rna": "counts", "adt": "X"}, feature_ids="symbol,gene_id")
    assert len(typed) == 1


def test_counts_beside_normalised_values_are_named(tmp_path: Path) -> None:
    counts = np.arange(40, dtype=np.float32).reshape(8, 5)
    table = ad.AnnData(np.log1p(counts), layers={"counts": counts, "scaled": counts - 0.5})
    with pytest.raises(DataError, match=r"must be raw(.|\n)*fix: `--layer counts` \(`layer=` in"):
        convert_cells(table, tmp_path / "s.zarr", ConversionRequest(modality="rna"))


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_columns_that_may_tell_cells_of_one_name_apart_are_listed(
    mdata: md.MuData, tmp_path: Path
) -> None:
    table = mdata["rna"].copy()
    table.obs_names = [f"c{i // 2}" for i in range(20)]
    with pytest.raises(DataError, match=r"`--dataset-key COLUMN` \(donor\)"):
        convert_cells(table, tmp_path / "s.zarr", ConversionRequest(modality="rna"))
    request = ConversionRequest(modality="rna", conversion="--dataset-key donor")
    convert_cells(table, tmp_path / "s.zarr", request)
    assert Store(tmp_path / "s.zarr").manifest.n_cells == 20


def test_flags_may_be_one_text(mdata: md.MuData, tmp_path: Path, typed: list[list[str]]) -> None:
    for flags in ("--keep-obs all --seed 3", ["--keep-obs", "all", "--seed", "3"]):
        convert_cells(mdata, tmp_path / "s.zarr", ConversionRequest(conversion=flags))
    first, second = (words[words.index("--keep-obs") :][:4] for words in typed)
    assert first == second == ["--keep-obs", "all", "--seed", "3"]
    with pytest.raises(DataError, match="one column holds the labels"):
        ConversionRequest(label_key=["cell_type"])  # type: ignore[arg-type]


def test_a_path_that_no_cells_are_read_from_is_refused_with_a_way_on(tmp_path: Path) -> None:
    for name, advice in (
        ("rna.h5ad.gz", r"unpack it: `gunzip rna\.h5ad\.gz`"),
        ("rna.h5", r"doctor rna\.h5` says how"),
    ):
        (tmp_path / name).write_bytes(b"1")
        with pytest.raises(DataError, match=advice):
            open_source(tmp_path / name)
    with pytest.raises(DataError, match=r'give the path alone; `modality="rna"`'):
        open_source(f"rna={tmp_path}/rna.h5ad")
    # A URL may be longer than the name of any file.
    with pytest.raises(StoreError, match="a store cannot lie there"):
        open_source(f"ftp://host/{'a' * 300}.zarr")


def test_an_h5ad_that_is_packed_is_told_from_a_broken_one(mdata: md.MuData, tmp_path: Path) -> None:
    mdata["rna"].write_h5ad(tmp_path / "a.h5ad")
    packed = tmp_path / "a.h5ad.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.h5ad").read_bytes()))
    with pytest.raises(DataError, match=r"got: an HDF5 file that is packed\n(.|\n)*gunzip a.h5ad"):
        convert_cells([f"rna={packed}"], tmp_path / "s.zarr", ConversionRequest())


def test_a_folder_without_a_run_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"`clue_dist\.fit`"):
        clue_dist.load(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.json").write_text("{}")
    with pytest.raises(ResumeError, match=rf"name one of the runs in it: {tmp_path}/a, "):
        clue_dist.load(tmp_path)
    (tmp_path / MANIFEST).write_text('{"name": "a web page"}')  # as other programs write it, too
    with pytest.raises(ResumeError, match="name one of the runs in it"):
        clue_dist.load(tmp_path)
    make_store(tmp_path / "s.zarr")
    with pytest.raises(ResumeError, match="this is a store"):
        clue_dist.load(tmp_path / "s.zarr")


def test_a_flag_of_pairing_counts_for_cells_in_memory(
    mdata: md.MuData, tmp_path: Path, typed: list[list[str]]
) -> None:
    flags = ["--pair-barcodes", "core"]
    convert_cells(mdata, tmp_path / "s.zarr", ConversionRequest(conversion=flags))
    # The last one counts.
    assert [w for w in typed[0] if w in ("exact", "core")] == ["exact", "core"]


def test_cells_are_written_and_read_without_advice_of_mudata(
    mdata: md.MuData, tmp_path: Path, typed: list[list[str]]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mdata.write(tmp_path / "cells.h5mu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_cells(mdata, tmp_path / "s.zarr", ConversionRequest())
        assert open_source(tmp_path / "cells.h5mu").n_obs == 20


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_batch_of_cells_to_score_is_that_of_the_training_cells(
    mdata: md.MuData, tmp_path: Path
) -> None:
    mdata.write(tmp_path / "cells.h5mu")
    table = mdata["rna"]
    table.write_h5ad(tmp_path / "rna.h5ad")
    for cells in (mdata, table, tmp_path / "cells.h5mu", str(tmp_path / "rna.h5ad")):
        assert find_batch_columns(cells, DONORS) == ["donor"]
    two = BatchVocabulary(["d1 | v2"], {"donor": ["d1"], "kit": ["v2"]})
    assert find_batch_columns(mdata, two) is None
    for place in (["rna=rna.h5ad"], "rna=rna.h5ad", tmp_path / "s.zarr"):
        assert find_batch_columns(place, DONORS) is None


def test_scores_need_no_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []

    def read_scores(folder: Path, place: Path, scores: Path, *_: Any, **__: Any) -> Path:
        texts.append(scores.read_text())
        return place

    monkeypatch.setattr(report, "write_report", read_scores)
    monkeypatch.setattr(trained_run, "export_run", read_scores)
    scores = Scores({"joint": {"cells": 20, "store_cells": 30}})
    run.report(embedding=tmp_path / "z.h5mu", scores=scores)
    assert run.export(tmp_path / "model", scores, licence="CC0") == tmp_path / "model"
    assert texts == [json.dumps(scores)] * 2


def test_counts_of_a_reference_may_lie_elsewhere(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[dict[str, Any]] = []

    def note_reading(source: object, model: object, arguments: object, **reading: Any) -> None:
        readings.append(reading)

    for name in ("open_cells", "open_reference"):
        monkeypatch.setattr(comparison_methods, name, note_reading)
    monkeypatch.setattr(comparison_methods, "label_cells", lambda *_, **__: None)
    monkeypatch.setattr(
        comparison_methods, "match_cells", lambda *_, **__: SimpleNamespace(pairs=None)
    )
    elsewhere = {"reference_layer": "X", "reference_feature_ids": "symbol"}
    run.transfer("a.h5ad", "b.h5ad", layer="counts", **elsewhere)
    run.match("b.h5ad", "rna", "adt", reference="a.h5ad", layer="counts", **elsewhere)
    run.transfer("a.h5ad", "b.h5ad", layer="counts")
    found = [(reading["layer"], reading["feature_ids"]) for reading in readings]
    query, reference = ("counts", None), ("X", "symbol")
    assert sorted(found[:4], key=str) == sorted([query, reference] * 2, key=str)
    assert found[4:] == [query, query]


def test_parquet_is_refused_where_nothing_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = output_files.require_output_format
    monkeypatch.setattr(output_files, "find_spec", lambda name: None)
    check(tmp_path / "labels.csv.gz", [".csv.gz", ".parquet"])
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        check(tmp_path / "labels.parquet", [".csv.gz", ".parquet"])
    monkeypatch.setattr(output_files, "find_spec", {"pyarrow": object()}.get)
    check(tmp_path / "labels.parquet", [".csv.gz", ".parquet"])


def test_what_counts_for_nothing_of_a_store_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").touch()
    for request in (
        ConversionRequest(),
        ConversionRequest(conversion=["--features-from", "runs/a"]),
    ):
        assert training_call._find_store(tmp_path, request, tmp_path / "run") == str(tmp_path)
        assert capsys.readouterr().err == ""
    training_call._find_store(tmp_path, ConversionRequest("donor", layer="counts"), tmp_path)
    assert "warning: of no effect: batch_key, layer;" in capsys.readouterr().err
