"""launch/train.py: early errors, resuming, precision, any number of modalities, any likelihood."""

import fcntl
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from clue_dist.checkpoint.attempts import read_attempts
from clue_dist.checkpoint.model_card import read_model_card
from tests.distributed.command import (
    FAST,
    ROOT,
    alone,
    best_weights,
    environment,
    largest_difference,
    launched,
    metrics,
    run,
    spawned,
    train_args,
)
from tests.faults.command import TIMES
from tests.stores import make_store
from tests.wandb_files import read_recorded_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    make_store(
        folder / "s.zarr",
        cells={"rna+adt": 200, "rna": 60, "adt": 40},
        features={"rna": 60, "adt": 10},
    )
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.lrr=1"], "did you mean `train.lr`?"),
        (["store=nowhere.zarr"], "no store here"),
        (["data.lanes=3", "data.batch_size=66"], "must divide data.lanes"),
        (["modalities.protein.weight=2"], "names a modality that the store lacks"),
    ],
)
def test_mistakes_end_with_2_before_any_worker_starts(
    folder: Path, settings: list[str], message: str
) -> None:
    done = run(*spawned(2, *train_args(folder, folder / "s.zarr", "bad", *settings)), expect=2)
    assert done.stderr.count(message) == 1  # rank 0 alone speaks
    assert "Traceback" not in done.stderr
    assert not (folder / "bad").exists()


def test_the_launcher_hands_the_exit_code_on(folder: Path) -> None:
    done = run(*launched(2, *train_args(folder, folder / "s.zarr", "bad", "train.lrr=1")), expect=2)
    assert (done.stdout + done.stderr).count("did you mean") == 1


def test_no_paired_cells_is_an_error_unless_nothing_is_crossed(folder: Path) -> None:
    make_store(
        folder / "unpaired.zarr", cells={"rna": 90, "adt": 90}, features={"rna": 60, "adt": 10}
    )
    args = train_args(folder, folder / "unpaired.zarr", "unpaired", "train.epochs=1")
    assert "no cell of the store carries two modalities" in alone(*args, expect=2).stderr
    alone(*args, "--set", "objective.lambda_cross=0")
    assert math.isfinite(metrics(folder / "unpaired", "validation")[-1]["score"])


def test_dry_run_shows_the_plan_and_writes_nothing(folder: Path) -> None:
    done = alone(*train_args(folder, folder / "s.zarr", "dry"), "--dry-run")
    assert "stratum rna+adt: 190 cells, 10 held out" in done.stdout
    assert "would go on" not in done.stdout
    assert not (folder / "dry").exists()
    done = alone(
        *train_args(folder, folder / "s.zarr", "dry"), "--dry-run", "--resume", "nowhere", expect=2
    )
    assert "this checkpoint cannot be used" in done.stderr


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def stopped_after(command: list[str], run_folder: Path, lines: int) -> int:
    """The exit code of a command whose process group gets SIGTERM once it has logged `lines`."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log, deadline = run_folder / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= lines):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    return process.wait(60)


def test_resumed_after_a_stop_signal_ends_like_an_unbroken_run(folder: Path) -> None:
    settings = ("train.epochs=12", "log.every=1")  # 54 steps
    alone(*train_args(folder, folder / "s.zarr", "whole", *settings))
    args = train_args(folder, folder / "s.zarr", "broken", *settings)
    command = [sys.executable, "tests/faults/plant.py", "pause:0.05", "--", *args]
    assert stopped_after(command, folder / "broken", 20) == 75
    (saved,) = (folder / "broken" / "checkpoints").glob("step-*")
    assert 20 <= int(saved.name.split("-")[1]) < metrics(folder / "whole")[-1]["step"]

    alone(*args)
    # The resumed run repeats the whole one bit for bit.
    assert timeless(metrics(folder / "broken")) == timeless(metrics(folder / "whole"))
    assert (
        largest_difference(best_weights(folder / "whole"), best_weights(folder / "broken")) == 0.0
    )


def test_two_ranks_stopped_under_the_launcher_go_on_to_the_same_weights(folder: Path) -> None:
    # ZeRO-3 and bf16, with validations between the steps: the settings of configs/zero3.json
    sharded = (
        "train.zero_stage=3",
        "train.precision=bf16",
        "train.validate_every=7",
        "train.patience=0",
    )
    settings = ("train.epochs=6", "log.every=1", *sharded)  # 27 steps
    run(*spawned(2, *train_args(folder, folder / "s.zarr", "whole3", *settings)))
    args = train_args(folder, folder / "s.zarr", "broken3", *settings)
    slow = ("tests/faults/plant.py", "pause:0.05", "--", *args)
    assert stopped_after(launched(2, *slow), folder / "broken3", 8) != 0
    deadline = time.monotonic() + 60  # the launcher may be gone before its ranks
    while not list((folder / "broken3" / "checkpoints").glob("step-????????/COMMIT.json")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with (folder / "broken3" / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the last rank 0 has left
    run(*spawned(2, *args))
    assert timeless(metrics(folder / "broken3")) == timeless(metrics(folder / "whole3"))
    assert (
        largest_difference(best_weights(folder / "whole3"), best_weights(folder / "broken3")) == 0.0
    )


def test_the_console_command_starts_its_ranks(folder: Path) -> None:
    _, *words = train_args(folder, folder / "s.zarr", "ranks", "train.epochs=1")
    done = run(sys.executable, "-m", "clue_dist", "train", "--ranks", "2", *words)
    assert "finished at step" in done.stdout
    assert [attempt.ranks for attempt in read_attempts(folder / "ranks")] == [2]


def test_a_second_job_on_the_same_run_folder_is_refused(folder: Path) -> None:
    args = train_args(folder, folder / "s.zarr", "twice", "train.epochs=1")
    (folder / "twice").mkdir()
    with (folder / "twice" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another job is training" in alone(*args, expect=2).stderr
    alone(*args)


@pytest.mark.parametrize("epochs", [5, 10])
def test_best_weights_of_a_killed_attempt_do_not_outlive_it(folder: Path, epochs: int) -> None:
    # Killed before its first checkpoint, but after a validation: the next attempt starts anew.
    name = f"killed-{epochs}"
    alone(
        *train_args(folder, folder / "s.zarr", name, "train.epochs=10", "train.validate_every=10")
    )
    best = max((folder / name / "best").iterdir()).name
    shutil.rmtree(folder / name / "checkpoints")
    settings = ("model.latent=4", f"train.epochs={epochs}", "train.validate_every=10")
    alone(*train_args(folder, folder / "s.zarr", name, *settings))
    # Each of the two members has its biases.
    assert best_weights(folder / name)["heads.bias"].shape[-1] == 2 * 2 * 4 // 2
    aside = [path.name for path in (folder / name).glob("*/step-*.aside")]
    # The weights are kept aside until training has passed their step.
    assert aside == ([f"{best}.aside"] if epochs == 5 else [])


def test_going_on_from_a_checkpoint_of_another_run(folder: Path) -> None:
    alone(
        *train_args(
            folder, folder / "s.zarr", "first", "train.epochs=4", "train.checkpoint_every=10"
        )
    )
    start = min((folder / "first" / "checkpoints").iterdir())
    alone(
        *train_args(folder, folder / "s.zarr", "second", "train.epochs=4"), "--resume", str(start)
    )
    assert (folder / "second" / "model.json").exists()
    assert (
        largest_difference(best_weights(folder / "first"), best_weights(folder / "second")) == 0.0
    )


def test_a_run_on_more_cells_begins_with_the_weights_of_an_earlier_one(folder: Path) -> None:
    make_store(
        folder / "more.zarr",
        cells={"rna+adt": 240, "adt": 40},
        features={"rna": 60, "adt": 10},
        batches=3,
    )
    alone(*train_args(folder, folder / "s.zarr", "less", "train.epochs=2"))
    # So small a rate that the weights stay what they were.
    settings = ("train.epochs=1", "train.lr=1e-12", "objective.lambda_contrastive=0")
    args = train_args(folder, folder / "more.zarr", "more", *settings)
    args += ["--init-from", str(folder / "less")]
    (best,) = (folder / "less" / "best").iterdir()
    for options in (("--dry-run",), (), ()):
        done = run(*spawned(2 if not options else 1, *args, *options))
        begins = f"begins with the weights of {best}" in done.stdout
        assert begins == ("nothing is left to train" not in done.stdout)
        assert ("batches kept: batch-0, batch-1; new: batch-2" in done.stdout) == begins
    assert not begins, "the same command goes on with the run"
    less, more = (read_model_card(folder / name) for name in ("less", "more"))
    assert less.fingerprint in more.identities - {more.fingerprint}
    before, after = best_weights(folder / "less"), best_weights(folder / "more")
    fixed = [name for name in before if name.endswith(("projection.weight", "heads.weight"))]
    assert len(fixed) == 3
    assert all((after[name] - before[name]).abs().max() < 1e-6 for name in fixed)


@pytest.mark.parametrize("settings", [("data.holdout=0",), ("data.holdout=0.005",)])
def test_nothing_or_a_single_pair_held_out(folder: Path, settings: tuple[str, ...]) -> None:
    name = settings[0].replace(".", "-")
    alone(*train_args(folder, folder / "s.zarr", name, "train.epochs=1", *settings))
    assert best_weights(folder / name)


def test_resume_refuses_other_data_settings_ranks_and_damage(folder: Path) -> None:
    args = train_args(folder, folder / "s.zarr", "again", "train.epochs=2")
    alone(*args)
    assert "already holds a run" in alone(*args, "--resume", "never", expect=2).stderr
    assert "changed: seed" in alone(*args, "--set", "seed=5", expect=2).stderr
    make_store(
        folder / "other.zarr",
        cells={"rna+adt": 200, "rna": 60, "adt": 40},
        features={"rna": 60, "adt": 10},
        seed=1,
    )
    assert (
        "not the one this run was trained on"
        in alone(*args, "--set", f"store={folder / 'other.zarr'}", expect=2).stderr
    )
    config = folder / "again" / "config.json"
    before = config.read_text()
    # The configuration reads as if another version had begun the run.
    config.write_text(before.replace('"latent": 6', '"latent": 8'))
    done = alone(*args, "--set", "model.latent=8", "train.epochs=3", expect=2)
    assert "the weights do not fit the model of these settings" in done.stderr
    assert "Traceback" not in done.stderr
    config.write_text(before)

    (checkpoint,) = (folder / "again" / "checkpoints").glob("step-*")
    victim = checkpoint / "rank-00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    done = alone(*args, expect=2)
    assert "every checkpoint of the run is damaged" in done.stderr
    assert victim.name in done.stdout


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.json")), ids=lambda p: p.stem)
def test_every_recipe_trains(folder: Path, recipe: Path) -> None:
    settings = (
        f"store={folder / 's.zarr'}",
        f"run={folder / recipe.stem}",
        "train.epochs=1.5",
        "log.every=1",
        # Some are as wide as a GPU likes it.
        "model.trunk.hidden=64",
        "model.decoder.hidden=64",
        "model.discriminator.hidden=64",
        *FAST,
    )
    alone("launch/train.py", "--config", str(recipe), "--set", *settings)
    losses = [line["loss"] for line in metrics(folder / recipe.stem)]
    assert len(losses) >= 3
    assert all(map(math.isfinite, losses))
    assert best_weights(folder / recipe.stem)


@pytest.mark.parametrize(("lower", "stage"), [("bf16", 0), ("bf16", 2), ("mixed", 0)])
def test_lower_precision_trains_close_to_fp32(folder: Path, lower: str, stage: int) -> None:
    for precision in ("fp32", lower):
        settings = (
            "train.epochs=10",
            "log.every=5",
            f"train.precision={precision}",
            f"train.zero_stage={stage}",
        )
        name = f"{precision}-beside-{lower}-{stage}"
        alone(*train_args(folder, folder / "s.zarr", name, *settings))
    exact, rounded = (folder / f"{name}-beside-{lower}-{stage}" for name in ("fp32", lower))
    for term in ("self", "cross", "contrastive"):
        a, b = ([line[term] for line in metrics(run)] for run in (exact, rounded))
        assert b == pytest.approx(a, rel=0.02)
        assert b != a
        assert a[-1] < a[0]
    assert all(w.dtype == torch.float32 for w in best_weights(rounded).values())


def test_ranks_of_unlike_machines_train_in_the_precision_that_all_can(folder: Path) -> None:
    """The second rank gains nothing by bfloat16, the first, which speaks, does."""
    settings = ("train.epochs=2", "log.every=1")
    run(*spawned(2, *train_args(folder, folder / "s.zarr", "alike", *settings)))
    args = train_args(folder, folder / "s.zarr", "unlike", *settings, "train.precision=auto")
    plant = ("tests/faults/plant.py", "bfloat16:1", "--")
    for words in ([*args, "--dry-run"], args):
        assert "ZeRO-1, fp32" in run(*spawned(2, *plant, *words)).stdout
    kept = json.loads((folder / "unlike" / "config.json").read_text())
    assert kept["train"]["precision"] == "fp32"
    weights = [best_weights(folder / name) for name in ("alike", "unlike")]
    assert largest_difference(*weights) == 0


@pytest.mark.parametrize("likelihood", ["zinb", "poisson", "bernoulli"])
def test_other_likelihoods_and_the_mean_posterior_train(folder: Path, likelihood: str) -> None:
    choices = (
        f"modalities.rna.likelihood={likelihood}",
        "model.posterior=mean",
        "objective.alignment=cosine",
    )
    elbo = ("objective.lambda_contrastive=0", "objective.lambda_self=1", "objective.lambda_cross=1")
    args = train_args(
        folder, folder / "s.zarr", likelihood, "train.epochs=8", "log.every=5", *choices, *elbo
    )
    alone(*args)
    for term in ("self", "cross"):
        losses = [line[term] for line in metrics(folder / likelihood)]
        assert losses[-1] < losses[0]


def test_one_modality_and_dense_real_values(folder: Path) -> None:
    # A modality of kind dense has a Normal likelihood, as the store says.
    make_store(folder / "single.zarr", cells={"image": 150}, features={"image": 20})
    done = alone(
        *train_args(folder, folder / "single.zarr", "single", "train.epochs=10", "log.every=5")
    )
    assert "none -> normal" in done.stdout
    losses = [line["loss"] for line in metrics(folder / "single")]
    assert losses[-1] < losses[0]


def test_sinks_wandb_offline_and_tensorboard(folder: Path) -> None:
    args = train_args(folder, folder / "s.zarr", "sinks", "train.epochs=2", "log.every=2")
    env = {k: v for k, v in environment().items() if not k.startswith("WANDB")}
    settings = ["--set", "log.wandb=offline", "log.tensorboard=true"]
    subprocess.run(
        ["python", *args, *settings],
        cwd=ROOT,
        env=env,
        check=True,
        timeout=120,
        capture_output=True,
    )
    run_folder = folder / "sinks"
    assert list(run_folder.glob("wandb/offline-run-*/*.wandb"))
    assert list(run_folder.glob("tensorboard/events*"))
    recorded = read_recorded_run(run_folder)
    kept = metrics(run_folder, "validation")[-1]
    assert recorded.config == recorded.config | json.loads((run_folder / "config.json").read_text())
    assert recorded.summary["best/step"] == kept["best_step"]
    assert recorded.summary["best/score"] == pytest.approx(kept["best_score"])
    (attempt,) = read_attempts(run_folder)
    assert (attempt.step, attempt.ranks, attempt.device) == (0, 1, "cpu")
    assert attempt.total_steps == kept["step"]
    assert attempt.command.startswith("launch/train.py --config ")
    assert sum(attempt.held_out_cells.values()) == 10
    assert attempt.versions.keys() >= {"clue-dist", "python", "torch"}
    assert {
        line["split"]
        for line in map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    } == {
        "train",
        "validation",
    }


def test_early_stop_keeps_the_latest_of_the_best_and_does_not_train_on(folder: Path) -> None:
    settings = ("train.epochs=40", "train.validate_every=1", "train.patience=2", "train.lr=1e-9")
    args = train_args(folder, folder / "s.zarr", "early", *settings)
    assert "stopping early" in alone(*args).stdout
    looks = [(line["score"], line["error"]) for line in metrics(folder / "early", "validation")]
    lowest = itertools.accumulate((score for score, _ in looks), min)
    kept = [
        i
        for i, ((score, error), low) in enumerate(zip(looks, lowest, strict=True), 1)
        if score <= low + error
    ]
    (best,) = (folder / "early" / "best").iterdir()
    assert int(best.name.split("-")[1]) == kept[-1]
    before = metrics(folder / "early", "validation")
    alone(*args)  # a finished run stays as it is
    assert metrics(folder / "early", "validation") == before
