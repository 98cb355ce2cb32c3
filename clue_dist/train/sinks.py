"""Where numbers go: always to metrics.jsonl and the screen, if asked to TensorBoard and wandb.

A failure of one of the last two is reported, and training goes on without it.
"""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from clue_dist.checkpoint.metrics_lines import read_metrics_lines
from clue_dist.checkpoint.run_folder import name_checkpoint
from clue_dist.checkpoint.wandb_run import open_wandb_run
from clue_dist.config import Config
from clue_dist.files import translate_write_errors, write_file
from clue_dist.process import print_line
from clue_dist.progress import has_spectator
from clue_dist.ranks import Ranks
from clue_dist.train.log_lines import Numbers, format_log_line, format_value

T = TypeVar("T")
# Numbers of a validation that say which weights are kept, and with which score.
_CHOICE = frozenset({"best_step", "best_score", "lowest_step", "lowest_score", "error"})


class Sinks:
    """The sinks of rank 0. On other ranks every call does nothing.

    Args:
        run_folder: the run folder.
        config: what is trained, and which sinks are wanted.
        total_steps: optimizer steps until training is done.
        step: the step from which the run goes on.
        ranks: this rank among all; every rank must call.

    Raises:
        SavingError: metrics.jsonl cannot be begun, on every rank.
    """

    def __init__(
        self, run_folder: Path, config: Config, total_steps: int, step: int, ranks: Ranks
    ) -> None:
        self._is_active, self._total_steps = ranks.is_first, total_steps
        ranks.run_on_first(lambda: self._open_all(run_folder, config, step))

    def _open_all(self, run_folder: Path, config: Config, step: int) -> None:
        with translate_write_errors("metrics.jsonl", run_folder):
            self._file = _MetricsFile(run_folder / "metrics.jsonl", step)
        self._board = self._wandb = self._bar = None
        if config.log.tensorboard:
            self._board = _call_guarded("TensorBoard", lambda: _open_tensorboard(run_folder, step))
        if config.log.wandb != "disabled":
            settings = config.model_dump(mode="json")
            self._wandb = _call_guarded(
                "wandb", lambda: open_wandb_run(run_folder, config.log, settings)
            )
        self._run_folder, self._sends_weights = run_folder, config.log.artifacts
        if has_spectator():
            self._bar = tqdm(total=self._total_steps, initial=step, unit="step", dynamic_ncols=True)
        self._started, self._first_step = time.monotonic(), step
        # Steps between lines on the screen, and the step from which the next validation is shown.
        self._interval, self._next_validation = config.log.every, step

    def count_step(self) -> None:
        """Move the progress bar on by a step."""
        if self._is_active and self._bar is not None:
            self._bar.update()

    def write_numbers(self, split: str, step: int, numbers: Numbers) -> None:
        """Write numbers to every sink.

        Args:
            split: "train", "validation" or "event".
            step: the optimizer step that they belong to.
            numbers: by name.
        """
        if not self._is_active:
            return
        self._file.write_line(json.dumps({"step": step, "split": split, **numbers}))
        plain = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
        if board := self._board:
            self._board = _call_guarded(
                "TensorBoard", lambda: _write_board(board, split, step, plain)
            )
        if run := self._wandb:
            self._wandb = _call_guarded("wandb", lambda: _write_wandb(run, split, step, plain))
        self._show(split, step, numbers)

    def write_event(self, what: str, step: int, numbers: Numbers) -> None:
        """Write down what seldom happens, with numbers that belong to it."""
        self.write_numbers("event", step, {"event": what, **numbers})

    def send_best_weights(self, step: int, score: float | None) -> None:
        """Give wandb the best weights as an artifact, where the config asks for that.

        Args:
            step: the step of the weights, which are committed.
            score: their validation score; None where there is none.
        """
        if self._is_active and self._sends_weights and (run := self._wandb):
            folder = self._run_folder
            self._wandb = _call_guarded("wandb", lambda: _log_weights(run, folder, step, score))

    def print_message(self, text: str) -> None:
        """Print a line to the screen, above the progress bar if there is one."""
        if self._is_active and self._bar is not None:
            with suppress(OSError):  # the terminal was closed
                self._bar.write(text)
        elif self._is_active:
            print_line(text)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_active:
            return
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            _call_guarded("TensorBoard", self._board.close)
        if self._wandb is not None:
            _call_guarded("wandb", self._wandb.finish)
        self._file.close()

    def flush_to_disk(self) -> None:
        """Wait until metrics.jsonl is on the disk: a checkpoint must not miss lines before it.

        Raises:
            OSError: the disk is full, for one. No line is lost: the next call writes them.
        """
        if self._is_active:
            self._file.flush_to_disk()

    def _show(self, split: str, step: int, numbers: Numbers) -> None:
        """Show numbers on the screen, those of training beside the progress bar if there is one."""
        if split == "train" and self._bar is not None:
            loss = format_value(numbers.get("loss", "skipped"))
            rate, wait = float(numbers["cells_per_s"]), float(numbers["data_wait"])
            self._bar.set_postfix_str(
                f"loss {loss}, {rate:,.0f} cells/s, {wait:.1%} waiting for data"
            )
            return
        seconds_left = None
        if split == "train":
            step_seconds = (time.monotonic() - self._started) / max(step - self._first_step, 1)
            seconds_left = step_seconds * (self._total_steps - step)
        elif split == "validation":
            # A small run validates every few steps: its lines would hide those of training.
            if step < self._next_validation and step < self._total_steps:
                return
            self._next_validation = step + self._interval
        self.print_message(format_log_line(split, step, self._total_steps, numbers, seconds_left))


# --- metrics.jsonl ------------------------------------------------------------------------------


class _MetricsFile:
    """Lines that the disk does not take wait in memory; no checkpoint is committed without them."""

    def __init__(self, path: Path, step: int) -> None:
        self._path, self._file = path, _reopen_metrics(path, step)
        self._pending = b""  # what the disk has not taken yet
        self._has_complained = False
        self._lock = threading.Lock()  # a thread of the saver flushes, too

    def write_line(self, line: str) -> None:
        try:
            with self._lock:
                self._pending += f"{line}\n".encode()
                self._write_pending()
        except OSError as error:
            if not self._has_complained:
                print_line(
                    f"{self._path} cannot be written ({error}): its lines wait for the next "
                    "checkpoint"
                )
            self._has_complained = True

    def flush_to_disk(self) -> None:
        with self._lock:
            self._write_pending()
        # Without the lock, as it may take long: training writes its next lines meanwhile.
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write_pending(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]


def _reopen_metrics(path: Path, step: int) -> io.FileIO:
    """Open metrics.jsonl to append, less the lines after `step`: those steps are trained again."""
    lines = read_metrics_lines(path)
    # The last line of a killed run may be cut: that is nothing to report.
    n_unreadable = sum(line.row is None for line in lines[:-1])
    if n_unreadable:
        print_line(f"{path}: lines that cannot be read are left out: {n_unreadable}")
    kept = b"".join(line.text + b"\n" for line in lines if line.is_until(step))
    write_file(path, kept, durable=True)
    return io.FileIO(path, "a")


# --- TensorBoard and wandb ----------------------------------------------------------------------


def _open_tensorboard(run_folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_folder / "tensorboard"), purge_step=step + 1 if step else None)


def _write_board(board: Any, split: str, step: int, numbers: Numbers) -> Any:
    for name, value in numbers.items():
        board.add_scalar(f"{split}/{name}", value, step)
    return board


def _write_wandb(run: Any, split: str, step: int, numbers: Numbers) -> Any:
    """Log numbers to wandb; its summary holds those of the weights that are kept."""
    run.log({f"{split}/{name}": value for name, value in numbers.items()}, step=step)
    if split == "validation" and numbers.get("best_step") == step:
        scores = {f"best/{name}": value for name, value in numbers.items() if name not in _CHOICE}
        run.summary.update({"best/step": step, **scores})
    return run


def _log_weights(run: Any, run_folder: Path, step: int, score: float | None) -> Any:
    """Log the files that a shared model has as an artifact."""
    import wandb

    artifact = wandb.Artifact(
        f"clue-{run.id}", type="model", metadata={"step": step, "score": score}
    )
    weights = run_folder / "best" / name_checkpoint(step)
    # "immutable" spares a copy: nothing changes files that are committed.
    for name in ("config.json", "model.json"):
        artifact.add_file(str(run_folder / name), name=name)
    artifact.add_dir(str(weights), name=f"best/{weights.name}", policy="immutable")
    run.log_artifact(artifact, aliases=["best"])
    return run


def _call_guarded(name: str, call: Callable[[], T]) -> T | None:
    """What the call returns; None if the sink fails, which is reported."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001  no failure of a sink may reach training
        print_line(
            f"{name} is off from here on ({type(error).__name__}: {error}); metrics.jsonl goes on"
        )
        return None
