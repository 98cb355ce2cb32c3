"""The stopwatch that our loader and its peers are measured with. It needs NumPy alone and sees nothing of clue_dist."""

from __future__ import annotations

import argparse
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SAMPLE_S = 0.02  # between looks at the memory: each costs some 50 microseconds

Take = Callable[[], tuple[int, int]]  # fetches the next batch: its cells and non-zeros


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=10, help="measured")
    parser.add_argument("--warm", type=float, default=3, help="seconds before that")
    parser.add_argument(
        "--step-ms",
        type=float,
        default=0,
        help="sleep after each batch, as an accelerator would work",
    )
    parser.add_argument("--threads", type=int, default=2)


def anonymous_mib() -> float:
    """Memory of this process that no file stands behind."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


class Peak:
    """The most anonymous memory while it is entered, in MiB."""

    def __init__(self) -> None:
        self.mib = anonymous_mib()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.mib = max(self.mib, anonymous_mib())


def stream(take: Take, args: argparse.Namespace) -> dict[str, float]:
    """Fetch batches for a while, timing each fetch."""
    start = anonymous_mib()
    with Peak() as peak:
        _fetch(take, args.warm, args.step_ms / 1e3)
        began = time.perf_counter()
        waits, cells, nonzeros = _fetch(take, args.seconds, args.step_ms / 1e3)
        took = time.perf_counter() - began
    return {
        "cells_per_s": cells / took,
        "nonzeros_per_s": nonzeros / took,
        "batches": len(waits),
        "waiting": sum(waits) / took,
        "p50_ms": 1e3 * float(np.percentile(waits, 50)),
        "p99_ms": 1e3 * float(np.percentile(waits, 99)),
        "anon_mib": peak.mib,
        "anon_start_mib": start,
    }


def _fetch(take: Take, seconds: float, step_s: float) -> tuple[list[float], int, int]:
    """Seconds each fetch took, and all cells and non-zeros."""
    waits, cells, nonzeros = [], 0, 0
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end or not waits:
        c, n = take()
        waits.append(time.perf_counter() - began)
        cells, nonzeros = cells + c, nonzeros + n
        if step_s:
            time.sleep(step_s)
    return waits, cells, nonzeros


def tell(result: dict[str, Any]) -> None:
    """The one line that the benchmark reads."""
    print(json.dumps(result), flush=True)
