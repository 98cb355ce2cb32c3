"""What a run folder holds. A checkpoint does not count until its commit marker is written.

    RUN/config.json                  resolved config
    RUN/model.json                   modalities, features and batches: with the weights, all that
                                     embedding needs
    RUN/attempts.jsonl               how training was started, each time
    RUN/checkpoints/step-00001200/   rank-00000.safetensors ..., state.json, COMMIT.json
    RUN/best/step-00001100/          weights.safetensors, state.json and COMMIT.json of the best
                                     validation

A checkpoint holds weights, optimizer and buffers. The buffers of the common space and of the
translation are fitted at validations alone: in between, they are older than the weights, which
training changes.

COMMIT.json holds the size and SHA-256 of every file beside it; a file that differs is not used.
Each rank writes its shards of weights and optimizer (shards.py), and any number of ranks reads
them. No file is a pickle.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AliasChoices, ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clue_dist.checkpoint import shards
from clue_dist.errors import ResumeError, list_names
from clue_dist.model.clue import CLUE
from clue_dist.model.posterior_encoder import FITTED_MODULES
from clue_dist.process import print_line
from clue_dist.store.writer import hash_file

COMMIT, STATE, WEIGHTS = "COMMIT.json", "state.json", "weights.safetensors"
SHARD_FILES = "rank-*.safetensors"
CHECKPOINT_NAME = re.compile(r"step-\d+")
LARGEST_JSON = 2**26  # bytes: what a hundred thousand ranks would list
# What loading weights or shards raises where the files hold something else.
UNFIT = (KeyError, RuntimeError, TypeError, ValueError, OSError, SafetensorError)
LATER_BUFFERS = ".batch_separation", ".theta_shift"  # which earlier versions did not have
MODEL_PREFIX = "model."  # of the model's parameters in the engine, which trains an `Objective`


@dataclass(frozen=True)
class RunState:
    """All that a run must know to go on, besides the engine's own state.

    The names of the fields are those of the keys in state.json.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    step: int  # optimizer steps done
    world: int  # ranks that saved this
    fingerprint: str  # fingerprint of the store
    updates: int = 0  # the optimizer's own count, which leaves out skipped steps
    # Lowest validation score, its step, and what each validation cell had then. The score was
    # called "best" before, and stood alone.
    lowest_score: Annotated[
        float | None, Field(validation_alias=AliasChoices("lowest_score", "best"))
    ] = None
    lowest_step: int = 0
    lowest_cells: tuple[float, ...] = ()
    best_step: int = 0  # the step of the weights that are kept as the best
    best_score: float | None = None  # their validation score
    bad: int = 0  # validations since the lowest score
    skipped: int = 0  # steps in a row whose loss or gradient was not finite
    usual: tuple[float, float] | None = None  # running mean and variance of the loss
    logged: dict[str, float] = field(default_factory=dict)  # sums over steps not logged yet
    origin: str | None = None  # checkpoint or weights of another run from which this one began
    job: str | None = None  # the Slurm job that saved this


_RUN_STATES = TypeAdapter(RunState)


def list_checkpoints(folder: Path) -> list[Path]:
    """List the committed checkpoints in a folder, newest first."""
    committed = [marker.parent for marker in folder.glob(f"step-*/{COMMIT}")]
    return sorted(
        (path for path in committed if CHECKPOINT_NAME.fullmatch(path.name)), reverse=True
    )


def list_uncommitted(folder: Path) -> list[Path]:
    """List folders that are called like checkpoints but have no commit marker, newest first."""
    committed = set(list_checkpoints(folder))
    named = [path for path in folder.glob("step-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted((path for path in named if path.is_dir() and path not in committed), reverse=True)


def list_shard_files(checkpoint: Path) -> list[Path]:
    """List the files of a checkpoint's ranks."""
    return sorted(checkpoint.glob(SHARD_FILES))


def name_checkpoint(step: int) -> str:
    """The name of the checkpoint of a step; `parse_step` parses it."""
    return f"step-{step:08d}"


def parse_step(checkpoint: Path) -> int:
    """Parse the step out of the name of a checkpoint, of one set aside or half-written, too."""
    return int(checkpoint.name.split(".")[0].removeprefix("step-"))


# --- damage -------------------------------------------------------------------------------------


def find_damage(checkpoint: Path) -> str | None:
    """Compare every file of a checkpoint with its recorded size and hash.

    Returns:
        What is wrong; None if nothing is.
    """
    try:
        listing = json.loads(_read_small_file(checkpoint / COMMIT))
        if STATE not in listing or not any(name.endswith(".safetensors") for name in listing):
            return f"{COMMIT} lists no {STATE} or no weights"
        unlisted = {path.name for path in checkpoint.glob("*.safetensors")} - set(listing)
        if unlisted:
            return f"{min(unlisted)} is not listed in {COMMIT}"
        for name, recorded in listing.items():
            status = (checkpoint / name).lstat()
            if Path(name).name != name or not stat.S_ISREG(status.st_mode):
                return f"{name!r} is no file beside {COMMIT}"
            if status.st_size != recorded["bytes"]:
                return f"{name} has another size than what was saved"
            if hash_file(checkpoint / name).model_dump() != recorded:
                return f"{name} differs from what was saved"
    except RecursionError:
        return f"{COMMIT} is nested without an end"
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        return str(error)
    return None


def _read_small_file(path: Path) -> bytes:
    """Read a file that may be anything, as what lies in a run folder cannot be trusted.

    Raises:
        OSError: there is none.
        ValueError: it is a link, a pipe, a device, or absurdly large.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_JSON:
        raise ValueError(f"{path.name} is not a file of at most {LARGEST_JSON:,} bytes")
    return path.read_bytes()


def iterate_sound_checkpoints(folder: Path) -> Iterator[Path]:
    """Iterate over committed checkpoints, newest first; report a damaged one and leave it out."""
    for checkpoint in list_checkpoints(folder):
        problem = find_damage(checkpoint)
        if problem is None:
            yield checkpoint
        else:
            print_line(f"checkpoint {checkpoint} is damaged and not used: {problem}")


# --- state and weights --------------------------------------------------------------------------


def read_state(checkpoint: Path) -> RunState:
    """Read the state of the run at a checkpoint.

    Raises:
        ResumeError: the checkpoint is damaged, or one of another version of clue_dist.
    """
    try:
        state = _RUN_STATES.validate_json(_read_small_file(checkpoint / STATE), strict=True)
        if not list_shard_files(checkpoint):
            raise ValueError(f"no {SHARD_FILES}")
    except (OSError, ValueError) as error:  # those of pydantic are ValueErrors
        raise ResumeError(
            "this checkpoint is not one of this version of clue_dist",
            where=checkpoint,
            got=error,
            fix="go on with the version that began the run, or start a new one with "
            "--set run=ANOTHER_FOLDER",
        ) from error
    return state


def find_state(checkpoint: Path) -> RunState | None:
    """Read the state of the run at a checkpoint, if it is not damaged."""
    try:
        return read_state(checkpoint)
    except ResumeError:
        return None


def read_best_step(checkpoint: Path) -> int | None:
    """Read which best weights a checkpoint names; a damaged checkpoint names none."""
    state = find_state(checkpoint)
    return None if state is None else state.best_step


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a committed folder, be they kept as the best or as a checkpoint.

    Returns:
        The parameters and buffers of the model by name, float32.
    """
    if (folder / WEIGHTS).exists():
        weights = load_file(folder / WEIGHTS)
        return {shards.find_present_name(name): values for name, values in weights.items()}
    tensors = shards.assemble_tensors(list_shard_files(folder))
    return {name.removeprefix(MODEL_PREFIX): values for name, values in tensors.items()}


def load_weights(model: CLUE, folder: Path, fix: str) -> None:
    """Set a model to the weights of a committed folder.

    Raises:
        ResumeError: they are the weights of another model; `fix` is what to do then.
    """
    try:
        weights = read_weights(folder)
        for module in FITTED_MODULES:  # an earlier version did not have all of them
            if not any(name.startswith(f"{module}.") for name in weights):
                buffers = model.get_submodule(module).named_buffers()
                weights |= {f"{module}.{name}": values for name, values in buffers}
        for name, values in model.state_dict().items():
            if name.endswith(LATER_BUFFERS):  # nor these, without which a model works
                weights.setdefault(name, values)
        model.load_state_dict(weights)
    except UNFIT as error:
        raise ResumeError(
            "the weights do not fit the model of these settings",
            where=folder,
            got=list_names((line.strip() for line in str(error).splitlines()), 3),
            fix=f"{fix}, or train again",
        ) from error
