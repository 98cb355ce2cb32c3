"""A checkpoint is whole or does not count.

Runs are killed while they save, checkpoints are damaged afterwards, the disk is full, a folder
turns read-only.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from clue_dist.checkpoint import resuming, run_folder
from clue_dist.errors import LOST, ResumeError, SavingError
from clue_dist.files import translate_write_errors
from clue_dist.ranks import Ranks
from clue_dist.store.writer import hash_file
from tests.distributed.command import (
    ROOT,
    alone,
    best_weights,
    environment,
    largest_difference,
    run,
    spawned,
    train_args,
)
from tests.faults.command import planted, saved_steps, timeless
from tests.faults.plant import PLACES
from tests.stores import make_store

SETTINGS = ("train.epochs=6", "log.every=1", "train.checkpoint_every=5")  # 27 steps

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a file system")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    make_store(
        folder / "s.zarr",
        cells={"rna+adt": 200, "rna": 60, "adt": 40},
        features={"rna": 60, "adt": 10},
    )
    alone(*args_of(folder, "whole"))
    return folder


def args_of(folder: Path, name: str, *settings: str) -> list[str]:
    return train_args(folder, folder / "s.zarr", name, *SETTINGS, *settings)


@pytest.mark.parametrize("place", PLACES)
def test_killed_in_mid_save_the_checkpoint_before_it_stands(folder: Path, place: str) -> None:
    args = args_of(folder, place)
    run("python", "tests/faults/plant.py", f"saving:0:15:{place}", "--", *args, expect=-9)
    left = saved_steps(folder / place)
    assert left == {"named": [15, 10, 5], "pruning": [15, 10]}.get(place, [10, 5])
    assert run_folder.find_damage(folder / place / "checkpoints" / f"step-{left[0]:08d}") is None
    assert f"going on from step {left[0]}" in alone(*args).stdout
    assert timeless(folder / place) == timeless(folder / "whole")
    assert largest_difference(best_weights(folder / place), best_weights(folder / "whole")) == 0.0
    assert not list((folder / place).rglob("*.partial"))


def test_a_rank_killed_in_mid_save_takes_the_others_with_it(folder: Path) -> None:
    args = args_of(folder, "two")
    began = time.monotonic()
    done = run(*planted(2, args, "saving:1:15:part"), expect=None)
    assert done.returncode == LOST, done.stderr[-3000:]  # rank 0's: it noticed, and left by itself
    assert time.monotonic() - began < 60
    assert saved_steps(folder / "two") == [10, 5]
    run(*spawned(2, *args))
    assert saved_steps(folder / "two") == [27, 25]


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
        there = shutil.copytree(source, tmp_path / str(i) / "checkpoints")
        harm(there / newest / victim.name, draw)
        found = resuming.choose_checkpoint(tmp_path / str(i), "auto", Ranks())
        assert found is not None
        assert found.name == before, victim
        said = capsys.readouterr().out
        # A checkpoint without its marker was never finished: nothing is reported as damaged.
        assert (newest in said) == ((harm, victim.name) != (remove, run_folder.COMMIT))
        with pytest.raises(ResumeError, match="cannot be used"):
            resuming.choose_checkpoint(tmp_path / str(i), str(there / newest), Ranks())


@pytest.mark.parametrize("listing", ["{}", "[]", '{"state.json": {}}', "null", '"text"'])
def test_a_marker_that_lists_no_weights_is_damaged(
    folder: Path, tmp_path: Path, listing: str
) -> None:
    there = shutil.copytree(folder / "whole" / "checkpoints", tmp_path / "checkpoints")
    newest, before = saved_steps(folder / "whole")
    (there / f"step-{newest:08d}" / run_folder.COMMIT).write_text(listing)
    # A copy that somebody made is no checkpoint.
    shutil.copytree(there / f"step-{before:08d}", there / "step-old")
    found = resuming.choose_checkpoint(tmp_path, "auto", Ranks())
    assert found == there / f"step-{before:08d}"


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
    there = shutil.copytree(folder / "whole" / "checkpoints", tmp_path / "checkpoints")
    newest, before = (there / f"step-{step:08d}" for step in saved_steps(folder / "whole"))
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
    own = tmp_path / "mine" / "checkpoints" / newest.name
    assert resuming.choose_checkpoint(tmp_path / "mine", str(own), Ranks()) == own


def test_the_same_command_goes_on_with_a_run_that_began_from_a_checkpoint_of_another(
    folder: Path,
) -> None:
    newest = run_folder.list_checkpoints(folder / "whole" / "checkpoints")[0]
    args = [*args_of(folder, "branch", "train.epochs=9"), "--resume", str(newest)]
    done = run("python", "tests/faults/plant.py", "usr1:0:29", "--", *args, expect=75)
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
    there = Path(shutil.copytree(folder / "whole" / "checkpoints", tmp_path / "checkpoints"))
    resume = resume if resume == "never" else str(there / resume)
    newest = there / "step-00000027"
    state = json.loads((newest / run_folder.STATE).read_text()) | {"job": "77"}
    (newest / run_folder.STATE).write_text(json.dumps(state))
    listing = json.loads((newest / run_folder.COMMIT).read_text())
    listing[run_folder.STATE] = hash_file(newest / run_folder.STATE).model_dump()
    (newest / run_folder.COMMIT).write_text(json.dumps(listing))
    monkeypatch.setattr(resuming, "SLURM_JOB", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert resuming.choose_checkpoint(tmp_path, resume, Ranks()) == newest
    # What another job saved; the job's first attempt.
    for job, restarts in (("78", "1"), ("77", "0")):
        monkeypatch.setattr(resuming, "SLURM_JOB", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        if resume == "never":
            with pytest.raises(ResumeError, match="already holds a run"):
                resuming.choose_checkpoint(tmp_path, resume, Ranks())
        else:
            assert resuming.choose_checkpoint(tmp_path, resume, Ranks()) == Path(resume)


def test_damaged_best_weights_are_told(folder: Path) -> None:
    args = args_of(folder, "torn-best", "train.validate_every=5")
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
    done = alone(*args_of(folder, str(tmp_path / "older")), "--resume", str(before), expect=2)
    assert "the weights do not fit" in done.stderr
    assert run_folder.list_checkpoints(tmp_path / "older" / "checkpoints") == [newest, before]


def test_a_run_that_stopped_early_goes_on_with_more_patience(folder: Path) -> None:
    args = args_of(folder, "patient", "train.validate_every=1", "train.patience=1")
    assert "stopping early" in alone(*args).stdout
    (stopped_at, *_) = saved_steps(folder / "patient")
    assert stopped_at < 27
    assert "stopping early" not in alone(*args).stdout
    assert saved_steps(folder / "patient")[0] == stopped_at
    done = alone(*args, "--set", "train.patience=0")
    assert f"going on from step {stopped_at}" in done.stdout
    assert saved_steps(folder / "patient")[0] == 27


def test_training_goes_on_from_the_one_before_a_damaged_one(folder: Path) -> None:
    args = args_of(folder, "flipped")
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


@contextmanager
def mounted(where: Path, *options: str) -> Iterator[None]:
    where.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *options, str(where)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(where)], check=True)


@needs_root
def test_a_full_disk_is_told_and_leaves_what_was_committed(folder: Path) -> None:
    """Sinks write there, too: they must not end training, and no line may be missing afterwards."""
    args = args_of(folder, "full", "train.keep=99", "log.tensorboard=true", "log.wandb=offline")
    with mounted(folder / "full", "-t", "tmpfs", "-o", "size=700k", "none"):
        (folder / "full" / "other").write_bytes(b"\1" * 700_000)  # tmpfs counts whole pages
        with suppress(OSError), (folder / "full" / "more").open("wb") as rest:
            rest.write(b"\1" * 100_000)
        done = alone(*args, expect=1)
        assert "could not be written" in done.stderr
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        for path in ("other", "more"):
            (folder / "full" / path).unlink()
        done = alone(*args, expect=1)
        assert "could not be written" in done.stderr
        assert "No space left on device" in done.stderr
        assert "make room" in done.stderr
        assert "Traceback" not in done.stderr
        there = saved_steps(folder / "full")
        assert there
        assert all(
            run_folder.find_damage(p) is None
            for p in run_folder.list_checkpoints(folder / "full" / "checkpoints")
        )
        assert not list((folder / "full").rglob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=20M", str(folder / "full")], check=True)
        assert f"going on from step {there[0]}" in alone(*args).stdout
        assert timeless(folder / "full") == timeless(folder / "whole")


@needs_root
def test_a_full_disk_that_takes_no_output_either_is_told_by_the_exit_code(folder: Path) -> None:
    """As under `python launch/train.py ... > RUN/log`: nothing that is printed can be written."""
    args = args_of(folder, "mute", "train.keep=99")
    with mounted(folder / "mute", "-t", "tmpfs", "-o", "size=400k", "none"):
        with (folder / "mute" / "log").open("wb") as log:
            process = subprocess.Popen(
                spawned(2, *args), cwd=ROOT, env=environment(), stdout=log, stderr=log
            )
            assert process.wait(120) == 1
        there = saved_steps(folder / "mute")
        subprocess.run(["mount", "-o", "remount,size=20M", str(folder / "mute")], check=True)
        assert f"going on from step {there[0]}" in run(*spawned(2, *args)).stdout
        assert [line["step"] for line in timeless(folder / "mute")] == list(range(1, 28))


@pytest.mark.parametrize(
    ("error", "code", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "make room"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "make room"),
        (
            SafetensorError("I/O error: Input/output error (os error 5)"),
            LOST,
            "type the same command",
        ),
        (OSError(errno.ESTALE, "Stale file handle"), LOST, "type the same command"),
        (FileNotFoundError(errno.ENOENT, "the folder was removed"), 1, "type the same command"),
        (KeyError("weights"), 1, "type the same command"),
    ],
)
def test_a_file_server_that_fails_for_a_while_is_told_from_what_lasts(
    tmp_path: Path, error: Exception, code: int, advice: str
) -> None:
    with pytest.raises(SavingError) as told, translate_write_errors("a checkpoint", tmp_path):
        raise error
    assert told.value.exit_code == code
    assert told.value.fix is not None
    assert told.value.fix.startswith(advice)
    assert pickle.loads(pickle.dumps(told.value)).exit_code == code  # as the other ranks are told


@needs_root
@pytest.mark.parametrize("stage", [1, 3])
def test_a_disk_that_fills_up_under_two_ranks_is_told_once_and_they_go_on_when_there_is_room(
    folder: Path, stage: int
) -> None:
    """Each writes its own part, and either may be the first without room."""
    name = f"full-{stage}"
    args = args_of(folder, name, "train.keep=99", f"train.zero_stage={stage}")
    with mounted(folder / name, "-t", "tmpfs", "-o", "size=700k", "none"):
        done = run(*spawned(2, *args), expect=1)
        told = re.findall(r"^(?:rank \d+: )?error: .*$", done.stderr, re.MULTILINE)
        who = f"rank 1 on {socket.gethostname()}: "
        assert len(told) == 1, done.stderr
        assert told[0].replace(who, "") == "error: a checkpoint could not be written"
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        there = saved_steps(folder / name)
        assert there
        assert all(
            run_folder.find_damage(p) is None
            for p in run_folder.list_checkpoints(folder / name / "checkpoints")
        )
        assert not list((folder / name).rglob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=20M", str(folder / name)], check=True)
        assert f"going on from step {there[0]}" in run(*spawned(2, *args)).stdout
        assert saved_steps(folder / name) == [27, 25, 20, 15, 10, 5]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_one_rank_ends_all_and_leaves_what_was_committed(
    folder: Path, rank: int
) -> None:
    name = f"full-for-{rank}"
    args = args_of(folder, name)
    done = run(*planted(2, args, f"full:{rank}:15:part"), expect=1)
    who = f"rank {rank} on {socket.gethostname()}: " if rank else ""
    assert done.stderr.count(f"error: {who}a checkpoint could not be written") == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert saved_steps(folder / name) == [10, 5]
    assert not list((folder / name).rglob("*.partial"))
    assert "going on from step 10" in run(*spawned(2, *args)).stdout


@needs_root
def test_a_folder_that_turns_read_only_is_told_and_mended(folder: Path) -> None:
    args = args_of(folder, "frozen", "train.epochs=400")
    checkpoints = folder / "frozen" / "checkpoints"
    process = subprocess.Popen(
        ["python", *args],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not saved_steps(folder / "frozen"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with mounted(checkpoints, "--bind", str(checkpoints)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(checkpoints)], check=True)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1, said
        assert "Read-only file system" in said
        assert "Traceback" not in said
    step = saved_steps(folder / "frozen")[0]
    process = subprocess.Popen(
        ["python", *args], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert any(f"going on from step {step}" in line for line in process.stdout)
    process.kill()
    process.wait()
