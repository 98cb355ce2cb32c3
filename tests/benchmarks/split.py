"""Cuts one paired data set into a mosaic to train on and paired cells to test on, the same way on every machine.

A barcode alone decides where its cell goes: its SHA-1, as a number, modulo 100, turned by 20 a fold. So no list of
cells needs to be kept, and over the five folds every cell is tested once.
"""

from __future__ import annotations

import hashlib

import anndata as ad
import mudata as md
import numpy as np

FOLDS = range(5)


def place(barcode: str, fold: int) -> int:
    """0 to 99: below 20 a test cell, below 60 trained on as a pair, below 80 by its first modality alone."""
    digest = hashlib.sha1(barcode.encode(), usedforsecurity=False).digest()
    return (int.from_bytes(digest, "big") - 20 * fold) % 100


def cut(whole: md.MuData, mods: tuple[str, str], fold: int) -> tuple[md.MuData, md.MuData]:
    """The mosaic to train on, and the paired test cells, which stand in the same order in both modalities.

    Only cells with counts in both modalities take part; features without a count in any paired cell are left out.
    """
    first, second = paired(whole, mods)
    at = np.array([place(name, fold) for name in first.obs_names])
    test, pair, only_first = at < 20, (at >= 20) & (at < 60), (at >= 60) & (at < 80)
    only_second = at >= 80
    train = _mudata(mods, first[pair | only_first], second[pair | only_second])
    return train, _mudata(mods, first[test], second[test])


def paired(whole: md.MuData, mods: tuple[str, str]) -> tuple[ad.AnnData, ad.AnnData]:
    """Both modalities of the paired cells, in the order of the first."""
    names = whole[mods[0]].obs_names
    names = names[names.isin(whole[mods[1]].obs_names)]
    first, second = (whole[m][names] for m in mods)
    first, second = (x[:, _counts(x, axis=0) > 0] for x in (first, second))
    full = (_counts(first, axis=1) > 0) & (_counts(second, axis=1) > 0)
    return first[full].copy(), second[full].copy()


def _counts(x: ad.AnnData, axis: int) -> np.ndarray:
    return np.asarray(x.X.sum(axis)).ravel()


def _mudata(mods: tuple[str, str], *parts: ad.AnnData) -> md.MuData:
    return md.MuData({m: part.copy() for m, part in zip(mods, parts, strict=True)})
