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
    found = scores.score_labels({JOINT: z}, obs)
    assert found["accuracy"][JOINT] == 1.0
    assert JOINT in found["ilisi"]
    assert scores.score_labels({JOINT: z}, obs.drop(columns="batch"))["ilisi"] == {}


def make_record(
    method: str, fold: int, accuracy: dict[str, float], ilisi: float = 0.7, seed: int = 0
) -> dict[str, Any]:
    run = {"method": method, "data_set": SET, "fold": fold, "seed": seed}
    return run | {"accuracy": accuracy, "ilisi": dict.fromkeys(accuracy, ilisi)}


def plan_labels(*words: str) -> Labels:
    return Labels(["--json", "out.json", "--sets", SET, *words])


def make_records(**accuracies: dict[str, float]) -> list[dict[str, Any]]:
    return [make_record(m, fold, found) for m, found in accuracies.items() for fold in FOLDS]


def test_the_joint_z_is_judged_against_the_best_of_all_else_and_against_wnn() -> None:
    ours = {JOINT: 0.9, "rna": 0.89, "atac": 0.7}
    counts = {JOINT: 0.88, "rna": 0.85, "atac": 0.6}
    records = make_records(ours=ours, counts=counts, wnn={JOINT: 0.88})
    lead, over_wnn, ilisi = plan_labels().judge(records)
    assert (lead["value"], lead["holds"]) == (pytest.approx(0.01), True)
    assert lead["name"].endswith("minus that of our z of rna")
    assert (over_wnn["value"], over_wnn["holds"]) == (pytest.approx(0.02), True)
    assert over_wnn["name"].endswith("minus that of WNN")
    assert (ilisi["value"], ilisi["holds"]) == (pytest.approx(0.7), True)
    better = make_records(ours=ours, counts=counts | {JOINT: 0.95}, wnn={JOINT: 0.91})
    lead, over_wnn, _ = plan_labels().judge(better)
    assert (lead["value"], lead["holds"]) == (pytest.approx(-0.05), False)
    assert lead["name"].endswith("minus that of both counts")
    assert over_wnn["holds"] is False
    assert [bar["holds"] for bar in plan_labels().judge(records[1:])] == [None] * 3
    text = plan_labels().tabulate(records)
    assert len(text.splitlines()) == 1 + 2 * 3 + 1
    assert "ours, joint" in text


def test_leads_are_of_the_same_folds_and_told_with_their_spread() -> None:
    ours, others = [], []
    for fold in FOLDS:
        joint = 0.5 + 0.1 * fold
        ours.append(make_record("ours", fold, {JOINT: joint, "rna": joint, "atac": 0.1}))
        alone = {JOINT: 0, "rna": 0, "atac": 0}
        others.append(make_record("counts", fold, alone))
        others.append(make_record("wnn", fold, {JOINT: joint - 0.1 - 0.01 * (-1) ** fold}))
    lead, over_wnn, _ = plan_labels().judge(ours + others)
    assert (lead["value"], lead["deviation"]) == (pytest.approx(0), pytest.approx(0))
    assert over_wnn["value"] == pytest.approx(0.1 + 0.01 / 5)
    deviation = np.std([0.11, 0.09, 0.11, 0.09, 0.11], ddof=1)
    assert over_wnn["deviation"] == pytest.approx(deviation)


def test_seeds_are_averaged_where_all_were_run() -> None:
    alone = {"rna": 0.5, "atac": 0.5}
    records = make_records(ours={JOINT: 0.8} | alone, counts={JOINT: 0.5} | alone, wnn={JOINT: 0.7})
    plan = plan_labels("--seeds", "0", "1")
    assert [bar["holds"] for bar in plan.judge(records)] == [None] * 3
    again = [make_record("ours", fold, {JOINT: 0.7} | alone, seed=1) for fold in FOLDS]
    lead, over_wnn, _ = plan.judge(records + again)
    assert (lead["value"], over_wnn["value"]) == (pytest.approx(0.25), pytest.approx(0.05))


def test_types_are_told_by_lists_of_neighbours_as_by_places_of_cells() -> None:
    rng, kind = np.random.default_rng(0), np.arange(200) % 4
    types = np.array(["B", "T", "NK", "Multiplets"])[kind]
    z = rng.normal(size=(200, 3)) + 1.5 * np.eye(4, 3)[kind]
    distances = np.linalg.norm(z[:, None] - z[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    near = distances.argsort(1)[:, :100]
    found = scores.score_neighbours(near, pd.DataFrame({"cell_type": types}))
    typed = kind != 3
    expected = scores.measure_accuracy(z[typed], types[typed])
    assert found["accuracy"] == {JOINT: pytest.approx(expected)}
    assert 0.5 < expected < 1


def test_the_joint_z_of_the_reference_has_length_one() -> None:
    u1, u2 = np.array([[3.0, 4.0], [0, 2]]), np.array([[0.0, 1], [5, 0]])
    z = scores.join_alone(mosaic.Split(Path("none"), ("rna", "atac")), u1, u2)
    assert np.linalg.norm(z[JOINT], axis=1) == pytest.approx([1, 1])
    assert z[JOINT][1] == pytest.approx(np.array([1, 1]) / np.sqrt(2))
    assert z["rna"] == pytest.approx(np.array([[0.6, 0.8], [0, 1]]))


@pytest.mark.filterwarnings("ignore:var_names are not unique")
def test_counts_are_reduced_by_training_cells_alone() -> None:
    """Other test cells leave the components of a test cell as they are."""
    rng = np.random.default_rng(0)
    counts = {m: rng.poisson(1.0, (120, 60)) for m in ("rna", "adt", "atac")}

    def make_table(cells: range) -> md.MuData:
        obs = pd.DataFrame(index=[f"cell{i}" for i in cells])
        return md.MuData({m: AnnData(sp.csr_matrix(x[cells]), obs=obs) for m, x in counts.items()})

    train = make_table(range(100))
    z = labels.reduce_counts(train, make_table(range(100, 120)))
    alone = labels.reduce_counts(train, make_table(range(100, 101)))
    for source in (JOINT, *counts):
        assert z[source][:1] == pytest.approx(alone[source], abs=1e-5)
    assert z[JOINT].shape[1] == sum(z[m].shape[1] for m in counts)


def test_labels_follow_from_the_embeddings_they_are_told_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{SET}.h5mu").write_bytes(b"cells")
    monkeypatch.setattr(mosaic, "digest_sources", lambda: "all of clue_dist")
    plan = plan_labels("--data", str(tmp_path))
    before = {method: plan.digest(method, SET) for method in labels.METHODS}
    monkeypatch.setattr(Matching, "digest_method", lambda self, method: f"other code of {method}")
    after = {method: plan.digest(method, SET) for method in labels.METHODS}
    assert {m for m in before if before[m] != after[m]} == {"ours", *labels.MODELS}
