"""A run that was interrupted anywhere goes on bit for bit, and on any number of ranks with the same global batches."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from clue_dist.train import checkpoint, pieces
from tests.distributed.command import best_weights, largest_difference, metrics, python, run, spawned, train_args
from tests.faults.command import planted, saved_steps, timeless
from tests.stores import make_store

STEPS = 24
# 14 of 300 cells are held out; with dropout, noise, mixing and subsets of features drawn in every step
SETTINGS = (
    f"train.epochs={STEPS * 64 / 286}",
    "log.every=1",
    "train.validate_every=5",
    "train.checkpoint_every=4",
    "model.decoder.features_per_step=8",
    "model.decoder.dropout=0.1",
    "train.patience=0",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    make_store(
        folder / "s.zarr",
        cells={"rna+adt": 160, "rna+atac": 120, "adt": 20},
        features={"rna": 60, "adt": 10, "atac": 40},
    )
    return folder


def args_of(folder: Path, name: str, *settings: str) -> list[str]:
    return train_args(folder, folder / "s.zarr", name, *SETTINGS, *settings)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_killed_at_a_random_step_it_ends_bit_for_bit_like_an_unbroken_run(folder: Path, stage: int) -> None:
    zero = f"train.zero_stage={stage}"
    run(*spawned(2, *args_of(folder, f"whole{stage}", zero)))
    rank, step = random.Random(stage).choice([0, 1]), random.Random(stage).randrange(5, STEPS)
    args = args_of(folder, f"killed{stage}", zero)
    done = run(*planted(2, args, f"kill:{rank}:{step}"), expect=None)
    assert done.returncode != 0
    before = saved_steps(folder / f"killed{stage}")[0]
    assert before == step // 4 * 4  # one interval at most is done again
    done = run(*spawned(2, *args))
    assert f"going on from step {before}" in done.stdout
    whole, broken = folder / f"whole{stage}", folder / f"killed{stage}"
    for split in ("train", "validation"):
        assert timeless(whole, split) == timeless(broken, split)
    assert len(timeless(whole)) == STEPS
    assert same_state(whole, broken) == 0.0
    assert largest_difference(best_weights(whole), best_weights(broken)) == 0.0


def same_state(a: Path, b: Path) -> float:
    """Largest difference of all weights and of the optimizer's state, in the last checkpoints of two runs."""
    last = [run / "checkpoints" / f"step-{saved_steps(run)[0]:08d}" for run in (a, b)]
    states = [contents(folder) for folder in last]
    assert states[0].keys() == states[1].keys()
    assert (last[0] / "state.json").read_text() == (last[1] / "state.json").read_text()
    return max(largest_difference(states[0][key], states[1][key]) for key in states[0])


def contents(folder: Path) -> dict[str, dict[str, Any]]:
    return {key: pieces.full(checkpoint.parts(folder), key) for key in ("weights", "exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4), (4, 2)])
def test_it_goes_on_with_another_number_of_ranks(folder: Path, before: int, after: int) -> None:
    whole, name = folder / "elastic", f"elastic-{before}-{after}"
    if not whole.exists():
        python(*args_of(folder, "elastic"))
    args = args_of(folder, name)
    done = run(*planted(before, args, f"usr1:{before - 1}:9"), expect=75)
    assert "asked to stop: saved at step 10" in done.stdout
    saved = contents(folder / name / "checkpoints" / "step-00000010")
    done = run(*planted(after, args, f"dump:{folder / name / 'begun'}"))
    assert f"going on from step 10, saved by {before} ranks" in done.stdout

    begun = contents(folder / name / "begun")
    assert len(checkpoint.parts(folder / name / "begun")) == after
    assert max(largest_difference(saved[key], begun[key]) for key in saved) == 0.0  # the bar is 1e-6
    losses = [[line["loss"] for line in metrics(run)] for run in (whole, folder / name)]
    assert len(losses[1]) == STEPS
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert largest_difference(best_weights(whole), best_weights(folder / name)) < 1e-4


def test_under_another_zero_stage_and_precision_of_the_same_checkpoint(folder: Path) -> None:
    args = args_of(folder, "stages", "train.zero_stage=3")
    run(*planted(2, args, "term:0:9"), expect=75)
    saved = contents(folder / "stages" / "checkpoints" / "step-00000010")
    for stage in (0, 2):
        begun = folder / "stages" / f"begun{stage}"
        run(*planted(2, [*args, "--set", f"train.zero_stage={stage}"], f"dump:{begun}", "term:0:10"), expect=75)
        newest = folder / "stages" / "checkpoints" / "step-00000011"
        assert max(largest_difference(saved[k], contents(begun)[k]) for k in saved) == 0.0
        assert all(values.isfinite().all() for values in pieces.full(checkpoint.parts(newest)).values())
        for path in newest.iterdir():  # so that the next stage begins at the same step
            path.unlink()
        newest.rmdir()


def test_early_stop_is_remembered(folder: Path) -> None:
    """Validations without a better score are counted across an interruption."""
    settings = ("train.validate_every=2", "train.patience=6", "train.lr=1e-9")
    python(*args_of(folder, "early", *settings))
    args = args_of(folder, "early-broken", *settings)
    run("python", "tests/faults/plant.py", "usr1:0:8", "--", *args, expect=75)
    assert "stopping early" in python(*args).stdout
    assert timeless(folder / "early", "validation") == timeless(folder / "early-broken", "validation")
    assert len(timeless(folder / "early", "validation")) < STEPS // 2
