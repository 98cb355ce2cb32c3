"""Where numbers go: metrics.jsonl (always), the screen, TensorBoard, wandb. Training never depends on the last two."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clue_dist.config import Config
from clue_dist.errors import SavingError

Numbers = Mapping[str, float | int | str]


class Sinks:
    """Rank 0's sinks; on other ranks every call does nothing. `step`: where the run goes on from."""

    def __init__(self, run: Path, config: Config, total: int, step: int, active: bool) -> None:
        self.active, self.total, self._run = active, total, run
        if not active:
            return
        self._file = _reopened(run / "metrics.jsonl", step)
        self._board = _tensorboard(run, step) if config.log.tensorboard else None
        self._wandb = _wandb(run, config) if config.log.wandb != "disabled" else None
        self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self._began, self._first = time.monotonic(), step

    def advance(self) -> None:
        """One step is done."""
        if self.active and self._bar is not None:
            self._bar.update()

    def write(self, split: str, step: int, numbers: Numbers) -> None:
        """Log numbers of a split ("train" or "validation") at a step."""
        if not self.active:
            return
        self._to_file(json.dumps({"step": step, "split": split, **numbers}) + "\n")
        plain = {k: v for k, v in numbers.items() if isinstance(v, int | float)}
        if self._board is not None:
            for name, value in plain.items():
                self._board.add_scalar(f"{split}/{name}", value, step)
        self._log_wandb({f"{split}/{k}": v for k, v in plain.items()}, step)
        self._show(split, step, numbers)

    def event(self, what: str, step: int, numbers: Numbers) -> None:
        """Log what seldom happens, at a step."""
        self.write("event", step, {"event": what, **numbers})

    def say(self, text: str) -> None:
        if self.active:
            try:
                self._bar.write(text) if self._bar is not None else print(text, flush=True)
            except OSError:  # nobody reads any more: a connection was closed, and metrics.jsonl goes on
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.active:
            return
        self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            _guarded(self._wandb.finish)

    def _to_file(self, line: str) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            fix = "make room, then type the same command: it goes on from the last checkpoint that was committed"
            raise SavingError("metrics.jsonl could not be written", where=self._run, got=error, fix=fix) from error

    def _log_wandb(self, numbers: dict[str, Any], step: int) -> None:
        if self._wandb is not None and not _guarded(self._wandb.log, numbers, step=step):
            self._wandb = None

    def _show(self, split: str, step: int, numbers: Numbers) -> None:
        if split == "train" and self._bar is not None:
            loss, wait = _short(numbers.get("loss", "skipped")), f"{float(numbers['data_wait']):.1%}"
            self._bar.set_postfix_str(
                f"loss {loss}, {float(numbers['cells_per_s']):,.0f} cells/s, {wait} waiting for data"
            )
            return
        left = ""
        if split == "train":
            pace = (time.monotonic() - self._began) / max(step - self._first, 1)
            left = f"  left {_clock(pace * (self.total - step))}"
        shown = "  ".join(f"{k} {_short(v)}" for k, v in numbers.items())
        self.say(f"[{step}/{self.total}] {split:<10} {shown}{left}")


def _short(value: float | int | str) -> str:
    """Four digits are enough on a screen."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _reopened(path: Path, step: int) -> Any:
    """metrics.jsonl for appending, without lines after `step`: what is trained again is logged again."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:  # the last line of a killed run may be cut
                continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.rename(path)
    return path.open("a")


def _tensorboard(run: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)


def _wandb(run: Path, config: Config) -> Any:
    """A wandb run in the run folder, offline unless the config says online; None if it cannot be started."""
    import wandb

    started: list[Any] = []

    def start() -> None:
        settings = wandb.Settings(silent=True, console="off", init_timeout=30, finish_timeout=20)
        started.append(
            wandb.init(
                project=config.log.project,
                name=run.name,
                dir=str(run),
                mode=config.log.wandb,
                id=_wandb_id(run),
                resume="allow",
                config=config.model_dump(mode="json"),
                settings=settings,
            )
        )

    _guarded(start)
    return started[0] if started else None


def _wandb_id(run: Path) -> str:
    """One id a run folder, so that a resumed run continues its curve."""
    path = run / "wandb-id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def _guarded(call: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether the call went through; a failing sink is reported and left."""
    try:
        call(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  any failure of wandb must leave training alone
        print(f"wandb is off from here on ({type(error).__name__}: {error}); metrics.jsonl goes on", flush=True)
        return False
    return True
