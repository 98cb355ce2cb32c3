"""The stopwatch of our loader and its peers. It needs NumPy alone and sees nothing of clue_dist."""

import argparse
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

Batches = Iterator[tuple[int, int]]  # cells and non-zeros of each, which comes when it is asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    step = "ms to sleep after each batch, as an accelerator would work"
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=10, help="measured")
    parser.add_argument("--warm", type=float, default=3, help="seconds before that")
    parser.add_argument("--step-ms", type=float, default=0, help=step)
    parser.add_argument("--threads", type=int, default=2)


def read_memory(process: str = "self") -> tuple[float, ...]:
    """MiB of a process that no file stands behind, that are shared, and in all."""
    status = Path(f"/proc/{process}/status").read_text()
    kib = dict(re.findall(r"^(RssAnon|RssShmem|VmRSS):\s+(\d+) kB", status, re.MULTILINE))
    return tuple(int(kib.get(name, 0)) / 1024 for name in ("RssAnon", "RssShmem", "VmRSS"))


def list_workers() -> list[str]:
    """The processes that this one started, as the workers of a PyTorch loader."""
    workers: list[str] = []
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            workers += children.read_text().split()
    return workers


def read_memory_of_all() -> tuple[float, ...]:
    """MiB of this process and its workers that no file stands behind."""
    total = 0.0
    for process in ("self", *list_workers()):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has gone
            alone, shared, _ = read_memory(process)
            total += alone + shared
    return (total,)


def read_cpu_seconds() -> float:
    """CPU seconds of this process and its workers so far."""
    ticks = 0
    for process in list_workers():
        with suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # in user mode and in the system
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def read_peak() -> float:
    """MiB that this process took at most. A parent's own peak is not in it, as in getrusage."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[0]) / 1024


@contextmanager
def watch_peak(read: Callable[[], Iterable[float]], every_s: float) -> Iterator[list[float]]:
    """The most of some sizes while it is entered; to read them costs time."""
    peak, done = list(read()), threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            peak[:] = map(max, peak, read())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def measure_stream(batches: Batches, args: argparse.Namespace) -> dict[str, float]:
    """Fetch batches for a while, timing each fetch."""
    (start,) = read_memory_of_all()
    with watch_peak(read_memory_of_all, every_s=0.02) as peak:
        _fetch_batches(batches, args.warm, args.step_ms / 1e3)
        began, cpu = time.perf_counter(), read_cpu_seconds()
        waits, cells, nonzeros = _fetch_batches(batches, args.seconds, args.step_ms / 1e3)
        took, cpu = time.perf_counter() - began, read_cpu_seconds() - cpu
    return {
        "cells_per_s": cells / took,
        "cells_per_cpu_s": cells / cpu,
        "nonzeros_per_s": nonzeros / took,
        "batches": len(waits),
        "waiting": sum(waits) / took,
        "p50_ms": 1e3 * float(np.percentile(waits, 50)),
        "p99_ms": 1e3 * float(np.percentile(waits, 99)),
        "anon_mib": peak[0],
        "anon_start_mib": start,
    }


def _fetch_batches(batches: Batches, seconds: float, step_s: float) -> tuple[list[float], int, int]:
    """Seconds each fetch took, and all cells and non-zeros."""
    waits, cells, nonzeros = [], 0, 0
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end or not waits:
        c, n = next(batches)
        waits.append(time.perf_counter() - began)
        cells, nonzeros = cells + c, nonzeros + n
        if step_s:
            time.sleep(step_s)
    return waits, cells, nonzeros


def print_result(result: dict[str, Any]) -> None:
    """Print the one line that the benchmark reads."""
    print(json.dumps(result), flush=True)
