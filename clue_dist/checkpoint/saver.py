"""Saving beside training: a checkpoint is copied while the next step computes, and written while training goes on.

Between two updates nothing changes what is trained, so the copy runs under the next forward and backward pass; only
the update after it has to wait for it. Files are staged under a temporary name, hashed, and committed by a rename.
"""

from __future__ import annotations

import json
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from clue_dist.checkpoint import engine_state, shards
from clue_dist.checkpoint.run_folder import (
    COMMIT,
    MODEL,
    STATE,
    WEIGHTS,
    RunState,
    list_checkpoints,
    parse_step,
    read_best_step,
)
from clue_dist.errors import ClueError, SavingError
from clue_dist.files import sync_to_disk, translate_write_errors
from clue_dist.process import print_line
from clue_dist.ranks import Ranks
from clue_dist.store.writer import hash_file

Kind = Literal["checkpoints", "best"]
Listing = dict[str, dict[str, Any]]  # file -> size and hash, what COMMIT.json holds


class Saver:
    """Saves checkpoints and best weights of a run. Every rank must make the same calls at the same steps.

    before_commit: what rank 0 must have done for a checkpoint to stand, in the thread that writes it.
    waited_seconds: seconds training has waited for saving so far. Raises from `check` and `finish`, on all ranks alike:
        SavingError: a file could not be written; what was half written is removed, what was committed stands.
    """

    def __init__(
        self,
        run: Path,
        engine: Any,
        ranks: Ranks,
        keep: int,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        self._run, self._engine, self._keep = run, engine, keep
        self._ranks = ranks.open_side_channel()
        self._before_commit = before_commit or _nothing
        # Ranks of an attempt that is over for Slurm may live on for a while: they must not write where we do.
        self._attempt = ranks.run_on_first(lambda: secrets.token_hex(4))
        self._shapes = json.dumps(engine_state.collect_shapes(engine))
        self._copier, self._writer = _Worker("copy"), _Worker("write")
        self._copies: list[Future[Any]] = []
        self._writes: list[tuple[int, Future[Any]]] = []  # by step
        self._broken: SavingError | None = None
        self.waited_seconds = 0.0

    # --- called by training ---

    def save_checkpoint(self, state: RunState) -> None:
        """Save all that the run needs to go on; drop the oldest. Waits for what earlier steps saved, if need be."""
        self._save("checkpoints", state, optimizer=True)

    def save_best_weights(self, state: RunState) -> None:
        """Keep the weights alone of the best validation so far; the next checkpoint drops those before it."""
        self._save("best", state, optimizer=False)

    def wait_for_copies(self) -> None:
        """What is about to change has been copied when this returns."""
        self._wait(self._copies)
        self._copies = []

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows of a failure; the others know as soon as they get there, `finish` raises on all."""
        return any(write.done() and write.exception() for _, write in self._writes)

    def finish(self) -> None:
        """Wait until everything asked for is committed."""
        self.wait_for_copies()
        writes, self._writes = [write for _, write in self._writes], []
        self._wait(writes)
        for write in writes:
            write.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Before an error that was told ends the run, what is under way is committed, or fails and is removed."""
        deadline = time.monotonic() + SETTLE
        for _, write in self._writes if isinstance(error, ClueError) else []:
            with suppress(TimeoutError, CancelledError):
                write.exception(max(0.0, deadline - time.monotonic()))
        for worker in (self._copier, self._writer) if error is None else ():
            worker.close()

    def _wait(self, futures: list[Future[Any]]) -> None:
        began = time.perf_counter()
        for future in futures:
            future.exception()
        self.waited_seconds += time.perf_counter() - began

    # --- the two threads ---

    def _save(self, kind: Kind, state: RunState, optimizer: bool) -> None:
        # No more is held in memory than what one earlier step and this one save.
        self._wait([write for step, write in self._writes if step < state.step])
        began = time.perf_counter()
        views = engine_state.collect_tensors(self._engine, optimizer)
        copied = self._copier.do(_copier(views))
        self._copies.append(copied)
        self._writes = [(step, w) for step, w in self._writes if not w.done() or w.exception()]
        self._writes.append((state.step, self._writer.do(lambda: self._write(kind, state, copied))))
        self.waited_seconds += time.perf_counter() - began

    def _write(self, kind: Kind, state: RunState, copied: Future[dict[str, Tensor]]) -> None:
        """Every rank's writer is here at the same time; they speak by a channel of their own.

        After a failure nothing more is written: what comes later may rely on what is missing.
        """
        if self._broken is not None:
            raise self._broken
        ranks = self._ranks
        final = self._run / kind / f"step-{state.step:08d}"
        partial = final.with_suffix(f".{self._attempt}.partial")
        mine = partial / f"rank-{ranks.rank:05d}.safetensors"
        told = translate_write_errors("a checkpoint", partial)
        try:
            ranks.run_on_first(told(lambda: _empty(partial)))
            parts = ranks.run_on_all(
                told(lambda: _write_tensors(mine, copied.result(), shapes=self._shapes))
            )
            listing = {name: entry for one in parts for name, entry in one.items()}
            ranks.run_on_first(told(lambda: self._commit(kind, state, partial, final, listing)))
        except SavingError as error:
            self._broken = error
            if ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _commit(
        self, kind: Kind, state: RunState, partial: Path, final: Path, listing: Listing
    ) -> None:
        """On rank 0, once all parts are there."""
        if kind == "best":
            listing = _merge(partial, listing)
        _write_text(partial / STATE, json.dumps(asdict(state), indent=1))
        _write_text(partial / COMMIT, json.dumps(listing | _listed(partial / STATE), indent=1))
        sync_to_disk(partial)
        self._before_commit()
        partial.rename(final)
        sync_to_disk(final.parent)
        if kind == "checkpoints":
            self._prune(state)

    def _prune(self, state: RunState) -> None:
        """After the commit, which it cannot undo: drop the oldest checkpoints, the best weights that none of those left
        names, and what was set aside of steps that this attempt has passed."""
        there = list_checkpoints(self._run / "checkpoints")
        named = {read_best_step(kept) for kept in there[: self._keep]}
        unnamed = [
            best for best in list_checkpoints(self._run / "best") if parse_step(best) not in named
        ]
        aside = [p for p in self._run.glob("*/step-*.aside") if parse_step(p) <= state.step]
        for old in [*there[self._keep :], *unnamed, *aside]:
            doomed = old.with_suffix(
                ".partial"
            )  # so that what is left of it is not taken for a checkpoint
            try:
                old.rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:  # the save itself stands
                print_line(f"{old} could not be removed, and is left: {error}")


def _merge(partial: Path, listing: Listing) -> Listing:
    """The ranks' parts as one file, to be shared and read by other tools."""
    files = [partial / name for name in sorted(listing)]
    whole = shards.assemble_tensors(files)
    merged = {name.removeprefix(MODEL): values for name, values in whole.items()}
    for file in files:
        file.unlink()
    return _write_tensors(partial / WEIGHTS, merged)


def _copier(views: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Copies of tensors on the CPU. Buffers and what is small are copied at once, as a forward pass may change them."""
    now = {name: view.clone() for name, view in views.items() if view.numel() < SMALL}
    device = next((v.device for v in views.values() if v.device.type == "cuda"), None)
    ready = torch.cuda.current_stream(device).record_event() if device is not None else None

    def copy() -> dict[str, Tensor]:
        if ready is None:
            return {
                name: now[name] if name in now else view.clone() for name, view in views.items()
            }
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            out = {
                name: now.get(name, view).to("cpu", non_blocking=False)
                for name, view in views.items()
            }
        return out

    return copy


SETTLE = 25.0  # seconds at most: another rank may be gone
SMALL = 1 << 16  # elements; what forward passes change is far smaller


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Listing:
    save_file(dict(tensors), path, metadata=metadata)
    sync_to_disk(path)
    return _listed(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    sync_to_disk(path)


def _listed(path: Path) -> Listing:
    return {path.name: hash_file(path).model_dump()}


def _nothing() -> None:
    pass


class _Worker:
    """A thread that does one thing after another. It ends with the process, however that ends."""

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"saver-{name}", daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._queue.put((future, work))
        return future

    def close(self) -> None:
        """After the work that was given."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            future, work = job
            del job
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  whoever waits for the future is told
                future.set_exception(error)
            del future, work  # and the copies they hold
