"""Runs many small tasks: on threads of this machine, or on the workers of a Dask scheduler."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from clue_dist.allocator import give_back_freed_memory, keep_freed_memory
from clue_dist.errors import DataError, StoreError
from clue_dist.progress import Progress

CONNECT = "20s"  # how long a scheduler may take to answer
SECONDS_WITHOUT_RESULT = 5.0  # after which the scheduler is asked for its workers


class WorkerPool(Protocol):
    """What runs tasks."""

    def run_tasks(
        self, function: Callable[[Any], object], tasks: Sequence[object], progress: Progress
    ) -> None:
        """Call `function` on every task; the first error ends the run and is raised here."""
        ...


class ThreadPool:
    """Threads of this process: HDF5, NumPy, Blosc and the kernels leave the interpreter free."""

    def __init__(self, workers: int | None = None) -> None:
        """Choose the number of threads; None: one for each core."""
        self.workers = workers or len(os.sched_getaffinity(0))
        # A heap for each of TensorStore's threads, too, would take half as much memory again.
        keep_freed_memory(heaps=self.workers)

    def run_tasks(
        self, function: Callable[[Any], object], tasks: Sequence[object], progress: Progress
    ) -> None:
        give_back_freed_memory()
        with ThreadPoolExecutor(self.workers) as threads:
            futures = [threads.submit(function, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
                    progress.mark_done()
            finally:
                # After an error, tasks may still be running: the executor waits for them alone.
                threads.shutdown(wait=False, cancel_futures=True)


class DaskPool:
    """Workers of a running Dask scheduler, which see inputs and output under the same paths.

    Tasks of a worker that dies are given to another one; workers may join and leave at any time.
    """

    def __init__(self, address: str) -> None:
        """Connect to the scheduler.

        Raises:
            DataError: the address is not a scheduler's, or no scheduler answers there.
        """
        import distributed

        # A Client would try for ever to connect to what is not an address.
        try:
            distributed.comm.get_address_host_port(address, strict=True)
        except ValueError as error:
            raise DataError(
                "not the address of a Dask scheduler",
                where=f"--scheduler {address}",
                got=str(error),
                expected="tcp://HOST:PORT",
                fix="give the address that `dask scheduler` tells when it starts",
            ) from None
        try:
            self.client = distributed.Client(address, timeout=CONNECT, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            what = "no Dask scheduler answers"
            fix = "start `dask scheduler` and `dask worker`, or leave --scheduler out"
            raise DataError(what, where=address, got=str(error), fix=fix) from None
        self.address = address

    def run_tasks(
        self, function: Callable[[Any], object], tasks: Sequence[object], progress: Progress
    ) -> None:
        import distributed

        # Futures in the order in which they end, each from a thread of the client.
        done: SimpleQueue[distributed.Future] = SimpleQueue()
        # pure: two equal tasks are still two. retries: an error of a task is not passing.
        futures = self.client.map(function, tasks, pure=False, retries=0)
        try:
            for future in futures:
                future.add_done_callback(done.put)
            for _ in futures:
                self._wait_for_result(done).result()
                progress.mark_done()
        except distributed.scheduler.KilledWorker as error:
            raise StoreError(
                "a task kills its workers",
                where=self.address,
                got=f"{error.allowed_failures + 1} workers died of it",
                fix="give each worker more memory or fewer threads, then run the same command "
                "again: it goes on",
            ) from None
        except (CancelledError, OSError) as error:
            # The client may not have noticed yet that its connection is closed.
            is_closed = isinstance(error, distributed.comm.CommClosedError)
            if self.client.status == "running" and not is_closed:
                raise  # an error of the task itself
            what = "the Dask scheduler is gone"
            fix = "start the scheduler again, then run the same command: it goes on"
            raise StoreError(what, where=self.address, got=repr(error), fix=fix) from None
        finally:
            if self.client.status == "running":
                self.client.cancel(futures)

    def _wait_for_result(self, done: SimpleQueue[Any]) -> Any:
        """The next finished future; where there are no workers to wait for, say so once."""
        said_so = False
        while True:
            try:
                return done.get(timeout=SECONDS_WITHOUT_RESULT)
            except Empty:
                if said_so or self.client.status != "running":
                    continue
                if not self.client.scheduler_info()["workers"]:
                    said_so = True
                    text = f"{self.address} has no workers: waiting for one"
                    print(text, file=sys.stderr, flush=True)


def run_missing(
    pool: WorkerPool, title: str, function: Callable[[Any], object], tasks: Mapping[Path, object]
) -> None:
    """Run the tasks that an earlier run has not done.

    Args:
        pool: runs them.
        title: title of the progress bar.
        function: takes a task and leaves its result.
        tasks: by the path of their result, which is there, whole, once a task is done.
    """
    missing = [task for path, task in tasks.items() if not path.exists()]
    progress = Progress(title, len(tasks), len(tasks) - len(missing))
    try:
        pool.run_tasks(function, missing, progress)
    finally:
        progress.close()


@contextmanager
def open_pool(workers: int | None = None, scheduler: str | None = None) -> Iterator[WorkerPool]:
    """A pool of threads, or of the workers of a Dask scheduler.

    Args:
        workers: number of threads; None: one for each core.
        scheduler: its address, tcp://HOST:PORT.
    """
    if scheduler is None:
        yield ThreadPool(workers)
        return
    cluster = DaskPool(scheduler)
    try:
        yield cluster
    finally:
        cluster.client.close()
