"""The most memory that everything this process has started takes together."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import psutil

SAMPLE_S = 0.05
MIB = 2**20


class TreePeak:
    """Peaks while it is entered, in MiB: `anon` that no file stands behind, `rss` with mapped files too."""

    def __init__(self) -> None:
        self.anon = self.rss = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> TreePeak:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_S):
            sizes = [memory_of(child.pid) for child in psutil.Process().children(recursive=True)]
            self.anon = max(self.anon, sum(anon for anon, _ in sizes))
            self.rss = max(self.rss, sum(rss for _, rss in sizes))


def memory_of(pid: int) -> tuple[float, float]:
    """Anonymous and shared memory of a process, and all it holds; none where it has gone. MiB."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0
    kib = {
        key: int(value)
        for key, value in re.findall(r"^(RssAnon|RssShmem|VmRSS):\s+(\d+) kB", status, re.M)
    }
    return (kib.get("RssAnon", 0) + kib.get("RssShmem", 0)) / 1024, kib.get("VmRSS", 0) / 1024
