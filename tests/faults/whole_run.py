"""A short run on one rank, with which tests compare the runs that they disturb."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.command import alone, train_args
from tests.stores import make_store

SETTINGS = ("train.epochs=6", "log.every=1", "train.checkpoint_every=5")  # 27 steps


def train_whole_run(folder: Path) -> None:
    """Make the store `s.zarr` and train the run `whole` on it, which nothing disturbs."""
    make_store(
        folder / "s.zarr",
        cells={"rna+adt": 200, "rna": 60, "adt": 40},
        features={"rna": 60, "adt": 10},
    )
    alone(*make_arguments(folder, "whole"))


def make_arguments(folder: Path, name: str, *settings: str) -> list[str]:
    """Make the arguments of `launch/train.py` for the run `name` on the same store."""
    return train_args(folder, folder / "s.zarr", name, *SETTINGS, *settings)
