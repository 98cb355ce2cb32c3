"""What commands cost: processor time, the memory of the largest process, the speed of training."""

import json
import resource
import statistics
from contextlib import suppress
from pathlib import Path

import psutil

from tests.benchmarks.report import Result


def read_children_cpu() -> float:
    """Seconds of processor time of all processes that this one started, and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read_largest_process() -> tuple[float]:
    """MiB that the largest of all processes that this one started ever took."""
    peaks = [0.0]
    for child in psutil.Process().children(recursive=True):
        with suppress(OSError, psutil.Error, StopIteration):  # it has gone
            status = Path(f"/proc/{child.pid}/status").read_text().splitlines()
            line = next(line for line in status if line.startswith("VmHWM"))
            peaks.append(int(line.split()[1]) / 1024)
    return (max(peaks),)


def read_training(run: Path) -> Result:
    """Read `steps` and `cells_per_s` of a run's folder.

    The median of the logged speeds leaves out starting and validating.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if line["split"] == "train"]
    speed = statistics.median(line["cells_per_s"] for line in training)
    return {"steps": training[-1]["step"], "cells_per_s": speed}
