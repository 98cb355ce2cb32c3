"""Run launch/train.py with faults planted in it, under any launcher.

[deepspeed] tests/faults/plant.py FAULT ... -- launch/train.py ARGS

kill:RANK:STEP        the rank kills itself when it fetches the batch of a step, once all saves are
                      written
term:RANK:STEP        the rank sends SIGTERM to itself; STEP is a number, "start" before the first
                      step of this attempt, or "end" after the last
usr1:RANK:STEP        the rank sends USR1 to itself
nan:RANK:FROM:TO:M    modality M of the rank's batches of steps FROM to TO - 1 is NaN
inf:RANK:FROM:TO:M    modality M has one infinite value
jump:RANK:FROM:TO:M   the values of modality M are a thousand times as large
gradient:RANK:STEP    a gradient of the step is NaN, though the loss is finite
validation:RANK:N     the N-th validation, counted from 1, scores NaN
saving:RANK:STEP:P    the rank kills itself while the checkpoint of a step is saved, at P of PLACES
full:RANK:STEP:P      at P, this rank alone finds its disk full
pause:SECONDS         every rank waits before each batch, so that a run of few steps lasts, and what
                      happens to it meets it in mid run
bfloat16:RANK         this rank alone does not multiply faster in bfloat16
dump:FOLDER           every rank writes what it begins with: its shards of weights and optimizer
"""

from __future__ import annotations

import errno
import json
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from clue_dist.checkpoint import engine_state, saver
from clue_dist.data.batch import Batch, SparseCounts
from clue_dist.data.loader import Loader
from clue_dist.ranks import Ranks
from clue_dist.train import auto_settings, loop, validate
from clue_dist.train.trainer import Trainer

SIGNALS = {"term": signal.SIGTERM, "usr1": signal.SIGUSR1}
VALUES: dict[str, Callable[[torch.Tensor], Any]] = {
    "nan": lambda v: v.fill_(torch.nan),
    "inf": lambda v: v.view(-1)[:1].fill_(torch.inf),
    "jump": lambda v: v.mul_(1000),
}


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    cut = words.index("--")
    for fault in words[:cut]:
        plant(*fault.split(":"))
    sys.argv = words[cut + 1 :]
    runpy.run_path(sys.argv[0], run_name="__main__")


def plant(kind: str, *where: str) -> None:
    if kind == "dump":
        return dump(Path(where[0]))
    if kind == "pause":
        return at_batch(lambda *_: time.sleep(float(where[0])))
    if kind == "bfloat16":
        is_faster = Ranks.from_environment().rank != int(where[0])
        auto_settings.multiplies_faster_in_bfloat16 = lambda: is_faster
        return None
    if Ranks.from_environment().rank != int(where[0]):
        return None
    if kind == "kill":
        return after_saving(int(where[1]))
    if kind in ("saving", "full"):
        return in_save(int(where[1]), where[2], _kill if kind == "saving" else _full)
    if kind == "gradient":
        return in_backward(int(where[1]))
    if kind == "validation":
        return in_validation(int(where[1]))
    if kind in SIGNALS and where[1] in MOMENTS:
        return at_call(*MOMENTS[where[1]], lambda: os.kill(os.getpid(), SIGNALS[kind]))
    if kind in SIGNALS:
        return at_batch(
            lambda step, _: os.kill(os.getpid(), SIGNALS[kind]) if step == int(where[1]) else None
        )
    return at_batch(
        lambda step, b: spoil(b, where[3], kind) if int(where[1]) <= step < int(where[2]) else None
    )


def at_batch(do: Callable[[int, Batch], object]) -> None:
    """`do` gets the step and the batch as training fetches it."""
    open_loader, fetch = Trainer.open_loader, Loader.__next__
    n_fetched: dict[int, int] = {}  # batches by loader; a step may take several
    micro_steps = [1]

    def open_counted(self: Trainer, step: int) -> Loader:
        loader = open_loader(self, step)
        micro_steps[0] = self.setup.config.train.grad_accum
        n_fetched[id(loader)] = step * micro_steps[0]
        return loader

    def fetch_counted(self: Loader) -> Batch:
        batch = fetch(self)
        do(n_fetched[id(self)] // micro_steps[0], batch)
        n_fetched[id(self)] += 1
        return batch

    Trainer.open_loader = open_counted  # type: ignore[method-assign]
    Loader.__next__ = fetch_counted  # type: ignore[method-assign]


def in_backward(step: int) -> None:
    """A gradient of the step is NaN."""
    train_step = loop.train_step

    def planted(trainer: Trainer, batches: Any, now: int, *rest: Any) -> Any:
        weight = next(p for p in trainer.engine.module.parameters() if p.requires_grad)
        hook = (
            weight.register_hook(lambda g: torch.full_like(g, torch.nan)) if now == step else None
        )
        outcome = train_step(trainer, batches, now, *rest)
        if hook is not None:
            hook.remove()
        return outcome

    loop.train_step = planted


def in_validation(number: int) -> None:
    """The validation of this number scores NaN."""
    score, calls = validate._score_cells, []

    def planted(*args: Any) -> tuple[list[float], dict[str, float]]:
        cells, parts = score(*args)
        calls.append(None)
        return [float("nan")] * len(cells) if len(calls) == number else cells, parts

    validate._score_cells = planted


# When, besides steps: as the engine is made, as everything is saved
MOMENTS = {"start": (loop, "build_engine"), "end": (saver.Saver, "finish")}


def at_call(owner: Any, name: str, do: Callable[[], object]) -> None:
    function = getattr(owner, name)

    def planted(*args: Any, **more: Any) -> Any:
        do()
        return function(*args, **more)

    setattr(owner, name, planted)


# By place in a save: the function, a word in its first argument by which the call is known, and
# whether the fault comes before the call.
PLACES = {
    "folder": (saver, "_make_empty_folder", "checkpoints", True),
    "part": (saver, "_write_tensors", "rank-", True),
    "part written": (saver, "_write_tensors", "rank-", False),
    "commit": (saver, "_write_text", "COMMIT", True),
    "commit written": (saver, "_write_text", "COMMIT", False),
    "named": (Path, "rename", "checkpoints", False),
    "pruning": (shutil, "rmtree", "checkpoints/step-00000005", True),
}


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_save(step: int, place: str, do: Callable[[], None]) -> None:
    owner, name, word, before = PLACES[place]
    function = getattr(owner, name)
    due = [False]
    save = saver.Saver.save_checkpoint

    def checkpoint(self: Any, state: Any) -> None:
        if state.step == step:
            for _, write in self._writes:  # of earlier steps, which are to stand
                write.exception()
            due[0] = True
        save(self, state)

    def killing(path: Any, *rest: Any, **more: Any) -> Any:
        is_due = due[0] and word in str(path)
        if is_due and before:
            do()
        result = function(path, *rest, **more)
        if is_due:
            do()
        return result

    saver.Saver.save_checkpoint = checkpoint  # type: ignore[method-assign]
    setattr(owner, name, killing)


def after_saving(step: int) -> None:
    """Kills at a step, so that it is known from which the run goes on."""
    made, begin = [], saver.Saver.__init__

    def noted(self: Any, *args: Any) -> None:
        begin(self, *args)
        made.append(self)

    def kill(now: int, _: Batch) -> None:
        if now == step:
            for write in made[0]._writes:
                write[1].exception()
            os.kill(os.getpid(), signal.SIGKILL)

    saver.Saver.__init__ = noted  # type: ignore[method-assign]
    at_batch(kill)


def spoil(batch: Batch, modality: str, kind: str) -> None:
    observed = batch.modalities[modality]
    counts = observed.counts
    values = (counts.values if isinstance(counts, SparseCounts) else counts).clone()
    VALUES[kind](values)
    spoilt = (
        values
        if not isinstance(counts, SparseCounts)
        else SparseCounts(counts.indptr, counts.indices, values, counts.n_features)
    )
    object.__setattr__(observed, "profiles", spoilt)


def dump(folder: Path) -> None:
    """Write what this rank begins with."""
    start = loop._start_trainer

    def started(*args: Any) -> Any:
        trainer, state = start(*args)
        folder.mkdir(parents=True, exist_ok=True)
        views = engine_state.collect_tensors(trainer.engine, with_optimizer=True)
        tensors = {name: view.clone() for name, view in views.items()}
        metadata = {"shapes": json.dumps(engine_state.collect_shapes(trainer.engine))}
        path = folder / f"rank-{trainer.ranks.rank:05d}.safetensors"
        save_file(tensors, path, metadata=metadata)
        return trainer, state

    loop._start_trainer = started


if __name__ == "__main__":
    main()
