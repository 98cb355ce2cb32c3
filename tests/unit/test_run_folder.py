"""Whatever somebody left in a run folder, a run goes on or says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clue_dist.checkpoint.resuming import (
    choose_checkpoint,
    find_starting_point,
    forget_lost_best,
    set_aside_later_work,
)
from clue_dist.checkpoint.run_folder import (
    COMMIT,
    STATE,
    WEIGHTS,
    RunState,
    read_state,
    read_weights,
)
from clue_dist.checkpoint.shards import assemble_tensors, format_label
from clue_dist.config import Config, LogConfig
from clue_dist.errors import ResumeError, SavingError
from clue_dist.files import translate_write_errors
from clue_dist.inference.report.panels import read_metrics
from clue_dist.ranks import Ranks
from clue_dist.resilience.run_lock import hold_run_lock
from clue_dist.train.sinks import Sinks
from tests.unit.run_helpers import SETTINGS, save_step

QUIET = Config(log=LogConfig(wandb="disabled", tensorboard=False))
LINES = [json.dumps({"step": step, "split": "train", "loss": 1.0}).encode() for step in (1, 2, 3)]
UNREADABLE = [
    b"12",
    b'"\xff"',
    b"\xff\xfe",
    b"null",
    b"[" * 10**5,
    b'{"step": "2"}',
    b'{"loss": 1}',
]


@pytest.mark.parametrize("line", UNREADABLE)
def test_a_line_of_metrics_that_cannot_be_read_costs_that_line_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([LINES[0], line, *LINES[1:], line]))
    assert read_metrics(path)[0]["step"].tolist() == [1, 2, 3]
    assert read_metrics(path)[1] == 2
    with Sinks(tmp_path, QUIET, 10, 2, Ranks()):
        assert "lines that cannot be read are left out: 1" in capsys.readouterr().out
    assert path.read_bytes() == b"".join(kept + b"\n" for kept in LINES[:2])
    with Sinks(tmp_path, QUIET, 10, 2, Ranks()):
        assert not capsys.readouterr().out


def test_whatever_the_lock_of_a_run_says_another_job_is_refused(tmp_path: Path) -> None:
    with hold_run_lock(tmp_path, Ranks()):
        (tmp_path / ".lock").write_bytes(b"job \xff")
        with pytest.raises(ResumeError, match="another job"), hold_run_lock(tmp_path, Ranks()):
            pass


def test_an_error_of_saving_does_not_show_a_whole_file(tmp_path: Path) -> None:
    with pytest.raises(SavingError) as raised, translate_write_errors("a file", tmp_path):
        (b"text" * 10_000 + b"\xff").decode()
    assert "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff" in str(raised.value)
    assert len(str(raised.value)) < 1000


# --- work that would be lost ---


def choose_auto(run: Path) -> Path | None:
    return choose_checkpoint(run, "auto", Ranks())


def drop_markers(run: Path) -> None:
    for marker in run.glob(f"checkpoints/*/{COMMIT}"):
        marker.unlink()


def drop_newest_marker(run: Path) -> None:
    (run / "checkpoints" / "step-00000030" / COMMIT).unlink()


def drop_best_marker(run: Path) -> None:
    (run / "best" / "step-00000025" / COMMIT).unlink()


def drop_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def drop_all_but_weights(run: Path) -> None:
    """What is left is a model as it is shared."""
    drop_checkpoints(run)
    (run / "metrics.jsonl").unlink()


def drop_all_but_metrics(run: Path) -> None:
    drop_checkpoints(run)
    shutil.rmtree(run / "best")


@pytest.mark.parametrize(
    "drop",
    [
        drop_markers,
        drop_newest_marker,
        drop_best_marker,
        drop_checkpoints,
        drop_all_but_weights,
        drop_all_but_metrics,
    ],
)
def test_work_that_would_be_lost_is_refused(run_folder: Path, drop: Callable[[Path], None]) -> None:
    assert choose_auto(run_folder) == run_folder / "checkpoints" / "step-00000030"
    drop(run_folder)
    before = sorted(run_folder.rglob("*"))
    with pytest.raises(ResumeError) as refused:
        choose_auto(run_folder)
    assert refused.value.exit_code == 2
    assert "copy" in str(refused.value.fix)
    with pytest.raises(ResumeError):
        choose_checkpoint(run_folder, "never", Ranks())
    assert sorted(run_folder.rglob("*")) == before


def test_some_files_of_what_was_half_copied_are_named(run_folder: Path) -> None:
    drop_newest_marker(run_folder)
    folder = run_folder / "checkpoints" / "step-00000030"
    for rank in range(1, 9):
        (folder / f"rank-{rank:05d}.safetensors").touch()
    with pytest.raises(ResumeError) as refused:
        choose_auto(run_folder)
    found = str(refused.value.got)
    assert "rank-00000.safetensors" in found
    assert [f"rank-{rank:05d}" in found for rank in (4, 5)] == [True, False]


@pytest.mark.parametrize("step", ["20", 20.0, True, None])
def test_a_step_that_is_no_whole_number_is_refused(run_folder: Path, step: object) -> None:
    checkpoint = run_folder / "checkpoints" / "step-00000020"
    assert read_state(checkpoint).step == 20
    state = json.loads((checkpoint / STATE).read_text())
    (checkpoint / STATE).write_text(json.dumps(state | {"step": step}))
    with pytest.raises(ResumeError, match="not one of this version"):
        read_state(checkpoint)


def test_an_older_checkpoint_is_gone_on_from_where_it_is_named(run_folder: Path) -> None:
    drop_newest_marker(run_folder)
    older = run_folder / "checkpoints" / "step-00000020"
    with pytest.raises(ResumeError, match=f"--resume {older}"):
        choose_auto(run_folder)
    assert choose_checkpoint(run_folder, str(older), Ranks()) == older


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    run_folder: Path, resume: str
) -> None:
    drop_checkpoints(run_folder)
    settings = SETTINGS.train.model_copy(update={"checkpoint_every": 15})
    (run_folder / "config.json").write_text(
        SETTINGS.model_copy(update={"train": settings}).to_json()
    )
    assert choose_checkpoint(run_folder, resume, Ranks()) is None
    with (run_folder / "metrics.jsonl").open("a") as file:
        print(file=file)
        # Two intervals, and the step that begins the third.
        print(json.dumps({"step": 31, "split": "train"}), file=file, flush=True)
        assert choose_checkpoint(run_folder, resume, Ranks()) is None
        print(json.dumps({"step": 32, "split": "train"}), file=file, flush=True)
        with pytest.raises(ResumeError, match="up to step 32"):
            choose_checkpoint(run_folder, resume, Ranks())


@pytest.mark.parametrize("settings", [Config(store="s", run="r").to_json(), "{"])
def test_without_an_interval_no_more_than_a_step_may_be_lost(
    run_folder: Path, settings: str
) -> None:
    drop_all_but_metrics(run_folder)
    (run_folder / "config.json").write_text(settings)
    (run_folder / "metrics.jsonl").write_bytes(LINES[0])
    assert choose_auto(run_folder) is None
    (run_folder / "metrics.jsonl").write_bytes(b"\n".join(LINES[:2]))
    with pytest.raises(ResumeError, match="up to step 2"):
        choose_auto(run_folder)


def test_best_weights_that_are_damaged_are_forgotten(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = RunState(
        step=30, world=1, fingerprint="f", lowest_score=1.0, best_step=25, best_score=1.5, bad=2
    )
    assert forget_lost_best(run_folder, state, Ranks()) == state
    (run_folder / "best" / "step-00000025" / WEIGHTS).write_bytes(b"damaged")
    forgotten = RunState(step=30, world=1, fingerprint="f")
    assert forget_lost_best(run_folder, state, Ranks()) == forgotten
    assert "the next validation counts as the best" in capsys.readouterr().out
    shutil.rmtree(run_folder / "best")
    assert forget_lost_best(run_folder, state, Ranks()) == forgotten
    assert forget_lost_best(run_folder, forgotten, Ranks()) == forgotten
    assert not capsys.readouterr().out


def test_what_lies_beyond_a_step_is_set_aside(run_folder: Path) -> None:
    (run_folder / "checkpoints" / "step-00000040.ab.partial").mkdir()
    set_aside_later_work(run_folder, 20, Ranks())
    left = {
        kind: sorted(path.name for path in (run_folder / kind).iterdir())
        for kind in ("checkpoints", "best")
    }
    assert left == {
        "checkpoints": ["step-00000020", "step-00000030.aside"],
        "best": ["step-00000025.aside"],
    }


def test_no_other_run_is_begun_in_a_folder_that_holds_work(
    run_folder: Path, tmp_path: Path
) -> None:
    other = save_step(tmp_path / "other", 4)
    assert choose_checkpoint(tmp_path / "new", str(other), Ranks()) == other
    drop_checkpoints(run_folder)
    with pytest.raises(ResumeError, match="no checkpoint to go on from"):
        choose_checkpoint(run_folder, str(other), Ranks())


def test_a_dry_run_reads_no_weights(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = run_folder / "checkpoints" / "step-00000030"
    (newest / "rank-00000.safetensors").write_bytes(b"damaged")
    start = find_starting_point(run_folder, SETTINGS, "f", "auto", Ranks(), reads_all=False)
    assert start.checkpoint == newest
    start = find_starting_point(run_folder, SETTINGS, "f", "auto", Ranks())
    assert start.checkpoint == newest.with_name("step-00000020")


@pytest.mark.parametrize(
    ("folder", "typed"),
    [
        ("checkpoints", "step-00000020"),
        ("checkpoints/step-00000020", "."),
        ("best", "../checkpoints/step-00000020"),
    ],
)
def test_a_checkpoint_is_found_from_inside_its_run(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, typed: str
) -> None:
    monkeypatch.chdir(run_folder / folder)
    for run in (run_folder, tmp_path / "new"):
        chosen = choose_checkpoint(run, typed, Ranks())
        assert chosen == run_folder / "checkpoints" / "step-00000020"


def test_a_buffer_is_found_under_its_former_name(tmp_path: Path) -> None:
    values = {"trunks.0.batch_told": torch.tensor([0.7]), "trunks.0.size": torch.ones(2, 2)}
    present = {"trunks.0.batch_separation", "trunks.0.size"}
    (tmp_path / "best").mkdir()
    save_file(values, tmp_path / "best" / WEIGHTS)
    weights = read_weights(tmp_path / "best")
    assert weights.keys() == present
    assert weights["trunks.0.batch_separation"].item() == pytest.approx(0.7)

    flat = {format_label("weights", 0, name): value.flatten() for name, value in values.items()}
    shapes = json.dumps({name: list(value.shape) for name, value in values.items()})
    save_file(flat, tmp_path / "rank-0.safetensors", {"shapes": shapes})
    assert assemble_tensors([tmp_path / "rank-0.safetensors"]).keys() == present
