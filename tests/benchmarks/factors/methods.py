"""Ways to embed a simulated mosaic: ours, a common space, and the components of its counts.

Each gives, by source of z, that of the paired training cells and of the test cells; and the seconds
of its fit.
"""

import time
from pathlib import Path

import mudata as md
import numpy as np
import torch

from clue_dist.config_file import load_config
from clue_dist.inference.cells import open_cells
from clue_dist.inference.embed import embed_cells
from clue_dist.inference.load_model import TrainedModel
from clue_dist.store.reader import Store
from clue_dist.train.setup import prepare_setup
from tests.benchmarks import mosaic
from tests.benchmarks.factors import common_space, simulate, views
from tests.benchmarks.factors.simulate import Design, Simulation, cut_parts, list_barcodes
from tests.benchmarks.kept import make_once
from tests.benchmarks.mosaic import JOINT, Split, Training
from tests.distributed.command import ROOT

COMPONENTS = 50
Sources = dict[str, tuple[np.ndarray, np.ndarray]]


def write_split(simulation: Simulation, name: str, work: Path) -> Split:
    """The files of a simulation, under a name among all that the work folder holds."""
    folder = work / "splits" / name / f"seed{simulation.seed}"
    made = make_once(folder, lambda path: simulate.write_files(simulation, path))
    return Split(made, tuple(simulation.design.names))


def embed_common_space(training: Training, alignment: float) -> tuple[md.MuData, float]:
    """The peer, trained and embedded from the stores that our run reads."""
    folder, stores = training.folder, mosaic.convert_split(training.split, training.args)
    words = [f"store={stores / 'train.zarr'}", f"run={folder / 'run'}", f"seed={training.seed}"]
    config = load_config(ROOT / training.recipe, [*words, *training.settings])
    setup, out = prepare_setup(config, 1), folder / "z.h5mu"
    torch.set_num_threads(training.args.threads)
    began = time.monotonic()
    model = common_space.train_model(setup, alignment)
    seconds = time.monotonic() - began
    loaded = TrainedModel(model, setup.store.manifest.modalities, "last", setup.config)
    cells = open_cells(Store(stores / "test.zarr"), loaded)
    embed_cells(loaded, cells, out, run=folder, per_modality=True)
    with mosaic.ignore_warnings():
        return md.read(out), seconds


def select_sources(table: md.MuData, design: Design) -> Sources:
    """z out of what was made of test.h5mu: joint, from each modality, from each of the subsets."""
    z, parts, cells = np.asarray(table.obsm["X_clue"]), cut_parts(design), []
    for rows in (parts["paired"], parts["test"]):
        barcodes = {subset: list_barcodes(rows, subset) for subset in design.subsets}
        some = {subset: z[table.obs_names.get_indexer(names)] for subset, names in barcodes.items()}
        cells.append(mosaic.select_z(table, list_barcodes(rows)) | some)
    train, test = cells
    return {source: (train[source], test[source]) for source in train}


def reduce_counts(simulation: Simulation) -> tuple[Sources, float]:
    """Components of the normalised counts, side by side for several modalities."""
    began = time.monotonic()
    design, parts = simulation.design, cut_parts(simulation.design)
    alone: Sources = {}
    for name, counts in simulation.counts.items():
        seen, tested = counts[simulate.list_seen(parts, name)], counts[parts["test"]]
        train, test = views.reduce_view(name, seen, tested, COMPONENTS)
        alone[name] = train[: len(parts["paired"])], test
    several = {JOINT: tuple(design.names)} | design.subsets
    together = {
        source: tuple(np.hstack([alone[name][part] for name in names]) for part in (0, 1))
        for source, names in several.items()
    }
    return together | alone, time.monotonic() - began
