"""The benchmarks' own machinery: mosaics are cut by one rule, finished runs are kept, tables and bars are true."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clue_dist.errors import ClueError, DataError
from tests.benchmarks import common, matching, mosaic, scores
from tests.benchmarks.common import Bar, BenchmarkError, Run, Steps
from tests.benchmarks.split import FOLDS, cut, place
from tests.unit.mosaic_helpers import MODS, paired_cells

# --- the split ---


@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_a_cell_is_tested_in_one_fold_of_five(barcode: str) -> None:
    places = [place(barcode, fold) for fold in FOLDS]
    assert all(0 <= p < 100 for p in places)
    assert sum(p < 20 for p in places) == 1
    assert places[0] == int(hashlib.sha1(barcode.encode()).hexdigest(), 16) % 100


def test_a_mosaic_has_pairs_and_cells_of_one_modality_and_no_test_cell() -> None:
    whole, tested = paired_cells(), []
    for fold in FOLDS:
        train, test = cut(whole, MODS, fold)
        rna, adt = (set(train[m].obs_names) for m in MODS)
        assert list(test["rna"].obs_names) == list(test["adt"].obs_names)
        assert not (rna | adt) & set(test["rna"].obs_names)
        assert {place(name, fold) // 20 for name in rna & adt} == {1, 2}
        assert {place(name, fold) // 20 for name in rna - adt} == {3}
        assert {place(name, fold) // 20 for name in adt - rna} == {4}
        tested += list(test["rna"].obs_names)
    assert sorted(tested) == sorted(
        f"cell-{i}" for i in range(300) if i not in (7, 9)
    )  # empty, and not paired


def test_a_mosaic_keeps_counts_with_their_cells_and_drops_empty_features() -> None:
    whole = paired_cells()
    for part in cut(whole, MODS, 0):
        assert list(part["rna"].var_names) == [f"rna-{i}" for i in range(11)]
        for mod in MODS:
            same = whole[mod][part[mod].obs_names, part[mod].var_names]
            np.testing.assert_array_equal(part[mod].X.toarray(), same.X.toarray())


def test_embeddings_are_scored_candidate_by_candidate_and_the_best_counts(tmp_path: Path) -> None:
    _, test = cut(paired_cells(), MODS, 0)
    test.write(tmp_path / "test.h5mu")
    z = np.random.default_rng(0).normal(size=(2, test["rna"].n_obs, 6))
    np.savez(tmp_path / "z.npz", u1=z, u2=np.stack([z[0, ::-1], z[1]]))
    found = scores.of(tmp_path / "z.npz", mosaic.Split(tmp_path, MODS))
    bad, good = found["candidates"]
    assert found["scores"] == good
    assert good["global"] == {"foscttm": 0.0, "match": 1.0, "recall10": 1.0}
    assert bad["within_batch"]["foscttm"] > 0.3
    assert "joint" not in found  # neither a joint z nor labels


def test_z_of_each_source_is_in_the_order_of_the_cells_asked_for() -> None:
    table = paired_cells(50)
    for part, mark in ((table, 0), (table["rna"], 0.25), (table["adt"], 0.5)):
        part.obsm["X_clue"] = np.array(
            [[int(name.rpartition("-")[2]) + mark] for name in part.obs_names]
        )
    got = mosaic.z_of(table, ["cell-30", "cell-4", "cell-17"])
    wanted = np.array([[30], [4], [17]])
    np.testing.assert_array_equal(got[mosaic.JOINT], wanted)
    np.testing.assert_array_equal(got["rna"], wanted + 0.25)
    np.testing.assert_array_equal(got["adt"], wanted + 0.5)


def test_the_joint_z_and_the_better_modality_are_scored_by_the_cell_types_they_tell(
    tmp_path: Path,
) -> None:
    _, test = cut(paired_cells(), MODS, 0)
    n = test["rna"].n_obs
    kind = np.arange(n) % 3
    test["rna"].obs["cell_type"] = np.array(["B", "T", "Multiplets"])[kind]
    test.write(tmp_path / "test.h5mu")
    z = np.random.default_rng(0).normal(size=(n, 4))
    told = (
        z + 100 * np.where(kind == 2, np.arange(n) % 2, kind)[:, None]
    )  # what names no type lies anywhere
    np.savez(tmp_path / "z.npz", u1=z, u2=told, test_joint=told)
    found = scores.of(tmp_path / "z.npz", mosaic.Split(tmp_path, MODS))
    assert found["joint"] == found["alone"] == 1.0
    np.savez(tmp_path / "z.npz", u1=z, u2=z, test_joint=told)
    found = scores.of(tmp_path / "z.npz", mosaic.Split(tmp_path, MODS))
    assert found["joint"] == 1.0 > found["alone"]
    assert "candidates" not in found


def test_a_missing_data_set_is_told_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data") as error:
        matching.runs_of(arguments(tmp_path, "--quick"))
    assert "bmmc_cite_starter.h5mu" in str(error.value)


# --- kept runs ---


def test_what_was_broken_off_is_made_anew_and_what_is_done_stays(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    def whole(folder: Path) -> None:
        assert not (folder / "half").exists()
        (folder / "all").touch()

    with pytest.raises(KeyboardInterrupt):
        common.once(tmp_path / "a/b", broken)
    assert (common.once(tmp_path / "a/b", whole) / "all").exists()
    common.once(tmp_path / "a/b", broken)


def test_finished_runs_are_kept_and_failed_ones_are_done_again(tmp_path: Path, capsys) -> None:
    runs = [Run("ours", "cells", fold, 0, "f00d") for fold in range(3)]
    begun: list[int] = []

    def do(run: Run, folder: Path) -> dict[str, object]:
        begun.append(run.fold)
        if run.fold == 1 and begun.count(1) == 1:
            raise BenchmarkError("it broke")
        return {"value": run.fold}

    def finish(runs: list[Run]) -> tuple[list[int], list[int]]:
        records, failures = common.finish(
            runs, tmp_path, Steps(do), lambda r: f"value {r['value']}"
        )
        return [r["value"] for r in records], [f["fold"] for f in failures]

    assert finish(runs) == ([0, 2], [1])
    assert finish(runs) == ([0, 1, 2], [])
    assert begun == [0, 1, 2, 1]
    told = capsys.readouterr().out
    assert "[2/3] ours on cells, fold 1, seed 0: FAILED: BenchmarkError: it broke" in told
    assert "[3/3] ours on cells, fold 2, seed 0: kept: value 2" in told
    assert finish([Run("ours", "cells", 0, 0, "beef")]) == ([0], [])  # of other sources
    assert begun[-1] == 0


def test_a_kept_run_is_scored_anew_when_the_scores_change_and_not_done_anew(tmp_path: Path) -> None:
    run, calls = Run("theirs", "cells", 0, 0, "f00d"), []

    def steps(code: str) -> Steps:
        def do(run: Run, folder: Path) -> common.Result:
            calls.append("do")
            (folder / "z").write_text("3")
            return {"fit_s": 1.0}

        def score(run: Run, folder: Path) -> common.Result:
            calls.append(code)
            return {"score": f"{code} of {(folder / 'z').read_text()}"}

        return Steps(do, score, code)

    first = [common.done(run, tmp_path, steps("a"))["score"] for _ in range(2)]
    assert (first, calls) == (["a of 3"] * 2, ["do", "a"])
    again = common.done(run, tmp_path, steps("b"))
    assert (again["score"], again["fit_s"], again["scored_by"]) == ("b of 3", 1.0, "b")
    assert calls == ["do", "a", "b"]
    assert run.record(tmp_path) == again


def test_a_result_from_before_scores_had_a_digest_is_scored_anew(tmp_path: Path) -> None:
    run = Run("theirs", "cells", 0, 0, "f00d")
    common.write_json(run.folder(tmp_path) / "result.json", {"fit_s": 9.0, "scores": "old"})
    never = Steps(
        lambda run, folder: pytest.fail("done anew"), lambda run, folder: {"scores": "new"}, "a"
    )
    assert common.done(run, tmp_path, never) == {"fit_s": 9.0, "scores": "new", "scored_by": "a"}


def test_peers_are_kept_under_what_they_follow_from_alone(tmp_path: Path) -> None:
    """Runs of an hour lie under these digests: of the script, its pins, the data set, and the rule that cuts it."""
    (tmp_path / "cbmc_cite.h5mu").write_bytes(b"cells")
    here = Path(matching.__file__).parent
    data = common.digest(tmp_path / "cbmc_cite.h5mu", here / "split.py", "rna", "adt")
    script = common.digest(
        *(here / "peers" / name for name in ("peer.py", "reference.py", "reference.txt"))
    )
    run = matching.runs_of(arguments(tmp_path, "--methods", "reference", "--sets", "cbmc_cite"))[0]
    assert run.digest == common.digest(data, script)


def test_our_runs_are_kept_under_the_way_they_are_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(mosaic, "digest", lambda *parts: seen.extend(parts) or "f00d")
    mosaic.sources()
    assert Path(mosaic.__file__) in seen


def test_time_left_follows_runs_of_the_same_kind(tmp_path: Path) -> None:
    for fold in range(2):
        run = Run("ours", "cells", fold, 0, "f00d")
        common.write_json(
            run.folder(tmp_path) / "result.json",
            {"method": "ours", "data_set": "cells", "wall_s": 40.0},
        )
    runs = [Run("ours", "cells", fold, 0, "f00d") for fold in range(5)] + [
        Run("theirs", "cells", 0, 0, "f00d")
    ]
    assert common.time_left(runs, tmp_path) == "2 min and 1 run of unknown length left"


def test_digest_follows_names_and_contents_but_not_caches_and_pages(tmp_path: Path) -> None:
    (tmp_path / "code/__pycache__").mkdir(parents=True)
    (tmp_path / "code/a.py").write_text("a")
    first = common.digest(tmp_path / "code")
    (tmp_path / "code/__pycache__/a.pyc").write_text("x")
    (tmp_path / "code/README.md").write_text("x")
    assert common.digest(tmp_path / "code") == first
    (tmp_path / "code/a.py").rename(tmp_path / "code/b.py")
    assert common.digest(tmp_path / "code") != first
    assert common.digest("ab", "c") != common.digest("a", "bc")


def test_a_failed_command_is_told_with_the_tail_of_its_log(tmp_path: Path) -> None:
    code = "print('before'); import sys; sys.exit('the reason')"
    with pytest.raises(BenchmarkError, match=r"exit code 1[\s\S]*the reason"):
        common.call([sys.executable, "-c", code], tmp_path / "log", threads=1)
    assert common.call([sys.executable, "-c", ""], tmp_path / "log", threads=1) > 0


def test_json_is_whole_and_without_nan(tmp_path: Path) -> None:
    common.write_json(tmp_path / "new/out.json", {"a": [float("nan"), 1.5], "b": None})
    assert json.loads((tmp_path / "new/out.json").read_text()) == {"a": [None, 1.5], "b": None}
    assert len(list((tmp_path / "new").iterdir())) == 1


# --- the matching benchmark ---


def arguments(data: Path, *words: str):
    return matching.arguments(["--json", "out.json", "--data", str(data), *words])


def record(
    method: str, fold: int, foscttm: float = 0.08, data_set: str = "cbmc_cite"
) -> common.Result:
    scores = {"global": {"foscttm": foscttm, "match": 0.02, "recall10": 0.1}}
    run = {"method": method, "data_set": data_set, "fold": fold, "seed": 0}
    return run | {"scores": scores, "fit_s": 100.0 + fold, "threads": 2}


def test_table_has_a_row_for_each_method_with_means_and_spreads() -> None:
    records = [record("ours", fold, 0.08 + 0.01 * fold) for fold in range(3)]
    lines = matching.table([*records, record("contrastive", 0)]).splitlines()
    assert lines[0].split() == [
        "set",
        "method",
        "folds",
        "FOSCTTM",
        "match",
        "recall10",
        "fit",
        "s",
        "threads",
    ]
    assert (
        "ours         3      0.0900 ± 0.0100  0.0200 ± 0.0000  0.100 ± 0.000  101 ± 1  2"
        in lines[2]
    )
    assert lines[3].split() == [
        "cbmc_cite",
        "contrastive",
        "1",
        "0.0800",
        "0.0200",
        "0.100",
        "100",
        "2",
    ]


def test_bars_are_judged_on_all_five_folds_of_ours_alone() -> None:
    others = [record("contrastive", fold) for fold in FOLDS]
    some = [record("ours", fold) for fold in range(4)]
    whole = [*some, record("ours", 4, 0.0945)]

    def holds(
        records: list[common.Result], seeds: tuple[int, ...] = (0,), quick: bool = False
    ) -> list[object]:
        bars = {
            b["name"].partition(", mean")[0]: b for b in matching.bars_of(records, seeds, quick)
        }
        return [bars[f"cbmc_cite: {m}"]["holds"] for m in ("foscttm", "match", "recall10")]

    assert holds([*others, *some]) == [None] * 3
    assert holds(whole) == [True, True, False]  # 0.0829, 0.02, 0.1
    assert holds(whole, seeds=(0, 1)) == [None] * 3
    assert holds(whole, quick=True) == [None] * 3
    seconds = next(
        b
        for b in matching.bars_of(whole, (0,), False)
        if b["name"].startswith("cbmc_cite: seconds")
    )
    assert (seconds["value"], seconds["holds"]) == (104.0, True)


@pytest.mark.parametrize(
    ("op", "value", "holds"), [("<=", 1.0, True), ("<", 1.0, False), (">=", 0.9, False)]
)
def test_a_bar_is_judged_by_its_operator(op: str, value: float, holds: bool) -> None:
    assert Bar("b", op, 1.0).judged(value) == {
        "name": "b",
        "value": value,
        "op": op,
        "bar": 1.0,
        "holds": holds,
    }


def test_multivi_runs_on_rna_and_atac_alone_and_seeds_have_runs_of_their_own(
    tmp_path: Path,
) -> None:
    for name in ("cbmc_cite", "snare_adbrain_8lib"):
        (tmp_path / f"{name}.h5mu").write_bytes(name.encode())
    runs = matching.runs_of(
        arguments(tmp_path, "--methods", "multivi", "reference", "--seeds", "0", "1")
    )
    assert {r.data_set for r in runs if r.method == "multivi"} == {"snare_adbrain_8lib"}
    assert len(runs) == 10 + 20
    assert len({r.folder(tmp_path) for r in runs}) == 30
    quick = matching.runs_of(
        arguments(tmp_path, "--quick", "--sets", "cbmc_cite", "--methods", "reference")
    )
    assert quick[0].digest not in {r.digest for r in runs}


def test_a_run_whose_cells_changed_since_it_was_planned_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cbmc_cite.h5mu").write_bytes(b"cells")
    args = arguments(tmp_path, "--methods", "contrastive", "--sets", "cbmc_cite")
    run = matching.runs_of(args)[0]
    (tmp_path / "cbmc_cite.h5mu").write_bytes(b"other cells")
    with pytest.raises(BenchmarkError, match="changed while"):
        matching.do(run, tmp_path, args)


@pytest.mark.parametrize("name", sorted(p.name for p in matching.PEERS.glob("*.txt")))
def test_peers_are_pinned_and_torch_comes_first(name: str) -> None:
    pins = common.pins(matching.PEERS / name)
    assert pins[0] == "torch==2.13.0" or not any(pin.startswith("torch==") for pin in pins)
    assert all("==" in pin for pin in pins)


def test_errors_of_benchmarks_end_with_one() -> None:
    assert issubclass(BenchmarkError, ClueError)
    assert BenchmarkError.exit_code == 1


def test_a_bar_tells_the_spread_of_what_it_is_the_mean_of() -> None:
    bars = [Bar("b", ">", 0.0).judged(0.5, 0.25), Bar("c", ">", 0.0).judged(None)]
    assert list(common.bar_lines(bars)) == ["holds   b: 0.5 ± 0.25 > 0", "open    c: not run > 0"]
