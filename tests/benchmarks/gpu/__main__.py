"""Is a GPU right, and how fast is it? One script of less than eight minutes on one GPU.

python -m tests.benchmarks.gpu --json G.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.gpu.clock import measure_rates
from tests.benchmarks.gpu.parity import (
    compare_draws,
    compare_expansion,
    compare_kernels,
    compare_steps,
)
from tests.benchmarks.gpu.training import measure_embedding, measure_training
from tests.benchmarks.gpu.whole_runs import measure_runs
from tests.benchmarks.gpu.workload import SHAPES

BUDGET_S = 440.0  # no part begins after this
NO_GPU = 2  # exit code
# What has to be reached, by part and value.
BARS = {
    ("train 20,000 + 100,000 + 134, large batch, bf16", "cells_per_s"): 300_000,
    ("train 20,000 + 100,000 + 134, large batch, bf16", "share_of_roofline"): 0.4,
    ("embed 20,000 + 100,000 + 134, large batch", "cells_per_s"): 1_000_000,
}

Part = tuple[str, Callable[[], dict[str, Any]]]


def list_parts(device: torch.device, rates: dict[str, float]) -> Iterator[Part]:
    """List the parts, what says whether the numbers are right first."""
    small, middle, large = SHAPES
    yield "kernels", lambda: compare_kernels(middle, device)
    yield "expansion", lambda: compare_expansion(large, device)
    yield "draws", lambda: compare_draws(device)
    yield f"parity {small.name}", lambda: compare_steps(small, device)
    for shape in (small, middle, large):
        for precision in ("fp32", "mixed", "bf16"):
            yield (
                f"train {shape.name}, {precision}",
                lambda shape=shape, precision=precision: measure_training(
                    shape, device, precision, rates
                ),
            )
        yield f"embed {shape.name}", lambda shape=shape: measure_embedding(shape, device)
    yield "runs", measure_runs


def measure_parts(
    parts: Iterator[Part], results: dict[str, Any], write: Callable[[], None], budget_s: float
) -> None:
    """Measure one part after the other, and write after each; a part that fails stops no other."""
    started = time.monotonic()
    for name, measure in parts:
        if time.monotonic() - started > budget_s:
            results[name] = {"left_out": "no time was left"}
            continue
        try:
            results[name] = measure()
        except Exception as error:  # noqa: BLE001  it is written, and the next part begins
            results[name] = {"failed": f"{error!r}", "traceback": traceback.format_exc()}
        write()
    write()


def format_table(results: dict[str, Any]) -> str:
    """A line for each value that is a number, a truth or a failure, and one for each bar."""
    lines = []
    for part, values in results.items():
        for name, value in _flatten(values):
            if name != "traceback":
                lines.append(f"{part:50} {name:40} {_format_value(value)}")
    for (part, name), least in BARS.items():
        value = results.get(part, {}).get(name)
        word = "open" if value is None else "holds" if value >= least else "MISSED"
        lines.append(f"{word:6} {part}: {name} >= {least:,}")
    return "\n".join(lines)


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name} ")
        else:
            yield prefix + name, value


def _format_value(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def main(words: list[str] | None = None) -> int:
    """Measure, print one table, write JSON; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    path: Path = parser.parse_args(words).json
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU: nothing was measured, nothing written")
        return NO_GPU
    device = torch.device("cuda", 0)
    rates = measure_rates(device)
    results: dict[str, Any] = {
        "machine": {
            "gpu": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            **rates,
        }
    }
    measure_parts(
        list_parts(device, rates),
        results,
        lambda: path.write_text(json.dumps(results, indent=1)) and None,
        BUDGET_S,
    )
    print(format_table(results))
    return int(any(name.endswith("failed") for name, _ in _flatten(results)))


if __name__ == "__main__":
    sys.exit(main())
