"""What a run folder holds, and which of it may be gone on from. Nothing exists until its commit marker does.

    RUN/config.json                          resolved config
    RUN/model.json                           modalities, features and batches: with the weights, all that embed needs
    RUN/checkpoints/step-00001200/           rank-00000.safetensors ..., state.json, COMMIT.json
    RUN/best/step-00001100/                  weights.safetensors, state.json, COMMIT.json of the best validation

COMMIT.json holds the size and SHA-256 of every file beside it; what differs is not used. Each rank writes its pieces of
weights and optimizer (checkpoint/shards.py), which any number of ranks reads. No file is a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clue_dist import config as configs
from clue_dist.checkpoint import shards
from clue_dist.config import Config
from clue_dist.errors import ResumeError, list_names
from clue_dist.files import translate_write_errors
from clue_dist.model.clue import CLUE
from clue_dist.process import print_line
from clue_dist.ranks import Ranks
from clue_dist.resilience.run_lock import SLURM_JOB
from clue_dist.store.writer import hash_file

COMMIT, STATE, WEIGHTS, PARTS = (
    "COMMIT.json",
    "state.json",
    "weights.safetensors",
    "rank-*.safetensors",
)
NAME = re.compile(r"step-\d+")
UNFIT = (
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
    OSError,
    SafetensorError,
)  # of files that hold something else
MODEL = "model."  # what names of the model begin with in the engine, which trains an Objective


@dataclass(frozen=True)
class RunState:
    """All that a run must know to go on, besides the engine's own state.

    step: optimizer steps done; updates: the optimizer's own count; best: the lowest validation score; best_step: of
    the weights that are kept; bad: validations since the lowest; skipped: steps in a row whose loss or gradient was
    not finite; usual: mean and variance of the loss of late, to tell spikes; logged: sums over the steps that are not
    logged yet; origin: the checkpoint of another run that this one began from; job: Slurm's, that saved this.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    step: int
    world: int
    fingerprint: str
    updates: int = 0
    best: float | None = None
    best_step: int = 0
    bad: int = 0
    skipped: int = 0
    usual: tuple[float, float] | None = None
    logged: dict[str, float] = field(default_factory=dict)
    origin: str | None = None
    job: str | None = None


def set_aside_later_work(run: Path, state: RunState, ranks: Ranks) -> RunState:
    """Clear the way for going on from `state`: what an earlier attempt left beyond its step is renamed, half-written
    checkpoints are removed. Without sound weights of its best validation, the next validation counts as the best."""

    def clear() -> bool:
        with translate_write_errors("what goes on from here", run):
            for path in [
                p for folder in ("checkpoints", "best") for p in (run / folder).glob("step-*")
            ]:
                if path.suffix == ".partial":
                    shutil.rmtree(
                        path, ignore_errors=True
                    )  # a rank of a dead attempt may still write there
                elif NAME.fullmatch(path.name) and parse_step(path) > state.step:
                    shutil.rmtree(path.with_suffix(".aside"), ignore_errors=True)
                    path.rename(path.with_suffix(".aside"))
        best = run / "best" / f"step-{state.best_step:08d}"
        problem = find_damage(best) if state.best is not None else None
        if (
            problem is not None and best.parent.exists()
        ):  # not in a run that begins from another's checkpoint
            print_line(
                f"the best weights, {best}, are damaged: {problem}; the next validation counts as the best"
            )
        return problem is not None

    lost = ranks.run_on_first(clear)
    return replace(state, best=None, best_step=0, bad=0) if lost else state


# --- restoring --------------------------------------------------------------------------------------------------


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints in a folder, newest first."""
    return sorted(
        (p.parent for p in folder.glob(f"step-*/{COMMIT}") if NAME.fullmatch(p.parent.name)),
        reverse=True,
    )


def parse_step(checkpoint: Path) -> int:
    return int(checkpoint.name.split(".")[0].removeprefix("step-"))


def read_best_step(checkpoint: Path) -> int | None:
    """Which best weights a checkpoint names; a damaged one names none."""
    state = _readable(checkpoint)
    return None if state is None else state.best_step


def _readable(checkpoint: Path) -> RunState | None:
    """The state of a checkpoint, unless it is damaged."""
    try:
        return _read_state(checkpoint)
    except ResumeError:
        return None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file is compared with its recorded size and hash."""
    try:
        listing = json.loads(_content_of(checkpoint / COMMIT))
        if STATE not in listing or not any(name.endswith(".safetensors") for name in listing):
            return f"{COMMIT} lists no {STATE} or no weights"
        unlisted = {path.name for path in checkpoint.glob("*.safetensors")} - set(listing)
        if unlisted:
            return f"{min(unlisted)} is not listed in {COMMIT}"
        for name, recorded in listing.items():
            there = (checkpoint / name).lstat()
            if Path(name).name != name or not stat.S_ISREG(there.st_mode):
                return f"{name!r} is no file beside {COMMIT}"
            if there.st_size != recorded["bytes"]:
                return f"{name} has another size than what was saved"
            if hash_file(checkpoint / name).model_dump() != recorded:
                return f"{name} differs from what was saved"
    except RecursionError:
        return f"{COMMIT} is nested without an end"
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        return str(error)
    return None


def _content_of(path: Path) -> bytes:
    """Of a small file of a checkpoint.

    Raises:
        OSError: there is none.
        ValueError: it is a link, a pipe, a device, or absurdly large.
    """
    there = path.lstat()
    if not stat.S_ISREG(there.st_mode) or there.st_size > _MOST_JSON:
        raise ValueError(f"{path.name} is not a file of at most {_MOST_JSON:,} bytes")
    return path.read_bytes()


_MOST_JSON = 2**26  # bytes: what a hundred thousand ranks would list


def iterate_sound_checkpoints(folder: Path) -> Iterator[Path]:
    """Committed checkpoints that are not damaged, newest first; of the others it is said what is wrong."""
    for checkpoint in list_checkpoints(folder):
        problem = find_damage(checkpoint)
        if problem is None:
            yield checkpoint
        else:
            print_line(f"checkpoint {checkpoint} is damaged and not used: {problem}")


def choose_checkpoint(run: Path, resume: str, ranks: Ranks) -> Path | None:
    """The checkpoint to go on from, chosen by rank 0 for all. resume: "auto" (newest sound one), "never", a folder.

    Raises:
        ResumeError: "never" in a folder that holds a run; a named checkpoint that is missing or damaged; every
            checkpoint damaged.
    """
    return ranks.run_on_first(lambda: _choose(run, resume))


def _choose(run: Path, resume: str) -> Path | None:
    there = list_checkpoints(run / "checkpoints")
    if resume != "auto" and there and (begun := _begun_so(run, resume)) is not None:
        return begun
    if resume == "never":
        if there:
            raise ResumeError(
                "the run folder already holds a run",
                where=run,
                got=there[0].name,
                expected="an empty folder with --resume never",
                fix="use --resume auto to go on, or --set run=ANOTHER_FOLDER",
            )
        return None
    if resume != "auto" and there and Path(resume).resolve().parent.parent != run.resolve():
        raise ResumeError(
            "the run folder already holds another run than the one to go on from",
            where=run,
            got=resume,
            fix="choose a new folder for what goes on from there, with --set run=ANOTHER_FOLDER",
        )
    if resume == "auto":
        chosen = next(iterate_sound_checkpoints(run / "checkpoints"), None)
        if chosen is None and there:
            raise ResumeError(
                "every checkpoint of the run is damaged",
                where=run,
                fix="start anew with --set run=ANOTHER_FOLDER",
            )
        return chosen
    folder = Path(resume)
    problem = find_damage(folder)
    if problem:
        raise ResumeError(
            "this checkpoint cannot be used",
            where=folder,
            got=problem,
            fix="name a folder like RUN/checkpoints/step-00001200",
        )
    return folder


def _begun_so(run: Path, resume: str) -> Path | None:
    """The newest checkpoint, where the same command has saved it, which is to go on then: an earlier attempt of this
    Slurm job did, or the run began from the checkpoint of another run that `resume` names."""
    state = next(filter(None, map(_readable, list_checkpoints(run / "checkpoints"))), None)
    if state is None:
        return None
    again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0 and state.job == SLURM_JOB
    so = again or state.origin == str(Path(resume).resolve())
    return next(iterate_sound_checkpoints(run / "checkpoints"), None) if so else None


# Settings that may change when a run goes on: they do not decide what a step computes, or are what a person turns to
# prolong a run or to bring one back whose loss was not finite.
_FREE_TRAIN = (
    "lr",
    "clip",
    "epochs",
    "patience",
    "validate_every",
    "checkpoint_every",
    "keep",
    "zero_stage",
)
FREE = ("store", "run", "log.", "data.prefetch", *(f"train.{name}" for name in _FREE_TRAIN))


def require_same_run(run: Path, config: Config, fingerprint: str, checkpoint: Path) -> RunState:
    """The state of a checkpoint, if this run may go on from it. The number of ranks and the ZeRO stage may be others.

    Raises:
        ResumeError: other data, other settings, or files of another version of clue_dist.
    """
    state = _read_state(checkpoint)
    if state.fingerprint != fingerprint:
        raise ResumeError(
            "the store is not the one this run was trained on",
            where=config.store,
            got=f"fingerprint {fingerprint[:16]}",
            expected=state.fingerprint[:16],
            fix="point --set store=... at the original store, or start a new run",
        )
    before = configs.load_config(checkpoint.parent.parent / "config.json")
    different = [
        key for key in configs.list_changed_settings(before, config) if not key.startswith(FREE)
    ]
    if different:
        raise ResumeError(
            "the settings are not those of the run to go on with",
            where=run,
            got=f"changed: {', '.join(different)}",
            fix="use the run's own config.json, or start a new run with --set run=ANOTHER_FOLDER",
        )
    if checkpoint.resolve().parent.parent != run.resolve():
        state = replace(state, origin=str(checkpoint.resolve()))
    return state


def _read_state(checkpoint: Path) -> RunState:
    try:
        state = _STATES.validate_json(_content_of(checkpoint / STATE), strict=True)
        if not list(checkpoint.glob(PARTS)):
            raise ValueError(f"no {PARTS}")
    except (OSError, ValueError) as error:  # those of pydantic are ValueErrors
        raise ResumeError(
            "this checkpoint is not one of this version of clue_dist",
            where=checkpoint,
            got=error,
            fix="go on with the version that began the run, or start a new one with --set run=ANOTHER_FOLDER",
        ) from error
    return state


_STATES = TypeAdapter(RunState)


def list_shard_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint's ranks."""
    return sorted(checkpoint.glob(PARTS))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """By parameter and buffer of the model in float32, whether kept as the best or as a checkpoint."""
    if (folder / WEIGHTS).exists():
        kept: dict[str, Tensor] = load_file(folder / WEIGHTS)
        return kept
    return {
        name.removeprefix(MODEL): values
        for name, values in shards.assemble_tensors(list_shard_files(folder)).items()
    }


def load_weights(model: CLUE, folder: Path, fix: str) -> None:
    """Set a model to the weights of a committed folder.

    Raises:
        ResumeError: they are those of another model.
    """
    try:
        model.load_state_dict(read_weights(folder))
    except UNFIT as error:
        got = list_names((line.strip() for line in str(error).splitlines()), 3)
        what = "the weights do not fit the model of these settings"
        raise ResumeError(what, where=folder, got=got, fix=f"{fix}, or train again") from error
