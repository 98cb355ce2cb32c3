"""From which checkpoint a run goes on, and whether it may."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clue_dist import config_file
from clue_dist.checkpoint.kept_config import follow_kept_config, load_kept_config
from clue_dist.checkpoint.lost_work import require_no_lost_work, require_whole_copies
from clue_dist.checkpoint.run_folder import (
    CHECKPOINT_NAME,
    RunState,
    find_damage,
    find_state,
    iterate_sound_checkpoints,
    list_checkpoints,
    name_checkpoint,
    parse_step,
    read_state,
)
from clue_dist.config import Config
from clue_dist.errors import ResumeError
from clue_dist.files import translate_write_errors
from clue_dist.process import print_line
from clue_dist.ranks import Ranks
from clue_dist.resilience.run_lock import find_slurm_job

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


@dataclass(frozen=True)
class StartingPoint:
    """Where a run begins or goes on."""

    state: RunState
    checkpoint: Path | None  # folder of the checkpoint to go on from; None at step 0
    config: Config  # the settings to train with, see `follow_kept_config`
    changes: dict[str, tuple[Any, Any]]  # what each changed setting was and is, by dotted path

    def is_within(self, run_folder: Path) -> bool:
        """Whether a run goes on that this folder describes already."""
        return self.checkpoint is not None and _belongs_to(self.checkpoint, run_folder)

    def format_changes(self) -> dict[str, str]:
        """Format what each changed setting was and is, by dotted path."""
        return {key: f"{before} -> {after}" for key, (before, after) in self.changes.items()}

    def describe_changes(self) -> str:
        """Say on one line which settings differ from those of the run, and how."""
        return ", ".join(f"{key} {change}" for key, change in self.format_changes().items())

    def describe_inherited(self, config: Config) -> str | None:
        """Say which settings a config leaves out that the run has otherwise than the default."""
        inherited = config_file.compare_settings(config, self.config)
        settings = ", ".join(f"{key}={value}" for key, (_, value) in inherited.items())
        return f"goes on as the run began, with {settings}" if settings else None


def find_starting_point(
    run_folder: Path,
    config: Config,
    fingerprint: str,
    resume: str,
    ranks: Ranks,
    *,
    earlier_weights: Path | None = None,
    reads_all: bool = True,
) -> StartingPoint:
    """Find where a run begins or goes on. Nothing is written.

    Args:
        run_folder: the run folder.
        config: the settings of the run, resolved.
        fingerprint: fingerprint of the store.
        resume: see `choose_checkpoint`.
        ranks: this rank among all; every rank must call.
        earlier_weights: the committed folder of an earlier run whose weights the run begins with.
        reads_all: see `choose_checkpoint`.

    Raises:
        ResumeError: see `choose_checkpoint` and `require_same_run`; or the run in the folder did
            not begin with the weights of that earlier run.
    """
    origin = None if earlier_weights is None else earlier_weights.resolve()
    checkpoint = choose_checkpoint(run_folder, resume, ranks, reads_all=reads_all)
    if checkpoint is None:
        state = RunState(step=0, world=ranks.world, fingerprint=fingerprint)
        state = replace(state, origin=str(origin) if origin else None)
        return StartingPoint(state, None, config, {})
    kept = load_kept_config(checkpoint.parent.parent)
    config = follow_kept_config(config, kept)
    state = require_same_run(run_folder, config, fingerprint, checkpoint)
    if origin is not None:
        _require_origin(run_folder, state, origin.parent.parent)
    return StartingPoint(state, checkpoint, config, config_file.compare_settings(kept, config))


def _require_origin(run_folder: Path, state: RunState, earlier_run: Path) -> None:
    """Check that a run which goes on began with weights of an earlier run, be they newer by now."""
    if state.origin is None or not _belongs_to(Path(state.origin), earlier_run):
        raise ResumeError(
            "the run folder already holds a run that did not begin with these weights",
            where=run_folder,
            got=f"--init-from {earlier_run}",
            expected=f"weights of {state.origin or 'no other run'}",
            fix="leave --init-from out to go on, or begin another run with "
            "--set run=ANOTHER_FOLDER",
        )


def choose_checkpoint(
    run_folder: Path, resume: str, ranks: Ranks, *, reads_all: bool = True
) -> Path | None:
    """Choose the checkpoint to go on from; rank 0 does so for all.

    Args:
        run_folder: the run folder.
        resume: "auto" for the newest sound checkpoint, "never", or the folder of a checkpoint.
        ranks: this rank among all; every rank must call.
        reads_all: whether the files of the newest checkpoints are read to find one that is sound,
            which may take minutes; else their states alone are.

    Returns:
        The folder of a sound checkpoint; None if the run begins anew.

    Raises:
        ResumeError: under "never", the folder holds a run; or the named checkpoint is missing or
            damaged; or every checkpoint is damaged; or work in the folder would be lost.
    """

    def choose_on_first() -> str | None:
        chosen = _choose_on_first(run_folder, resume, reads_all)
        return None if chosen is None else str(chosen)

    chosen = ranks.run_on_first(choose_on_first)
    return None if chosen is None else Path(chosen)


def _choose_on_first(run_folder: Path, resume: str, reads_all: bool) -> Path | None:
    checkpoints = list_checkpoints(run_folder / "checkpoints")
    # Typed again after an interruption, a command that names "never" or a checkpoint goes on.
    if resume == "auto" or _began_with(resume, checkpoints):
        if checkpoints:
            return _choose_newest(run_folder, checkpoints, reads_all)
        require_no_lost_work(run_folder, 0)
        return None
    if resume == "never":
        if checkpoints:
            raise ResumeError(
                "the run folder already holds a run",
                where=run_folder,
                got=checkpoints[0].name,
                expected="an empty folder with --resume never",
                fix="use --resume auto to go on, or --set run=ANOTHER_FOLDER",
            )
        require_no_lost_work(run_folder, 0)
        return None
    return _choose_named(run_folder, resume, checkpoints)


def _choose_newest(run_folder: Path, checkpoints: list[Path], reads_all: bool) -> Path:
    """The newest sound checkpoint of the run."""
    sound = (
        iterate_sound_checkpoints(run_folder / "checkpoints")
        if reads_all
        else filter(find_state, checkpoints)
    )
    newest = next(iter(sound), None)
    if newest is None:
        raise ResumeError(
            "every checkpoint of the run is damaged",
            where=run_folder,
            fix="copy them again, or begin another run with --set run=ANOTHER_FOLDER",
        )
    require_whole_copies(run_folder, newest)
    return newest


def _choose_named(run_folder: Path, resume: str, checkpoints: list[Path]) -> Path:
    """The checkpoint that a person named: of this run, or of another with which it begins."""
    checkpoint = Path(resume).resolve()  # it may be typed from inside its run
    problem = find_damage(checkpoint)
    if problem:
        raise ResumeError(
            "this checkpoint cannot be used",
            where=resume,
            got=problem,
            expected="auto, never, or a folder like RUN/checkpoints/step-00001200",
        )
    is_foreign = not _belongs_to(checkpoint, run_folder)
    if checkpoints and is_foreign:
        raise ResumeError(
            "the run folder already holds another run than the one to go on from",
            where=run_folder,
            got=resume,
            fix="choose a new folder for what goes on from there, with --set run=ANOTHER_FOLDER",
        )
    if is_foreign:
        require_no_lost_work(run_folder, read_state(checkpoint).step)
    return checkpoint


def _belongs_to(checkpoint: Path, run_folder: Path) -> bool:
    """Whether a checkpoint is one of this run."""
    return checkpoint.resolve().parent.parent == run_folder.resolve()


def _began_with(resume: str, checkpoints: list[Path]) -> bool:
    """Whether this command wrote the checkpoints and was then interrupted.

    An earlier attempt of this Slurm job saved them; or the run began from the checkpoint of another
    run which `resume` names.
    """
    state = next(filter(None, map(find_state, checkpoints)), None)
    if state is None:
        return False
    is_restart = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    was_requeued = is_restart and state.job == find_slurm_job()
    return was_requeued or state.origin == str(Path(resume).resolve())


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
            fix="point --set store=... at the original store, or begin a new run with the weights "
            f"of this one: --init-from {run_folder} --set run=ANOTHER_FOLDER",
        )
    changed = config_file.compare_settings(load_kept_config(checkpoint.parent.parent), config)
    forbidden = [key for key in changed if not key.startswith(CHANGEABLE)]
    if forbidden:
        raise ResumeError(
            "the settings are not those of the run to go on with",
            where=run_folder,
            got=f"changed: {', '.join(forbidden)}",
            expected=f"no other changes than of {', '.join(CHANGEABLE)}",
            fix="use the run's own config.json, or start a new run with --set run=ANOTHER_FOLDER, "
            "in Python with another `out`",
        )
    if not _belongs_to(checkpoint, run_folder):
        state = replace(state, origin=str(checkpoint.resolve()))
    return state


def forget_lost_best(run_folder: Path, state: RunState, ranks: Ranks) -> RunState:
    """Forget the best validation, if its weights are damaged or gone: the next one is the best.

    Args:
        run_folder: the run folder.
        state: the state to go on from.
        ranks: this rank among all; every rank must call.
    """
    lost = ranks.run_on_first(
        lambda: state.lowest_score is not None and _report_lost_best(run_folder, state.best_step)
    )
    return replace(state, lowest_score=None, best_step=0, best_score=None, bad=0) if lost else state


def set_aside_later_work(run_folder: Path, step: int, ranks: Ranks) -> None:
    """Clear the way for going on from a step.

    What an earlier attempt left beyond it is renamed, and half-written checkpoints are removed.

    Args:
        run_folder: the run folder.
        step: the step to go on from.
        ranks: this rank among all; every rank must call.
    """

    def clear_folder() -> None:
        with translate_write_errors("what goes on from here", run_folder):
            for kind in ("checkpoints", "best"):
                # A list, as what is renamed would turn up again.
                for path in list((run_folder / kind).glob("step-*")):
                    _set_aside(path, step)

    ranks.run_on_first(clear_folder)


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
    best = run_folder / "best" / name_checkpoint(best_step)
    problem = find_damage(best)
    # A run that begins from another's checkpoint has no folder of best weights yet.
    if problem is not None and best.parent.exists():
        print_line(
            f"the best weights, {best}, are damaged: {problem}; "
            "the next validation counts as the best"
        )
    return problem is not None
