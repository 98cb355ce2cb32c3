"""launch/bench.py alone, under the launcher, and on a store that is slow to read."""

import json
from pathlib import Path

import pytest

from tests.distributed.command import alone, run, spawned, train_args
from tests.processes import run_ranks
from tests.stores import make_store

QUICK = ("--seconds", "0.2", "--repeats", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More blocks than the loader keeps, so that it reads all the time."""
    folder = tmp_path_factory.mktemp("bench")
    make_store(
        folder / "s.zarr", cells={"rna+adt": 2000, "rna": 900}, features={"rna": 60, "adt": 10}
    )
    return folder


def bench_args(folder: Path, name: str, *settings: str) -> list[str]:
    _, *args = train_args(folder, folder / "s.zarr", name, *settings)
    return ["launch/bench.py", *args, *QUICK]


def test_it_measures_all_three_and_writes_nothing_but_its_json(folder: Path) -> None:
    out = folder / "one.json"
    done = alone(*bench_args(folder, "one", "data.window_blocks=1"), "--json", str(out))
    report = json.loads(out.read_text())
    assert report["verdict"] == done.stdout.splitlines()[-1]
    assert report["feeds"] == report["data"]["cells_per_s"] / report["model"]["cells_per_s"]
    assert report["data"]["cells_per_s"] == report["data"]["batches_per_s"] * 64
    assert report["data"]["non_zeros_per_s"] > report["data"]["cells_per_s"]
    assert {"plan", "read and decode", "gather"} <= report["data"]["phases"].keys()
    assert sum(report["data"]["phases"].values()) == pytest.approx(1)
    parts = (
        report["model"]["forward_ms"]
        + report["model"]["backward_ms"]
        + report["model"]["optimizer_ms"]
    )
    assert 0.1 < parts / report["model"]["step_ms"] < 10
    assert 0 <= report["both"]["waited"] < 1
    assert not (folder / "one").exists()


def test_two_ranks_report_once_and_count_all_cells(folder: Path) -> None:
    out = folder / "two.json"
    done = run(*spawned(2, *bench_args(folder, "two", "train.grad_accum=2"), "--json", str(out)))
    report = json.loads(out.read_text())
    assert report["about"]["ranks"] == 2
    assert report["both"]["cells_per_s"] == pytest.approx(64e3 / report["both"]["step_ms"])
    assert (done.stdout + done.stderr).count("is the limit") == 1
    assert not (folder / "two").exists()


def test_a_recipe_needs_a_store_but_no_run(folder: Path) -> None:
    assert (
        "`store` is not set"
        in alone("launch/bench.py", "--config", "configs/atlas.json", expect=2).stderr
    )
    store = ["--set", f"store={folder / 's.zarr'}", "data.batch_size=64", "model.trunk.hidden=8"]
    alone("launch/bench.py", "--config", "configs/atlas.json", *store, *QUICK)


def test_mistakes_are_told_before_anything_is_measured(folder: Path) -> None:
    args = bench_args(folder, "bad")
    assert (
        "folder that is there"
        in alone(*args, "--json", str(folder / "no" / "o.json"), expect=2).stderr
    )
    assert "where: --repeats" in alone(*args, "--repeats", "0", expect=2).stderr


def test_a_slow_store_is_found_to_be_the_limit(folder: Path) -> None:
    settings = {
        "store": str(folder / "s.zarr"),
        "model": {"latent": 4, "trunk": {"projection": 4, "hidden": 4, "members": 1, "depth": 1}},
        "data": {"lanes": 4, "batch_size": 64, "window_blocks": 1},
    }
    output = run_ranks(
        1,
        f"settings = {settings!r}",
        """
        import time
        from clue_dist.config import Config
        from clue_dist.ranks import Ranks
        from clue_dist.store.segment_arrays import SegmentArrays
        from clue_dist.train.setup import prepare_setup
        from clue_dist.train.bench import measure_speed
        finish, delay_s = SegmentArrays.finish_read, 0.0
        def slow(*args):
            time.sleep(delay_s)
            return finish(*args)
        SegmentArrays.finish_read = slow
        setup = prepare_setup(Config(**settings), 1, writes=False)
        # A batch needs about one read, which takes as long as five steps: on a busy machine the
        # time of a step may double from one measurement to the next.
        delay_s = 5e-3 * measure_speed(setup, Ranks(), 0.1, 1).model.step_ms
        report = measure_speed(setup, Ranks(), 0.1, 1)
        print(max(report.data.phases, key=report.data.phases.get))
        print(report.verdict)
        """,
        timeout_s=240,
    )[0].splitlines()
    assert output[-2] == "read and decode"
    assert output[-1].startswith("data is the limit: the model could take")
