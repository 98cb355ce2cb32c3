"""One thread per test process: tests run beside each other, and float sums stay the same."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest
import torch

torch.set_num_threads(1)

TESTS = Path(__file__).parent
# Everything there starts processes and waits for them.
SLOW_FOLDERS = ("distributed", "faults")
# Files of `tests/unit` that take more than ten seconds.
SLOW_FILES: frozenset[str] = frozenset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test-fast` leaves out."""
    for item in items:
        place = item.path.relative_to(TESTS).parts
        if place[0] in SLOW_FOLDERS or place[-1] in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
