"""Runs many small tasks: on threads of this machine, or on the workers of a Dask scheduler."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import dask
from tqdm import tqdm

from clue_dist.errors import DataError

CONNECT = "20s"  # how long a scheduler may take to answer


class Progress:
    """A bar on a terminal; elsewhere a line every few seconds, which logs can keep."""

    def __init__(self, title: str, total: int, done: int = 0, every: float = 10.0) -> None:
        self.title, self.total, self.done, self.every = title, total, done, every
        self.lock = threading.Lock()  # steps come from every worker thread
        self.started = self.said = time.monotonic()
        self.bar = tqdm(total=total, initial=done, desc=title, leave=True) if sys.stderr.isatty() else None

    def step(self) -> None:
        with self.lock:
            self.done += 1
            if self.bar is not None:
                self.bar.update()
            elif time.monotonic() - self.said > self.every and self.done < self.total:
                self.said = time.monotonic()
                print(f"{self.title}: {self.done} of {self.total}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.done == self.total:
            took = time.monotonic() - self.started
            print(f"{self.title}: {self.done} of {self.total}, {took:.1f} s", file=sys.stderr, flush=True)


class Pool(Protocol):
    def run(self, function: Callable[[Any], object], tasks: Sequence[object], progress: Progress) -> None:
        """Call `function` on every task; the first error ends the run and is raised here."""
        ...


class Threads:
    """Dask's threaded scheduler: HDF5, NumPy, Blosc and the kernels leave the interpreter free."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))

    def run(self, function: Callable[[Any], object], tasks: Sequence[object], progress: Progress) -> None:
        def call(i: int) -> None:
            function(tasks[i])
            progress.step()

        delayed = dask.delayed(call, pure=False)
        dask.compute(*(delayed(i) for i in range(len(tasks))), scheduler="threads", num_workers=self.workers)


class Cluster:
    """Workers of a running Dask scheduler. They must see the inputs and the output under the same paths."""

    def __init__(self, address: str) -> None:
        import distributed

        try:
            self.client = distributed.Client(address, timeout=CONNECT, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            fix = "start `dask scheduler` and `dask worker`, or leave --scheduler out"
            raise DataError("no Dask scheduler answers", where=address, got=str(error), fix=fix) from None

    def run(self, function: Callable[[Any], object], tasks: Sequence[object], progress: Progress) -> None:
        import distributed

        futures = self.client.map(function, tasks, pure=False, retries=0)
        try:
            for future in distributed.as_completed(futures, loop=self.client.loop):
                future.result()
                progress.step()
        finally:
            self.client.cancel(futures)


@contextmanager
def pool(workers: int | None = None, scheduler: str | None = None) -> Iterator[Pool]:
    """A pool of `workers` threads, or of the workers behind `scheduler` (tcp://host:port)."""
    if scheduler is None:
        yield Threads(workers)
        return
    cluster = Cluster(scheduler)
    try:
        yield cluster
    finally:
        cluster.client.close()
