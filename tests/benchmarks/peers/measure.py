"""The stopwatch of our loader and its peers. It needs NumPy alone and sees nothing of clue_dist."""

import argparse
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
    start, *_ = read_memory()
    with watch_peak(read_memory, every_s=0.02) as peak:
        _fetch_batches(batches, args.warm, args.step_ms / 1e3)
        began = time.perf_counter()
        waits, cells, nonzeros = _fetch_batches(batches, args.seconds, args.step_ms / 1e3)
        took = time.perf_counter() - began
    return {
        "cells_per_s": cells / took,
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
