"""Cells whose batches have two covariates, the donor and the chemistry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np

from clue_dist.store.reader import Store
from data_prep.cli.commands import run_command
from tests.unit.prep_helpers import make_counts, write_h5ad

N = 40
DONORS = np.array([f"d{i % 3}" for i in range(N)], object)
# No cell of d2 was measured with v3.
CHEMISTRIES = np.array(["v3" if i % 6 in (3, 4) else "v2" for i in range(N)], object)
COLUMNS = ["donor", "chemistry"]


def write_files(folder: Path, cells: str = "c", **obs: object) -> list[str]:
    """The two modalities of cells; only the file of RNA says what the chemistry was."""
    columns = {"donor": DONORS, "chemistry": CHEMISTRIES} | obs
    rna = write_h5ad(folder / "rna.h5ad", make_counts(N, 12, cells=cells), **columns)
    adt = make_counts(N, 5, 1, "p", cells)
    return [f"rna={rna}", f"adt={write_h5ad(folder / 'adt.h5ad', adt, donor=columns['donor'])}"]


def convert(folder: Path, *words: str, **obs: object) -> Store:
    run_command(["convert", *write_files(folder, **obs), *words, "--out", str(folder / "s.zarr")])
    return Store(folder / "s.zarr")


def make_table(**obs: Sequence[object]) -> ad.AnnData:
    """RNA of four cells, as in memory."""
    counts = make_counts(N, 12).iloc[:4]
    table = ad.AnnData(counts.to_numpy(np.float32))
    table.obs_names, table.var_names = list(counts.index), list(counts.columns)
    for column, values in obs.items():
        table.obs[column] = values
    return table
