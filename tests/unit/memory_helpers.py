"""Cells in memory, and a model of their modalities that knows nothing but features."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from clue_dist.inference.cells import open_cells
from clue_dist.store.batch_vocabulary import BatchVocabulary
from clue_dist.store.manifest_parts import Modality
from tests.fakes import FakeTrainedModel, dense


def name_features(modality: str, number: int) -> list[str]:
    return [f"{modality}-{i}" for i in range(number)]


LOADED = FakeTrainedModel(
    {
        "rna": Modality(kind="rna", storage="sparse", features=name_features("rna", 10)),
        "adt": Modality(kind="adt", storage="dense", features=name_features("adt", 4)),
        "clr": Modality(kind="dense", storage="dense", features=name_features("clr", 3)),
    },
    batch_vocabulary=BatchVocabulary.from_lists(["1", "2"]),
)


def make_table(modality: str = "rna", cells: int = 5, number: int | None = None) -> ad.AnnData:
    """Counts 1, 2, ... of all features of a modality, or of the first ones."""
    number = number or LOADED.modalities[modality].n_features
    counts = np.arange(1.0, cells * number + 1).reshape(cells, number)
    names = pd.DataFrame(index=[f"cell-{i}" for i in range(cells)])
    return ad.AnnData(
        sp.csr_matrix(counts), names, pd.DataFrame(index=name_features(modality, number))
    )


def read_all(source, **choices) -> dict[str, np.ndarray]:
    """Counts of every cell that has them, by modality, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        cells = open_cells(source, LOADED, **choices)
    batches = [cells.read_slice(cell_slice) for cell_slice in cells.slice_cells(100)]
    return {
        name: np.concatenate(
            [dense(b.modalities[name].counts).numpy() for b in batches if name in b.modalities]
        )
        for name in cells.modalities
    }
