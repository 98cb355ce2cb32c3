"""Labels told by z and batches mixed in it: known mixtures have known scores, bars are judged on what was run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

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


def test_ilisi_knows_no_scale() -> None:
    rng = np.random.default_rng(1)
    z, batch = rng.normal(size=(400, 4)), rng.integers(0, 3, 400)
    assert score.ilisi(1e3 * z, batch) == pytest.approx(score.ilisi(z, batch), abs=1e-6)


def test_cells_without_a_type_are_left_out_and_batches_scored_where_there_are_some() -> None:
    rng = np.random.default_rng(0)
    kind = np.arange(200) % 4
    obs = pd.DataFrame({"cell_type": np.array(["B", "T", "NK", "Multiplets"])[kind], "batch": "one"})
    obs.loc[::2, "batch"] = "two"
    z = rng.normal(size=(200, 3)) + 50 * np.eye(4, 3)[np.where(kind == 3, np.arange(200) % 3, kind)]
    got = labels.scored({JOINT: z}, {JOINT: z}, obs, obs)
    assert got["accuracy"][JOINT] == got["transferred"][JOINT] == 1.0
    assert JOINT in got["ilisi"]
    assert labels.scored({JOINT: z}, {}, obs.drop(columns="batch"), obs)["ilisi"] == {}


def record(method: str, fold: int, accuracy: dict[str, float], ilisi: float = 0.5) -> dict:
    run = {"method": f"labels-{method}", "data_set": SET, "fold": fold}
    return run | {"accuracy": accuracy, "transferred": accuracy, "ilisi": dict.fromkeys(accuracy, ilisi)}


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
