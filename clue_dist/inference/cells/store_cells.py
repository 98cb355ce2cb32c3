"""Cells of a store, as a model is asked about them: slices of whole blocks, segment by segment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata.utils import make_index_unique

from clue_dist.data.assembly import read_batch
from clue_dist.data.batch import Batch
from clue_dist.errors import StoreError, format_count, list_names
from clue_dist.inference.load_model import TrainedModel
from clue_dist.number_checks import require_number
from clue_dist.store.batch_vocabulary import BatchVocabulary
from clue_dist.store.reader import Store

_METADATA_CELLS = 2**16  # cells whose barcodes are read at once


@dataclass(frozen=True, eq=False)
class CellSlice:
    """Cells that carry the same modalities and are read at once."""

    modalities: tuple[str, ...]  # that each of the cells carries, in the model's order
    rows: np.ndarray  # (n,) int64, ascending, their rows in the answer

    @property
    def n_cells(self) -> int:
        return len(self.rows)

    @property
    def place(self) -> str:
        """Where the cells lie, for messages."""
        return f"cells {self.rows[0]} to {self.rows[-1]}"


@dataclass(frozen=True, eq=False)
class SegmentSlice(CellSlice):
    """Cells `start` to `start + n_cells` of a segment; their rows in the answer lie together."""

    segment: str
    start: int

    @property
    def place(self) -> str:
        return f"segment {self.segment}, cells {self.start} to {self.start + self.n_cells - 1}"

    @property
    def positions(self) -> np.ndarray:
        """Positions in the segment, (n_cells,)."""
        return np.arange(self.start, self.start + self.n_cells)


class StoreCells:
    """The cells of a store, or the first ones of each of its segments.

    Args:
        store: the store, with modalities and features that the model knows.
        trained_model: the model that is asked.
        sizes: how many cells of each segment; by default all.
    """

    def __init__(
        self, store: Store, trained_model: TrainedModel, sizes: Mapping[str, int] | None = None
    ) -> None:
        self.store = store
        self.modalities = [name for name in trained_model.modalities if name in store.modalities]
        segments = store.manifest.strata
        self._sizes = {
            name: segment.n_cells if sizes is None else sizes.get(name, 0)
            for name, segment in segments.items()
        }
        self._all_modalities = list(trained_model.modalities)

    @property
    def batches(self) -> BatchVocabulary:
        """The biological batches that codes of cells name, be they known to the model or not."""
        return self.store.manifest.batch_vocabulary

    @property
    def n_cells(self) -> int:
        """Number of cells, which are the rows of the answer."""
        return sum(self._sizes.values())

    def __repr__(self) -> str:
        cells = format_count(self.n_cells, "cell")
        return f"{cells} with {list_names(self.modalities)} in {self.store.name}"

    def describe_source(self) -> dict[str, Any]:
        """Say where the cells come from."""
        return {
            "store": self.store.name,
            "fingerprint": self.store.fingerprint,
            "modalities": self.store.modalities,
        }

    def slice_cells(self, batch_size: int) -> list[SegmentSlice]:
        """Cut the cells into slices of whole blocks, in the order of their rows.

        Args:
            batch_size: cells of a slice, rounded down to whole blocks, at least one.

        Raises:
            ConfigError: `batch_size` is no such number.
            StoreError: no cells.
        """
        require_number("batch_size", batch_size, 1, whole=True)
        block_cells = self.store.manifest.block_cells
        step = max(1, batch_size // block_cells) * block_cells
        slices: list[SegmentSlice] = []
        row = 0
        for name, n_cells in self._sizes.items():
            carried = self.store.manifest.strata[name].modalities
            modalities = tuple(m for m in self.modalities if m in carried)
            for start in range(0, n_cells, step):
                rows = np.arange(row + start, row + min(start + step, n_cells))
                slices.append(SegmentSlice(modalities, rows, name, start))
            row += n_cells
        if not slices:
            raise StoreError("the store has no cells to embed", where=self.store.name)
        return slices

    def read_slice(self, cells: CellSlice) -> Batch:
        """Read the cells of a slice; columns of `observed` are in the model's order."""
        assert isinstance(cells, SegmentSlice)
        return read_batch(self.store, cells.segment, cells.positions, self._all_modalities)

    def read_obs(self) -> pd.DataFrame:
        """Read what is known of the cells.

        Returns:
            Barcodes as the index, `batch` and `cell_type` where some cell has one, the levels of
            batches that have several covariates, and the columns of obs that the store keeps, (N)
            rows. Where data sets share barcodes, the index is made unique; `barcode` keeps them.
        """
        parts = [
            self.store.segments[name].read_metadata(
                np.arange(start, min(start + _METADATA_CELLS, n_cells))
            )
            for name, n_cells in self._sizes.items()
            for start in range(0, n_cells, _METADATA_CELLS)
        ]
        barcodes = pd.Index(np.concatenate([part.barcodes for part in parts]).astype(object))
        if barcodes.has_duplicates:
            # MuData would take cells that share a barcode for one.
            frame = pd.DataFrame(index=make_index_unique(barcodes))
            frame["barcode"] = barcodes.to_numpy()
        else:
            frame = pd.DataFrame(index=barcodes)
        columns = {
            "batch": ([part.batch for part in parts], self.store.manifest.batches),
            "cell_type": ([part.label for part in parts], self.store.manifest.labels),
        }
        for column, (codes, names) in columns.items():
            code = np.concatenate(codes)
            if (code >= 0).any():  # -1 is unknown
                frame[column] = pd.Categorical.from_codes(code, categories=pd.Index(names))
        for column, levels in self.batches.decode_levels(
            np.concatenate(columns["batch"][0])
        ).items():
            frame[column] = levels
        for name, kept in self.store.manifest.obs_columns.items():
            if name not in frame:
                frame[name] = kept.decode_values(self._read_kept_column(name))
        return frame

    def _read_kept_column(self, name: str) -> np.ndarray:
        """Read a kept column of all cells, (N,) as it is stored."""
        parts = [
            self.store.segments[segment].read_kept_column(
                name, np.arange(start, min(start + _METADATA_CELLS, n_cells))
            )
            for segment, n_cells in self._sizes.items()
            for start in range(0, n_cells, _METADATA_CELLS)
        ]
        return np.concatenate(parts)
