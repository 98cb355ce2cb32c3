"""One thread per test process: tests run beside each other, and float sums stay the same."""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

# What is imported until all tests are collected stays to the end: no collection looks at it.
gc.disable()

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# Before anything imports Triton, as DeepSpeed does: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TESTS = Path(__file__).parent
# What takes minutes, the longest first: what starts late runs alone at the end.
LONG_FILES = (
    "test_slurm.py",
    "test_docker.py",
    "test_hosts.py",
    "test_campaigns.py",
    "test_resume.py",
    "test_saving.py",
    "test_stop.py",
    "test_train.py",
    "test_peers.py",
    "test_flow.py",
)
# Everything there starts processes and waits for them.
SLOW_FOLDERS = ("distributed", "faults")
# Files of `tests/unit` whose tests take a second on average, or start clusters and commands.
SLOW_FILES = frozenset(
    {
        "test_embed.py",
        "test_kernel_cache.py",
        "test_order.py",
        "test_prep_append.py",
        "test_prep_check.py",
        "test_prep_cluster.py",
        "test_prep_fetch.py",
        "test_prep_resume.py",
        "test_prep_selection.py",
        "test_prep_simulate.py",
        "test_prep_store.py",
        "test_prep_svd.py",
        "test_s3.py",
    }
)


def pytest_collection_finish() -> None:
    """Have the garbage collector work again, on what the tests make."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test-fast` leaves out, and begin with what takes long."""
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    for item in items:
        place = item.path.relative_to(TESTS).parts
        if place[0] in SLOW_FOLDERS or place[-1] in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
