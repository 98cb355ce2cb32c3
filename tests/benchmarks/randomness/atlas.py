"""An atlas in the worst order there is, and where its cells lie once it is converted."""

from dataclasses import dataclass

import numpy as np

from clue_dist.store.shuffle import derive_key, hash_barcodes

PLATES, TYPES = 20, 12
GROUPS = PLATES * TYPES
STRATA = ("rna+atac", "rna", "atac")
MEASURED = (0, 0, 1, 1, 2)  # of every five plates in a row, where not all cells are paired


@dataclass(frozen=True)
class SortedAtlas:
    """Cells in the order of their barcodes: plate by plate, and in each type by type."""

    group: np.ndarray  # (n,) int16, plate * TYPES + type
    strata: tuple[str, ...]
    stratum: np.ndarray  # (n,) int8, which of the strata: one a plate

    @property
    def sizes(self) -> dict[str, int]:
        sizes = np.bincount(self.stratum, minlength=len(self.strata)).tolist()
        return dict(zip(self.strata, sizes, strict=True))


def make_atlas(n: int, unpaired: bool) -> SortedAtlas:
    """n cells on plates of one size, each with its own mix of types, some perhaps unpaired."""
    mix = np.random.default_rng(0).dirichlet(np.full(TYPES, 2.0), PLATES)  # (P, T)
    ends = np.round(n * mix.cumsum() / PLATES).astype(np.int64)
    group = np.repeat(np.arange(GROUPS, dtype=np.int16), np.diff(ends, prepend=0))
    strata = STRATA if unpaired else STRATA[:1]
    plates = np.resize(MEASURED if unpaired else (0,), PLATES).astype(np.int8)
    return SortedAtlas(group, strata, plates[group // TYPES])


def order_stored(atlas: SortedAtlas, seed: int) -> dict[str, np.ndarray]:
    """Groups of each stratum's cells as `data_prep convert` with this seed lays them, (n_s,)."""
    key = derive_key(seed, "cells")
    return _split_strata(atlas, np.argsort(hash_barcodes(list_barcodes(len(atlas.group)), key)))


def order_input(atlas: SortedAtlas) -> dict[str, np.ndarray]:
    """The same of a store that kept the order of the barcodes: what happens without a shuffle."""
    return _split_strata(atlas, np.arange(len(atlas.group)))


def list_barcodes(n: int) -> np.ndarray:
    """cell00000000 and so on, (n,) bytes."""
    letters = np.empty((n, 12), np.uint8)
    letters[:, :4] = np.frombuffer(b"cell", np.uint8)
    letters[:, 4:] = ord("0") + np.arange(n)[:, None] // 10 ** np.arange(7, -1, -1) % 10
    return letters.view("S12").reshape(n)


def _split_strata(atlas: SortedAtlas, order: np.ndarray) -> dict[str, np.ndarray]:
    group, stratum = atlas.group[order], atlas.stratum[order]
    return {name: group[stratum == s] for s, name in enumerate(atlas.strata)}
