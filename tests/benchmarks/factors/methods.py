"""Three ways to embed a simulated mosaic: ours, a common space, and the components of its counts as they are.

Each gives, by source of z, the z of the paired training cells and of the test cells; and the seconds it took to fit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from clue_dist.config import load
from clue_dist.train.setup import resolve
from tests.benchmarks import mosaic as mosaics
from tests.benchmarks.common import once
from tests.benchmarks.factors import common_space
from tests.benchmarks.factors.simulate import Simulation, mosaic, seen, write
from tests.benchmarks.factors.views import components
from tests.benchmarks.mosaic import JOINT, Split
from tests.distributed.command import ROOT

COMPONENTS = 50
QUIET = ("log.tensorboard=false", "log.wandb=disabled")
Embedded = dict[str, tuple[np.ndarray, np.ndarray]]


def by_ours(
    simulation: Simulation, name: str, folder: Path, settings: Sequence[str], threads: int, work: Path
) -> tuple[Embedded, float]:
    """name: of this simulation, among all that the work folder holds."""
    files = once(work / "splits" / name / f"seed{simulation.seed}", lambda folder: write(simulation, folder))
    split = Split(files, tuple(simulation.design.names))
    tables, seconds = mosaics.embedded(
        split, folder, simulation.seed, [*QUIET, *settings], threads, work, ("train", "test")
    )
    parts = mosaic(simulation.design)
    train, test = (
        mosaics.z_of(tables[file], simulation.barcodes[parts[part]])
        for file, part in (("train", "paired"), ("test", "test"))
    )
    return {source: (train[source], test[source]) for source in train}, seconds


def by_common_space(simulation: Simulation, settings: Sequence[str]) -> tuple[Embedded, float]:
    """The peer, with the widths and the whole budget of our run, which may stop before its end and holds pairs out."""
    began = time.monotonic()
    names, parts = simulation.design.names, mosaic(simulation.design)
    first = len(parts["test"])  # the test cells stand before all others
    config = resolve(load(ROOT / "configs/atlas.json", [*settings]), simulation.design.cells - first)
    observed = torch.zeros(simulation.design.cells - first, len(names), dtype=torch.bool)
    data, inputs = [], []
    for k, name in enumerate(names):
        rows, counts = seen(parts, name), simulation.counts[name]
        train, test = components(name, counts[rows], counts[parts["test"]], config.model.trunk.projection)
        data.append(common_space.placed(name, train, counts[rows], rows - first, len(observed)))
        inputs.append((train[: len(parts["paired"])], test))
        observed[rows - first, k] = True
    model = common_space.train(data, observed, config, simulation.seed)
    z = [common_space.embed(model, list(part)) for part in zip(*inputs, strict=True)]
    return dict(zip([JOINT, *names], zip(*z, strict=True), strict=True)), time.monotonic() - began


def by_counts(simulation: Simulation) -> tuple[Embedded, float]:
    """Components of the normalised counts, side by side for the joint z: what there is to be read."""
    began = time.monotonic()
    parts = mosaic(simulation.design)
    views: Embedded = {}
    for name, counts in simulation.counts.items():
        train, test = components(name, counts[seen(parts, name)], counts[parts["test"]], COMPONENTS)
        views[name] = train[: len(parts["paired"])], test
    train, test = (np.hstack(part) for part in zip(*views.values(), strict=True))
    return {JOINT: (train, test)} | views, time.monotonic() - began
