"""Times on a device, which runs behind the host."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def wait_for_device(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    work: Callable[[], object], device: torch.device, seconds: float = 0.3, fewest: int = 3
) -> float:
    """Time calls for about `seconds`, after `fewest` that warm up; return the seconds of one."""
    for _ in range(fewest):
        work()
    wait_for_device(device)
    started, calls = time.perf_counter(), 0
    while calls < fewest or time.perf_counter() - started < seconds:
        for _ in range(fewest):
            work()
        calls += fewest
        wait_for_device(device)
    return (time.perf_counter() - started) / calls


def measure_rates(device: torch.device) -> dict[str, float]:
    """Measure what the device does at most: products of matrices, and copies of memory.

    Returns:
        TFLOP/s in fp32 (as PyTorch computes by default) and bf16, and GB/s read and written.
    """
    size = 4096 if device.type == "cuda" else 256
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x = torch.randn(size, size, device=device).to(dtype)
        rates[f"{name}_tflops"] = 2 * size**3 / time_calls(lambda x=x: x @ x, device) / 1e12
    source = torch.empty(size * size * 8, device=device)
    target = torch.empty_like(source)
    seconds = time_calls(lambda: target.copy_(source), device)
    rates["gb_per_s"] = 2 * source.nbytes / seconds / 1e9
    return rates
