"""launch/train.py as a person uses it: errors before any worker starts, resume, precision, any K, any likelihood."""

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.command import (
    ROOT,
    best_weights,
    environment,
    largest_difference,
    launched,
    metrics,
    python,
    run,
    train_args,
)
from tests.stores import make_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    make_store(folder / "s.zarr", cells={"rna+adt": 200, "rna": 60, "adt": 40}, features={"rna": 60, "adt": 10})
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
def test_mistakes_end_with_2_before_any_worker_starts(folder: Path, settings: list[str], message: str) -> None:
    args = train_args(folder, folder / "s.zarr", "bad", *settings)
    done = subprocess.run(
        ["python", *args],
        cwd=ROOT,
        env=environment() | {"RANK": "0", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "bad").exists()


def test_the_launcher_hands_the_exit_code_on(folder: Path) -> None:
    done = run(*launched(2, *train_args(folder, folder / "s.zarr", "bad", "train.lrr=1")), expect=2)
    assert (done.stdout + done.stderr).count("did you mean") == 1  # rank 0 alone speaks


def test_no_paired_cells_is_an_error_unless_nothing_is_crossed(folder: Path) -> None:
    make_store(folder / "unpaired.zarr", cells={"rna": 90, "adt": 90}, features={"rna": 60, "adt": 10})
    args = train_args(folder, folder / "unpaired.zarr", "unpaired", "train.epochs=1")
    assert "no cell of the store carries two modalities" in python(*args, expect=2).stderr
    python(*args, "--set", "objective.lambda_cross=0")
    assert math.isfinite(metrics(folder / "unpaired", "validation")[-1]["score"])


def test_dry_run_shows_the_plan_and_writes_nothing(folder: Path) -> None:
    done = python(*train_args(folder, folder / "s.zarr", "dry"), "--dry-run")
    assert "stratum rna+adt: 190 cells, 10 held out" in done.stdout
    assert not (folder / "dry").exists()


def test_resumed_after_a_stop_signal_ends_like_an_unbroken_run(folder: Path) -> None:
    settings = ("train.epochs=40", "log.every=1")
    python(*train_args(folder, folder / "s.zarr", "whole", *settings))
    args = train_args(folder, folder / "s.zarr", "broken", *settings)
    process = subprocess.Popen(["python", *args], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    log = folder / "broken" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 20):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 75
    (saved,) = (folder / "broken" / "checkpoints").glob("step-*")
    assert 20 < int(saved.name.split("-")[1]) < metrics(folder / "whole")[-1]["step"]

    python(*args)
    timeless = [
        {k: v for k, v in line.items() if k not in ("cells_per_s", "data_wait")} for line in metrics(folder / "broken")
    ]
    unbroken = [
        {k: v for k, v in line.items() if k not in ("cells_per_s", "data_wait")} for line in metrics(folder / "whole")
    ]
    assert timeless == unbroken  # bit for bit
    assert largest_difference(best_weights(folder / "whole"), best_weights(folder / "broken")) == 0.0


def test_resume_refuses_other_data_settings_ranks_and_damage(folder: Path) -> None:
    args = train_args(folder, folder / "s.zarr", "again", "train.epochs=2")
    python(*args)
    assert "already holds a run" in python(*args, "--resume", "never", expect=2).stderr
    assert "changed: train.lr" in python(*args, "--set", "train.lr=0.5", expect=2).stderr
    make_store(
        folder / "other.zarr", cells={"rna+adt": 200, "rna": 60, "adt": 40}, features={"rna": 60, "adt": 10}, seed=1
    )
    assert (
        "not the one this run was trained on"
        in python(*args, "--set", f"store={folder / 'other.zarr'}", expect=2).stderr
    )
    assert "another number of ranks" in run(*launched(2, *args), expect=2).stderr

    (checkpoint,) = (folder / "again" / "checkpoints").glob("step-*")
    victim = max(checkpoint.rglob("*.pt"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    done = python(*args, expect=2)
    assert "every checkpoint of the run is damaged" in done.stderr
    assert victim.name in done.stdout


def test_bf16_trains_close_to_fp32(folder: Path) -> None:
    for precision in ("fp32", "bf16"):
        python(
            *train_args(
                folder, folder / "s.zarr", precision, "train.epochs=10", "log.every=5", f"train.precision={precision}"
            )
        )
    a, b = ([line["loss"] for line in metrics(folder / p)] for p in ("fp32", "bf16"))
    assert b == pytest.approx(a, rel=0.02)
    assert a[-1] < a[0]
    assert all(w.dtype == torch.float32 for w in best_weights(folder / "bf16").values())


@pytest.mark.parametrize("likelihood", ["zinb", "poisson", "bernoulli"])
def test_other_likelihoods_and_the_mean_posterior_train(folder: Path, likelihood: str) -> None:
    settings = (
        "train.epochs=8",
        "log.every=5",
        f"modalities.rna.likelihood={likelihood}",
        "model.posterior=mean",
        "objective.alignment=cosine",
    )
    python(*train_args(folder, folder / "s.zarr", likelihood, *settings))
    losses = [line["loss"] for line in metrics(folder / likelihood)]
    assert losses[-1] < losses[0]


def test_one_modality_and_dense_real_values(folder: Path) -> None:
    make_store(folder / "single.zarr", cells={"image": 150}, features={"image": 20})  # kind dense: Normal, as stored
    done = python(*train_args(folder, folder / "single.zarr", "single", "train.epochs=10", "log.every=5"))
    assert "none -> normal" in done.stdout
    losses = [line["loss"] for line in metrics(folder / "single")]
    assert losses[-1] < losses[0]


def test_sinks_wandb_offline_and_tensorboard(folder: Path) -> None:
    args = train_args(folder, folder / "s.zarr", "sinks", "train.epochs=2", "log.every=2")
    env = {k: v for k, v in environment().items() if not k.startswith("WANDB")}
    settings = ["--set", "log.wandb=offline", "log.tensorboard=true"]
    subprocess.run(["python", *args, *settings], cwd=ROOT, env=env, check=True, timeout=120, capture_output=True)
    run_folder = folder / "sinks"
    assert list(run_folder.glob("wandb/offline-run-*/*.wandb"))
    assert list(run_folder.glob("tensorboard/events*"))
    assert {line["split"] for line in map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())} == {
        "train",
        "validation",
    }


def test_early_stop_keeps_the_best_and_does_not_train_on(folder: Path) -> None:
    settings = ("train.epochs=40", "train.validate_every=1", "train.patience=2", "train.lr=1e-9")
    args = train_args(folder, folder / "s.zarr", "early", *settings)
    assert "stopping early" in python(*args).stdout
    scores = [line["score"] for line in metrics(folder / "early", "validation")]
    (best,) = (folder / "early" / "best").iterdir()
    assert int(best.name.split("-")[1]) == 1 + scores.index(min(scores))
    before = metrics(folder / "early", "validation")
    python(*args)  # a finished run stays as it is
    assert metrics(folder / "early", "validation") == before
