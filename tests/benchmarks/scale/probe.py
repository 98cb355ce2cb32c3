"""One thing done with many cells, in a process of its own, and what it took.

python -m tests.benchmarks.scale.probe METHOD --cells N --work FOLDER
python -m tests.benchmarks.scale.probe METHOD --run RUN --store STORE --reference STORE --out OUT
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clue_dist.metrics.integration import measure_mixing
from clue_dist.metrics.matching import compute_scores
from clue_dist.metrics.matching_estimate import estimate_matching
from tests.benchmarks.peers.measure import print_result, read_memory, watch_peak
from tests.benchmarks.scale.profiles import find_profiles

if TYPE_CHECKING:
    from clue_dist.api.trained_run import Run


def score_exactly(args: argparse.Namespace) -> dict[str, Any]:
    """All scores of all pairs of cells."""
    first, second = find_profiles(args.cells, args.work)
    scores = compute_scores(first, second, np.zeros(args.cells))["global"]
    return scores | {"mixing": measure_mixing(first, second)}


def score_approximately(args: argparse.Namespace) -> dict[str, Any]:
    """Estimates, with the standard errors that they state."""
    found = estimate_matching(*find_profiles(args.cells, args.work))
    values = {name: score.value for name, score in found.items()}
    return values | {f"{name}_error": score.standard_error for name, score in found.items()}


def embed(run: Run, args: argparse.Namespace) -> None:
    run.embed(args.store, out=args.out / "embedding.zarr")


def impute(run: Run, args: argparse.Namespace) -> None:
    run.impute(args.store, "adt", from_="rna", out=args.out / "imputed.zarr")


def match(run: Run, args: argparse.Namespace) -> None:
    run.match(args.store, "rna", "adt", approximate=True)


def transfer(run: Run, args: argparse.Namespace) -> None:
    run.transfer(args.reference, args.store, "cell_type")


SCORES = {"exact": score_exactly, "approximate": score_approximately}
CALLS = {"embed": embed, "impute": impute, "match": match, "transfer": transfer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=[*SCORES, *CALLS])
    parser.add_argument("--cells", type=int)
    for option in ("work", "run", "store", "reference", "out"):
        parser.add_argument(f"--{option}", type=Path)
    args = parser.parse_args()
    began, found = time.perf_counter(), {}
    with watch_peak(read_memory, every_s=0.05) as peak:
        if args.method in SCORES:
            found = SCORES[args.method](args)
        else:
            from clue_dist.api.trained_run import load  # scores need none of what it imports

            CALLS[args.method](load(args.run), args)
    seconds = time.perf_counter() - began
    memory = {"anon_mib": peak[0] + peak[1], "rss_mib": peak[2]}
    print_result({"seconds": seconds, "cpu_s": time.process_time(), **memory, **found})


if __name__ == "__main__":
    main()
