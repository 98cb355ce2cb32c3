"""Our z of both parts of a mosaic, joint and from each modality alone, by the command lines."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import mudata as md
import numpy as np

from tests.benchmarks.common import BenchmarkError, call
from tests.benchmarks.mosaic import KEPT, Split, sources, stores_of
from tests.distributed.command import launched

JOINT = "joint"  # z from every modality that a cell has; the others are called as their modality


def embed(
    split: Split, folder: Path, seed: int, settings: Sequence[str], threads: int, work: Path
) -> tuple[dict[str, md.MuData], float]:
    """Train configs/atlas.json on a split; "train" and "test" with their z, and the seconds of the training command.

    Raises:
        BenchmarkError: a command failed, or the sources changed meanwhile.
    """
    before, log, run = sources(), folder / "log.txt", folder / "run"
    stores = stores_of(split, before, threads, work)
    paths = [f"store={stores / 'train.zarr'}", f"run={run}", f"seed={seed}"]
    quiet = ["log.tensorboard=false", "log.wandb=disabled"]
    command = launched(1, "launch/train.py", "--config", "configs/atlas.json", "--set", *paths, *quiet, *settings)
    seconds = call(command, log, threads)
    tables = {part: _embedded(run, stores / f"{part}.zarr", folder, log, threads) for part in ("train", "test")}
    if sources() != before:
        raise BenchmarkError("the sources changed during the run, so nobody knows whose result it is", fix="run again")
    for name in KEPT:
        shutil.copy(run / name, folder)
    shutil.rmtree(run)
    return tables, seconds


def _embedded(run: Path, store: Path, folder: Path, log: Path, threads: int) -> md.MuData:
    out = folder / "z.h5mu"
    command = [sys.executable, "launch/embed.py", "--run", run, "--store", store, "--out", out, "--per-modality"]
    call(command, log, threads)
    with md.set_options(pull_on_update=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # genes and antibodies may share names
        table = md.read(out)
    out.unlink()
    return table


def z_of(table: md.MuData, cells: Sequence[str]) -> dict[str, np.ndarray]:
    """z of cells that carry every modality, in the order of their barcodes: joint, and from each alone."""
    tables = {JOINT: table} | dict(table.mod)
    return {source: np.asarray(t.obsm["X_clue"])[t.obs_names.get_indexer(cells)] for source, t in tables.items()}
