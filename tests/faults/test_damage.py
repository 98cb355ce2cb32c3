"""A damaged or foreign checkpoint is refused, and the run goes on from the right one."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from clue_dist.checkpoint import resuming, run_folder
from clue_dist.errors import ResumeError
from clue_dist.ranks import Ranks
from clue_dist.store.writer import hash_file
from tests.distributed.command import alone, run
from tests.faults.command import planted, saved_steps
from tests.faults.whole_run import make_arguments, train_whole_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    train_whole_run(folder)
    return folder


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


@pytest.mark.parametrize("harm", [flip, truncate, remove])
def test_what_was_damaged_is_refused_and_the_one_before_it_used(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path, random.Random], None],
) -> None:
    source = folder / "whole" / "checkpoints"
    newest, before = (f"step-{step:08d}" for step in saved_steps(folder / "whole"))
    draw = random.Random(harm.__name__)
    for i in range(20):
        victim = draw.choice(sorted((source / newest).iterdir()))
        checkpoints = shutil.copytree(source, tmp_path / str(i) / "checkpoints")
        harm(checkpoints / newest / victim.name, draw)
        if (checkpoints / newest / run_folder.COMMIT).exists():
            found = resuming.choose_checkpoint(tmp_path / str(i), "auto", Ranks())
            assert found is not None
            assert found.name == before, victim
            assert newest in capsys.readouterr().out
        else:  # a checkpoint without its marker is one that was not copied to its end
            with pytest.raises(ResumeError, match="not whole"):
                resuming.choose_checkpoint(tmp_path / str(i), "auto", Ranks())
        with pytest.raises(ResumeError, match="cannot be used"):
            resuming.choose_checkpoint(tmp_path / str(i), str(checkpoints / newest), Ranks())


@pytest.mark.parametrize("listing", ["{}", "[]", '{"state.json": {}}', "null", '"text"'])
def test_a_marker_that_lists_no_weights_is_damaged(
    folder: Path, tmp_path: Path, listing: str
) -> None:
    checkpoints = shutil.copytree(folder / "whole" / "checkpoints", tmp_path / "checkpoints")
    newest, before = saved_steps(folder / "whole")
    (checkpoints / f"step-{newest:08d}" / run_folder.COMMIT).write_text(listing)
    # A copy that somebody made is no checkpoint.
    shutil.copytree(checkpoints / f"step-{before:08d}", checkpoints / "step-old")
    found = resuming.choose_checkpoint(tmp_path, "auto", Ranks())
    assert found == checkpoints / f"step-{before:08d}"


def _listed_outside(folder: Path, listing: dict[str, Any]) -> None:
    shutil.copy(folder / "state.json", folder.parent / "state.json")
    listing["../state.json"] = listing["state.json"]


def _linked(folder: Path, listing: dict[str, Any]) -> None:
    (folder / "state.json").rename(folder.parent / "moved.json")
    (folder / "state.json").symlink_to(folder.parent / "moved.json")


def _unlisted(folder: Path, listing: dict[str, Any]) -> None:
    shutil.copy(folder / "rank-00000.safetensors", folder / "rank-00001.safetensors")


def _pipe(folder: Path, listing: dict[str, Any]) -> None:
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")


def _marker_pipe(folder: Path, listing: dict[str, Any]) -> None:
    (folder / run_folder.COMMIT).unlink()
    os.mkfifo(folder / run_folder.COMMIT)


def _marker_nested(folder: Path, listing: dict[str, Any]) -> None:
    (folder / run_folder.COMMIT).write_text("[" * 200_000)


def _without_sizes(folder: Path, listing: dict[str, Any]) -> None:
    listing["state.json"] = {}


MARKERS = [_marker_pipe, _marker_nested]


@pytest.mark.parametrize(
    "forge", [_listed_outside, _linked, _unlisted, _pipe, _without_sizes, *MARKERS]
)
def test_a_forged_checkpoint_is_refused(
    folder: Path, tmp_path: Path, forge: Callable[[Path, dict[str, Any]], None]
) -> None:
    """COMMIT.json names files elsewhere; there are pipes, and shards that no rank saved."""
    checkpoints = shutil.copytree(folder / "whole" / "checkpoints", tmp_path / "checkpoints")
    newest, before = (checkpoints / f"step-{step:08d}" for step in saved_steps(folder / "whole"))
    assert run_folder.find_damage(newest) is None
    listing = json.loads((newest / run_folder.COMMIT).read_text())
    forge(newest, listing)
    if forge not in MARKERS:
        (newest / run_folder.COMMIT).write_text(json.dumps(listing))
    assert run_folder.find_damage(newest) is not None
    assert resuming.choose_checkpoint(tmp_path, "auto", Ranks()) == before


def test_a_checkpoint_of_another_run_is_not_gone_on_from_in_the_folder_of_a_run(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "whole", tmp_path / "mine")
    newest = run_folder.list_checkpoints(folder / "whole" / "checkpoints")[0]
    with pytest.raises(ResumeError, match="already holds another run"):
        resuming.choose_checkpoint(tmp_path / "mine", str(newest), Ranks())
    assert resuming.choose_checkpoint(tmp_path / "new", str(newest), Ranks()) == newest
    inside = tmp_path / "mine" / "checkpoints" / newest.name
    assert resuming.choose_checkpoint(tmp_path / "mine", str(inside), Ranks()) == inside


def test_the_same_command_goes_on_with_a_run_that_began_from_a_checkpoint_of_another(
    folder: Path,
) -> None:
    newest = run_folder.list_checkpoints(folder / "whole" / "checkpoints")[0]
    args = [*make_arguments(folder, "branch", "train.epochs=9"), "--resume", str(newest)]
    done = run(*planted(1, args, "usr1:0:29"), expect=75)
    assert "going on from step 27" in done.stdout
    assert "damaged" not in done.stdout
    assert "going on from step 30" in alone(*args).stdout
    assert saved_steps(folder / "branch")[0] == 41
    other = run_folder.list_checkpoints(folder / "whole" / "checkpoints")[1]
    assert "already holds another run" in alone(*args[:-1], str(other), expect=2).stderr


@pytest.mark.parametrize("resume", ["never", "step-00000025"])
def test_a_later_attempt_of_a_slurm_job_goes_on_whatever_its_command_began_from(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str
) -> None:
    checkpoints = Path(shutil.copytree(folder / "whole" / "checkpoints", tmp_path / "checkpoints"))
    resume = resume if resume == "never" else str(checkpoints / resume)
    newest = checkpoints / "step-00000027"
    state = json.loads((newest / run_folder.STATE).read_text()) | {"job": "77"}
    (newest / run_folder.STATE).write_text(json.dumps(state))
    listing = json.loads((newest / run_folder.COMMIT).read_text())
    listing[run_folder.STATE] = hash_file(newest / run_folder.STATE).model_dump()
    (newest / run_folder.COMMIT).write_text(json.dumps(listing))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert resuming.choose_checkpoint(tmp_path, resume, Ranks()) == newest
    # What another job saved; the job's first attempt.
    for job, restarts in (("78", "1"), ("77", "0")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        if resume == "never":
            with pytest.raises(ResumeError, match="already holds a run"):
                resuming.choose_checkpoint(tmp_path, resume, Ranks())
        else:
            assert resuming.choose_checkpoint(tmp_path, resume, Ranks()) == Path(resume)


def test_damaged_best_weights_are_told(folder: Path) -> None:
    args = make_arguments(folder, "torn-best", "train.validate_every=5")
    alone(*args, "--set", "train.epochs=4")
    (newest, *_) = run_folder.list_checkpoints(folder / "torn-best" / "best")
    os.truncate(newest / run_folder.WEIGHTS, 100)
    done = alone(*args)
    assert f"{newest}, are damaged: {run_folder.WEIGHTS} has another size" in done.stdout
    assert (
        run_folder.find_damage(run_folder.list_checkpoints(folder / "torn-best" / "best")[0])
        is None
    )


def test_a_checkpoint_that_does_not_fit_leaves_those_after_it(folder: Path, tmp_path: Path) -> None:
    """Weights of another model, as of an older version, and signed."""
    shutil.copytree(folder / "whole", tmp_path / "older")
    newest, before = run_folder.list_checkpoints(tmp_path / "older" / "checkpoints")
    (part,) = run_folder.list_shard_files(before)
    save_file(
        {"weights:0:model.other": torch.zeros(3)},
        part,
        {"shapes": json.dumps({"model.other": [3]})},
    )
    listing = json.loads((before / run_folder.COMMIT).read_text())
    listing[part.name] = hash_file(part).model_dump()
    (before / run_folder.COMMIT).write_text(json.dumps(listing))
    done = alone(
        *make_arguments(folder, str(tmp_path / "older")), "--resume", str(before), expect=2
    )
    assert "the weights do not fit" in done.stderr
    assert run_folder.list_checkpoints(tmp_path / "older" / "checkpoints") == [newest, before]


def test_a_run_that_stopped_early_goes_on_with_more_patience(folder: Path) -> None:
    args = make_arguments(folder, "patient", "train.validate_every=1", "train.patience=1")
    assert "stopping early" in alone(*args).stdout
    (stopped_at, *_) = saved_steps(folder / "patient")
    assert stopped_at < 27
    assert "stopping early" not in alone(*args).stdout
    assert saved_steps(folder / "patient")[0] == stopped_at
    done = alone(*args, "--set", "train.patience=0")
    assert f"going on from step {stopped_at}" in done.stdout
    assert saved_steps(folder / "patient")[0] == 27


def test_training_goes_on_from_the_one_before_a_damaged_one(folder: Path) -> None:
    args = make_arguments(folder, "flipped")
    alone(*args, "--set", "train.epochs=4")
    newest, before = saved_steps(folder / "flipped")
    flip(
        folder / "flipped" / "checkpoints" / f"step-{newest:08d}" / "rank-00000.safetensors",
        random.Random(0),
    )
    done = alone(*args, "--set", "train.epochs=4")
    assert "is damaged and not used" in done.stdout
    assert f"going on from step {before}" in done.stdout
    assert saved_steps(folder / "flipped")[0] == newest
    assert run_folder.find_damage(folder / "flipped" / "checkpoints" / f"step-{newest:08d}") is None
