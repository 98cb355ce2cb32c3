"""The benchmark of answers: its scores, its rivals, and what a table and bars are made of."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from tests.benchmarks.answers import imputation, markers, transfer
from tests.benchmarks.answers.__main__ import MARKERS, METHODS, OURS, TRANSFER, Answers
from tests.benchmarks.matching import applies_to


def test_a_perfect_prediction_correlates_and_a_constant_does_not():
    truth = np.random.default_rng(0).random((20, 6))
    truth[:, 5] = 1.0  # does not vary: counts for nothing by feature
    scores = imputation.score_prediction(truth, truth)
    assert scores == {"feature": pytest.approx(1), "cell": pytest.approx(1), "rmse": 0}
    flat = imputation.score_prediction(np.ones_like(truth), truth)
    assert (flat["feature"], flat["cell"]) == (0, 0)


def test_counts_are_covered_as_often_as_intervals_say():
    """Counts of the same distribution as their draws, though most are 0 and intervals are wide."""
    rng = np.random.default_rng(0)
    mean = rng.gamma(0.3, 1.0, (300, 40))
    draws = rng.poisson(mean, (imputation.DRAWS, 300, 40))
    truth = rng.poisson(mean)
    assert imputation.cover_truth(truth, draws, rng) == pytest.approx(0.9, abs=0.01)
    assert imputation.cover_truth(rng.poisson(3 * mean + 2), draws, rng) < 0.6


@pytest.fixture(scope="module")
def cells() -> md.MuData:
    """Proteins follow from the RNA; ten cells lack them."""
    rng = np.random.default_rng(1)
    kind = rng.integers(0, 3, 150)
    rna = rng.poisson(np.eye(3)[kind].repeat(20, 1) * 4 + 0.2)
    adt = rng.poisson(np.eye(3)[kind] * 50 + 5)
    names = [f"c{i}" for i in range(150)]
    tables = {
        m: ad.AnnData(sp.csr_matrix(x.astype(np.int32)), obs=pd.DataFrame(index=names))
        for m, x in (("rna", rna), ("adt", adt))
    }
    tables["adt"] = tables["adt"][10:].copy()
    return md.MuData(tables)


@pytest.mark.parametrize("method", imputation.RIVALS)
def test_rivals_predict_from_pairs(cells, method):
    test = md.MuData({m: cells[m][cells[m].obs_names[-40:]].copy() for m in ("rna", "adt")})
    predicted = imputation.predict_simply(method, cells, test, "rna", "adt")
    truth = imputation.log_normalise(test["adt"].X)
    assert predicted.shape == truth.shape
    score = imputation.score_prediction(predicted, truth)["feature"]
    assert score == 0 if method == "mean" else score > 0.9


def test_what_another_model_imputed_is_scored_whatever_its_unit(cells, tmp_path):
    test = md.MuData({m: cells[m][10:].copy() for m in ("rna", "adt")})
    np.savez(tmp_path / imputation.IMPUTED, **{"rna-adt": test["adt"].X.toarray() / 7})
    found = imputation.score_peer(tmp_path, test)
    assert found["rna-adt"] == pytest.approx({"feature": 1, "cell": 1, "rmse": 0})
    assert len(found) == 1


def test_other_models_are_asked_about_the_modalities_that_they_know(tmp_path):
    words = ("--json", str(tmp_path / "o.json"), "--methods", "totalvi", "multivi", "knn")
    benchmark = Answers([*words, "--seeds", "0", "1", "--folds", "0"])
    cases = [(method, name, seed) for method, name, _, seed in benchmark.list_cases()]
    told = {("totalvi", name) for name in ("cbmc_cite", "hao_mosaic")}
    told |= {("multivi", "snare_adbrain_8lib")}
    for seed in (0, 1):
        assert {case[:2] for case in cases if case[0] != "knn" and case[2] == seed} == told
    assert {seed for method, _, seed in cases if method == "knn"} == {0}


def test_bars_are_about_leads_and_coverage(tmp_path):
    benchmark = Answers(["--json", str(tmp_path / "o.json"), "--work", str(tmp_path)])
    records = [
        {
            "method": method,
            "data_set": name,
            "fold": fold,
            "seed": 0,
            "wall_s": 1.0,
            "imputation": {
                direction: {
                    "feature": 0.5 + 0.1 * (method == OURS),
                    "cell": 0.5,
                    "rmse": 1.0,
                    "coverage": 0.9,
                }
                for direction in directions
            },
        }
        for method in METHODS
        if method not in (TRANSFER, MARKERS)
        for fold in range(5)
        for name, directions in {
            "cbmc_cite": ("rna-adt", "adt-rna"),
            "hao_mosaic": ("rna-adt", "adt-rna"),
            "snare_adbrain_8lib": ("rna-atac", "atac-rna"),
        }.items()
    ]
    labels = {"calibration_error": 0.01, "at_kept": 0.9}
    parts = dict.fromkeys(("joint", "rna", "adt"), labels)
    records += [
        {"method": TRANSFER, "data_set": "hao_mosaic", "fold": fold, "seed": 0, TRANSFER: parts}
        for fold in range(5)
    ]
    records = [r for r in records if applies_to(r["method"], r["data_set"])]
    judged = {bar["name"]: bar for bar in benchmark.judge(records)}
    errors = [name for name, bar in judged.items() if "calibration error" in name and bar["holds"]]
    assert len(errors) == 3
    assert judged["cbmc_cite, rna-adt: correlation by protein minus that of knn"]["holds"]
    lead = judged["snare_adbrain_8lib, atac-rna: correlation by cell minus that of knn"]
    assert (lead["value"], lead["holds"]) == (0, False)
    told = "{}, rna-adt: correlation by protein minus that of {}"
    without = [r for r in records if (r["method"], r["data_set"]) != ("totalvi", "cbmc_cite")]
    for record in without:
        if record["method"] == "totalvi":
            record["imputation"]["rna-adt"]["feature"] = 0.7
    holds = {bar["name"]: bar["holds"] for bar in benchmark.judge(without)}
    assert holds[told.format("cbmc_cite", "the best of the others")] is None
    assert holds[told.format("hao_mosaic", "totalvi")] is False
    assert sum("coverage" in name for name in judged) == 6
    table = benchmark.tabulate([record | {"wall_s": 1.0} for record in records])
    assert "imputed, rna-adt" in table
    assert "transfer, adt" in table


def test_labels_are_scored_by_confidence_and_by_types_left_out():
    rng = np.random.default_rng(0)
    names = np.array(["a", "b", "c"])

    def draw(n_cells: int, lacking: float) -> transfer.LabelledCells:
        codes = rng.integers(3, size=n_cells)
        z = 4 * np.eye(3, 6)[codes] + rng.normal(size=(n_cells, 6))
        alone = np.where(rng.random(n_cells) < lacking, np.nan, 1.0)[:, None] * z
        return transfer.LabelledCells({"joint": z, "rna": alone}, names[codes])

    found = dict(transfer.score_transfer(draw(400, 0.2), draw(300, 0.0)))
    joint = found["joint"]
    assert joint["accuracy"] > 0.9
    assert joint["calibration_error"] < 0.1
    assert min(joint["auroc"], joint["unknown"], joint["at_kept"]) > 0.8
    assert joint["kept"] == pytest.approx(0.9, abs=0.1)
    sure = transfer.measure_calibration_error(np.array([0.9, 0.9, 1.0]), np.array([1, 1, 1.0]))
    assert sure == pytest.approx(0.2 / 3)


def test_markers_are_compared_with_those_that_scanpy_names(cells, tmp_path):
    types = np.repeat(["a", "b", "rare"], [70, 65, 5])
    tables = {m: cells[m][cells["adt"].obs_names].copy() for m in ("rna", "adt")}
    for table in tables.values():
        table.obs["cell_type"] = types
    both = md.MuData(tables)
    asked = []

    def find_differences(cells, *, groups, modality, **choices):
        # The model knows all features but the first.
        return {name: pd.DataFrame(index=cells[modality].var_names[1:]) for name in groups}

    def rank_backwards(table, groups):
        asked.append((table.obs["type"].tolist(), groups))
        names = list(table.var_names)
        return {"a": names, "b": names[::-1]}

    run = SimpleNamespace(differential=find_differences)
    found = dict(markers.score_markers(run, both, rank_backwards))
    # The 14 first of 59 known genes are the same for a, and others for b.
    assert found["rna"] == {"overlap": 0.5, "first": 14, "types": 2}
    assert asked[0] == (types.tolist(), ["a", "b"])


def test_scanpy_is_given_raw_counts_and_types(cells, tmp_path):
    table = cells["adt"].copy()
    table.obs["type"] = "a"
    python = tmp_path / "python"  # stands for that of the environment: shows what it was given
    python.write_text(
        f"#!{sys.executable}\nimport json, sys\nimport anndata\n"
        "_, script, path, column, out, *groups = sys.argv\ncells = anndata.read_h5ad(path)\n"
        "names = [*cells.var_names, cells.obs[column].iloc[0], str(int(cells.X.sum()))]\n"
        "json.dump({group: names for group in groups}, open(out, 'w'))\n"
    )
    python.chmod(0o755)
    answer = markers.rank_by_scanpy(table, ["a", "b c"], python, tmp_path, threads=1)
    shown = [*table.var_names, "a", str(int(table.X.sum()))]
    assert answer == {"a": shown, "b c": shown}
