"""Profiles of the same cells from two modalities, of any number, written piece by piece."""

from pathlib import Path

import numpy as np

from tests.benchmarks.kept import make_once

NAMES = ("first", "second")
WIDTH = 64  # dimensions of z, as in configs/atlas.json
NOISE = 2.0  # standard deviation of what a modality adds to a cell's own place, which has 1
PIECE = 2**16  # cells made at a time


def find_profiles(n_cells: int, work: Path) -> list[np.ndarray]:
    """Find two memory maps (N, WIDTH) float32, made once; row i of both is one cell."""
    folder = make_once(
        work / "profiles" / f"{n_cells}-{WIDTH}-{NOISE}",
        lambda made: write_profiles(n_cells, made),
    )
    return [np.load(folder / f"{name}.npy", mmap_mode="c") for name in NAMES]


def write_profiles(n_cells: int, folder: Path) -> None:
    """Write the profiles of cells that are drawn from a normal distribution."""
    shape, rng = (n_cells, WIDTH), np.random.default_rng(0)
    files = [
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape) for name in NAMES
    ]
    for start in range(0, n_cells, PIECE):
        size = (min(PIECE, n_cells - start), WIDTH)
        cells = rng.standard_normal(size, np.float32)
        for file in files:
            file[start : start + PIECE] = cells + NOISE * rng.standard_normal(size, np.float32)
    for file in files:
        file.flush()
