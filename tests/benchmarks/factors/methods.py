"""Ways to embed a simulated mosaic: ours, a common space with and without alignment, and the components of its counts.

Each gives, by source of z, the z of the paired training cells and of the test cells; and the seconds it took to fit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import mudata as md
import numpy as np
import torch

from clue_dist.config import load_config
from clue_dist.inference.embed import embed_store
from clue_dist.inference.load_model import TrainedModel
from clue_dist.store.reader import Store
from clue_dist.train.setup import prepare_setup
from tests.benchmarks import mosaic as mosaics
from tests.benchmarks.common import once
from tests.benchmarks.factors import common_space
from tests.benchmarks.factors.simulate import Design, Simulation, barcodes, mosaic, seen, write
from tests.benchmarks.factors.views import components
from tests.benchmarks.mosaic import JOINT, Split
from tests.distributed.command import ROOT

COMPONENTS = 50
QUIET = ("log.tensorboard=false", "log.wandb=disabled")
Embedded = dict[str, tuple[np.ndarray, np.ndarray]]


def split_of(simulation: Simulation, name: str, work: Path) -> Split:
    """The files of a simulation. name: of it, among all that the work folder holds."""
    folder = work / "splits" / name / f"seed{simulation.seed}"
    return Split(
        once(folder, lambda folder: write(simulation, folder)), tuple(simulation.design.names)
    )


def by_ours(
    simulation: Simulation,
    split: Split,
    folder: Path,
    settings: Sequence[str],
    threads: int,
    work: Path,
) -> tuple[Embedded, float]:
    settings = [*QUIET, *settings]
    tables, seconds = mosaics.embedded(
        split, folder, simulation.seed, settings, threads, work, ("test",)
    )
    return z_of(tables["test"], simulation.design), seconds


def by_common_space(
    simulation: Simulation,
    split: Split,
    folder: Path,
    settings: Sequence[str],
    threads: int,
    work: Path,
    alignment: float,
) -> tuple[Embedded, float]:
    """The peer, trained and embedded from the stores that our run reads."""
    stores = mosaics.stores_of(split, mosaics.sources(), threads, work)
    paths = [f"store={stores / 'train.zarr'}", f"run={folder / 'run'}", f"seed={simulation.seed}"]
    setup = prepare_setup(load_config(ROOT / mosaics.RECIPE, [*paths, *settings]), 1)
    torch.set_num_threads(threads)
    began = time.monotonic()
    model = common_space.train(setup, alignment)
    seconds = time.monotonic() - began
    config, out = setup.config, folder / "z.h5mu"
    loaded = TrainedModel(model, setup.store.manifest.modalities, "last", config)
    embed_store(loaded, Store(stores / "test.zarr"), out, run=folder, per_modality=True)
    with mosaics.quiet():
        table = md.read(out)
    out.unlink()
    return z_of(table, simulation.design), seconds


def z_of(table: md.MuData, design: Design) -> Embedded:
    """z of the paired training cells and of the test cells out of what was made of test.h5mu: joint, from each modality
    alone, and from each of the design's subsets."""
    train, test = (
        _z_of_cells(table, rows, design)
        for rows in (mosaic(design)[part] for part in ("paired", "test"))
    )
    return {source: (train[source], test[source]) for source in train}


def _z_of_cells(table: md.MuData, rows: np.ndarray, design: Design) -> mosaics.Embedded:
    z = np.asarray(table.obsm["X_clue"])
    place = {
        subset: table.obs_names.get_indexer(barcodes(rows, subset)) for subset in design.subsets
    }
    return mosaics.z_of(table, barcodes(rows)) | {subset: z[at] for subset, at in place.items()}


def by_counts(simulation: Simulation) -> tuple[Embedded, float]:
    """Components of the normalised counts, side by side for several modalities: what there is to be read."""
    began = time.monotonic()
    design, parts = simulation.design, mosaic(simulation.design)
    views: Embedded = {}
    for name, counts in simulation.counts.items():
        train, test = components(name, counts[seen(parts, name)], counts[parts["test"]], COMPONENTS)
        views[name] = train[: len(parts["paired"])], test
    several = {JOINT: tuple(design.names)} | design.subsets
    together = {
        source: tuple(np.hstack(part) for part in zip(*(views[name] for name in some), strict=True))
        for source, some in several.items()
    }
    return together | views, time.monotonic() - began
