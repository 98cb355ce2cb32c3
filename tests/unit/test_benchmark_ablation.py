"""The ablation: its rows are recipes of their own, its cells are what they are said to be, its schedules are alike."""

from __future__ import annotations

from pathlib import Path

import mudata as md
import numpy as np
import pytest
import scipy.sparse as sp

from clue_dist import config as configs
from clue_dist.config import Config, ModelConfig, TrunkConfig
from clue_dist.train.setup import Setup, prepare_setup
from tests.benchmarks import common, matching, mosaic
from tests.benchmarks.ablation import __main__ as ablation
from tests.benchmarks.ablation import cells as other
from tests.benchmarks.ablation import estimates, rows
from tests.benchmarks.ablation.rows import ROWS, TABLE_5
from tests.benchmarks.split import FOLDS, cut
from tests.distributed.command import ROOT
from tests.stores import make_store
from tests.unit.mosaic_helpers import MODS, paired_cells


def recipe(row: str, name: str) -> Config:
    return configs.load_config(ROOT / rows.recipe_of(row, name), list(ROWS[row].settings))


@pytest.mark.parametrize("name", ["cbmc_cite", "snare_adbrain_8lib"])
def test_every_row_is_a_valid_recipe_of_its_own(name: str) -> None:
    recipes = {row: recipe(row, name).model_dump_json() for row in ROWS}
    alike = {row for row in recipes if recipes[row] == recipes[rows.ATLAS]}
    assert alike == {rows.ATLAS, *other.OTHER_CELLS, rows.COUNTED_ANEW}
    assert len(set(recipes.values())) == len(recipes) - len(alike) + 1
    assert len({rows.method_of(row) for row in ROWS}) == len(ROWS)
    assert [rows.row_of(rows.method_of(row)) for row in ROWS] == list(ROWS)
    assert set(other.DOUBLINGS) <= set(other.OTHER_CELLS)


@pytest.mark.parametrize(
    ("name", "authors"),
    [("cbmc_cite", "neurips2021_cite"), ("snare_adbrain_8lib", "neurips2021_multiome")],
)
def test_table_5_is_the_authors_recipe_with_terms_left_out(name: str, authors: str) -> None:
    whole = configs.load_config(ROOT / "configs" / f"{authors}.json")
    assert recipe("paper: all", name) == whole
    used = set()
    for row in TABLE_5:
        got = recipe(row, name).objective
        kept = {term for term in rows.TERMS if getattr(got, f"lambda_{term}")}
        assert all(
            getattr(got, f"lambda_{t}") == getattr(whole.objective, f"lambda_{t}")
            for t in {*kept, "self"}
        )
        assert got.lambda_self > 0
        assert got.lambda_contrastive == 0
        used.add(frozenset(kept))
    assert len(used) == len(TABLE_5) == 8


def test_rows_are_run_where_they_say_something() -> None:
    assert not rows.applies(rows.WITHIN_BATCH, "cbmc_cite")
    assert rows.applies(rows.WITHIN_BATCH, "snare_adbrain_8lib")
    assert rows.applies(rows.COUNTED_ANEW, "cbmc_cite")
    assert not rows.applies(rows.COUNTED_ANEW, "snare_adbrain_8lib")


def arguments(data: Path, *words: str):
    (data / "cbmc_cite.h5mu").write_bytes(b"cells")
    return ablation.arguments(
        ["--json", "out.json", "--data", str(data), "--sets", "cbmc_cite", *words]
    )


def test_atlas_json_as_it_stands_is_the_run_of_the_matching_benchmark(tmp_path: Path) -> None:
    args = arguments(tmp_path, "--rows", rows.ATLAS)
    run = ablation.runs_of(args)[0]
    assert (run.method, run.digest) == ("ours", matching.digest_of("ours", "cbmc_cite", args))


def test_rows_with_other_cells_follow_from_the_code_that_makes_them(
    tmp_path: Path, monkeypatch
) -> None:
    args = arguments(tmp_path)
    before = {row: ablation.digest_of(row, "cbmc_cite", args) for row in ROWS}
    assert len(set(before.values())) == len(ROWS)
    changed = tmp_path / "cells.py"
    changed.write_text("other code")
    monkeypatch.setattr(other, "__file__", str(changed))
    after = {row: ablation.digest_of(row, "cbmc_cite", args) for row in ROWS}
    assert {row for row in ROWS if after[row] != before[row]} == set(other.OTHER_CELLS)


# --- other cells ---


@pytest.fixture(scope="module")
def cells() -> other.Cells:
    whole = paired_cells()
    return other.Cells(MODS, *cut(whole, MODS, 0), whole)


def partners(table: md.MuData) -> set[str]:
    return set(table["rna"].obs_names) & set(table["adt"].obs_names)


def test_test_cells_join_the_training_cells_without_their_partners(cells: other.Cells) -> None:
    joined = other.with_test_cells(cells)
    for m in MODS:
        assert joined[m].n_obs == cells.train[m].n_obs + cells.test[m].n_obs
        tail = joined[m][cells.train[m].n_obs :]
        np.testing.assert_array_equal(tail.X.toarray(), cells.test[m].X.toarray())
    assert partners(joined) == partners(cells.train)


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("unpaired", [False, True])
def test_the_ablation_takes_pairs_or_unpaired_cells_away(
    cells: other.Cells, halved: bool, unpaired: bool
) -> None:
    pairs, fewer = partners(cells.train), other.of_pairs(cells, halved, unpaired)
    assert len(partners(fewer)) == (-(-len(pairs) // 2) if halved else len(pairs))
    assert partners(fewer) <= pairs
    for m in MODS:
        assert (
            fewer[m].n_obs - len(partners(fewer)) == (cells.train[m].n_obs - len(pairs)) * unpaired
        )
        np.testing.assert_array_equal(
            fewer[m].X.toarray(), cells.train[m][fewer[m].obs_names].X.toarray()
        )


def test_the_ablation_reveals_partners_of_training_cells_alone(cells: other.Cells) -> None:
    full = other.all_paired(cells)
    known = set(cells.train["rna"].obs_names) | set(cells.train["adt"].obs_names)
    assert set(full["rna"].obs_names) == partners(full) == known
    assert not known & set(cells.test["rna"].obs_names)
    for m in MODS:
        assert list(full[m].var_names) == list(cells.test[m].var_names)


def test_other_training_cells_are_kept_beside_their_split(
    tmp_path: Path, cells: other.Cells
) -> None:
    folder = tmp_path / "splits" / "cbmc_cite-abc" / "fold0"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        getattr(cells, part).write(folder / f"{part}.h5mu")
    cells.whole.write(tmp_path / "cbmc_cite.h5mu")
    split = other.changed(
        mosaic.Split(folder, MODS), "no unpaired cells", "ablation-none", tmp_path
    )
    assert split.folder.parent == folder.parent != split.folder
    with mosaic.quiet():
        assert (
            partners(md.read(split.train))
            == partners(cells.train)
            == set(md.read(split.train)["rna"].obs_names)
        )


def setup_of(store: Path, *settings: str) -> Setup:
    return prepare_setup(
        configs.load_config(
            ROOT / mosaic.RECIPE, [f"store={store}", f"run={store.parent / 'r'}", *settings]
        ),
        1,
    )


@pytest.mark.parametrize(
    "fewer", [{"rna+adt": 300, "rna": 300, "adt": 300}, {"rna+adt": 600}, {"rna+adt": 2400}]
)
@pytest.mark.parametrize("settings", [(), ("train.epochs=7",)])
def test_other_cells_are_trained_on_as_long_in_the_same_batches(
    tmp_path: Path, fewer: dict[str, int], settings: tuple[str, ...]
) -> None:
    features = {"rna": 30, "adt": 8}
    make_store(
        tmp_path / "full.zarr", cells={"rna+adt": 600, "rna": 300, "adt": 300}, features=features
    )
    make_store(tmp_path / "other.zarr", cells=fewer, features=features)
    pinned = other.schedule(tmp_path / "full.zarr", tmp_path / "other.zarr", settings)
    full, got = (
        setup_of(tmp_path / "full.zarr", *settings),
        setup_of(tmp_path / "other.zarr", *settings, *pinned),
    )
    assert got.total_steps == full.total_steps
    assert got.config.data.batch_size == full.config.data.batch_size
    assert got.config.train.validate_every == full.config.train.validate_every
    if len(fewer) > 1:
        assert got.plan.stratum_shares["rna+adt"] == full.plan.stratum_shares["rna+adt"]


# --- estimates and the table ---


def test_counting_noise_is_what_hides_a_cell_from_its_own_recount() -> None:
    rng = np.random.default_rng(0)
    scores = {}
    for depth in (1, 300):
        counts = sp.csr_matrix(rng.poisson(depth * rng.gamma(2, 0.5, (200, 13))))
        scores[depth] = estimates.counted_anew(counts, seed=0)["global"]
    assert scores[300]["foscttm"] < 1e-4 < scores[1]["foscttm"] < 0.2
    assert scores[300]["match"] > 0.95 > scores[1]["match"]


def test_the_limit_of_a_geometric_approach_is_exact_and_of_none_unknown() -> None:
    assert estimates.limit([8.0, 4.0, 2.0]) == pytest.approx(0)
    assert estimates.limit([0.1, 0.15, 0.17]) == pytest.approx(0.17 + 0.02 * 0.4 / 0.6)
    assert np.isnan(estimates.limit([0.1, 0.15, 0.21]))


def test_separate_encoders_grow_faster_than_shared_trunks() -> None:
    shared, separate = (
        [estimates.encoder_parameters(k, ModelConfig(trunk=TrunkConfig(shared=s))) for k in (2, 4)]
        for s in (True, False)
    )
    assert separate[1] / separate[0] > 3.9  # K^2 networks
    assert shared[1] / shared[0] < 3
    assert shared[0] < separate[0]


def records(row: str, folds: range) -> list[common.Result]:
    scores = {"global": {"foscttm": 0.1, "match": 0.02, "recall10": 0.1}}
    run = {"method": rows.method_of(row), "data_set": "cbmc_cite", "scores": scores, "fit_s": 100.0}
    return [run | {"fold": fold, "joint": 0.9, "alone": 0.8} for fold in folds]


def test_pairs_are_extrapolated_from_five_folds_of_every_row_alone() -> None:
    some = [r for row in other.DOUBLINGS[:2] for r in records(row, FOLDS)]
    with_four = ablation.table(some + records(other.DOUBLINGS[2], range(4)))
    with_five = ablation.table(some + records(other.DOUBLINGS[2], FOLDS))
    assert ablation.EXTRAPOLATED not in with_four
    assert ablation.EXTRAPOLATED in with_five
    assert with_five.count("no limit") == 3  # of equal values none can be told


def test_the_table_tells_the_label_accuracy_of_the_joint_z_and_of_one_modality() -> None:
    lines = ablation.table(
        [*records("posterior mean", range(2)), *records(rows.ATLAS, range(1))]
    ).splitlines()
    assert lines[0].split() == [
        "set",
        "row",
        "folds",
        "FOSCTTM",
        "match",
        "recall10",
        "joint",
        "alone",
        "fit",
        "s",
    ]
    assert lines[2].index("0.900 ± 0.000") < lines[2].index("0.800 ± 0.000")
    assert lines[3].split()[:3] == ["cbmc_cite", "atlas.json", "1"]
