"""Labels told by z and batches mixed in it: known mixtures have known scores, bars are judged on what was run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import mudata as md
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from tests.benchmarks import matching
from tests.benchmarks.labels import __main__ as labels
from tests.benchmarks.labels import score
from tests.benchmarks.mosaic import JOINT
from tests.benchmarks.split import FOLDS

SET = "snare_adbrain_8lib"


@pytest.mark.parametrize("batches", [2, 4])
def test_ilisi_is_near_one_where_batches_mix_and_zero_where_they_do_not(batches: int) -> None:
    z, batch = np.random.default_rng(0).normal(size=(800, 5)), np.arange(800) % batches
    mixed, apart = score.ilisi(z, batch), score.ilisi(z + 100.0 * batch[:, None], batch)
    assert mixed > 0.75  # of about 30 neighbours, so never quite alike
    assert apart == pytest.approx(0, abs=1e-9)


def test_ilisi_of_an_uneven_mixture_is_the_inverse_simpson_index_of_its_shares() -> None:
    rng = np.random.default_rng(0)
    batch = (rng.random(3000) < 0.2).astype(int)
    expected = 1 / (0.2**2 + 0.8**2) - 1  # over two batches, so that the scale is one
    assert score.ilisi(rng.normal(size=(3000, 3)), batch) == pytest.approx(expected, abs=0.08)


def test_ilisi_is_that_of_scib_metrics() -> None:
    rng = np.random.default_rng(3)
    z, batch = rng.normal(size=(300, 6)), rng.choice(3, 300, p=[0.5, 0.3, 0.2])
    z[:, 0] += 0.7 * batch
    # `ilisi_knn` of scib-metrics 0.5.10 on sklearn's neighbours, the cell itself and 90 others
    assert score.ilisi(z, batch) == pytest.approx(0.6447145938873291, abs=1e-5)


def test_ilisi_knows_no_scale() -> None:
    rng = np.random.default_rng(1)
    z, batch = rng.normal(size=(400, 4)), rng.integers(0, 3, 400)
    assert score.ilisi(1e3 * z, batch) == pytest.approx(score.ilisi(z, batch), abs=1e-6)


def test_cells_without_a_type_are_left_out_and_batches_scored_where_there_are_some() -> None:
    rng = np.random.default_rng(0)
    kind = np.arange(200) % 4
    obs = pd.DataFrame(
        {"cell_type": np.array(["B", "T", "NK", "Multiplets"])[kind], "batch": "one"}
    )
    obs.loc[::2, "batch"] = "two"
    z = rng.normal(size=(200, 3)) + 50 * np.eye(4, 3)[np.where(kind == 3, np.arange(200) % 3, kind)]
    got = labels.scored({JOINT: z}, {JOINT: z}, obs, obs)
    assert got["accuracy"][JOINT] == got["transferred"][JOINT] == 1.0
    assert JOINT in got["ilisi"]
    assert labels.scored({JOINT: z}, {}, obs.drop(columns="batch"), obs)["ilisi"] == {}


def record(method: str, fold: int, accuracy: dict[str, float], ilisi: float = 0.5) -> dict:
    run = {"method": f"labels-{method}", "data_set": SET, "fold": fold}
    return run | {
        "accuracy": accuracy,
        "transferred": accuracy,
        "ilisi": dict.fromkeys(accuracy, ilisi),
    }


def bars(records: list[dict], quick: bool = False) -> list[dict]:
    return list(labels.bars_of(records, SimpleNamespace(sets=[SET], quick=quick)))


def test_the_joint_z_is_judged_against_counts_and_against_our_own_z_of_one_modality() -> None:
    ours = [record("ours", fold, {JOINT: 0.9, "rna": 0.91, "atac": 0.7}) for fold in FOLDS]
    counts = [record("counts", fold, {JOINT: 0.95, "rna": 0.85, "atac": 0.6}) for fold in FOLDS]
    over_counts, over_own, _ = bars(ours + counts)
    assert (over_counts["value"], over_counts["holds"]) == (pytest.approx(0.05), True)
    assert (over_own["value"], over_own["holds"]) == (pytest.approx(-0.01), False)
    assert [b["holds"] for b in bars(ours[:4] + counts)] == [None] * 3
    assert [b["holds"] for b in bars(ours + counts, quick=True)] == [None] * 3


def test_leads_are_of_the_same_folds_and_told_with_their_spread() -> None:
    ours = [
        record("ours", fold, {JOINT: 0.5 + 0.1 * fold, "rna": 0.5 + 0.1 * fold, "atac": 0.1})
        for fold in FOLDS
    ]
    counts = [
        record("counts", fold, {"rna": 0.4 + 0.1 * fold - 0.01 * (-1) ** fold, "atac": 0})
        for fold in FOLDS
    ]
    over_counts, over_own, _ = bars(ours + counts)
    assert over_counts["value"] == pytest.approx(0.1 + 0.01 / 5)
    assert over_counts["deviation"] == pytest.approx(np.std([0.11, 0.09, 0.11, 0.09, 0.11], ddof=1))
    assert (over_own["value"], over_own["deviation"]) == (pytest.approx(0), pytest.approx(0))


def test_the_joint_z_of_the_reference_has_length_one(tmp_path: Path) -> None:
    u = {"u1": np.array([[3.0, 4.0], [0, 2]]), "u2": np.array([[0.0, 1], [5, 0]])}
    np.savez(tmp_path / "z.npz", **u)
    z = labels.reference(tmp_path / "z.npz", ("rna", "atac"))
    assert np.linalg.norm(z[JOINT], axis=1) == pytest.approx([1, 1])
    assert z[JOINT][1] == pytest.approx(np.array([1, 1]) / np.sqrt(2))
    assert z["rna"] == pytest.approx(np.array([[0.6, 0.8], [0, 1]]))


def test_counts_are_reduced_by_training_cells_alone(tmp_path: Path) -> None:
    """Other test cells leave the components of a test cell and of all training cells as they are."""
    rng = np.random.default_rng(0)
    x = {m: rng.poisson(1.0, (120, 60)) for m in ("rna", "adt", "atac")}

    def table(cells: slice) -> md.MuData:
        names = [f"cell{i}" for i in range(*cells.indices(120))]
        return md.MuData(
            {
                m: AnnData(sp.csr_matrix(v[cells]), obs=pd.DataFrame(index=names))
                for m, v in x.items()
            }
        )

    train, pairs = table(slice(100)), [f"cell{i}" for i in (7, 3, 50)]
    known, z = labels.counts(train, table(slice(100, 120)), pairs)
    again, alone = labels.counts(train, table(slice(100, 101)), pairs)
    for source in (JOINT, *x):
        assert known[source] == pytest.approx(again[source], abs=1e-5)
        assert z[source][:1] == pytest.approx(alone[source], abs=1e-5)
    whole, _ = labels.counts(train, train, [f"cell{i}" for i in range(100)])
    assert known["rna"] == pytest.approx(whole["rna"][[7, 3, 50]], abs=1e-5)


def test_batch_mixing_is_compared_on_the_folds_that_both_have() -> None:
    accuracy = {JOINT: 0.9, "rna": 0.9, "atac": 0.7}
    ours = [record("ours", fold, accuracy, ilisi=0.1 * fold) for fold in FOLDS]
    reference = [record("reference", fold, accuracy, ilisi=0.25) for fold in (2, 3)]
    mixing = bars(ours + reference)[-1]
    assert mixing["value"] == pytest.approx(0.0)
    assert "2 of 5 folds" in mixing["name"]
    assert bars(ours)[-1]["holds"] is None


def test_labels_follow_from_the_embeddings_they_are_told_from(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / f"{SET}.h5mu").write_bytes(b"cells")
    args = labels.arguments(["--json", "out.json", "--data", str(tmp_path), "--sets", SET])
    before = {m: labels.digest_of(m, SET, 0, args) for m in labels.METHODS}
    monkeypatch.setattr(matching, "code_of", lambda method, quick: f"other code of {method}")
    after = {m: labels.digest_of(m, SET, 0, args) for m in labels.METHODS}
    assert {m for m in before if before[m] != after[m]} == {"ours", "reference"}
