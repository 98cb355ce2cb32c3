"""Saving beside training.

A checkpoint is copied while the next step computes, and written while training goes on. Between two
updates nothing changes what is trained, so that the copy runs under the next forward and backward
pass, and only the update after it has to wait. Files are staged under a temporary name, hashed, and
committed by a rename.
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
    CHECKPOINT_NAME,
    COMMIT,
    MODEL_PREFIX,
    STATE,
    WEIGHTS,
    RunState,
    list_checkpoints,
    name_checkpoint,
    parse_step,
    read_best_step,
)
from clue_dist.errors import ClueError, SavingError
from clue_dist.files import apply_umask, sync_to_disk, translate_write_errors
from clue_dist.process import print_line
from clue_dist.ranks import Ranks
from clue_dist.store.writer import hash_file

Kind = Literal["checkpoints", "best"]  # the folder in the run folder
Listing = dict[str, dict[str, Any]]  # size and hash by file, what COMMIT.json holds

SETTLE_LIMIT = 25.0  # seconds that an error waits for saves under way: another rank may be gone
SMALL = 1 << 16  # elements; all that a forward pass changes is far smaller


class Saver:
    """Saves checkpoints and best weights. Every rank must make the same calls at the same steps.

    Args:
        run_folder: the run folder.
        engine: what is saved.
        ranks: this rank among all.
        keep: how many checkpoints are kept.
        before_commit: what rank 0 does before a checkpoint or best weights may count, in the thread
            that writes them.

    Raises:
        SavingError: from `finish`, on all ranks alike: a file could not be written. What was half
            written is removed, what was committed stays.
    """

    def __init__(
        self,
        run_folder: Path,
        engine: Any,
        ranks: Ranks,
        keep: int,
        before_commit: Callable[[Kind], None] | None = None,
    ) -> None:
        self._run_folder, self._engine, self._keep = run_folder, engine, keep
        self._ranks = ranks.open_side_channel()  # for the thread that writes
        self._before_commit = before_commit
        # An attempt that is over for Slurm may live on for a while, and must not write where we do.
        self._attempt = ranks.run_on_first(lambda: secrets.token_hex(4))
        self._shapes = json.dumps(engine_state.collect_shapes(engine))
        self._copier, self._writer = _WorkThread("copy"), _WorkThread("write")
        self._copies: list[Future[Any]] = []  # copies of what the next update will change
        self._writes: list[tuple[int, Future[Any]]] = []  # with the step
        self._failure: SavingError | None = None
        self.waited_seconds = 0.0  # how long training has waited for saving so far

    # --- what training calls ---

    def save_checkpoint(self, state: RunState) -> None:
        """Save all that the run needs to go on, then drop the oldest checkpoint.

        Training waits here until what earlier steps saved is written.
        """
        self._save("checkpoints", state, with_optimizer=True)

    def save_best_weights(self, state: RunState) -> None:
        """Save the weights alone; the next checkpoint drops the best weights before them."""
        self._save("best", state, with_optimizer=False)

    def wait_for_copies(self) -> None:
        """Wait until all that the next update will change is copied."""
        self._wait(self._copies)
        self._copies = []

    @property
    def has_failed(self) -> bool:
        """Whether a save of this rank has failed; `finish` raises why, on all ranks."""
        return any(write.done() and write.exception() for _, write in self._writes)

    def finish(self) -> None:
        """Wait until everything is committed; see the class for what it raises."""
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
        """End the threads. Before an error of ours ends the run, saves under way may settle."""
        deadline = time.monotonic() + SETTLE_LIMIT
        for _, write in self._writes if isinstance(error, ClueError) else []:
            with suppress(TimeoutError, CancelledError):
                write.exception(max(0.0, deadline - time.monotonic()))
        for thread in (self._copier, self._writer) if error is None else ():
            thread.close()

    def _save(self, kind: Kind, state: RunState, with_optimizer: bool) -> None:
        """Give the two threads their work."""
        # Memory holds the copies of at most two saves: an earlier one and this one.
        self._wait([write for step, write in self._writes if step < state.step])
        started = time.perf_counter()
        copy = _prepare_copy(engine_state.collect_tensors(self._engine, with_optimizer))
        copied = self._copier.start(copy)
        self._copies.append(copied)
        # A failure stays in the list, for `has_failed` and `finish`.
        self._writes = [
            (step, write) for step, write in self._writes if not write.done() or write.exception()
        ]
        written = self._writer.start(lambda: self._write(kind, state, copied))
        self._writes.append((state.step, written))
        self.waited_seconds += time.perf_counter() - started

    def _wait(self, futures: list[Future[Any]]) -> None:
        """Wait for work, however it ends, and count the time."""
        started = time.perf_counter()
        for future in futures:
            future.exception()
        self.waited_seconds += time.perf_counter() - started

    # --- what the writing thread does ---

    def _write(self, kind: Kind, state: RunState, copied: Future[dict[str, Tensor]]) -> None:
        """Write and commit. The writers of all ranks do so together, on a channel of their own.

        After a failure nothing more is written: what comes later may rely on what is missing.
        """
        if self._failure is not None:
            raise self._failure
        ranks = self._ranks
        final = self._run_folder / kind / name_checkpoint(state.step)
        partial = final.with_suffix(f".{self._attempt}.partial")
        shard_file = partial / f"rank-{ranks.rank:05d}.safetensors"
        translated = translate_write_errors("a checkpoint", partial)
        try:
            ranks.run_on_first(translated(lambda: _make_empty_folder(partial)))
            listings = ranks.run_on_all(
                translated(lambda: _write_tensors(shard_file, copied.result(), shapes=self._shapes))
            )
            listing = {name: entry for files in listings for name, entry in files.items()}
            ranks.run_on_first(
                translated(lambda: self._commit(kind, state, partial, final, listing))
            )
        except SavingError as error:
            self._failure = error
            if ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _commit(
        self, kind: Kind, state: RunState, partial: Path, final: Path, listing: Listing
    ) -> None:
        """Commit what all ranks have written; rank 0 does."""
        if kind == "best":
            listing = _merge_shards(partial, listing)
        _write_text(partial / STATE, json.dumps(asdict(state), indent=1))
        listing = listing | _list_file(partial / STATE)
        _write_text(partial / COMMIT, json.dumps(listing, indent=1))
        sync_to_disk(partial)
        if self._before_commit is not None:
            self._before_commit(kind)
        partial.rename(final)
        sync_to_disk(final.parent)
        if kind == "checkpoints":
            self._drop_old(state)

    def _drop_old(self, state: RunState) -> None:
        """Remove what is not needed any more. The commit before stands, even if this fails.

        That is: the oldest checkpoints, best weights that none of the remaining checkpoints names,
        and what was set aside of steps that this attempt has passed.
        """
        checkpoints = list_checkpoints(self._run_folder / "checkpoints")
        best_steps = {read_best_step(checkpoint) for checkpoint in checkpoints[: self._keep]}
        unnamed = [
            best
            for best in list_checkpoints(self._run_folder / "best")
            if parse_step(best) not in best_steps
        ]
        aside = [
            path
            for path in self._run_folder.glob("*/step-*.aside")
            if CHECKPOINT_NAME.fullmatch(path.stem) and parse_step(path) <= state.step
        ]
        for path in [*checkpoints[self._keep :], *unnamed, *aside]:
            # Renamed first, so that what may be left of it is not taken for a checkpoint.
            doomed = path.with_suffix(".partial")
            try:
                path.rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                print_line(f"{path} could not be removed, and is left: {error}")


def _merge_shards(partial: Path, listing: Listing) -> Listing:
    """Make one file of the ranks' files, which can be shared and read by other tools."""
    files = [partial / name for name in sorted(listing)]
    tensors = shards.assemble_tensors(files)
    weights = {name.removeprefix(MODEL_PREFIX): values for name, values in tensors.items()}
    for file in files:
        file.unlink()
    return _write_tensors(partial / WEIGHTS, weights)


def _prepare_copy(views: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Make the function that copies tensors to the CPU, for the copying thread.

    What is small is copied at once: a forward pass may change a buffer.
    """
    small = {name: view.clone() for name, view in views.items() if view.numel() < SMALL}
    device = next((view.device for view in views.values() if view.device.type == "cuda"), None)
    ready = torch.cuda.current_stream(device).record_event() if device is not None else None

    def copy_tensors() -> dict[str, Tensor]:
        if ready is None:
            return {
                name: small[name] if name in small else view.clone() for name, view in views.items()
            }
        # Beside the stream that computes, but after what had been computed by then.
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            return {
                name: small.get(name, view).to("cpu", non_blocking=False)
                for name, view in views.items()
            }

    return copy_tensors


def _make_empty_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Listing:
    with apply_umask(path):
        save_file(dict(tensors), path, metadata=metadata)
    sync_to_disk(path)
    return _list_file(path)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    sync_to_disk(path)


def _list_file(path: Path) -> Listing:
    return {path.name: hash_file(path).model_dump()}


class _WorkThread:
    """A thread that does one thing after another. It ends with the process, however that ends."""

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"saver-{name}", daemon=True)
        self._thread.start()

    def start(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._queue.put((future, work))
        return future

    def close(self) -> None:
        """Wait until all work is done, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            future, work = item
            del item
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  raised in the thread that waits for it
                future.set_exception(error)
            del future, work  # and the copies that they hold
