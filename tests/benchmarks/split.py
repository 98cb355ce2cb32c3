"""Cuts one paired data set into a mosaic to train on and paired cells to test on.

A barcode alone decides where its cell goes: its SHA-1, as a number, modulo 100, turned by 20 a
fold. So no list of cells needs to be kept, and over the five folds every cell is tested once.
"""

import hashlib

import anndata as ad
import mudata as md
import numpy as np

FOLDS = range(5)


def place_cell(barcode: str, fold: int) -> int:
    """0 to 99: below 20 a test cell, below 60 a pair to train on, below 80 one modality alone."""
    digest = hashlib.sha1(barcode.encode(), usedforsecurity=False).digest()
    return (int.from_bytes(digest, "big") - 20 * fold) % 100


def cut_mosaic(whole: md.MuData, mods: tuple[str, str], fold: int) -> tuple[md.MuData, md.MuData]:
    """The mosaic to train on, and the paired test cells, in the same order in both modalities.

    Only cells with counts in both modalities take part, and features with a count in one of them.
    """
    first, second = select_pairs(whole, mods)
    place = np.array([place_cell(name, fold) for name in first.obs_names])
    test, paired = place < 20, (place >= 20) & (place < 60)
    train = (first[paired | ((place >= 60) & (place < 80))], second[paired | (place >= 80)])
    return tuple(
        md.MuData({m: table.copy() for m, table in zip(mods, tables, strict=True)})
        for tables in (train, (first[test], second[test]))
    )


def select_pairs(whole: md.MuData, mods: tuple[str, str]) -> tuple[ad.AnnData, ad.AnnData]:
    """Both modalities of the paired cells, in the order of the first."""
    names = whole[mods[0]].obs_names
    names = names[names.isin(whole[mods[1]].obs_names)]
    tables = [whole[m][names] for m in mods]
    first, second = (x[:, _sum_counts(x, axis=0) > 0] for x in tables)
    full = (_sum_counts(first, axis=1) > 0) & (_sum_counts(second, axis=1) > 0)
    return first[full].copy(), second[full].copy()


def _sum_counts(x: ad.AnnData, axis: int) -> np.ndarray:
    return np.asarray(x.X.sum(axis)).ravel()
