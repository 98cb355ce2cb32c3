"""What the scripts of methods with a joint embedding share: a mosaic in which every cell has a row.

`peer.py` has what all scripts share.
"""

import argparse
from collections.abc import Iterable, Mapping

import anndata as ad
import numpy as np
import pandas as pd
import peer
import scipy.sparse as sp

Tables = Mapping[str, ad.AnnData]  # by modality, the cells that it was measured in


def list_cells(tables: Tables) -> pd.DataFrame:
    """Every cell once: its `pattern`, such as "rna+adt" or "rna", and its `batch`."""
    names = pd.Index(np.concatenate([table.obs_names for table in tables.values()])).unique()
    carried = [np.where(names.isin(table.obs_names), m, "") for m, table in tables.items()]
    patterns = ["+".join(filter(None, found)) for found in zip(*carried, strict=True)]
    batches = [pd.Series(peer.list_batches(x), index=x.obs_names) for x in tables.values()]
    batch = pd.concat(batches)
    known = batch[~batch.index.duplicated()][names]
    return pd.DataFrame({"pattern": patterns, "batch": known.to_numpy()}, index=names)


def fill_counts(cells: ad.AnnData, names: pd.Index) -> sp.csr_matrix:
    """Counts of the named cells; a row of zeros where a cell is not here. (len(names), features)"""
    rows = cells.obs_names.get_indexer(names)
    here = np.flatnonzero(rows >= 0)
    ones, shape = np.ones(len(here), np.float32), (len(names), cells.n_obs)
    picked = sp.csr_matrix((ones, (here, rows[here])), shape=shape) @ cells.X
    return picked.astype(np.float32).tocsr()


def hide_modalities(tables: Tables, kept: Iterable[str]) -> dict[str, ad.AnnData]:
    """The same cells as if other modalities had not been measured."""
    return {m: table if m in kept else table[:0] for m, table in tables.items()}


def save_views(
    args: argparse.Namespace,
    fit_s: float,
    test: Mapping[str, np.ndarray],
    mosaic: np.ndarray,
    pattern: np.ndarray,
) -> None:
    """Write what is scored: of a method that embeds one modality alone also u1, u2.

    test: embeddings of the test cells, by modality alone and "joint"; mosaic: the joint embedding
    of training cells, whose patterns follow.
    """
    arrays = {f"test_{source}": latent for source, latent in test.items()}
    if set(args.mods) <= test.keys():
        arrays |= {f"u{i}": test[m] for i, m in enumerate(args.mods, 1)}
    np.savez(args.out, **arrays, mosaic=mosaic, pattern=pattern.astype(str), fit_s=fit_s)


def save_imputed(args: argparse.Namespace, expected: Mapping[str, np.ndarray]) -> None:
    """Write imputed values of the test cells beside their embeddings.

    expected: (test cells, features), such as "rna-adt" of proteins told from RNA alone; a cell's
    values are in proportion to its counts.
    """
    np.savez(args.out.with_name("imputed.npz"), **expected)
