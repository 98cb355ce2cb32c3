"""Whole training runs on a small store: each ZeRO stage, saved, and gone on from there."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from clue_dist.config import Config
from clue_dist.ranks import Ranks
from clue_dist.train.loop import run_training
from clue_dist.train.setup import prepare_setup
from tests.stores import make_store

EPOCHS = 1, 2  # of the run, and of the same one gone on
MODEL = {
    "latent": 8,
    "trunk": {"projection": 16, "hidden": 16},
    "decoder": {"hidden": 16},
    "discriminator": {"hidden": 16},
}
LONGEST_S = 120  # a process of its own that takes longer is ended


def train_in_process(store: Path, run: Path, stage: int, epochs: float) -> None:
    """Train, or go on, in this process, on its GPU if there is one."""
    config = Config.model_validate(
        {
            "store": str(store),
            "run": str(run),
            "train": {"epochs": epochs, "zero_stage": stage, "precision": "bf16"},
            "data": {"batch_size": 32},
            "model": MODEL,
            "log": {"every": 1, "wandb": "disabled"},
        }
    )
    result = run_training(prepare_setup(config, 1), Ranks())
    assert result.finished


def measure_runs(stages: tuple[int, ...] = (1, 3), longest_s: float = LONGEST_S) -> dict[str, Any]:
    """Train under each stage, save and go on; a process for each, as a job would be.

    Returns:
        By stage: steps taken, first and last loss, or what went wrong.
    """
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store.zarr"
        make_store(store, {"rna+adt": 120, "rna": 60}, {"rna": 60, "adt": 10})
        for stage in stages:
            run = Path(folder) / f"run{stage}"
            for epochs in EPOCHS:
                words = [sys.executable, "-m", __name__, str(store), str(run), str(stage)]
                done = subprocess.run(
                    [*words, str(epochs)],
                    capture_output=True,
                    text=True,
                    timeout=longest_s,
                    check=False,
                )
                if done.returncode:
                    results[f"ZeRO-{stage}"] = {"failed": done.stderr[-2000:]}
                    break
            else:
                results[f"ZeRO-{stage}"] = _read_losses(run)
    return results


def _read_losses(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    steps = sorted(losses)
    return {
        "steps": len(steps),
        "gone_on_without_a_gap": steps == list(range(1, len(steps) + 1)),
        "first_loss": losses[steps[0]],
        "last_loss": losses[steps[-1]],
    }


if __name__ == "__main__":
    store_path, run_path, stage_number, n_epochs = sys.argv[1:]
    train_in_process(Path(store_path), Path(run_path), int(stage_number), float(n_epochs))
