"""Other training cells for the same test cells, and how to train on them for as long as on the full set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mudata as md
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from clue_dist.config import load_config
from clue_dist.train.setup import prepare_setup
from tests.benchmarks import common, mosaic
from tests.benchmarks.split import paired
from tests.distributed.command import ROOT


@dataclass(frozen=True)
class Cells:
    """A split, and the data set it was cut from."""

    mods: tuple[str, str]
    train: md.MuData
    test: md.MuData
    whole: md.MuData


def with_test_cells(cells: Cells) -> md.MuData:
    """Each modality of the test cells among the training cells, under barcodes of their own."""
    parts = {}
    for m in cells.mods:
        unpaired = cells.test[m].copy()
        unpaired.obs_names = [f"{barcode}_{m}" for barcode in unpaired.obs_names]
        parts[m] = joined(cells.train[m], unpaired)
    return md.MuData(parts)


def joined(a: AnnData, b: AnnData) -> AnnData:
    """The cells of two tables with the same features, one table behind the other."""
    return AnnData(sp.vstack([a.X, b.X], format="csr"), obs=pd.concat([a.obs, b.obs]), var=a.var)


def of_pairs(cells: Cells, halved: bool, unpaired: bool) -> md.MuData:
    """All of the pairs or every other one, with the unpaired cells or without."""
    first, second = (cells.train[m].obs_names for m in cells.mods)
    pairs = first.intersection(second).sort_values()
    dropped = pairs[1::2] if halved else pairs[:0]
    tables = {m: cells.train[m] for m in cells.mods}
    keep = {
        m: ~t.obs_names.isin(dropped) & (unpaired | t.obs_names.isin(pairs))
        for m, t in tables.items()
    }
    return md.MuData({m: t[keep[m]].copy() for m, t in tables.items()})


def all_paired(cells: Cells) -> md.MuData:
    """Every training cell with both of its modalities."""
    tables = dict(zip(cells.mods, paired(cells.whole, cells.mods), strict=True))
    keep = ~tables[cells.mods[0]].obs_names.isin(cells.test[cells.mods[0]].obs_names)
    return md.MuData({m: t[keep].copy() for m, t in tables.items()})


TRANSDUCTIVE = "transductive: test cells too, unpaired"
OTHER_CELLS: dict[str, Callable[[Cells], md.MuData]] = {
    TRANSDUCTIVE: with_test_cells,
    "no unpaired cells": lambda cells: of_pairs(cells, halved=False, unpaired=False),
    "half the pairs": lambda cells: of_pairs(cells, halved=True, unpaired=True),
    "half the pairs, no unpaired cells": lambda cells: of_pairs(cells, halved=True, unpaired=False),
    "every partner known": all_paired,
}
# Rows with ever twice as many pairs, and what they lead to.
DOUBLINGS = ("half the pairs, no unpaired cells", "no unpaired cells", "every partner known")


def changed(split: mosaic.Split, row: str, method: str, data: Path) -> mosaic.Split:
    """The same test cells, with the training cells of a row of OTHER_CELLS. method: the row, as folders are called."""

    def make(folder: Path) -> None:
        with mosaic.quiet():
            cells = Cells(
                split.mods,
                *(md.read(p) for p in (split.train, split.test, mosaic.source_of(name, data))),
            )
            OTHER_CELLS[row](cells).write(folder / "train.h5mu")
            cells.test.write(folder / "test.h5mu")

    name = split.folder.parent.name.rpartition("-")[0]
    code = common.digest(Path(__file__))[:8]
    folder = split.folder.parent / f"{split.folder.name}-{method}-{code}"
    return mosaic.Split(common.once(folder, make), split.mods)


def schedule(full: Path, other: Path, settings: Sequence[str]) -> tuple[str, ...]:
    """Settings that give training on the store `other` the steps, the batches and their share of pairs that `full`
    gets, for a number of cells would change all three where they say "auto"."""
    recipe, run = ROOT / mosaic.RECIPE, f"run={other.parent / 'run'}"
    wanted, got = (
        prepare_setup(load_config(recipe, [f"store={store}", run, *settings]), 1)
        for store in (full, other)
    )
    size = wanted.config.data.batch_size
    pairs = sum(
        n
        for s, n in wanted.plan.stratum_shares.items()
        if len(wanted.store.segments[s].modalities) > 1
    )
    epochs = wanted.total_steps * size / sum(got.train_cells.values())
    return (
        f"data.batch_size={size}",
        f"data.paired_share={pairs / size!r}",
        f"train.epochs={epochs!r}",
    )
