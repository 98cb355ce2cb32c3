"""The runner of benchmarks: finished runs are kept, mosaics are cut by one rule, bars are true."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clue_dist.errors import DataError
from clue_dist.metrics.integration import score_mixing
from tests.benchmark_tests.mosaic_helpers import MODS, paired_cells
from tests.benchmarks import commands, kept, matching, mosaic, report, runner, scores
from tests.benchmarks.commands import BenchmarkError
from tests.benchmarks.matching import Matching
from tests.benchmarks.report import Bar, Result
from tests.benchmarks.runner import Benchmark, Option, Run
from tests.benchmarks.split import FOLDS, cut_mosaic, place_cell

# --- the split ---


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=30).map(lambda raw: raw.decode("latin-1")))
def test_a_cell_is_tested_in_one_fold_of_five(barcode: str) -> None:
    places = [place_cell(barcode, fold) for fold in FOLDS]
    assert all(0 <= place < 100 for place in places)
    assert sum(place < 20 for place in places) == 1
    assert places[0] == int(hashlib.sha1(barcode.encode()).hexdigest(), 16) % 100


def test_a_mosaic_has_pairs_and_cells_of_one_modality_and_no_test_cell() -> None:
    whole, tested = paired_cells(), []
    for fold in FOLDS:
        train, test = cut_mosaic(whole, MODS, fold)
        rna, adt = (set(train[m].obs_names) for m in MODS)
        assert list(test["rna"].obs_names) == list(test["adt"].obs_names)
        assert not (rna | adt) & set(test["rna"].obs_names)
        assert {place_cell(name, fold) // 20 for name in rna & adt} == {1, 2}
        assert {place_cell(name, fold) // 20 for name in rna - adt} == {3}
        assert {place_cell(name, fold) // 20 for name in adt - rna} == {4}
        tested += list(test["rna"].obs_names)
    # One cell is empty, and one is not paired.
    assert sorted(tested) == sorted(f"cell-{i}" for i in range(300) if i not in (7, 9))


def test_a_mosaic_keeps_counts_with_their_cells_and_drops_empty_features() -> None:
    whole = paired_cells()
    for part in cut_mosaic(whole, MODS, 0):
        assert list(part["rna"].var_names) == [f"rna-{i}" for i in range(11)]
        for mod in MODS:
            same = whole[mod][part[mod].obs_names, part[mod].var_names]
            np.testing.assert_array_equal(part[mod].X.toarray(), same.X.toarray())


# --- embeddings and scores ---


def test_embeddings_are_scored_candidate_by_candidate_and_the_best_counts(tmp_path: Path) -> None:
    _, test = cut_mosaic(paired_cells(), MODS, 0)
    test.write(tmp_path / "test.h5mu")
    z = np.random.default_rng(0).normal(size=(2, test["rna"].n_obs, 6))
    np.savez(tmp_path / "z.npz", u1=z, u2=np.stack([z[0, ::-1], z[1]]))
    found = scores.score_embedding(tmp_path / "z.npz", mosaic.Split(tmp_path, MODS))
    bad, good = found["candidates"]
    assert found["scores"] == good
    assert good["global"] == {"foscttm": 0.0, "match": 1.0, "recall10": 1.0}
    assert bad["within_batch"]["foscttm"] > 0.3
    assert found["mixing"] == score_mixing(z[1], z[1])["mixing"]
    assert not {"joint", "transfer", "islands"} & found.keys()  # neither a joint z nor labels


def test_the_worst_island_is_of_the_whole_training_mosaic(tmp_path: Path) -> None:
    train, test = cut_mosaic(paired_cells(), MODS, 0)
    test.write(tmp_path / "test.h5mu")
    pattern = mosaic.list_patterns(train)
    counts = {name: int((pattern == name).sum()) for name in ("rna+adt", "rna", "adt")}
    for mod in MODS:
        assert train[mod].n_obs == counts["rna+adt"] + counts[mod]
    z = np.random.default_rng(0).normal(size=(len(pattern), 3))
    z[pattern == "adt"] += 100
    u = z[: test["rna"].n_obs]
    np.savez(tmp_path / "z.npz", u1=u, u2=u, mosaic=z, pattern=pattern)
    found = scores.score_embedding(tmp_path / "z.npz", mosaic.Split(tmp_path, MODS))
    assert found["islands"] == pytest.approx((len(pattern) - 1) / (counts["adt"] - 1))


def test_z_of_each_source_is_in_the_order_of_the_cells_asked_for() -> None:
    table = paired_cells(50)
    for part, mark in ((table, 0), (table["rna"], 0.25), (table["adt"], 0.5)):
        numbers = [int(name.rpartition("-")[2]) + mark for name in part.obs_names]
        part.obsm["X_clue"] = np.array(numbers)[:, None]
    found = mosaic.select_z(table, ["cell-30", "cell-4", "cell-17"])
    wanted = np.array([[30], [4], [17]])
    for source, mark in ((mosaic.JOINT, 0), ("rna", 0.25), ("adt", 0.5)):
        np.testing.assert_array_equal(found[source], wanted + mark)


def test_the_joint_z_and_the_better_modality_are_scored_by_their_cell_types(tmp_path: Path) -> None:
    _, test = cut_mosaic(paired_cells(), MODS, 0)
    n = test["rna"].n_obs
    kind = np.arange(n) % 3
    test["rna"].obs["cell_type"] = np.array(["B", "T", "Multiplets"])[kind]
    test.write(tmp_path / "test.h5mu")
    noise = np.random.default_rng(0).normal(size=(n, 4))
    # What names no type lies anywhere.
    types = noise + 100 * np.where(kind == 2, np.arange(n) % 2, kind)[:, None]
    split = mosaic.Split(tmp_path, MODS)
    sources = {"u1": noise, "u2": types, "test_rna": noise, "test_adt": types}
    np.savez(tmp_path / "z.npz", test_joint=types, **sources)
    found = scores.score_embedding(tmp_path / "z.npz", split)
    assert found["joint"] == found["alone"] == 1.0
    assert 0.2 < found["transfer"] < 0.8  # noise tells nothing of two types
    np.savez(tmp_path / "z.npz", test_joint=types, **(sources | {"test_adt": noise}))
    found = scores.score_embedding(tmp_path / "z.npz", split)
    assert found["joint"] == 1.0 > found["alone"]
    assert "candidates" not in found


# --- kept runs ---


class Toy(Benchmark):
    """Runs that can be told to fail, and scores whose code changes."""

    name, work, counted = "toy", "toy", "fold"
    options: ClassVar = {"folds": Option([0, 1, 2], [0])}
    columns = ("value",)

    def __init__(self, work: Path, inputs: str = "f00d") -> None:
        super().__init__(["--json", str(work / "out.json"), "--work", str(work)])
        self.inputs, self.begun, self.scored = inputs, [], []

    def list_cases(self) -> Any:
        return [("ours", "cells", fold, 0) for fold in self.args.folds]

    def list_inputs(self, method: str, data_set: str) -> list[str]:
        return [method, data_set, self.inputs]

    def measure(self, run: Run, folder: Path) -> Result:
        self.begun.append(run.fold)
        if run.fold == 1 and self.begun.count(1) == 1:
            raise BenchmarkError("it broke")
        return {"value": float(run.fold)}

    def score(self, run: Run, folder: Path) -> Result:
        self.scored.append(run.fold)
        return {"score": self.score_sources[0].read_text()}

    def judge(self, records: Any) -> Any:
        yield Bar("folds", ">=", 3).judge(float(len(records)))


def test_what_was_broken_off_is_made_anew_and_what_is_done_stays(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    def whole(folder: Path) -> None:
        assert not (folder / "half").exists()
        (folder / "all").touch()

    with pytest.raises(KeyboardInterrupt):
        kept.make_once(tmp_path / "a/b", broken)
    assert (kept.make_once(tmp_path / "a/b", whole) / "all").exists()
    kept.make_once(tmp_path / "a/b", broken)


def test_finished_runs_are_kept_and_failed_ones_are_done_again(tmp_path: Path, capsys) -> None:
    toy = Toy(tmp_path)
    with pytest.raises(BenchmarkError, match="1 runs failed"):
        toy.carry_out()
    written = json.loads((tmp_path / "out.json").read_text())
    assert [record["value"] for record in written["results"]] == [0, 2]
    assert [failure["fold"] for failure in written["failures"]] == [1]
    assert written["bars"] == [{"name": "folds", "value": 2, "op": ">=", "bar": 3, "holds": False}]
    assert {"quick", "machine", "versions"} < written.keys()
    toy.carry_out()
    assert toy.begun == [0, 1, 2, 1]
    told = capsys.readouterr().out
    assert "[2/3] ours on cells, fold 1: FAILED: BenchmarkError: it broke" in told
    assert "[3/3] ours on cells, fold 2: kept: value 2" in told
    assert "MISSED  folds: 2 >= 3" in told
    assert "holds   folds: 3 >= 3" in told
    other = Toy(tmp_path, inputs="beef")  # of other sources
    assert [record["fold"] for record in other.finish(other.plan_runs()[:1])[0]] == [0]
    assert other.begun == [0]


def test_a_kept_run_is_scored_anew_when_the_scores_change_and_not_done_anew(tmp_path: Path) -> None:
    toy, code = Toy(tmp_path), tmp_path / "score.py"
    toy.score_sources = [code]
    run = toy.plan_runs()[0]
    for text in ("a", "a", "b"):
        code.write_text(text)
        record = toy.obtain(run)
        assert (record["score"], record["value"]) == (text, 0)
    assert (toy.begun, toy.scored) == ([0], [0, 0])
    assert run.read_record(tmp_path) == record
    del record["scored_by"]  # as before scores had a digest
    kept.write_json(run.folder(tmp_path) / runner.RESULT, record | {"score": "old"})
    assert toy.obtain(run)["score"] == "b"
    assert toy.begun == [0]


def test_a_run_whose_sources_changed_since_it_was_planned_is_refused(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    run = toy.plan_runs()[0]
    toy.inputs = "others"
    with pytest.raises(BenchmarkError, match="changed while"):
        toy.obtain(run)
    assert toy.begun == []


def test_digest_follows_names_and_contents_but_not_caches_and_pages(tmp_path: Path) -> None:
    (tmp_path / "code/__pycache__").mkdir(parents=True)
    (tmp_path / "code/a.py").write_text("a")
    first = kept.compute_digest(tmp_path / "code")
    (tmp_path / "code/__pycache__/a.pyc").write_text("x")
    (tmp_path / "code/README.md").write_text("x")
    assert kept.compute_digest(tmp_path / "code") == first
    (tmp_path / "code/a.py").rename(tmp_path / "code/b.py")
    assert kept.compute_digest(tmp_path / "code") != first
    assert kept.compute_digest("ab", "c") != kept.compute_digest("a", "bc")
    with pytest.raises(FileNotFoundError):
        kept.compute_digest(tmp_path / "nowhere")


def test_a_failed_command_is_told_with_the_tail_of_its_log(tmp_path: Path) -> None:
    code = "print('before'); import sys; sys.exit('the reason')"
    with pytest.raises(BenchmarkError, match=r"exit code 1[\s\S]*the reason") as error:
        commands.run_command([sys.executable, "-c", code], tmp_path / "log", threads=1)
    assert error.value.exit_code == 1
    assert commands.run_command([sys.executable, "-c", ""], tmp_path / "log", threads=1) > 0


def test_json_is_whole_and_without_nan(tmp_path: Path) -> None:
    kept.write_json(tmp_path / "new/out.json", {"a": [float("nan"), 1.5], "b": None})
    assert json.loads((tmp_path / "new/out.json").read_text()) == {"a": [None, 1.5], "b": None}
    assert len(list((tmp_path / "new").iterdir())) == 1


# --- bars and tables ---


@pytest.mark.parametrize(
    ("op", "value", "holds"), [("<=", 1.0, True), ("<", 1.0, False), (">=", 0.9, False)]
)
def test_a_bar_is_judged_by_its_operator(op: str, value: float, holds: bool) -> None:
    judged = Bar("b", op, 1.0).judge(value)
    assert judged == {"name": "b", "value": value, "op": op, "bar": 1.0, "holds": holds}


def test_a_bar_tells_the_spread_of_what_it_is_the_mean_of_and_is_open_without_a_value() -> None:
    bars = [Bar("b", ">", 0.0).judge_mean([0.25, 0.75]), Bar("c", ">", 0.0).judge_mean([])]
    bars.append(Bar("d", ">", 0.0).judge(float("nan")))
    lines = ["holds   b: 0.5 ± 0.35 > 0", "open    c: not run > 0", "open    d: not run > 0"]
    assert list(report.describe_bars(bars)) == lines


def test_medians_wait_for_every_repeat() -> None:
    records = [{"method": "a", "data_set": "b", "x": {"y": float(i)}} for i in range(3)]
    assert report.find_median(records, "x.y", 3, method="a") == 1
    assert np.isnan(report.find_median(records, "x.y", 4, method="a"))
    assert np.isnan(report.find_median(records, "x.y", method="other"))


# --- the matching benchmark ---


def plan_matching(data: Path, *words: str) -> Matching:
    return Matching(["--json", "out.json", "--data", str(data), *words])


def make_record(
    method: str, fold: int, foscttm: float = 0.08, seed: int = 0, **other: Any
) -> Result:
    run = {"method": method, "data_set": "cbmc_cite", "fold": fold, "seed": seed, "threads": 2}
    found = {"global": {"foscttm": foscttm, "match": 0.02, "recall10": 0.16}}
    mixed = {"mixing": 0.41, "transfer": 0.8} | ({"islands": 1.2} if method == "ours" else {})
    return run | {"scores": found, "fit_s": 100.0 + fold} | mixed | other


def test_a_missing_data_set_is_told_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data") as error:
        plan_matching(tmp_path, "--quick").plan_runs()
    assert "bmmc_cite_starter.h5mu" in str(error.value)


def test_peers_are_kept_under_what_they_follow_from_alone(tmp_path: Path) -> None:
    """Runs of an hour: of the script, its pins, the data set, and the rule that cuts it."""
    (tmp_path / "cbmc_cite.h5mu").write_bytes(b"cells")
    here = Path(matching.__file__).parent
    files = [here / "peers" / name for name in ("peer.py", "reference.py", "reference.txt")]
    data = kept.compute_digest(tmp_path / "cbmc_cite.h5mu", here / "split.py", "rna", "adt")
    runs = plan_matching(tmp_path, "--methods", "reference", "--sets", "cbmc_cite").plan_runs()
    assert runs[0].digest == kept.compute_digest(data, kept.compute_digest(*files))


def test_the_table_has_a_row_for_each_method_with_means_and_spreads(tmp_path: Path) -> None:
    records = [make_record("ours", fold, 0.08 + 0.01 * fold) for fold in range(3)]
    lines = plan_matching(tmp_path).tabulate([*records, make_record("linear", 0)]).splitlines()
    # What no record has, as the scores of the worst pair of three modalities, has no column.
    assert [" ".join(line.split()) for line in lines] == [
        "data_set method folds foscttm match recall10 mixing islands transfer fit s threads",
        "cbmc_cite ours 3 0.09 ± 0.01 0.02 ± 0 0.16 ± 0 0.41 ± 0 1.2 ± 0 0.8 ± 0 101 ± 1 2 ± 0",
        "cbmc_cite linear 1 0.08 0.02 0.16 0.41 0.8 100 2",
    ]


def judge_cbmc(data: Path, records: list[Result], *words: str) -> dict[str, Result]:
    bars = plan_matching(data, *words).judge(records)
    keys = ("mixing", "islands", "foscttm", "match", "recall10", "transfer", "fit_s")
    return dict(
        zip(keys, (bar for bar in bars if bar["name"].startswith("cbmc_cite")), strict=True)
    )


def test_bars_are_judged_on_all_five_folds_and_seeds_of_ours(tmp_path: Path) -> None:
    others = [make_record(m, fold) for m in ("linear", "contrastive") for fold in FOLDS]
    some = [make_record("ours", fold) for fold in range(4)]
    whole = [*some, make_record("ours", 4, 0.0845)]
    assert {bar["holds"] for bar in judge_cbmc(tmp_path, [*others, *some]).values()} == {None}
    held = {name: bar["holds"] for name, bar in judge_cbmc(tmp_path, others + whole).items()}
    missed = {"foscttm", "match", "transfer"}  # 0.0809, 0.02, no lead
    assert held == {name: name not in missed for name in held}
    assert judge_cbmc(tmp_path, others + whole)["fit_s"]["value"] == 104
    again = [make_record("ours", fold, 0.075, seed=1) for fold in FOLDS]
    for records, holds in ((whole, None), (whole + again, True)):
        judged = judge_cbmc(tmp_path, others + records, "--seeds", "0", "1")
        assert judged["foscttm"]["holds"] is holds


def test_transfer_of_labels_is_judged_against_the_better_baseline(tmp_path: Path) -> None:
    ours = [make_record("ours", fold, transfer=0.80 + 0.01 * fold) for fold in FOLDS]
    linear = [make_record("linear", fold, transfer=0.79 + 0.01 * fold) for fold in FOLDS]
    weaker = [make_record("contrastive", fold, transfer=0.7) for fold in FOLDS]
    assert judge_cbmc(tmp_path, ours + linear)["transfer"]["holds"] is None
    judged = judge_cbmc(tmp_path, ours + linear + weaker)["transfer"]
    assert judged["name"].endswith("minus that of linear")
    assert (judged["value"], judged["deviation"]) == (pytest.approx(0.01), pytest.approx(0))


def test_more_than_two_modalities_are_for_ours_and_the_baselines(tmp_path: Path) -> None:
    assert matching.applies_to("ours", "digits")
    assert matching.applies_to("linear", "cbmc_halves")
    assert not matching.applies_to("contrastive", "snare_halves")
    (tmp_path / "cbmc_cite.h5mu").write_bytes(b"cells")
    plan = plan_matching(tmp_path, "--sets", "cbmc_halves", "--methods", *matching.METHODS)
    assert {run.method for run in plan.plan_runs()} == {"ours", "linear"}


def test_multivi_runs_on_rna_and_atac_alone_and_seeds_have_runs_of_their_own(
    tmp_path: Path,
) -> None:
    for name in ("cbmc_cite", "snare_adbrain_8lib"):
        (tmp_path / f"{name}.h5mu").write_bytes(name.encode())
    words = ("--methods", "multivi", "reference", "--seeds", "0", "1", "--sets", *mosaic.LARGE)
    runs = plan_matching(tmp_path, *words).plan_runs()
    assert {run.data_set for run in runs if run.method == "multivi"} == {"snare_adbrain_8lib"}
    assert len(runs) == len({run.folder(tmp_path) for run in runs}) == 10 + 20
    quick = plan_matching(tmp_path, "--quick", "--sets", "cbmc_cite", "--methods", "reference")
    assert quick.plan_runs()[0].digest not in {run.digest for run in runs}


@pytest.mark.parametrize("name", sorted(path.name for path in matching.PEERS.glob("*.txt")))
def test_peers_are_pinned_and_torch_comes_first(name: str) -> None:
    pins = commands.read_pins(matching.PEERS / name)
    assert pins[0] == "torch==2.13.0" or not any(pin.startswith("torch==") for pin in pins)
    assert all("==" in pin for pin in pins)
