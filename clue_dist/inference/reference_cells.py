"""Cells that other cells are compared with: z and obs of cells, whose counts may be elsewhere.

A model that was shared can bring such cells along, in `cells.h5ad` of its folder. It is what
`clue embed --per-modality` writes, without variances and paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from clue_dist.errors import ClueError, ConfigError, DataError, list_names, shorten_error
from clue_dist.files import parse_path
from clue_dist.inference.answer_files import PROVENANCE_KEY
from clue_dist.inference.cells import (
    ArgumentNames,
    Cells,
    CellSlice,
    CellSource,
    open_cells,
)
from clue_dist.inference.cells.argument_names import OPEN_CELLS
from clue_dist.inference.cells.memory_obs import require_writable_obs
from clue_dist.inference.cells.named_counts import warn_of_cells
from clue_dist.inference.embed import KEY, OBSERVED_COLUMN, collect_embedding
from clue_dist.inference.load_model import TrainedModel
from clue_dist.inference.stream import Embedding, embed_in_memory
from clue_dist.model.common_space import JOINT_FORMULA
from clue_dist.store.reader import Store

REFERENCE_FILE = "cells.h5ad"  # in the folder of a model
# Cells that are to travel with a model are named alone, without a word on how to read them.
_NO_ARGUMENTS = ArgumentNames(
    modality="",
    layer="",
    feature_ids="",
    min_known="",
    instead="convert the cells into a store, or embed them into an .h5ad, and say it there",
)


@dataclass(frozen=True, eq=False)
class ReferenceCells:
    """Cells and where each lies in the space of a model."""

    obs: pd.DataFrame  # (N) rows: barcodes as the index, `batch`, `cell_type`, ...
    embedding: Embedding  # also of each modality alone
    modalities: list[str]  # those that some cell carries, in the model's order

    def read_obs(self) -> pd.DataFrame:
        """Return what is known of the cells, (N) rows, as `Cells.read_obs` does."""
        return self.obs

    def __repr__(self) -> str:
        return (
            f"{len(self.obs):,} embedded cells with {list_names(self.modalities)}; "
            f"obs: {list_names(self.obs.columns) or 'barcodes alone'}"
        )


ComparedCells: TypeAlias = Cells | ReferenceCells


def embed_for_comparison(
    trained_model: TrainedModel, cells: ComparedCells, batch_size: int = 4096
) -> ReferenceCells:
    """Embed cells, unless they are embedded already.

    Args:
        trained_model: the model.
        cells: the cells.
        batch_size: cells embedded at once.
    """
    if isinstance(cells, ReferenceCells):
        return cells
    embedding = embed_in_memory(trained_model, cells, batch_size, with_variance=False)
    return ReferenceCells(cells.read_obs(), embedding, list(cells.modalities))


def open_reference(
    source: CellSource | ReferenceCells,
    trained_model: TrainedModel,
    arguments: ArgumentNames = OPEN_CELLS,
    **reading: Any,
) -> ComparedCells:
    """Open the cells that others are to be compared with.

    Args:
        source: cells, as `open_cells` takes them; or an .h5ad that `clue embed --per-modality` has
            written with this model.
        trained_model: the model.
        arguments: what the caller calls those of `reading`, for messages.
        reading: how counts are read, see `open_cells`.

    Raises:
        DataError: an embedding by other weights, or without z from each modality alone.
        ClueError: what `open_cells` raises.
    """
    if isinstance(source, ReferenceCells):
        return source
    if isinstance(source, (str, Path)) and _holds_embedding(source, ".h5mu"):
        raise DataError(
            "an embedding in a MuData is no reference",
            where=source,
            fix="write it into an .h5ad: `clue embed --per-modality --out z.h5ad`",
        )
    if isinstance(source, (str, Path)) and _holds_embedding(source):
        return _index_cells(_read_embedding(source, trained_model), trained_model)
    return open_cells(source, trained_model, arguments, **reading)


def open_own_reference(folder: Path, trained_model: TrainedModel) -> ComparedCells:
    """Open the cells that the folder of a model holds, else those that it was trained on.

    Raises:
        ConfigError: the folder holds none, and the store of its training is not where it was.
    """
    if (folder / REFERENCE_FILE).is_file():
        return open_reference(folder / REFERENCE_FILE, trained_model)
    try:
        store = Store(trained_model.config.store)
    except ClueError:
        store = None
    if store is None or store.fingerprint not in trained_model.seen_cells:
        raise ConfigError(
            "the model brings no reference cells",
            where=folder,
            got=f"no {REFERENCE_FILE}, and not the store of its training",
            fix="name the reference; `clue export --with-cells STORE` lets cells travel with a "
            "model",
        )
    return open_cells(store, trained_model)


def collect_reference(source: CellSource, trained_model: TrainedModel) -> ad.AnnData:
    """Collect what of cells may travel with a model: z and obs, no counts, no path.

    Args:
        source: the cells, as `open_reference` takes them.
        trained_model: the model.

    Raises:
        DataError: columns of obs that no file takes.
        ClueError: what `open_reference` raises.
    """
    if isinstance(source, (str, Path)) and _holds_embedding(source):
        table = _read_embedding(source, trained_model)
    else:
        cells = open_cells(source, trained_model, _NO_ARGUMENTS)
        table = collect_embedding(trained_model, cells, "")
    require_writable_obs(table.obs, ".h5ad")
    keys = [KEY, *(f"{KEY}_{name}" for name in trained_model.modalities)]
    made = table.uns[PROVENANCE_KEY]
    provenance = {**made, "run": "", "store": Path(str(made["store"])).name}
    obsm = {key: table.obsm[key] for key in keys if key in table.obsm}
    return ad.AnnData(obs=table.obs, obsm=obsm, uns={PROVENANCE_KEY: provenance})


def _holds_embedding(source: str | Path, ending: str = ".h5ad") -> bool:
    """Whether a path names a file, with this ending, that `clue embed` has written."""
    path = parse_path(str(source))
    if path.suffix != ending or not path.is_file():
        return False
    try:
        with h5py.File(path) as file:
            return f"uns/{PROVENANCE_KEY}" in file and f"obsm/{KEY}" in file
    except OSError:  # which reading counts from it will explain
        return False


def _read_embedding(source: str | Path, trained_model: TrainedModel) -> ad.AnnData:
    """Read an .h5ad that `clue embed --per-modality` has written with a model.

    Warns where another version of the package may have made its joint z.
    """
    path = parse_path(str(source))
    try:
        table = ad.read_h5ad(path)
        made = table.uns[PROVENANCE_KEY]
        weights, sizes = made["checkpoint"], {name: int(d) for name, d in made["latent"].items()}
        observed = table.obs[OBSERVED_COLUMN].astype(str)
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            "the embedding cannot be read",
            where=path,
            got=shorten_error(error),
            fix="make it again with `clue embed --per-modality`",
        ) from error
    expected = dict.fromkeys(trained_model.modalities, trained_model.latent)
    if (weights, sizes) != (trained_model.name, expected):
        raise DataError(
            "the embedding was made with other weights than the model's",
            where=path,
            got=f"{weights}, dimensions {sizes}",
            expected=f"{trained_model.name}, dimensions {expected}",
            fix="embed the cells with this model",
        )
    carried = {name for pattern in observed.unique() for name in pattern.split("+") if name}
    if missing := [name for name in carried if f"{KEY}_{name}" not in table.obsm]:
        raise DataError(
            "the embedding lacks z from single modalities",
            where=path,
            got=f"nothing of {list_names(sorted(missing))} alone",
            fix="make it again with `clue embed --per-modality`",
        )
    joins_modalities = trained_model.has_common_space and observed.str.contains("+", regex=False)
    if np.any(joins_modalities) and made.get("joint_formula") != JOINT_FORMULA:
        warn_of_cells(
            f"nothing says that {path} has its joint z by the formula of this version, so labels "
            "that it gives to other cells may be worse; matching is not touched. Embed its cells "
            "anew, or ask whoever shared the model to export it anew, with its cells"
        )
    return table


def _index_cells(table: ad.AnnData, trained_model: TrainedModel) -> ReferenceCells:
    """The cells of a table that `_read_embedding` gives."""
    observed = table.obs[OBSERVED_COLUMN].astype(str).to_numpy()
    slices = [
        CellSlice(tuple(pattern.split("+")), np.flatnonzero(observed == pattern))
        for pattern in np.unique(observed[observed != ""])
    ]
    carried = {name for cells in slices for name in cells.modalities}
    modalities = [name for name in trained_model.modalities if name in carried]
    alone = {name: np.asarray(table.obsm[f"{KEY}_{name}"]) for name in modalities}
    embedding = Embedding(slices, np.asarray(table.obsm[KEY]), alone, {})
    return ReferenceCells(table.obs, embedding, modalities)
