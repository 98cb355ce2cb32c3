"""NaN and Inf in one rank's batch: all ranks skip the step, which is explained.

Five such steps in a row end the run.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from clue_dist.checkpoint import run_folder
from tests.distributed.command import (
    best_weights,
    largest_difference,
    metrics,
    run,
    spawned,
    train_args,
)
from tests.faults.command import planted, saved_steps, timeless
from tests.ranks import GONE, HUNG
from tests.stores import make_store

SETTINGS = ("train.epochs=3", "log.every=1", "train.checkpoint_every=5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nan")
    make_store(
        folder / "s.zarr",
        cells={"rna+adt": 220, "rna": 60, "adt": 40},
        features={"rna": 60, "adt": 10},
    )
    return folder


def args_of(folder: Path, name: str, *settings: str) -> list[str]:
    return train_args(folder, folder / "s.zarr", name, *SETTINGS, *settings)


@pytest.mark.parametrize(
    ("stage", "precision", "kind"),
    [
        (0, "fp32", "nan"),
        (1, "fp32", "inf"),
        (2, "fp32", "nan"),
        (3, "fp32", "inf"),
        (0, "mixed", "nan"),
        (0, "bf16", "nan"),
        (1, "bf16", "nan"),
    ],
)
def test_all_ranks_skip_and_the_culprit_is_named(
    folder: Path, stage: int, precision: str, kind: str
) -> None:
    name = f"{kind}{stage}{precision}"
    args = args_of(folder, name, f"train.zero_stage={stage}", f"train.precision={precision}")
    done = run(*planted(2, args, f"{kind}:1:6:8:adt"))
    events = metrics(folder / name, "event")
    assert [(e["step"], e["in_a_row"]) for e in events] == [(7, 1), (8, 2)]
    for event in events:
        assert event["event"] == "not finite, step skipped"
        assert event["found"].startswith("rank 1: values of adt, ")
        assert "term self/adt" in event["found"]
        assert "term contrastive" in event["found"]
        assert "values of rna" not in event["found"]
    assert "not finite, step skipped" in done.stdout
    losses = {line["step"]: line.get("loss") for line in metrics(folder / name)}
    assert losses.pop(7) is None
    assert losses.pop(8) is None
    assert all(math.isfinite(loss) for loss in losses.values())
    assert all(w.isfinite().all() for w in best_weights(folder / name).values())


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "mixed"), (0, "bf16"), (2, "bf16")],
)
def test_a_gradient_of_finite_losses_is_skipped_too(
    folder: Path, stage: int, precision: str
) -> None:
    name = f"gradient{stage}{precision}"
    args = args_of(folder, name, f"train.zero_stage={stage}", f"train.precision={precision}")
    run(*planted(2, args, "gradient:1:6"))
    (event,) = metrics(folder / name, "event")
    assert (event["step"], event["found"]) == (7, "a gradient, of finite losses")
    assert all(w.isfinite().all() for w in best_weights(folder / name).values())
    assert metrics(folder / name)[-1]["step"] == 14


def test_a_validation_that_is_not_finite_is_told_and_is_never_the_best(folder: Path) -> None:
    args = args_of(folder, "validation", "train.validate_every=4")
    run(*planted(2, args, "validation:0:2"))
    (event,) = metrics(folder / "validation", "event")
    assert (event["event"], event["step"]) == ("validation not finite", 8)
    assert event["found"] == "score"
    lines = metrics(folder / "validation", "validation")
    assert [line["step"] for line in lines] == [4, 12, 14]
    assert all(math.isfinite(line["lowest_score"]) for line in lines)
    assert 8 not in [line["best_step"] for line in lines]


def test_five_in_a_row_end_the_run_and_leave_the_last_checkpoint(folder: Path) -> None:
    args = args_of(folder, "abort")
    done = run(*planted(2, args, "nan:0:6:99:rna"), expect=1)
    said = done.stdout + done.stderr
    assert "not finite in 5 steps in a row" in said
    assert "rank 0: values of rna" in said
    assert "Traceback" not in said
    assert saved_steps(folder / "abort") == [10, 5]
    assert run_folder.find_damage(folder / "abort" / "checkpoints" / "step-00000010") is None
    # What was planted is gone: it goes on, with the smaller steps that the message advises.
    assert "train.lr" in said
    assert "going on from step 10" in run(*spawned(2, *args, "--set", "train.lr=1e-4")).stdout
    assert metrics(folder / "abort")[-1]["step"] == 14
    assert all(w.isfinite().all() for w in best_weights(folder / "abort").values())


def test_skipped_steps_are_skipped_again_bit_for_bit_after_a_kill(folder: Path) -> None:
    args = args_of(folder, "again")
    killed = run(*planted(2, args, "nan:1:5:7:adt", "kill:0:9"), expect=None)
    assert killed.returncode not in (0, HUNG, GONE)
    assert saved_steps(folder / "again") == [5]
    run(*planted(2, args, "nan:1:5:7:adt"))
    run(*planted(2, args_of(folder, "once"), "nan:1:5:7:adt"))
    assert timeless(folder / "again") == timeless(folder / "once")
    assert metrics(folder / "again", "event") == metrics(folder / "once", "event")
    assert largest_difference(best_weights(folder / "again"), best_weights(folder / "once")) == 0.0


def test_a_jump_of_the_loss_is_logged_and_trained_on(folder: Path) -> None:
    args = args_of(folder, "jump", "train.epochs=14")
    done = run(*planted(2, args, "jump:1:60:61:adt"))
    (event,) = metrics(folder / "jump", "event")
    assert (event["event"], event["step"]) == ("loss spike", 61)
    assert abs(event["loss"] - event["usual"]) > 100
    assert "loss spike" in done.stdout
