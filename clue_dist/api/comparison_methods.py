"""The methods of a run that compare cells: partners across modalities, labels carried over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from clue_dist.inference.cells import ArgumentNames, CellSource, open_cells
from clue_dist.inference.load_model import TrainedModel
from clue_dist.inference.match import match_cells, require_pairs_path, write_matches
from clue_dist.inference.output_files import parse_output, require_table_path
from clue_dist.inference.reference_cells import (
    ComparedCells,
    open_own_reference,
    open_reference,
)
from clue_dist.inference.transfer import label_cells, write_labels
from clue_dist.neighbours.label_transfer import TransferSettings
from clue_dist.neighbours.partner_settings import PartnerMethod, PartnerSettings
from clue_dist.ranks import run_on_first_rank

# `match` is asked of several modalities, so no argument says which one an AnnData holds.
_OF_MATCH = ArgumentNames(modality="", instead='a MuData says it: `mudata.MuData({"rna": adata})`')


class ComparisonMethods:
    """A part of `Run`."""

    folder: Path
    trained_model: TrainedModel

    @property
    def reference(self) -> ComparedCells:
        """The cells that travel with the model, or else the store that it was trained on.

        Raises:
            ConfigError: there are neither.
        """
        return open_own_reference(self.folder, self.trained_model)

    def match(
        self,
        cells: CellSource,
        first: str,
        second: str,
        *,
        reference: CellSource | ComparedCells | None = None,
        out: str | Path | None = None,
        method: PartnerMethod = "scaled",
        n_partners: int = 1,
        within_batch: bool = False,
        approximate: bool = False,
        calibrate_on: CellSource | None = None,
        layer: str | Mapping[str, str] | None = None,
        feature_ids: str | Mapping[str, str] | None = None,
        reference_layer: str | Mapping[str, str] | None = None,
        reference_feature_ids: str | Mapping[str, str] | None = None,
        batch_key: str | Sequence[str] | None = None,
        min_known: float | None = None,
        batch_size: int = 4096,
    ) -> pd.DataFrame:
        """Find partners of the cells with modality `first` among reference cells with `second`.

        Args:
            cells: the cells, as of `embed`; some carry `first` and some `second`, or both.
            first: modality of the cells whose partners are sought.
            second: modality that the partners carry.
            reference: cells among which partners are sought, as of `transfer`; by default `cells`.
            out: a file for the pairs (.csv, .csv.gz, .parquet) or their sparse matrix (.npz).
            method: see `clue_dist.neighbours.partners.find_partners`.
            n_partners: the most that a cell gets, up to 1,000.
            within_batch: whether a partner must be of the same batch; a cell of an unknown batch
                gets none.
            approximate: whether neighbours come from faiss, for more than some 100,000 cells.
            calibrate_on: cells with both modalities, new to the model, that confidence is
                calibrated on; by default those of `cells`, if these are a store that the model
                was not trained on, with 50 of them or more.
            layer: where raw counts lie, as of `embed`.
            feature_ids: column of var that names the features, likewise.
            reference_layer: that of the reference, where it differs; "X" stands for X.
            reference_feature_ids: that of the reference, where it differs.
            batch_key: column of obs with the batch; by default that of the training cells.
            min_known: least share of a modality's features that must be there.
            batch_size: cells encoded at once.

        Returns:
            `cell`, `partner`, `weight`, and `confidence`, the probability that both are one cell;
            `attrs["is_calibrated"]` says whether that was calibrated.
        """
        settings = PartnerSettings(method, n_partners, approximate=approximate)
        path = parse_output(out, require_pairs_path)
        reading: dict[str, Any] = {
            "layer": layer,
            "feature_ids": feature_ids,
            "batch_key": batch_key,
            "min_known": min_known,
        }
        paired = None
        if calibrate_on is not None:  # whose batches do not matter
            paired = open_cells(
                calibrate_on, self.trained_model, _OF_MATCH, **reading | {"batch_key": None}
            )
        known = None
        if reference is not None:
            differing = {"layer": reference_layer, "feature_ids": reference_feature_ids}
            known = self._open_reference(reference, _OF_MATCH, reading, differing)
        matched = match_cells(
            self.trained_model,
            open_cells(cells, self.trained_model, _OF_MATCH, **reading),
            first,
            second,
            reference=known,
            settings=settings,
            within_batch=within_batch,
            calibrate_on=paired,
            batch_size=batch_size,
        )
        if path is not None:
            run_on_first_rank(lambda: write_matches(matched, path))
        return matched.pairs

    def transfer(
        self,
        reference: CellSource | ComparedCells | None,
        query: CellSource,
        label_key: str = "cell_type",
        *,
        out: str | Path | None = None,
        n_neighbours: int = 15,
        kept: float = 0.9,
        least_confidence: float = 0.0,
        reference_modality: str | None = None,
        query_modality: str | None = None,
        layer: str | Mapping[str, str] | None = None,
        feature_ids: str | Mapping[str, str] | None = None,
        reference_layer: str | Mapping[str, str] | None = None,
        reference_feature_ids: str | Mapping[str, str] | None = None,
        min_known: float | None = None,
        batch_size: int = 4096,
    ) -> pd.DataFrame:
        """Label cells by the labelled cells nearest to them, in any modalities.

        Args:
            reference: labelled cells, as of `embed`, or an .h5ad that this model has embedded them
                into; None: `Run.reference`.
            query: the cells to label, as of `embed`.
            label_key: column of the reference's obs with the labels.
            out: a file for the labels, too (.csv, .csv.gz, .parquet).
            n_neighbours: reference cells that vote for a label.
            kept: share of cells like the reference's that keep their label, see `TransferSettings`.
            least_confidence: cells below it are "unknown".
            reference_modality: which modality an AnnData holds, as `modality` of `embed`.
            query_modality: likewise, of the query.
            layer: where raw counts lie, as of `embed`.
            feature_ids: column of var that names the features, likewise.
            reference_layer: that of the reference, where it differs; "X" stands for X.
            reference_feature_ids: that of the reference, where it differs.
            min_known: least share of a modality's features that must be there.
            batch_size: cells encoded at once.

        Returns:
            A row for each query, as `clue_dist.inference.transfer.label_cells` explains it.
        """
        settings = TransferSettings(n_neighbours, kept, least_confidence)
        path = parse_output(out, require_table_path)
        reading: dict[str, Any] = {
            "layer": layer,
            "feature_ids": feature_ids,
            "min_known": min_known,
        }
        known = self._open_reference(
            reference,
            ArgumentNames(modality="reference_modality="),
            {**reading, "modality": reference_modality},
            {"layer": reference_layer, "feature_ids": reference_feature_ids},
        )
        asked = open_cells(
            query,
            self.trained_model,
            ArgumentNames(modality="query_modality="),
            modality=query_modality,
            **reading,
        )
        labels = label_cells(
            self.trained_model, known, asked, label_key, settings=settings, batch_size=batch_size
        )
        if path is not None:
            run_on_first_rank(lambda: write_labels(labels, path))
        return labels

    def _open_reference(
        self,
        source: CellSource | ComparedCells | None,
        names: ArgumentNames,
        reading: Mapping[str, Any],
        differing: Mapping[str, Any],
    ) -> ComparedCells:
        """Open reference cells; those of the model where none are named.

        They are read as the query is, but for what is not None in `differing`.
        """
        if source is None:
            return self.reference
        # What nobody has said of the query is best said of the reference alone.
        renamed = {
            argument: f"reference_{argument}="
            for argument, value in differing.items()
            if value is not None or reading[argument] is None
        }
        chosen = {argument: value for argument, value in differing.items() if value is not None}
        return open_reference(
            source, self.trained_model, replace(names, **renamed), **{**reading, **chosen}
        )
