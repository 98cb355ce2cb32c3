"""Lines on the screen fit, are few, and say the numbers that metrics.jsonl has, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from clue_dist.config import Config, LogConfig
from clue_dist.ranks import Ranks
from clue_dist.train.log_lines import format_log_line
from clue_dist.train.sinks import Sinks
from tests.distributed.command import metrics

TRAIN = {
    "loss": 12.345678,
    "mse": 5.9423,
    "d": -1.0768,
    "self": 59.886,
    "cross": 63.518,
    "contrastive": 8.2094,
    "epoch": 3.32,
    "lr": 0.00095412,
    "cells_per_s": 12345.678,
    "data_wait": 0.26481,
    "saving_wait": 0.0021981,
    "peak_memory_gb": 3.25,
}
VALIDATION = {
    "score": 0.17749,
    **{f"foscttm/{pair}": 0.17 for pair in ("rna-adt", "rna-atac", "adt-atac")},
    "error": 0.0012345,
    "best_score": 0.17651,
    "best_step": 8000,
    "lowest_score": 0.17512,
    "lowest_step": 6000,
}
FOUND = "; ".join(
    f"rank {rank}: values of rna, term self, term cross, term self/rna, term cross/rna"
    for rank in range(4)
)


@pytest.mark.parametrize("steps", [120, 9_999_999])
def test_a_line_fits_and_has_the_most_important_numbers(steps: int) -> None:
    train = format_log_line("train", steps, steps, TRAIN, 360_000.0)
    validation = format_log_line("validation", steps, steps, VALIDATION)
    assert train.startswith(f"[{steps}/{steps}] train")
    assert "loss 12.35  epoch 3.32  cells_per_s 1.235e+04" in train
    assert train.endswith("  left 100:00:00")
    assert "data_wait 0.2648  left 0:01:00" in format_log_line("train", 12, 120, TRAIN, 60.0)
    assert validation.endswith("kept 0.1765 of step 8000  lowest 0.1751 of step 6000")
    assert max(len(train), len(validation)) <= 100


def test_an_event_is_told_in_full_on_lines_that_fit() -> None:
    numbers = {
        "event": "not finite, step skipped",
        "found": FOUND.replace("; ", ";\n"),
        "in_a_row": 2,
    }
    text = format_log_line("event", 7, 120, numbers)
    lines = text.splitlines()
    assert lines[0].startswith("[7/120] event not finite, step skipped: found rank 0: values of")
    assert max(map(len, lines)) <= 100
    assert " ".join(text.split()).endswith(f"{FOUND}, in_a_row 2")


def test_validations_are_shown_no_more_often_than_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(log=LogConfig(wandb="disabled", tensorboard=False, every=20))
    with Sinks(tmp_path, config, 50, 0, Ranks()) as sinks:
        for step in range(4, 51, 2):
            sinks.write_numbers("validation", step, {"score": 0.5})
    shown = [line.split("/")[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["[4", "[24", "[44", "[50"]
    assert len(metrics(tmp_path, "validation")) == 24  # all are in the file
