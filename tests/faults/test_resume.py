"""An interrupted run goes on bit for bit; on another number of ranks, with the same batches."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from clue_dist.checkpoint import run_folder, shards
from clue_dist.errors import format_count
from tests.distributed.command import (
    KILLED,
    alone,
    best_weights,
    largest_difference,
    metrics,
    run,
    spawned,
    train_args,
    trained_weights,
)
from tests.faults.command import planted, saved_steps, timeless
from tests.ranks import GONE, HUNG
from tests.stores import make_store

STEPS = 24
# 14 of 300 cells are held out. Dropout, noise, mixing and subsets of features are drawn in every
# step.
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


ACCUMULATED, RMSPROP = "train.grad_accum=2", "train.optimizer=rmsprop"
MIXED, BF16 = "train.precision=mixed", "train.precision=bf16"


@pytest.mark.parametrize(
    ("ranks", "stage", "settings"),
    [
        (1, 0, ()),  # one rank keeps the memory of gradients, which a resumed run has yet to get
        (1, 0, (ACCUMULATED,)),
        (2, 0, ()),
        (2, 1, ()),
        (2, 2, ()),
        (2, 3, ()),
        (2, 0, (ACCUMULATED, RMSPROP)),
        (2, 1, (MIXED,)),
        (2, 0, (BF16,)),
        (2, 1, (BF16, ACCUMULATED)),
    ],
)
def test_killed_at_a_random_step_it_ends_bit_for_bit_like_an_unbroken_run(
    tmp_path: Path, folder: Path, ranks: int, stage: int, settings: tuple[str, ...]
) -> None:
    args = [
        args_of(folder, str(tmp_path / name), f"train.zero_stage={stage}", *settings)
        for name in ("whole", "kill")
    ]
    run(*spawned(ranks, *args[0]))
    draw = random.Random(f"{stage}{settings}")
    rank, step = draw.randrange(ranks), draw.randrange(5, STEPS)
    done = run(*planted(ranks, args[1], f"kill:{rank}:{step}"), expect=None)
    assert done.returncode not in (0, HUNG, GONE)
    whole, broken = tmp_path / "whole", tmp_path / "kill"
    before = saved_steps(broken)[0]
    assert before == step // 4 * 4  # one interval at most is done again
    done = run(*spawned(ranks, *args[1]))
    assert f"going on from step {before}" in done.stdout
    for split in ("train", "validation"):
        assert timeless(whole, split) == timeless(broken, split)
    assert len(timeless(whole)) == STEPS
    assert same_state(whole, broken) == 0.0
    assert largest_difference(best_weights(whole), best_weights(broken)) == 0.0


def same_state(a: Path, b: Path) -> float:
    """Largest difference between the last checkpoints of two runs, optimizer states included."""
    last = [run / "checkpoints" / f"step-{saved_steps(run)[0]:08d}" for run in (a, b)]
    states = [contents(folder) for folder in last]
    assert states[0].keys() == states[1].keys()
    assert all(states[0].values())
    assert (last[0] / "state.json").read_text() == (last[1] / "state.json").read_text()
    return max(largest_difference(states[0][key], states[1][key]) for key in states[0])


def contents(folder: Path) -> dict[str, dict[str, Any]]:
    """Weights and whatever the optimizer keeps, each by parameter."""
    parts = run_folder.list_shard_files(folder)
    return {
        key: shards.assemble_tensors(parts, key)
        for key in sorted({key for key, *_ in shards.iterate_shards(parts)})
    }


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4), (4, 2)])
def test_it_goes_on_with_another_number_of_ranks(folder: Path, before: int, after: int) -> None:
    whole, name = folder / "elastic", f"elastic-{before}-{after}"
    if not whole.exists():
        alone(*args_of(folder, "elastic"))
    args = args_of(folder, name)
    done = run(*planted(before, args, f"usr1:{before - 1}:9"), expect=75)
    assert "asked to stop: saved at step 10" in done.stdout
    saved = contents(folder / name / "checkpoints" / "step-00000010")
    done = run(*planted(after, args, f"dump:{folder / name / 'begun'}"))
    ranks = format_count(before, "rank")
    assert f"going on from step 10, saved by {ranks}" in done.stdout

    begun = contents(folder / name / "begun")
    assert len(run_folder.list_shard_files(folder / name / "begun")) == after
    # The bar is 1e-6.
    assert max(largest_difference(saved[key], begun[key]) for key in saved) == 0.0
    losses = [[line["loss"] for line in metrics(run)] for run in (whole, folder / name)]
    assert len(losses[1]) == STEPS
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert largest_difference(trained_weights(whole), trained_weights(folder / name)) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_goes_on_under_another_zero_stage_and_number_of_ranks(
    folder: Path, precision: str
) -> None:
    name = f"stages-{precision}"
    args = args_of(folder, name, "train.zero_stage=3", f"train.precision={precision}")
    run(*planted(2, args, "term:0:9"), expect=75)
    saved = contents(folder / name / "checkpoints" / "step-00000010")
    for stage, ranks in ((0, 2), (2, 2), (3, 1)):
        begun = folder / name / f"begun{stage}"
        run(
            *planted(
                ranks, [*args, "--set", f"train.zero_stage={stage}"], f"dump:{begun}", "term:0:10"
            ),
            expect=75,
        )
        newest = folder / name / "checkpoints" / "step-00000011"
        assert max(largest_difference(saved[k], contents(begun)[k]) for k in saved) == 0.0
        assert all(
            values.isfinite().all()
            for values in shards.assemble_tensors(run_folder.list_shard_files(newest)).values()
        )
        for path in newest.iterdir():  # so that the next stage begins at the same step
            path.unlink()
        newest.rmdir()


def test_what_is_logged_now_and_then_is_the_mean_over_all_its_steps(folder: Path) -> None:
    alone(*args_of(folder, "means", "log.every=8"))
    args = args_of(folder, "means-broken", "log.every=8")
    # Two steps after the last line.
    run(*planted(1, args, "usr1:0:10"), expect=75)
    alone(*args)
    whole, broken = timeless(folder / "means"), timeless(folder / "means-broken")
    assert [line["step"] for line in whole] == [8, 16, 24]
    for a, b in zip(whole, broken, strict=True):
        assert list(a) == list(b)
        assert list(b.values())[2:] == pytest.approx(list(a.values())[2:], rel=1e-6)


def test_best_weights_are_those_of_the_checkpoint_that_is_gone_on_from(folder: Path) -> None:
    """The newest checkpoint is damaged: the validations since the one before are forgotten."""
    settings = ("train.validate_every=2", "train.checkpoint_every=8", "train.patience=9")
    alone(*args_of(folder, "best", *settings))
    args = args_of(folder, "best-broken", *settings)
    run(*planted(1, args, "usr1:0:18"), expect=75)
    newest, before = saved_steps(folder / "best-broken")[:2]
    assert (newest, before) == (19, 16)
    (
        folder / "best-broken" / "checkpoints" / f"step-{newest:08d}" / "rank-00000.safetensors"
    ).write_bytes(b"torn")
    assert f"going on from step {before}" in alone(*args).stdout
    whole, broken = folder / "best", folder / "best-broken"
    assert timeless(whole, "validation") == timeless(broken, "validation")
    assert saved_steps(whole, "best") == saved_steps(broken, "best")
    assert largest_difference(best_weights(whole), best_weights(broken)) == 0.0
    assert not list(broken.glob("*/*.aside")), "training has passed them"


def read_settings(run_folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((run_folder / "config.json").read_text())["train"]
    return settings


def test_a_run_is_prolonged_and_its_folder_says_so(folder: Path) -> None:
    alone(*args_of(folder, "prolonged"))
    args = (*args_of(folder, "prolonged"), "train.epochs=6", "train.lr=0.0005")
    previewed = alone(*args, "--dry-run").stdout
    assert f"would go on from step {STEPS}" in previewed
    assert "differs from the run: train.epochs" in previewed
    done = alone(*args)
    assert f"going on from step {STEPS}" in done.stdout
    settings = read_settings(folder / "prolonged")
    assert (settings["epochs"], settings["lr"]) == (6, 0.0005)
    assert saved_steps(folder / "prolonged")[0] == metrics(folder / "prolonged")[-1]["step"] == 27
    (change,) = metrics(folder / "prolonged", "event")
    assert change["step"] == STEPS + 1
    assert change["train.lr"] == "0.001 -> 0.0005"


def test_settings_of_an_attempt_that_saved_nothing_leave_no_trace(folder: Path) -> None:
    alone(*args_of(folder, "unsaved"))
    args = args_of(folder, "unsaved", "train.epochs=6", "train.lr=0.0005")
    run(*planted(1, args, f"kill:0:{STEPS + 1}"), expect=KILLED)
    assert read_settings(folder / "unsaved")["lr"] == 0.001
    alone(*args_of(folder, "unsaved", "train.epochs=6"))
    (change,) = metrics(folder / "unsaved", "event")
    assert "train.lr" not in change


def test_a_finished_run_stays_as_it_is_whatever_is_asked_of_it(folder: Path) -> None:
    def read_folder() -> dict[Path, bytes]:
        found = (path for path in (folder / "left").rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in found if path.name != ".lock"}

    args = args_of(folder, "left")
    alone(*args)
    before = read_folder()
    args = [*args, "train.lr=0.01", "log.tensorboard=true"]
    for done in (alone(*args, "--dry-run"), run(*spawned(2, *args))):
        assert f"finished at step {STEPS}" in done.stdout
        assert "nothing" in done.stdout
        changes = "log.tensorboard False -> True, train.lr 0.001 -> 0.01"
        assert f"differs from the run: {changes}" in done.stdout
    assert read_folder() == before


def test_early_stop_is_remembered(folder: Path) -> None:
    """Validations without a better score are counted across an interruption."""
    settings = ("train.validate_every=2", "train.patience=6", "train.lr=1e-9")
    alone(*args_of(folder, "early", *settings))
    args = args_of(folder, "early-broken", *settings)
    run(*planted(1, args, "usr1:0:8"), expect=75)
    assert "stopping early" in alone(*args).stdout
    assert timeless(folder / "early", "validation") == timeless(
        folder / "early-broken", "validation"
    )
    assert len(timeless(folder / "early", "validation")) < STEPS // 2
