"""Cells that tests of the benchmarks cut into mosaics."""

from __future__ import annotations

import anndata as ad
import mudata as md
import numpy as np
import scipy.sparse as sp

MODS = ("rna", "adt")


def paired_cells(n: int = 300) -> md.MuData:
    """Cells in both modalities, the second in another order.

    One name in each has no partner; one cell and one feature are empty.
    """
    rng = np.random.default_rng(0)
    names = np.array([f"cell-{i}" for i in range(n)])
    parts = {}
    for mod, width in zip(MODS, (12, 5), strict=True):
        counts = rng.poisson(2, (n, width)) + (np.arange(width) == 0)
        counts[:, -1] = 0
        if mod == "adt":
            counts[7] = 0
        order = np.arange(n) if mod == "rna" else rng.permutation(n)
        x = ad.AnnData(sp.csr_matrix(counts[order]))
        x.obs_names, x.var_names = names[order], [f"{mod}-{i}" for i in range(width)]
        x.obs["batch"] = "one"
        parts[mod] = x
    parts["adt"].obs_names = [
        f"other-{name}" if name == "cell-9" else name for name in parts["adt"].obs_names
    ]
    with md.set_options(pull_on_update=False):
        return md.MuData(parts)
