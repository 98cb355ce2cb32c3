"""Runs many small tasks: on threads of this machine, or on the workers of a Dask scheduler."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import dask
import dask.threaded
from tqdm import tqdm

from clue_dist.allocator import give_back_freed_memory, keep_freed_memory
from clue_dist.errors import DataError, StoreError

CONNECT = "20s"  # how long a scheduler may take to answer
PATIENCE = 5.0  # seconds without a result after which one looks whether there are workers at all


class Progress:
    """A bar on a terminal; elsewhere a line every few seconds, which logs can keep."""

    def __init__(self, title: str, total: int, done: int = 0, every: float = 10.0) -> None:
        self.title, self.total, self.done, self.every = title, total, done, every
        self.lock = threading.Lock()  # steps come from every worker thread
        self.started = self.said = time.monotonic()
        self.bar = (
            tqdm(total=total, initial=done, desc=title, leave=True) if sys.stderr.isatty() else None
        )
        if done and self.bar is None:
            print(f"{title}: {done} of {total} were done before", file=sys.stderr, flush=True)

    def mark_done(self) -> None:
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
            print(
                f"{self.title}: {self.done} of {self.total}, {took:.1f} s",
                file=sys.stderr,
                flush=True,
            )


class WorkerPool(Protocol):
    def run_tasks(
        self, function: Callable[[Any], object], tasks: Sequence[object], progress: Progress
    ) -> None:
        """Call `function` on every task; the first error ends the run and is raised here."""
        ...


class ThreadPool:
    """Dask's threaded scheduler: HDF5, NumPy, Blosc and the kernels leave the interpreter free."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        keep_freed_memory(
            heaps=self.workers
        )  # a third less memory than with a heap for each of TensorStore's threads

    def run_tasks(
        self, function: Callable[[Any], object], tasks: Sequence[object], progress: Progress
    ) -> None:
        def call(i: int) -> None:
            function(tasks[i])
            progress.mark_done()

        give_back_freed_memory()
        delayed = dask.delayed(call, pure=False)
        with ThreadPoolExecutor(
            self.workers
        ) as threads:  # whose end waits for tasks that run after another failed
            dask.compute(
                *(delayed(i) for i in range(len(tasks))), scheduler=dask.threaded.get, pool=threads
            )


class DaskPool:
    """Workers of a running Dask scheduler. They must see the inputs and the output under the same paths.

    Tasks of a worker that dies are given to another one; workers may join and leave at any time.
    """

    def __init__(self, address: str) -> None:
        import distributed

        try:
            distributed.comm.get_address_host_port(
                address, strict=True
            )  # a Client would not end with one that is none
        except ValueError as error:
            fix = "give the address that `dask scheduler` tells when it starts"
            raise DataError(
                "not the address of a Dask scheduler",
                where=f"--scheduler {address}",
                got=str(error),
                expected="tcp://HOST:PORT",
                fix=fix,
            ) from None
        try:
            self.client = distributed.Client(address, timeout=CONNECT, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            fix = "start `dask scheduler` and `dask worker`, or leave --scheduler out"
            raise DataError(
                "no Dask scheduler answers", where=address, got=str(error), fix=fix
            ) from None
        self.address = address

    def run_tasks(
        self, function: Callable[[Any], object], tasks: Sequence[object], progress: Progress
    ) -> None:
        import distributed

        done: SimpleQueue[distributed.Future] = SimpleQueue()
        futures = self.client.map(function, tasks, pure=False, retries=0)
        try:
            for future in futures:
                future.add_done_callback(done.put)
            for _ in futures:
                self._next(done).result()
                progress.mark_done()
        except distributed.scheduler.KilledWorker as error:
            fix = "give each worker more memory or fewer threads, then run the same command again: it goes on"
            got = f"{error.allowed_failures + 1} workers died of it"
            raise StoreError(
                "a task kills its workers", where=self.address, got=got, fix=fix
            ) from None
        except (CancelledError, OSError) as error:
            lost = isinstance(
                error, distributed.comm.CommClosedError
            )  # which the client may not have noticed yet
            if self.client.status == "running" and not lost:
                raise  # an error of the task itself
            fix = "start the scheduler again, then run the same command: it goes on"
            raise StoreError(
                "the Dask scheduler is gone", where=self.address, got=repr(error), fix=fix
            ) from None
        finally:
            if self.client.status == "running":
                self.client.cancel(futures)

    def _next(self, done: SimpleQueue[Any]) -> Any:
        """The next finished future; says so once if there is nobody to wait for."""
        told = False
        while True:
            try:
                return done.get(timeout=PATIENCE)
            except Empty:
                if (
                    not told
                    and self.client.status == "running"
                    and not self.client.scheduler_info()["workers"]
                ):
                    told = True
                    print(
                        f"{self.address} has no workers: waiting for one",
                        file=sys.stderr,
                        flush=True,
                    )


def run_missing(
    pool: WorkerPool, title: str, function: Callable[[Any], object], tasks: Mapping[Path, object]
) -> None:
    """Run the tasks whose result, the key, is not there yet."""
    missing = [task for path, task in tasks.items() if not path.exists()]
    progress = Progress(title, len(tasks), len(tasks) - len(missing))
    try:
        pool.run_tasks(function, missing, progress)
    finally:
        progress.close()


@contextmanager
def open_pool(workers: int | None = None, scheduler: str | None = None) -> Iterator[WorkerPool]:
    """A pool of `workers` threads, or of the workers behind `scheduler` (tcp://host:port)."""
    if scheduler is None:
        yield ThreadPool(workers)
        return
    cluster = DaskPool(scheduler)
    try:
        yield cluster
    finally:
        cluster.client.close()
