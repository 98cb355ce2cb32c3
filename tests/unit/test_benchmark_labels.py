"""Labels told by z and batches mixed in it: known mixtures have known scores, bars wait for all."""

from pathlib import Path
from typing import Any

import mudata as md
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from tests.benchmarks import labels, mosaic, scores
from tests.benchmarks.labels import Labels
from tests.benchmarks.matching import Matching
from tests.benchmarks.mosaic import JOINT
from tests.benchmarks.split import FOLDS

SET = "snare_adbrain_8lib"


def test_cells_without_a_type_are_left_out_and_batches_scored_where_there_are_some() -> None:
    rng, kind = np.random.default_rng(0), np.arange(200) % 4
    types = np.array(["B", "T", "NK", "Multiplets"])[kind]
    obs = pd.DataFrame({"cell_type": types, "batch": np.array(["one", "two"])[np.arange(200) % 2]})
    place = np.where(kind == 3, np.arange(200) % 3, kind)
    z = rng.normal(size=(200, 3)) + 50 * np.eye(4, 3)[place]
    found = scores.score_labels({JOINT: z}, {JOINT: z}, obs, obs)
    assert found["accuracy"][JOINT] == found["transferred"][JOINT] == 1.0
    assert JOINT in found["ilisi"]
    without = scores.score_labels({JOINT: z}, {}, obs.drop(columns="batch"), obs)
    assert without["ilisi"] == without["transferred"] == {}


def make_record(
    method: str, fold: int, accuracy: dict[str, float], ilisi: float = 0.5
) -> dict[str, Any]:
    run = {"method": method, "data_set": SET, "fold": fold}
    scored = {"accuracy": accuracy, "transferred": accuracy}
    return run | scored | {"ilisi": dict.fromkeys(accuracy, ilisi)}


def plan_labels(*words: str) -> Labels:
    return Labels(["--json", "out.json", "--sets", SET, *words])


def test_the_joint_z_is_judged_against_counts_and_against_our_own_z_of_one_modality() -> None:
    ours = [make_record("ours", fold, {JOINT: 0.9, "rna": 0.91, "atac": 0.7}) for fold in FOLDS]
    alone = {JOINT: 0.95, "rna": 0.85, "atac": 0.6}
    counts = [make_record("counts", fold, alone) for fold in FOLDS]
    over_counts, over_own, over_all, _ = plan_labels().judge(ours + counts)
    assert (over_counts["value"], over_counts["holds"]) == (pytest.approx(0.05), True)
    assert (over_own["value"], over_own["holds"]) == (pytest.approx(-0.01), False)
    assert over_all["value"] == pytest.approx(0.9 - 0.95)  # both counts side by side
    assert [bar["holds"] for bar in plan_labels().judge(ours[:4] + counts)] == [None] * 4
    text = plan_labels().tabulate(ours + counts)
    assert len(text.splitlines()) == 1 + 2 * 3
    assert "ours, joint" in text


def test_leads_are_of_the_same_folds_and_told_with_their_spread() -> None:
    ours, counts = [], []
    for fold in FOLDS:
        joint = 0.5 + 0.1 * fold
        ours.append(make_record("ours", fold, {JOINT: joint, "rna": joint, "atac": 0.1}))
        alone = {JOINT: 0, "rna": joint - 0.1 - 0.01 * (-1) ** fold, "atac": 0}
        counts.append(make_record("counts", fold, alone))
    over_counts, over_own, *_ = plan_labels().judge(ours + counts)
    assert over_counts["value"] == pytest.approx(0.1 + 0.01 / 5)
    deviation = np.std([0.11, 0.09, 0.11, 0.09, 0.11], ddof=1)
    assert over_counts["deviation"] == pytest.approx(deviation)
    assert (over_own["value"], over_own["deviation"]) == (pytest.approx(0), pytest.approx(0))


def test_batch_mixing_is_compared_on_the_folds_that_both_have() -> None:
    accuracy = {JOINT: 0.9, "rna": 0.9, "atac": 0.7}
    ours = [make_record("ours", fold, accuracy, ilisi=0.1 * fold) for fold in FOLDS]
    reference = [make_record("reference", fold, accuracy, ilisi=0.25) for fold in (2, 3)]
    *_, mixing = plan_labels().judge(ours + reference)
    assert mixing["value"] == pytest.approx(0.0)
    assert "2 of 5 folds" in mixing["name"]
    *_, mixing = plan_labels().judge(ours)
    assert mixing["holds"] is None


def test_the_joint_z_of_the_reference_has_length_one() -> None:
    u1, u2 = np.array([[3.0, 4.0], [0, 2]]), np.array([[0.0, 1], [5, 0]])
    z = scores.join_alone(mosaic.Split(Path("none"), ("rna", "atac")), u1, u2)
    assert np.linalg.norm(z[JOINT], axis=1) == pytest.approx([1, 1])
    assert z[JOINT][1] == pytest.approx(np.array([1, 1]) / np.sqrt(2))
    assert z["rna"] == pytest.approx(np.array([[0.6, 0.8], [0, 1]]))


@pytest.mark.filterwarnings("ignore:var_names are not unique")
def test_counts_are_reduced_by_training_cells_alone() -> None:
    """Other test cells leave the components of a test cell and of training cells as they are."""
    rng = np.random.default_rng(0)
    counts = {m: rng.poisson(1.0, (120, 60)) for m in ("rna", "adt", "atac")}

    def make_table(cells: range) -> md.MuData:
        obs = pd.DataFrame(index=[f"cell{i}" for i in cells])
        return md.MuData({m: AnnData(sp.csr_matrix(x[cells]), obs=obs) for m, x in counts.items()})

    train, pairs = make_table(range(100)), [f"cell{i}" for i in (7, 3, 50)]
    known, z = labels.reduce_counts(train, make_table(range(100, 120)), pairs)
    again, alone = labels.reduce_counts(train, make_table(range(100, 101)), pairs)
    for source in (JOINT, *counts):
        assert known[source] == pytest.approx(again[source], abs=1e-5)
        assert z[source][:1] == pytest.approx(alone[source], abs=1e-5)
    whole, _ = labels.reduce_counts(train, train, [f"cell{i}" for i in range(100)])
    assert known["rna"] == pytest.approx(whole["rna"][[7, 3, 50]], abs=1e-5)


def test_labels_follow_from_the_embeddings_they_are_told_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{SET}.h5mu").write_bytes(b"cells")
    monkeypatch.setattr(mosaic, "digest_sources", lambda: "all of clue_dist")
    plan = plan_labels("--data", str(tmp_path))
    before = {method: plan.digest(method, SET) for method in labels.METHODS}
    monkeypatch.setattr(Matching, "digest_method", lambda self, method: f"other code of {method}")
    after = {method: plan.digest(method, SET) for method in labels.METHODS}
    assert {m for m in before if before[m] != after[m]} == {"ours", "reference"}
