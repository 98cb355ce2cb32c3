"""Cuts a data set of three modalities or more into a mosaic of many patterns, and test cells.

As `split.py`, a barcode decides: 20 of 100 cells are tested and 40 carry everything; 20 carry two
modalities and 20 one, any of them.
"""

import hashlib
import itertools
import re
from collections.abc import Sequence

import anndata as ad
import mudata as md
import numpy as np

from tests.benchmarks.split import place_cell

ODD, EVEN = "odd", "even"


def cut_patterns(whole: md.MuData, mods: Sequence[str], fold: int) -> tuple[md.MuData, md.MuData]:
    """The mosaic to train on, and the test cells, in the same order in all modalities."""
    tables = select_complete(whole, mods)
    names = tables[mods[0]].obs_names
    tested = np.array([place_cell(name, fold) < 20 for name in names])
    kept = [choose_modalities(name, mods, fold) for name in names]
    train = {m: x[~tested & [m in carried for carried in kept]].copy() for m, x in tables.items()}
    return md.MuData(train), md.MuData({m: x[tested].copy() for m, x in tables.items()})


def choose_modalities(barcode: str, mods: Sequence[str], fold: int) -> tuple[str, ...]:
    """The modalities that a training cell keeps."""
    place = place_cell(barcode, fold)
    if place < 60:
        return tuple(mods)
    patterns = list(itertools.combinations(mods, 2 if place < 80 else 1))
    number = int.from_bytes(hashlib.sha1(barcode.encode(), usedforsecurity=False).digest(), "big")
    return patterns[number // 100 % len(patterns)]


def select_complete(whole: md.MuData, mods: Sequence[str]) -> dict[str, ad.AnnData]:
    """The modalities of cells with values in all of them, and features with a value in a cell."""
    tables = {m: select_modality(whole, m) for m in mods}
    first, *others = tables.values()
    names = first.obs_names
    for table in others:
        names = names[names.isin(table.obs_names)]
    tables = {m: x[names] for m, x in tables.items()}
    tables = {m: x[:, _count_values(x, axis=0) > 0] for m, x in tables.items()}
    full = np.logical_and.reduce([_count_values(x, axis=1) > 0 for x in tables.values()])
    return {m: x[full].copy() for m, x in tables.items()}


def select_modality(whole: md.MuData, name: str) -> ad.AnnData:
    """A modality, or the half of one: "atac_odd" are the peaks of odd chromosomes, and of X."""
    base, _, half = name.rpartition("_")
    if half not in (ODD, EVEN):
        return whole[name]
    table = whole[base]
    chromosomes = [re.match(r"(?:chr)?(\d+|[XYM])\w*[:_-]\d+", peak) for peak in table.var_names]
    if all(chromosomes):
        labels = [found[1] for found in chromosomes]
        numbers = np.array([int(x) if x.isdigit() else 1 for x in labels])
    else:
        numbers = np.arange(table.n_vars)  # genes, by their places
    return table[:, numbers % 2 == (half == ODD)]


def _count_values(x: ad.AnnData, axis: int) -> np.ndarray:
    return np.asarray((x.X != 0).sum(axis)).ravel()
