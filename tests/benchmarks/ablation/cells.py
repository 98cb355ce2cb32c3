"""Other training cells for the same test cells, and how to train on them as long."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import mudata as md

from clue_dist.config_file import load_config
from clue_dist.train.setup import prepare_setup
from tests.benchmarks.kept import compute_digest, make_once
from tests.benchmarks.mosaic import RECIPE, Split, find_data_set, ignore_warnings
from tests.benchmarks.split import select_pairs
from tests.distributed.command import ROOT


@dataclass(frozen=True)
class SplitCells:
    """The cells of a split, and the data set that it was cut from."""

    mods: tuple[str, str]
    train: md.MuData
    test: md.MuData
    whole: md.MuData


def add_test_cells(cells: SplitCells) -> md.MuData:
    """Each modality of the test cells among the training cells, under barcodes of their own."""
    tables = {}
    for m in cells.mods:
        unpaired = cells.test[m].copy()
        unpaired.obs_names = [f"{barcode}_{m}" for barcode in unpaired.obs_names]
        tables[m] = ad.concat([cells.train[m], unpaired], join="outer", merge="same")
    return md.MuData(tables)


def select_training(cells: SplitCells, halved: bool, unpaired: bool) -> md.MuData:
    """All of the pairs or every other one, with the unpaired cells or without."""
    first, second = (cells.train[m].obs_names for m in cells.mods)
    pairs = first.intersection(second).sort_values()
    dropped = pairs[1::2] if halved else pairs[:0]
    tables = {}
    for m in cells.mods:
        names = cells.train[m].obs_names
        keep = ~names.isin(dropped) & (unpaired | names.isin(pairs))
        tables[m] = cells.train[m][keep].copy()
    return md.MuData(tables)


def pair_all(cells: SplitCells) -> md.MuData:
    """Every training cell with both of its modalities."""
    tables = select_pairs(cells.whole, cells.mods)
    keep = ~tables[0].obs_names.isin(cells.test[cells.mods[0]].obs_names)
    return md.MuData({m: t[keep].copy() for m, t in zip(cells.mods, tables, strict=True)})


TRANSDUCTIVE = "transductive: test cells too, unpaired"
FINE_TUNED = "fine-tuned on the test cells too, unpaired"  # the model of atlas.json, all weights
OTHER_CELLS: dict[str, Callable[[SplitCells], md.MuData]] = {
    TRANSDUCTIVE: add_test_cells,
    FINE_TUNED: add_test_cells,
    "no unpaired cells": lambda cells: select_training(cells, False, False),
    "half the pairs": lambda cells: select_training(cells, True, True),
    "half the pairs, no unpaired cells": lambda cells: select_training(cells, True, False),
    "every partner known": pair_all,
}
# Rows with ever twice as many pairs, and what they lead to.
DOUBLINGS = ("half the pairs, no unpaired cells", "no unpaired cells", "every partner known")


def change_training(split: Split, row: str, method: str, data: Path) -> Split:
    """The same test cells, with the training cells of a row; method: as its folders are called."""

    def make(folder: Path) -> None:
        with ignore_warnings():
            paths = (split.train, split.test, find_data_set(name, data))
            cells = SplitCells(split.mods, *map(md.read, paths))
            OTHER_CELLS[row](cells).write(folder / "train.h5mu")
            cells.test.write(folder / "test.h5mu")

    name = split.folder.parent.name.rpartition("-")[0]
    code = compute_digest(Path(__file__))[:8]
    folder = split.folder.parent / f"{split.folder.name}-{method}-{code}"
    return Split(make_once(folder, make), split.mods)


def match_schedule(full: Path, other: Path, settings: Sequence[str]) -> tuple[str, ...]:
    """Settings that train on the store `other` as on the store `full`.

    Steps, batches and their share of pairs become those of `full`: where they say "auto", another
    number of cells would change all three.
    """
    recipe, run = ROOT / RECIPE, f"run={other.parent / 'run'}"
    wanted, found = (
        prepare_setup(load_config(recipe, [f"store={store}", run, *settings]), 1)
        for store in (full, other)
    )
    size, strata = wanted.config.data.batch_size, wanted.store.segments
    pairs = sum(n for s, n in wanted.plan.mean_shares.items() if len(strata[s].modalities) > 1)
    epochs = wanted.total_steps * size / sum(found.train_cells.values())
    shares = (f"data.paired_share={pairs / size!r}", f"train.epochs={epochs!r}")
    return (f"data.batch_size={size}", *shares)
