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
    "faults/test_slurm.py",
    "faults/test_docker.py",
    "faults/test_hosts.py",
    "faults/test_campaigns.py",
    "faults/test_resume.py",
    "faults/test_saving.py",
    "faults/test_stop.py",
    "distributed/test_train.py",
    "faults/test_peers.py",
    "distributed/test_flow.py",
)
# Everything there starts processes and waits for them.
SLOW_FOLDERS = ("distributed", "faults")
# Files whose tests take a second on average, or start clusters and commands.
SLOW_FILES = frozenset(
    {
        "unit/test_embed.py",
        "unit/test_kernel_cache.py",
        "unit/test_order.py",
        "unit/test_prep_append.py",
        "unit/test_prep_check.py",
        "unit/test_prep_cluster.py",
        "unit/test_prep_fetch.py",
        "unit/test_prep_resume.py",
        "unit/test_prep_selection.py",
        "unit/test_prep_simulate.py",
        "unit/test_prep_store.py",
        "unit/test_prep_svd.py",
        "unit/test_s3.py",
    }
)


def pytest_collection_finish() -> None:
    """Have the garbage collector work again, on what the tests make."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test-fast` leaves out, and begin with what takes long."""
    order = {name: place for place, name in enumerate(LONG_FILES)}
    files = {item: item.path.relative_to(TESTS) for item in items}
    items.sort(key=lambda item: order.get(files[item].as_posix(), len(order)))
    for item, file in files.items():
        if file.parts[0] in SLOW_FOLDERS or file.as_posix() in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
