"""Scores of all cells of an embedding: python -m tests.benchmarks.multiome.estimate EMBEDDING.zarr.

Each is estimated from cells that are drawn, and comes with its standard error.
"""

import argparse
from pathlib import Path

import numpy as np
import zarr

from clue_dist.metrics.matching_estimate import estimate_matching
from tests.benchmarks.multiome.simulate import FEATURES
from tests.benchmarks.peers.measure import print_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("embedding", type=Path)
    obsm = zarr.open_group(parser.parse_args().embedding, mode="r")["obsm"]
    first, second = (np.asarray(obsm[f"X_clue_{modality}"]) for modality in FEATURES)
    found = estimate_matching(first, second)
    errors = {f"{name}_error": score.standard_error for name, score in found.items()}
    scores = {name: score.value for name, score in found.items()}
    print_result({"scored_cells": len(first), **scores, **errors})


if __name__ == "__main__":
    main()
