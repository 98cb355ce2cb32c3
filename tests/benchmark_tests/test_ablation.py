"""The ablation: rows are recipes of their own, cells what they are said to be, schedules alike."""

import argparse
from pathlib import Path
from typing import Any

import mudata as md
import numpy as np
import pytest
import scipy.sparse as sp

from clue_dist import config_file
from clue_dist.config import Config, ModelConfig, TrunkConfig
from clue_dist.train.setup import Setup, prepare_setup
from tests.benchmark_tests.mosaic_helpers import MODS, paired_cells
from tests.benchmarks import mosaic
from tests.benchmarks.ablation import cells as other
from tests.benchmarks.ablation import estimates, rows
from tests.benchmarks.ablation.__main__ import Ablation
from tests.benchmarks.ablation.rows import ROWS, TABLE
from tests.benchmarks.matching import Matching
from tests.benchmarks.split import FOLDS, cut_mosaic
from tests.distributed.command import ROOT
from tests.stores import make_store

# --- rows ---


def load_recipe(row: str, name: str) -> Config:
    return config_file.load_config(ROOT / rows.choose_recipe(row, name), ROWS[row].split())


@pytest.mark.parametrize("name", ["cbmc_cite", "snare_adbrain_8lib"])
def test_every_row_is_a_valid_recipe_of_its_own(name: str) -> None:
    recipes = {row: load_recipe(row, name).model_dump_json() for row in ROWS}
    alike = {row for row in recipes if recipes[row] == recipes[rows.ATLAS]}
    assert alike == {rows.ATLAS, *other.OTHER_CELLS, rows.COUNTED_ANEW}
    assert len(set(recipes.values())) == len(recipes) - len(alike) + 1
    assert len({rows.name_method(row) for row in ROWS}) == len(ROWS)
    assert [rows.find_row(rows.name_method(row)) for row in ROWS] == list(ROWS)
    assert set(other.DOUBLINGS) <= set(other.OTHER_CELLS)


@pytest.mark.parametrize(
    ("name", "authors"),
    [("cbmc_cite", "neurips2021_cite"), ("snare_adbrain_8lib", "neurips2021_multiome")],
)
def test_table_5_is_the_authors_recipe_with_terms_left_out(name: str, authors: str) -> None:
    whole = config_file.load_config(ROOT / "configs" / f"{authors}.json")
    assert load_recipe("paper: all", name) == whole
    used = set()
    table_5 = list(TABLE["paper"])[:8]
    for row in table_5:
        weights, full = load_recipe(row, name).objective, whole.objective
        terms = {term for term in ("cross", "mse", "d") if getattr(weights, f"lambda_{term}")}
        fields = [f"lambda_{term}" for term in (*terms, "self")]
        assert all(getattr(weights, field) == getattr(full, field) > 0 for field in fields)
        assert weights.lambda_contrastive == 0
        used.add(frozenset(terms))
    assert len(used) == len(table_5)


def test_rows_are_run_where_they_say_something() -> None:
    assert not rows.applies_to(rows.OF_BATCHES[0], "cbmc_cite")
    assert rows.applies_to(rows.OF_BATCHES[0], "snare_adbrain_8lib")
    assert rows.applies_to(rows.COUNTED_ANEW, "cbmc_cite")
    assert not rows.applies_to(rows.COUNTED_ANEW, "snare_adbrain_8lib")
    assert not rows.applies_to(rows.THINNED, "cbmc_cite")
    assert rows.applies_to(rows.THINNED, "snare_adbrain_8lib")


def plan_ablation(data: Path) -> Ablation:
    (data / "cbmc_cite.h5mu").write_bytes(b"cells")
    return Ablation(["--json", "out.json", "--data", str(data), "--sets", "cbmc_cite"])


def test_atlas_json_as_it_stands_is_the_run_of_the_matching_benchmark(tmp_path: Path) -> None:
    ablation = plan_ablation(tmp_path)
    matching = Matching(args=ablation.args)
    assert ablation.digest("ours", "cbmc_cite") == matching.digest("ours", "cbmc_cite")
    assert ("ours", "cbmc_cite", 0, 0) in ablation.list_cases()


def test_every_row_is_trained_with_every_seed(tmp_path: Path) -> None:
    (tmp_path / "cbmc_cite.h5mu").write_bytes(b"cells")
    words = ["--json", "out.json", "--data", str(tmp_path), "--sets", "cbmc_cite"]
    ablation = Ablation([*words, "--rows", "no mixup", rows.COUNTED_ANEW, "--seeds", "0", "1"])
    counted = rows.name_method(rows.COUNTED_ANEW)
    assert ablation.list_cases() == [
        ("ablation-no-mixup", "cbmc_cite", 0, 0),
        (counted, "cbmc_cite", 0, 0),  # draws counts by the fold alone
        ("ablation-no-mixup", "cbmc_cite", 0, 1),
    ]


def test_rows_with_other_cells_follow_from_the_code_that_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ablation, changed = plan_ablation(tmp_path), tmp_path / "cells.py"
    monkeypatch.setattr(mosaic, "digest_sources", lambda: "all of clue_dist")
    digests = []
    for _ in range(2):
        digests.append({row: ablation.digest(rows.name_method(row), "cbmc_cite") for row in ROWS})
        changed.write_text("other code")
        monkeypatch.setattr(other, "__file__", str(changed))
    before, after = digests
    assert len(set(before.values())) == len(ROWS)
    assert {row for row in ROWS if after[row] != before[row]} == set(other.OTHER_CELLS)


# --- other cells ---


@pytest.fixture(scope="module")
def cells() -> other.SplitCells:
    whole = paired_cells()
    return other.SplitCells(MODS, *cut_mosaic(whole, MODS, 0), whole)


def list_partners(table: md.MuData) -> set[str]:
    return set(table["rna"].obs_names) & set(table["adt"].obs_names)


def test_test_cells_join_the_training_cells_without_their_partners(cells: other.SplitCells) -> None:
    joined = other.add_test_cells(cells)
    for m in MODS:
        assert joined[m].n_obs == cells.train[m].n_obs + cells.test[m].n_obs
        tail = joined[m][cells.train[m].n_obs :]
        np.testing.assert_array_equal(tail.X.toarray(), cells.test[m].X.toarray())
        assert list(joined[m].obs["batch"].unique()) == ["one"]
    assert list_partners(joined) == list_partners(cells.train)


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("unpaired", [False, True])
def test_the_ablation_takes_pairs_or_unpaired_cells_away(
    cells: other.SplitCells, halved: bool, unpaired: bool
) -> None:
    pairs = list_partners(cells.train)
    fewer = other.select_training(cells, halved, unpaired)
    left = list_partners(fewer)
    assert len(left) == (-(-len(pairs) // 2) if halved else len(pairs))
    assert left <= pairs
    for m in MODS:
        alone = cells.train[m].n_obs - len(pairs)
        assert fewer[m].n_obs - len(left) == alone * unpaired
        same = cells.train[m][fewer[m].obs_names]
        np.testing.assert_array_equal(fewer[m].X.toarray(), same.X.toarray())


def test_the_ablation_reveals_partners_of_training_cells_alone(cells: other.SplitCells) -> None:
    full = other.pair_all(cells)
    known = set(cells.train["rna"].obs_names) | set(cells.train["adt"].obs_names)
    assert set(full["rna"].obs_names) == list_partners(full) == known
    assert not known & set(cells.test["rna"].obs_names)
    for m in MODS:
        assert list(full[m].var_names) == list(cells.test[m].var_names)


def test_other_training_cells_are_kept_beside_their_split(
    tmp_path: Path, cells: other.SplitCells
) -> None:
    folder = tmp_path / "splits" / "cbmc_cite-abc" / "fold0"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        getattr(cells, part).write(folder / f"{part}.h5mu")
    cells.whole.write(tmp_path / "cbmc_cite.h5mu")
    split = mosaic.Split(folder, MODS)
    changed = other.change_training(split, "no unpaired cells", "ablation-none", tmp_path)
    assert changed.folder.parent == folder.parent != changed.folder
    with mosaic.ignore_warnings():
        train = md.read(changed.train)
    assert list_partners(train) == list_partners(cells.train) == set(train["rna"].obs_names)


def test_a_model_is_fine_tuned_from_that_of_the_mosaic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run_command(words: list[str], log: Path, threads: int) -> float:
        commands.append(list(map(str, words)))
        (tmp_path / "earlier").mkdir(exist_ok=True)
        return 2.0

    monkeypatch.setattr(mosaic, "run_command", run_command)
    monkeypatch.setattr(mosaic, "convert_split", lambda split, args: split.folder)
    more, full = (mosaic.Split(tmp_path / name, MODS) for name in ("more", "full"))
    args = argparse.Namespace(threads=1)
    training = mosaic.Training(more, tmp_path, 3, ["train.epochs=7"], args, earlier=full)
    assert training._train_model(more.folder / "train.zarr", tmp_path / "run") == 4
    first, second = (" ".join(words) for words in commands)
    assert f"launch/train.py --config {mosaic.RECIPE}" in first
    assert f"store={full.folder / 'train.zarr'} run={tmp_path / 'earlier'} seed=3" in first
    assert f"launch/fine_tune.py --train all --run {tmp_path / 'earlier'}" in second
    assert f"--store {more.folder / 'train.zarr'} --out {tmp_path / 'run'} --set seed=3" in second
    assert first.endswith("train.epochs=7")
    assert second.endswith("train.epochs=7")
    assert not (tmp_path / "earlier").exists()


def set_up(store: Path, *settings: str) -> Setup:
    words = [f"store={store}", f"run={store.parent / 'r'}", *settings]
    return prepare_setup(config_file.load_config(ROOT / mosaic.RECIPE, words), 1)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("full") / "full.zarr"
    sizes = {"rna+adt": 600, "rna": 300, "adt": 300}
    make_store(store, cells=sizes, features={"rna": 10, "adt": 4})
    return store


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ({"rna+adt": 300, "rna": 300, "adt": 300}, ()),
        ({"rna+adt": 600}, ("train.epochs=7",)),
        ({"rna+adt": 2400}, ()),
    ],
)
def test_other_cells_are_trained_on_as_long_in_the_same_batches(
    tmp_path: Path, full: Path, sizes: dict[str, int], settings: tuple[str, ...]
) -> None:
    make_store(tmp_path / "other.zarr", cells=sizes, features={"rna": 10, "adt": 4})
    pinned = other.match_schedule(full, tmp_path / "other.zarr", settings)
    wanted = set_up(full, *settings)
    found = set_up(tmp_path / "other.zarr", *settings, *pinned)
    assert found.total_steps == wanted.total_steps
    assert found.config.data.batch_size == wanted.config.data.batch_size
    assert found.config.train.validate_every == wanted.config.train.validate_every
    if len(sizes) > 1:
        assert found.plan.stratum_shares["rna+adt"] == wanted.plan.stratum_shares["rna+adt"]


# --- estimates and the table ---


def test_counting_noise_is_what_hides_a_cell_from_its_own_recount() -> None:
    rng, scores = np.random.default_rng(0), {}
    for depth in (1, 300):
        counts = sp.csr_matrix(rng.poisson(depth * rng.gamma(2, 0.5, (200, 13))))
        scores[depth] = estimates.match_recounts(counts, seed=0)["global"]
    assert scores[300]["foscttm"] < 1e-4 < scores[1]["foscttm"] < 0.2
    assert scores[300]["match"] > 0.95 > scores[1]["match"]


def test_the_limit_of_a_geometric_approach_is_exact_and_of_none_unknown() -> None:
    assert estimates.extrapolate_limit([8.0, 4.0, 2.0]) == pytest.approx(0)
    limit = estimates.extrapolate_limit([0.1, 0.15, 0.17])
    assert limit == pytest.approx(0.17 + 0.02 * 0.4 / 0.6)
    assert np.isnan(estimates.extrapolate_limit([0.1, 0.15, 0.21]))


def test_separate_encoders_grow_faster_than_shared_trunks() -> None:
    shared, separate = (
        [estimates.count_encoders(k, ModelConfig(trunk=TrunkConfig(shared=flag))) for k in (2, 4)]
        for flag in (True, False)
    )
    assert separate[1] / separate[0] > 3.9  # K^2 networks
    assert shared[1] / shared[0] < 3
    assert shared[0] < separate[0]


def make_records(row: str, folds: range) -> list[dict[str, Any]]:
    scores = {"global": {"foscttm": 0.1, "match": 0.02, "recall10": 0.1}}
    run = {"method": rows.name_method(row), "data_set": "cbmc_cite", "scores": scores}
    return [run | {"fit_s": 100.0, "fold": fold, "joint": 0.9, "alone": 0.8} for fold in folds]


def test_the_table_has_accuracies_and_extrapolates_five_folds_of_every_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "tabulate_parameters", lambda: "parameters")
    ablation, last = plan_ablation(tmp_path), other.DOUBLINGS[2]
    some = [r for row in other.DOUBLINGS[:2] for r in make_records(row, FOLDS)]
    with_four = ablation.tabulate(some + make_records(last, range(4)))
    with_five = ablation.tabulate(some + make_records(last, FOLDS))
    assert "ever more pairs" not in with_four
    assert with_five.count("ever more pairs") == 3
    assert with_five.endswith("parameters")
    text = ablation.tabulate([*make_records("posterior mean", range(2))])
    heading, line = text.splitlines()[:2]
    assert heading.split()[-2:] == ["joint", "alone"]
    assert line.split()[-6:] == ["0.9", "±", "0", "0.8", "±", "0"]
