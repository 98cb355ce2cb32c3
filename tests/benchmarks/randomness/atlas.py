"""An atlas in the worst order there is, and where its cells lie once it is converted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clue_dist.store.shuffle import derive_key, hash_barcodes

PLATES, TYPES = 20, 12
GROUPS = PLATES * TYPES
PAIRED, ALONE = "rna+atac", ("rna", "atac")
MEASURED = (
    PAIRED,
    PAIRED,
    "rna",
    "rna",
    "atac",
)  # of every five plates in a row, where not all cells are paired


@dataclass(frozen=True)
class Atlas:
    """Cells in the order of their barcodes: plate by plate, and in each type by type.

    group: (n,) int16, plate * TYPES + type; strata: names; stratum: (n,) int8, which of them: one a plate.
    """

    group: np.ndarray
    strata: tuple[str, ...]
    stratum: np.ndarray

    @property
    def sizes(self) -> dict[str, int]:
        return dict(
            zip(
                self.strata,
                np.bincount(self.stratum, minlength=len(self.strata)).tolist(),
                strict=True,
            )
        )


def atlas_of(n: int, unpaired: bool) -> Atlas:
    """n cells on plates of one size, each with its own mix of types. unpaired: whether some have one modality alone."""
    mix = np.random.default_rng(0).dirichlet(np.full(TYPES, 2.0), PLATES)  # (P, T)
    ends = np.round(n * mix.cumsum() / PLATES).astype(np.int64)
    group = np.repeat(np.arange(GROUPS, dtype=np.int16), np.diff(ends, prepend=0))
    strata = (PAIRED, *ALONE) if unpaired else (PAIRED,)
    of_plate = [strata.index(MEASURED[p % len(MEASURED)]) if unpaired else 0 for p in range(PLATES)]
    return Atlas(group, strata, np.array(of_plate, np.int8)[group // TYPES])


def stored(atlas: Atlas, seed: int) -> dict[str, np.ndarray]:
    """Groups of each stratum's cells, (n_s,) in the order in which `data_prep convert` with this seed lays them."""
    return _by_stratum(
        atlas, np.argsort(hash_barcodes(barcodes(len(atlas.group)), derive_key(seed, "cells")))
    )


def barcodes(n: int) -> np.ndarray:
    """cell00000000 and so on, (n,) bytes."""
    letters = np.empty((n, 12), np.uint8)
    letters[:, :4] = np.frombuffer(b"cell", np.uint8)
    letters[:, 4:] = ord("0") + np.arange(n)[:, None] // 10 ** np.arange(7, -1, -1) % 10
    return letters.view("S12").reshape(n)


def unshuffled(atlas: Atlas) -> dict[str, np.ndarray]:
    """The same of a store that kept the order of the barcodes: what happens without a shuffle."""
    return _by_stratum(atlas, np.arange(len(atlas.group)))


def _by_stratum(atlas: Atlas, order: np.ndarray) -> dict[str, np.ndarray]:
    group, stratum = atlas.group[order], atlas.stratum[order]
    return {name: group[stratum == s] for s, name in enumerate(atlas.strata)}
