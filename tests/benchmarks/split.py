"""Cuts one data set of paired cells into a mosaic to train on and test cells.

A barcode alone decides where its cell goes: its SHA-1, as a number, modulo 100, turned by 20 a
fold. So no list of cells needs to be kept, and over the five folds every cell is tested once.
"""

import hashlib
import itertools
import re
import zlib
from collections.abc import Sequence
from functools import reduce

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import scipy.sparse as sp

from tests.benchmarks.commands import BenchmarkError

FOLDS = range(5)
# Of `cbmc_batches`, how differently batches capture a feature: the deviation of its ln.
BATCHES, BATCH_DEVIATIONS = 3, {"rna": 0.8, "adt": 0.5}


def place_cell(barcode: str, fold: int) -> int:
    """0 to 99: below 20 a test cell, below 60 a pair to train on, below 80 one modality alone."""
    digest = hashlib.sha1(barcode.encode(), usedforsecurity=False).digest()
    return (int.from_bytes(digest, "big") - 20 * fold) % 100


def choose_modalities(barcode: str, mods: Sequence[str], fold: int) -> tuple[str, ...]:
    """The modalities that a cell has in training: none if it is tested.

    Of three or more, cells from 60 to 79 have any two of them, and those above any one.
    """
    place = place_cell(barcode, fold)
    if place < 60:
        return () if place < 20 else tuple(mods)
    if len(mods) == 2:
        return (mods[place >= 80],)
    patterns = list(itertools.combinations(mods, 2 if place < 80 else 1))
    return patterns[zlib.crc32(barcode.encode()) % len(patterns)]


def cut_mosaic(whole: md.MuData, mods: Sequence[str], fold: int) -> tuple[md.MuData, md.MuData]:
    """The mosaic to train on, and the test cells, in the same order in all modalities.

    Only cells with counts in all modalities take part, and features with a count in one of them.
    """
    tables = dict(zip(mods, select_pairs(whole, mods), strict=True))
    names = tables[mods[0]].obs_names
    kept = [choose_modalities(name, mods, fold) for name in names]
    train = {m: x[[m in carried for carried in kept]].copy() for m, x in tables.items()}
    test = {m: x[[not carried for carried in kept]].copy() for m, x in tables.items()}
    return md.MuData(train), md.MuData(test)


def cut_by_batch(whole: md.MuData, mods: Sequence[str], fold: int) -> tuple[md.MuData, md.MuData]:
    """A mosaic whose pairs are of one half of the batches, and the cells of the other half.

    These are tested, and trained on, too, each as two cells with one modality, as in the mosaics of
    SCMMIB. A fold further, the halves begin one batch further.
    """
    tables = dict(zip(mods, select_pairs(whole, mods), strict=True))
    obs = tables[mods[0]].obs
    batch = obs.get("batch", pd.Series(index=obs.index, dtype=object))
    turned = np.roll(sorted(set(batch.dropna())), -fold)
    if len(turned) < 2:
        problem = "half the batches are to keep their pairs, which takes two batches or more"
        raise BenchmarkError(problem, got=f"{len(turned)} in obs['batch']")
    paired = batch.isin(turned[: len(turned) // 2]).to_numpy()
    train = {}
    for name, x in tables.items():
        train[name] = x.copy()
        train[name].obs_names = np.where(paired, x.obs_names, f"{name}:" + x.obs_names)
    return md.MuData(train), md.MuData({m: x[~paired].copy() for m, x in tables.items()})


def draw_batches(whole: md.MuData) -> md.MuData:
    """Deal cells to batches that capture each feature to another share, in all modalities.

    A barcode decides the batch, so that batches hold the same cell types.
    """
    tables = {}
    for place, (name, deviation) in enumerate(BATCH_DEVIATIONS.items()):
        table, generator = whole[name].copy(), np.random.default_rng(place)
        shares = np.exp(generator.normal(0, deviation, (BATCHES, table.n_vars)))
        shares /= shares.max(0)
        batch = np.array([zlib.crc32(barcode.encode()) % BATCHES for barcode in table.obs_names])
        counts = sp.csr_matrix(table.X).tocoo()
        captured = generator.binomial(
            counts.data.astype(int), shares[batch[counts.row], counts.col]
        )
        table.X = sp.csr_matrix((captured, (counts.row, counts.col)), counts.shape)
        table.X.eliminate_zeros()
        table.obs["batch"] = [f"batch {code}" for code in batch]
        tables[name] = table
    return md.MuData(tables)


def select_pairs(whole: md.MuData, mods: Sequence[str]) -> list[ad.AnnData]:
    """All modalities of the cells that have them, in the order of the first."""
    tables = [select_modality(whole, m) for m in mods]
    names = reduce(lambda a, b: a[a.isin(b)], [x.obs_names for x in tables])
    tables = [x[names, _mark_filled(x[names], axis=0)] for x in tables]
    full = np.logical_and.reduce([_mark_filled(x, axis=1) for x in tables])
    return [x[full].copy() for x in tables]


def select_modality(whole: md.MuData, name: str) -> ad.AnnData:
    """A modality, or half of its features: "atac_odd" is of odd chromosomes, and of X and Y."""
    base, _, half = name.rpartition("_")
    if half not in ("odd", "even"):
        return whole[name]
    names = whole[base].var_names
    peaks = [re.match(r"chr(\w+?)[:_-]\d+[_-]\d+$", name) for name in names]
    numbers = range(len(names))  # of genes, their places
    if all(peaks):
        numbers = [int(peak[1]) if peak[1].isdigit() else 1 for peak in peaks]
    return whole[base][:, np.array(numbers) % 2 == (half == "odd")]


def _mark_filled(x: ad.AnnData, axis: int) -> np.ndarray:
    return np.asarray((x.X != 0).sum(axis)).ravel() > 0
