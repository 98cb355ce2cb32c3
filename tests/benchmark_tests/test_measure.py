"""The measures of loaders are true: time, memory, and what workers take of both."""

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.benchmark_tests.measure_helpers import parse_limits
from tests.benchmarks import stores
from tests.benchmarks.peers import measure


def test_the_stopwatch_counts_batches_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))

    def count_batches() -> measure.Batches:
        while True:
            now[0] += 0.003
            yield 512, 1024

    found = measure.measure_stream(count_batches(), parse_limits(step_ms=1.0))
    assert found["batches"] == 13  # of 4 ms each: the last begins before 50 ms are over
    assert found["waiting"] == pytest.approx(0.75)
    assert found["p99_ms"] == pytest.approx(3)
    assert found["cells_per_s"] == pytest.approx(512 / 0.004)
    assert found["nonzeros_per_s"] == pytest.approx(1024 / 0.004)


@pytest.mark.slow
def test_workers_count_for_memory_and_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.time, "process_time", lambda: 0.0)  # of this process
    alone, cpu = measure.read_memory_of_all()[0], measure.read_cpu_seconds()
    script = "b = bytearray(2**26); sum(range(10**7)); print(1, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        assert str(worker.pid) in measure.list_workers()
        assert measure.read_memory_of_all()[0] > alone + 60
        assert measure.read_cpu_seconds() > cpu
        worker.communicate(b"\n")
    assert str(worker.pid) not in measure.list_workers()


def test_the_peak_of_memory_is_seen_and_files_do_not_count() -> None:
    gc.collect()  # what other tests left may be given back meanwhile
    with measure.watch_peak(measure.read_memory, every_s=0.01) as peak:
        before, *_ = measure.read_memory()
        held = np.ones(128 * 2**20, np.uint8)
        wait_until(lambda: peak[0] > before + 64)
    assert held.sum() > 0


def test_memory_of_what_was_started_is_seen(tmp_path: Path) -> None:
    mark = tmp_path / "go"
    wait = f"while not pathlib.Path({str(mark)!r}).exists(): time.sleep(0.01)"
    code = f"import pathlib, time; x = b'1' * 2**26\n{wait}"
    with stores.watch_children() as peak:
        process = psutil.Popen([sys.executable, "-c", code])
        wait_until(lambda: peak[0] > 64)
        mark.touch()
        assert process.wait(20) == 0
    anon, rss = peak
    assert rss > anon


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_thread_that_ends_meanwhile_has_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Path("/proc/self/task")
    ended = threads / "1" / "children"  # no thread of this process has that number
    listed = [ended, *threads.glob("*/children")]
    monkeypatch.setattr(measure.Path, "glob", lambda path, pattern: listed)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as worker:
        found = measure.list_workers()
        worker.communicate(b"\n")
    assert str(worker.pid) in found
