"""A checkpoint is whole or does not count.

Runs are killed while they save, the disk is full, a folder turns read-only.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from safetensors import SafetensorError

from clue_dist.checkpoint import run_folder
from clue_dist.errors import LOST, SavingError
from clue_dist.files import translate_write_errors
from clue_dist.ranks.messages import decode_error, encode_error
from tests.distributed.command import (
    KILLED,
    ROOT,
    alone,
    best_weights,
    environment,
    largest_difference,
    run,
    spawned,
)
from tests.faults.command import planted, saved_steps, timeless
from tests.faults.plant import PLACES
from tests.faults.whole_run import make_arguments, train_whole_run

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a file system")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    train_whole_run(folder)
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_killed_in_mid_save_the_checkpoint_before_it_stands(folder: Path, place: str) -> None:
    args = make_arguments(folder, place)
    run(*planted(1, args, f"saving:0:15:{place}"), expect=KILLED)
    steps = saved_steps(folder / place)
    assert steps == {"named": [15, 10, 5], "pruning": [15, 10]}.get(place, [10, 5])
    assert run_folder.find_damage(folder / place / "checkpoints" / f"step-{steps[0]:08d}") is None
    assert f"going on from step {steps[0]}" in alone(*args).stdout
    assert timeless(folder / place) == timeless(folder / "whole")
    assert largest_difference(best_weights(folder / place), best_weights(folder / "whole")) == 0.0
    assert not list((folder / place).rglob("*.partial"))


def test_a_rank_killed_in_mid_save_takes_the_others_with_it(folder: Path) -> None:
    args = make_arguments(folder, "two")
    began = time.monotonic()
    done = run(*planted(2, args, "saving:1:15:part"), expect=None)
    assert done.returncode == LOST, done.stderr[-3000:]  # rank 0's: it noticed, and left by itself
    assert time.monotonic() - began < 60
    assert saved_steps(folder / "two") == [10, 5]
    run(*spawned(2, *args))
    assert saved_steps(folder / "two") == [27, 25]


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
    args = make_arguments(
        folder, "full", "train.keep=99", "log.tensorboard=true", "log.wandb=offline"
    )
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
        steps = saved_steps(folder / "full")
        assert steps
        assert all(
            run_folder.find_damage(p) is None
            for p in run_folder.list_checkpoints(folder / "full" / "checkpoints")
        )
        assert not list((folder / "full").rglob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=20M", str(folder / "full")], check=True)
        assert f"going on from step {steps[0]}" in alone(*args).stdout
        assert timeless(folder / "full") == timeless(folder / "whole")


@needs_root
def test_a_full_disk_that_takes_no_output_either_is_told_by_the_exit_code(folder: Path) -> None:
    """As under `python launch/train.py ... > RUN/log`: nothing that is printed can be written."""
    args = make_arguments(folder, "mute", "train.keep=99")
    with mounted(folder / "mute", "-t", "tmpfs", "-o", "size=400k", "none"):
        with (folder / "mute" / "log").open("wb") as log:
            process = subprocess.Popen(
                spawned(2, *args), cwd=ROOT, env=environment(), stdout=log, stderr=log
            )
            assert process.wait(120) == 1
        steps = saved_steps(folder / "mute")
        subprocess.run(["mount", "-o", "remount,size=20M", str(folder / "mute")], check=True)
        assert f"going on from step {steps[0]}" in run(*spawned(2, *args)).stdout
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
    with pytest.raises(SavingError) as raised, translate_write_errors("a checkpoint", tmp_path):
        raise error
    assert raised.value.exit_code == code
    assert raised.value.fix is not None
    assert raised.value.fix.startswith(advice)
    arrived = decode_error(encode_error(raised.value), "another rank")
    assert arrived is not None
    assert arrived.exit_code == code


@needs_root
@pytest.mark.parametrize("stage", [1, 3])
def test_a_disk_that_fills_up_under_two_ranks_is_told_once_and_they_go_on_when_there_is_room(
    folder: Path, stage: int
) -> None:
    """Each writes its own part, and either may be the first without room."""
    name = f"full-{stage}"
    args = make_arguments(folder, name, "train.keep=99", f"train.zero_stage={stage}")
    with mounted(folder / name, "-t", "tmpfs", "-o", "size=700k", "none"):
        done = run(*spawned(2, *args), expect=1)
        errors = re.findall(r"^(?:rank \d+: )?error: .*$", done.stderr, re.MULTILINE)
        prefix = f"rank 1 on {socket.gethostname()}: "
        assert len(errors) == 1, done.stderr
        assert errors[0].replace(prefix, "") == "error: a checkpoint could not be written"
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        steps = saved_steps(folder / name)
        assert steps
        assert all(
            run_folder.find_damage(p) is None
            for p in run_folder.list_checkpoints(folder / name / "checkpoints")
        )
        assert not list((folder / name).rglob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=20M", str(folder / name)], check=True)
        assert f"going on from step {steps[0]}" in run(*spawned(2, *args)).stdout
        assert saved_steps(folder / name) == [27, 25, 20, 15, 10, 5]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_one_rank_ends_all_and_leaves_what_was_committed(
    folder: Path, rank: int
) -> None:
    name = f"full-for-{rank}"
    args = make_arguments(folder, name)
    done = run(*planted(2, args, f"full:{rank}:15:part"), expect=1)
    prefix = f"rank {rank} on {socket.gethostname()}: " if rank else ""
    assert done.stderr.count(f"error: {prefix}a checkpoint could not be written") == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert saved_steps(folder / name) == [10, 5]
    assert not list((folder / name).rglob("*.partial"))
    assert "going on from step 10" in run(*spawned(2, *args)).stdout


@needs_root
def test_a_folder_that_turns_read_only_is_told_and_mended(folder: Path) -> None:
    args = make_arguments(folder, "frozen", "train.epochs=400")
    checkpoints = folder / "frozen" / "checkpoints"
    process = subprocess.Popen(
        spawned(1, *args),
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
        spawned(1, *args), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert any(f"going on from step {step}" in line for line in process.stdout)
    process.kill()
    process.wait()
