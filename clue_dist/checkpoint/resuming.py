"""From which checkpoint a run goes on, and whether it may."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from clue_dist import config as configs
from clue_dist.checkpoint.run_folder import (
    CHECKPOINT_NAME,
    RunState,
    find_damage,
    find_state,
    iterate_sound_checkpoints,
    list_checkpoints,
    parse_step,
    read_state,
)
from clue_dist.config import Config
from clue_dist.errors import ResumeError
from clue_dist.files import translate_write_errors
from clue_dist.process import print_line
from clue_dist.ranks import Ranks
from clue_dist.resilience.run_lock import SLURM_JOB

# Settings of training that may change when a run goes on: they do not decide what a step computes,
# or a person turns to them to prolong a run, or to bring back one whose loss was not finite.
CHANGEABLE_TRAINING = (
    "lr",
    "clip",
    "epochs",
    "patience",
    "validate_every",
    "checkpoint_every",
    "keep",
    "zero_stage",
)
# What the keys of all settings that may change begin with.
CHANGEABLE = (
    "store",
    "run",
    "log.",
    "data.prefetch",
    *(f"train.{name}" for name in CHANGEABLE_TRAINING),
)


def choose_checkpoint(run_folder: Path, resume: str, ranks: Ranks) -> Path | None:
    """Choose the checkpoint to go on from; rank 0 does so for all.

    Args:
        run_folder: the run folder.
        resume: "auto" for the newest sound checkpoint, "never", or the folder of a checkpoint.
        ranks: this rank among all; every rank must call.

    Returns:
        The folder of a sound checkpoint; None if the run begins anew.

    Raises:
        ResumeError: under "never", the folder holds a run; or the named checkpoint is missing or
            damaged; or every checkpoint is damaged.
    """

    def choose_name() -> str | None:
        checkpoint = _choose_on_first(run_folder, resume)
        return None if checkpoint is None else str(checkpoint)

    name = ranks.run_on_first(choose_name)
    return None if name is None else Path(name)


def _choose_on_first(run_folder: Path, resume: str) -> Path | None:
    checkpoints = list_checkpoints(run_folder / "checkpoints")
    if resume == "auto":
        return _choose_newest(run_folder, checkpoints)
    # Typed again after an interruption, a command that names "never" or a checkpoint goes on.
    continued = _find_continuation(run_folder, resume, checkpoints)
    if continued is not None:
        return continued
    if resume == "never":
        if checkpoints:
            raise ResumeError(
                "the run folder already holds a run",
                where=run_folder,
                got=checkpoints[0].name,
                expected="an empty folder with --resume never",
                fix="use --resume auto to go on, or --set run=ANOTHER_FOLDER",
            )
        return None
    return _choose_named(run_folder, resume, checkpoints)


def _choose_newest(run_folder: Path, checkpoints: list[Path]) -> Path | None:
    """The newest sound checkpoint of the run."""
    newest = next(iterate_sound_checkpoints(run_folder / "checkpoints"), None)
    if newest is None and checkpoints:
        raise ResumeError(
            "every checkpoint of the run is damaged",
            where=run_folder,
            fix="start anew with --set run=ANOTHER_FOLDER",
        )
    return newest


def _choose_named(run_folder: Path, resume: str, checkpoints: list[Path]) -> Path:
    """The checkpoint that a person named: of this run, or of another with which it begins."""
    if checkpoints and Path(resume).resolve().parent.parent != run_folder.resolve():
        raise ResumeError(
            "the run folder already holds another run than the one to go on from",
            where=run_folder,
            got=resume,
            fix="choose a new folder for what goes on from there, with --set run=ANOTHER_FOLDER",
        )
    problem = find_damage(Path(resume))
    if problem:
        raise ResumeError(
            "this checkpoint cannot be used",
            where=Path(resume),
            got=problem,
            fix="name a folder like RUN/checkpoints/step-00001200",
        )
    return Path(resume)


def _find_continuation(run_folder: Path, resume: str, checkpoints: list[Path]) -> Path | None:
    """The newest sound checkpoint, if this command wrote it and was then interrupted.

    An earlier attempt of this Slurm job saved it; or the run began from the checkpoint of another
    run which `resume` names.
    """
    state = next(filter(None, map(find_state, checkpoints)), None)
    if state is None:
        return None
    was_requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0 and state.job == SLURM_JOB
    if was_requeued or state.origin == str(Path(resume).resolve()):
        return next(iterate_sound_checkpoints(run_folder / "checkpoints"), None)
    return None


def require_same_run(
    run_folder: Path, config: Config, fingerprint: str, checkpoint: Path
) -> RunState:
    """Check that a run may go on from a checkpoint, on any number of ranks and any ZeRO stage.

    Args:
        run_folder: the run folder; the checkpoint may lie in another.
        config: the settings of the run, resolved.
        fingerprint: fingerprint of the store.
        checkpoint: the checkpoint's folder.

    Returns:
        The state of the run at the checkpoint.

    Raises:
        ResumeError: other data, other settings, or files of another version of clue_dist.
    """
    state = read_state(checkpoint)
    if state.fingerprint != fingerprint:
        raise ResumeError(
            "the store is not the one this run was trained on",
            where=config.store,
            got=f"fingerprint {fingerprint[:16]}",
            expected=state.fingerprint[:16],
            fix="point --set store=... at the original store, or start a new run",
        )
    # What the run began with, as its own folder keeps it beside the checkpoints.
    saved_config = configs.load_config(checkpoint.parent.parent / "config.json")
    changed = configs.list_changed_settings(saved_config, config)
    forbidden = [key for key in changed if not key.startswith(CHANGEABLE)]
    if forbidden:
        raise ResumeError(
            "the settings are not those of the run to go on with",
            where=run_folder,
            got=f"changed: {', '.join(forbidden)}",
            fix="use the run's own config.json, or start a new run with --set run=ANOTHER_FOLDER",
        )
    if checkpoint.resolve().parent.parent != run_folder.resolve():
        state = replace(state, origin=str(checkpoint.resolve()))
    return state


def set_aside_later_work(run_folder: Path, state: RunState, ranks: Ranks) -> RunState:
    """Clear the way for going on from a state.

    What an earlier attempt left beyond its step is renamed, and half-written checkpoints are
    removed.

    Returns:
        The state; if the weights of its best validation are damaged or gone, it knows of none, so
        that the next validation counts as the best.
    """

    def clear_folder() -> bool:
        with translate_write_errors("what goes on from here", run_folder):
            for kind in ("checkpoints", "best"):
                # A list, as what is renamed would turn up again.
                for path in list((run_folder / kind).glob("step-*")):
                    _set_aside(path, state.step)
        return state.best is not None and _report_lost_best(run_folder, state.best_step)

    lost = ranks.run_on_first(clear_folder)
    return replace(state, best=None, best_step=0, bad=0) if lost else state


def _set_aside(path: Path, step: int) -> None:
    """Remove a folder if it is half-written, rename it if it is a checkpoint after `step`."""
    if path.suffix == ".partial":
        # A rank of a dead attempt may still write into it.
        shutil.rmtree(path, ignore_errors=True)
    elif CHECKPOINT_NAME.fullmatch(path.name) and parse_step(path) > step:
        shutil.rmtree(path.with_suffix(".aside"), ignore_errors=True)
        path.rename(path.with_suffix(".aside"))


def _report_lost_best(run_folder: Path, best_step: int) -> bool:
    """Whether the best weights are damaged or gone; the damage is reported."""
    best = run_folder / "best" / f"step-{best_step:08d}"
    problem = find_damage(best)
    # A run that begins from another's checkpoint has no folder of best weights yet.
    if problem is not None and best.parent.exists():
        print_line(
            f"the best weights, {best}, are damaged: {problem}; "
            "the next validation counts as the best"
        )
    return problem is not None
