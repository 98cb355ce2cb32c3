"""Where numbers go: metrics.jsonl (always), the screen, TensorBoard, wandb. Training never depends on the last two."""

from __future__ import annotations

import io
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from clue_dist.config import Config
from clue_dist.files import translate_write_errors, write_file
from clue_dist.process import print_line
from clue_dist.ranks import Ranks

Numbers = Mapping[str, float | int | str]
T = TypeVar("T")
WANDB_WAIT = 30  # seconds for its server to answer


class Sinks:
    """Rank 0's sinks; on other ranks every call does nothing. `step`: where the run goes on from.

    Raises:
        SavingError: metrics.jsonl cannot be begun, on every rank.
    """

    def __init__(self, run: Path, config: Config, total: int, step: int, ranks: Ranks) -> None:
        self.active, self.total = ranks.is_first, total
        ranks.run_on_first(lambda: self._begin(run, config, step))

    def _begin(self, run: Path, config: Config, step: int) -> None:
        with translate_write_errors("metrics.jsonl", run):
            self._file = _Lines(run / "metrics.jsonl", step)
        self._board = (
            _guarded("TensorBoard", lambda: _tensorboard(run, step))
            if config.log.tensorboard
            else None
        )
        self._wandb = (
            _guarded("wandb", lambda: _wandb(run, config))
            if config.log.wandb != "disabled"
            else None
        )
        self._bar = (
            tqdm(total=self.total, initial=step, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )
        self._began, self._first = time.monotonic(), step

    def count_step(self) -> None:
        """One step is done."""
        if self.active and self._bar is not None:
            self._bar.update()

    def write_numbers(self, split: str, step: int, numbers: Numbers) -> None:
        """Log numbers of a split ("train" or "validation") at a step."""
        if not self.active:
            return
        self._file.write(json.dumps({"step": step, "split": split, **numbers}) + "\n")
        plain = {f"{split}/{k}": v for k, v in numbers.items() if isinstance(v, int | float)}
        if board := self._board:
            self._board = _guarded("TensorBoard", lambda: _to_board(board, plain, step))
        if wandb := self._wandb:
            self._wandb = _guarded("wandb", lambda: (wandb.log(plain, step=step), wandb)[1])
        self._show(split, step, numbers)

    def write_event(self, what: str, step: int, numbers: Numbers) -> None:
        """Log what seldom happens, at a step."""
        self.write_numbers("event", step, {"event": what, **numbers})

    def print_message(self, text: str) -> None:
        if self.active and self._bar is not None:
            with suppress(OSError):  # the terminal was closed
                self._bar.write(text)
        elif self.active:
            print_line(text)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.active:
            return
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            _guarded("TensorBoard", self._board.close)
        if self._wandb is not None:
            _guarded("wandb", self._wandb.finish)
        self._file.close()

    def flush_to_disk(self) -> None:
        """Have metrics.jsonl on disk: a checkpoint that is gone on from must not miss lines before it.

        Raises:
            OSError: the disk is full, say. No line is lost by that: the next call writes them.
        """
        if self.active:
            self._file.sync()

    def _show(self, split: str, step: int, numbers: Numbers) -> None:
        if split == "train" and self._bar is not None:
            loss, wait = (
                _short(numbers.get("loss", "skipped")),
                f"{float(numbers['data_wait']):.1%}",
            )
            self._bar.set_postfix_str(
                f"loss {loss}, {float(numbers['cells_per_s']):,.0f} cells/s, {wait} waiting for data"
            )
            return
        left = ""
        if split == "train":
            pace = (time.monotonic() - self._began) / max(step - self._first, 1)
            left = f"  left {_clock(pace * (self.total - step))}"
        shown = "  ".join(f"{k} {_short(v)}" for k, v in numbers.items())
        self.print_message(f"[{step}/{self.total}] {split:<10} {shown}{left}")


def _short(value: float | int | str) -> str:
    """Four digits are enough on a screen."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class _Lines:
    """metrics.jsonl. Lines that the disk does not take wait in memory; a checkpoint cannot stand without them."""

    def __init__(self, path: Path, step: int) -> None:
        self._path, self._file = path, _reopened(path, step)
        self._left, self._told, self._lock = (
            b"",
            False,
            threading.Lock(),
        )  # a checkpoint's thread syncs

    def write(self, line: str) -> None:
        try:
            with self._lock:
                self._left += line.encode()
                self._flush()
        except OSError as error:
            if not self._told:
                print_line(
                    f"{self._path} cannot be written ({error}): its lines wait for the next checkpoint"
                )
            self._told = True

    def sync(self) -> None:
        with self._lock:
            self._flush()
        os.fsync(
            self._file.fileno()
        )  # which may take long: training writes its next lines meanwhile

    def close(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        while self._left:
            self._left = self._left[self._file.write(self._left) :]


def _reopened(path: Path, step: int) -> io.FileIO:
    """metrics.jsonl for appending, without lines after `step`: what is trained again is logged again."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:  # the last line of a killed run may be cut
                continue
    write_file(path, "".join(line + "\n" for line in kept), durable=True)
    return io.FileIO(path, "a")


def _tensorboard(run: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)


def _to_board(board: Any, numbers: Numbers, step: int) -> Any:
    for name, value in numbers.items():
        board.add_scalar(name, value, step)
    return board


def _wandb(run: Path, config: Config) -> Any:
    """A wandb run in the run folder, offline unless the config says online and the server answers."""
    import wandb

    def begin(mode: str) -> Any:
        return wandb.init(
            project=config.log.project,
            name=run.name,
            dir=str(run),
            mode=mode,
            id=_wandb_id(run),
            resume="allow",
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=WANDB_WAIT, finish_timeout=20
            ),
        )

    try:
        return begin(config.log.wandb)
    except wandb.Error as error:
        if config.log.wandb != "online":
            raise
        print_line(
            f"wandb is offline ({error}): `wandb sync {run}/wandb/offline-run-*` sends the run later"
        )
        wandb.teardown()  # it takes the run for one that is still going on
        return begin("offline")


def _wandb_id(run: Path) -> str:
    """One id a run folder, so that a resumed run continues its curve."""
    path = run / "wandb-id"
    if not path.exists():
        write_file(path, secrets.token_hex(4))
    return path.read_text().strip()


def _guarded(name: str, call: Callable[[], T]) -> T | None:
    """What the call returns; None where the sink fails, which is reported and left."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001  any failure of a sink must leave training alone
        print_line(
            f"{name} is off from here on ({type(error).__name__}: {error}); metrics.jsonl goes on"
        )
        return None
