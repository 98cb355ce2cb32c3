"""Mosaics of three modalities or more: every pattern, no test cell, every ordered pair scored."""

from itertools import combinations
from pathlib import Path

import mudata as md
import numpy as np
import pytest

from tests.benchmark_tests.mosaic_helpers import MODS, paired_cells
from tests.benchmarks import mosaic, scores
from tests.benchmarks.commands import BenchmarkError
from tests.benchmarks.split import cut_by_batch, cut_mosaic, place_cell, select_modality


def triple_cells() -> md.MuData:
    whole = paired_cells()
    with md.set_options(pull_on_update=False):
        peaks = whole["rna"].copy()
        peaks.var_names = [f"chr{1 + i % 4}:{i}00-{i}99" for i in range(11)] + ["chrX:5-9"]
        return md.MuData({"rna": whole["rna"], "adt": whole["adt"], "atac": peaks})


def test_patterns_of_many_modalities_have_their_shares_and_no_test_cell() -> None:
    mods, whole = ("rna", "adt", "atac"), triple_cells()
    train, test = cut_mosaic(whole, mods, 0)
    names = {m: set(train[m].obs_names) for m in mods}
    assert len({tuple(test[m].obs_names) for m in mods}) == 1
    assert not set.union(*names.values()) & set(test["rna"].obs_names)
    for name in set.union(*names.values()):
        carried = tuple(m for m in mods if name in names[m])
        assert len(carried) == {1: 3, 2: 3, 3: 2, 4: 1}[place_cell(name, 0) // 20]
    patterns = mosaic.list_patterns(train)
    assert set(patterns) == {"+".join(p) for n in (1, 2, 3) for p in combinations(mods, n)}


def test_halves_of_a_modality_are_of_odd_and_of_even_chromosomes_or_places() -> None:
    whole = triple_cells()
    odd, even = (select_modality(whole, f"atac_{half}") for half in ("odd", "even"))
    assert {name.partition(":")[0] for name in odd.var_names} == {"chr1", "chr3", "chrX"}
    assert {name.partition(":")[0] for name in even.var_names} == {"chr2", "chr4"}
    assert list(select_modality(whole, "rna_odd").var_names) == [
        f"rna-{i}" for i in range(1, 12, 2)
    ]
    _, test = cut_mosaic(whole, ("rna_odd", "rna_even", "adt"), 0)
    assert test["rna_even"].n_vars + test["rna_odd"].n_vars == 11  # one gene is empty


def test_every_ordered_pair_is_scored_and_the_worst_is_told(tmp_path: Path) -> None:
    mods = ("rna", "adt", "atac")
    _, test = cut_mosaic(triple_cells(), mods, 0)
    test.write(tmp_path / "test.h5mu")
    z = np.random.default_rng(0).normal(size=(test["rna"].n_obs, 6))
    arrays = {"u1": z, "u2": z, "u3": z[::-1]}
    split, npz = mosaic.Split(tmp_path, mods), tmp_path / "z.npz"
    np.savez(npz, **arrays, test_joint=z)
    found = scores.score_embedding(npz, split)
    assert len(found["pairs"]) == 6
    assert found["pairs"]["rna->adt"]["foscttm"] == 0
    assert found["worst"]["foscttm"] == found["pairs"]["atac->adt"]["foscttm"] > 0.3
    means = [pair["foscttm"] for pair in found["pairs"].values()]
    assert found["scores"]["global"]["foscttm"] == pytest.approx(np.mean(means))
    # As of a method that knows two modalities.
    pairs = {
        f"{mods[i]}-{mods[j]}": np.stack([arrays[f"u{i + 1}"], arrays[f"u{j + 1}"]])
        for i, j in combinations(range(3), 2)
    }
    np.savez(npz, **pairs)
    assert scores.score_embedding(npz, split) == found


def test_pairs_of_half_the_batches_need_two_batches() -> None:
    with pytest.raises(BenchmarkError, match=r"two batches or more\n.*1 in obs"):
        cut_by_batch(paired_cells(), MODS, 0)


def test_by_batch_pairs_are_of_half_the_batches_and_tested_cells_are_two() -> None:
    whole = paired_cells()
    for table in whole.mod.values():
        table.obs["batch"] = [f"b{int(name.split('-')[-1]) % 4}" for name in table.obs_names]
    for fold, paired in ((0, {"b0", "b1"}), (3, {"b3", "b0"})):
        train, test = cut_by_batch(whole, MODS, fold)
        names = {m: set(train[m].obs_names) for m in MODS}
        pairs = train["rna"][sorted(names["rna"] & names["adt"])]
        assert set(pairs.obs["batch"]) == paired
        assert set(test["rna"].obs["batch"]) == {"b0", "b1", "b2", "b3"} - paired
        assert list(test["rna"].obs_names) == list(test["adt"].obs_names)
        for m in MODS:
            assert names[m] - names["adt" if m == "rna" else "rna"] == {
                f"{m}:{name}" for name in test[m].obs_names
            }
            again = train[m][[f"{m}:{name}" for name in test[m].obs_names]].X
            np.testing.assert_array_equal(again.toarray(), test[m].X.toarray())
