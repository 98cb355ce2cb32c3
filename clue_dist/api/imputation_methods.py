"""The methods of a run that tell values of features: imputation, and what marks groups of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata as ad
import pandas as pd

from clue_dist.inference.answer_files import require_answer_path
from clue_dist.inference.cells import ArgumentNames, CellSource, find_source_file, open_cells
from clue_dist.inference.differential import (
    DifferentialChoices,
    compare_groups,
    write_differences,
)
from clue_dist.inference.imputation_question import ImputationChoices
from clue_dist.inference.impute import IMPUTATION_FORMATS, impute_cells, write_imputation
from clue_dist.inference.load_model import TrainedModel
from clue_dist.inference.output_files import parse_output, require_table_path
from clue_dist.ranks import Ranks, run_on_first_rank

_ARGUMENTS = ArgumentNames(modality="cells_modality=")


class ImputationMethods:
    """A part of `Run`."""

    folder: Path
    trained_model: TrainedModel

    def impute(
        self,
        cells: CellSource,
        modality: str,
        *,
        out: str | Path | None = None,
        from_: str | Sequence[str] | None = None,
        batch: str | Sequence[str] | Mapping[str, str] = "own",
        features: str | Sequence[str] | None = None,
        library_size: float | str | None = None,
        log1p: bool = False,
        samples: int = 0,
        interval: float | None = None,
        threshold: float | None = None,
        seed: int = 0,
        cells_modality: str | None = None,
        layer: str | Mapping[str, str] | None = None,
        feature_ids: str | Mapping[str, str] | None = None,
        batch_key: str | Sequence[str] | None = None,
        min_known: float | None = None,
        batch_size: int = 4096,
    ) -> ad.AnnData | Path:
        """Impute a modality, or denoise one that was measured.

        Args:
            cells: the cells, as of `embed`.
            modality: whose values are asked for.
            out: an .h5ad or .zarr to write instead, piece by piece, over all ranks.
            from_: modalities to infer them from; by default all that a cell has.
            batch: the batch to decode for: a name, "own" (of each cell; averaged over all batches
                where it is unknown), or "average"; or levels by covariate, {"chemistry": "v3"},
                where the other covariates are each cell's own.
            features: those asked for, in this order; by default all.
            library_size: expected counts of profiles of this size, or "own", of each cell's; by
                default expected shares, per 10,000 counts.
            log1p: E ln(1 + counts per 10,000) instead, which is less than ln(1 + E).
            samples: profiles to draw of each cell, with the noise of counts.
            interval: share of draws in the central interval: layers `lower` and `upper`.
            threshold: smaller values become zero, and the matrices sparse.
            seed: of what is drawn.
            cells_modality: which modality an AnnData holds, as `modality` of `embed`.
            layer: where raw counts lie, as of `embed`.
            feature_ids: column of var that names the features, likewise.
            batch_key: column of obs with the batch; by default that of the training cells.
            min_known: least share of a modality's features that must be there.
            batch_size: cells encoded at once.

        Returns:
            Means in X, draws and bounds in layers, (cells, features); `out`, where that is given.
        """
        path = parse_output(
            out, lambda path: require_answer_path(path, IMPUTATION_FORMATS, find_source_file(cells))
        )
        opened = open_cells(
            cells,
            self.trained_model,
            _ARGUMENTS,
            modality=cells_modality,
            layer=layer,
            feature_ids=feature_ids,
            batch_key=batch_key,
            min_known=min_known,
        )
        choices = ImputationChoices(
            modality,
            from_=from_,
            batch=batch,
            features=features,
            library_size=library_size,
            log1p=log1p,
            samples=samples,
            interval=interval,
            threshold=threshold,
            seed=seed,
        )
        if path is None:
            return impute_cells(self.trained_model, opened, choices, batch_size, self.folder)
        ranks = Ranks.from_environment().join_group()
        write_imputation(
            self.trained_model,
            opened,
            path,
            choices,
            run=self.folder,
            batch_size=batch_size,
            ranks=ranks,
        )
        return path

    def differential(
        self,
        cells: CellSource,
        *,
        groupby: str,
        modality: str,
        out: str | Path | None = None,
        groups: str | Sequence[str] | None = None,
        reference: str | None = None,
        from_: str | Sequence[str] | None = None,
        batch: str | Sequence[str] | Mapping[str, str] = "average",
        features: str | Sequence[str] | None = None,
        least_change: float = 0.25,
        pairs: int = 2000,
        seed: int = 0,
        cells_modality: str | None = None,
        layer: str | Mapping[str, str] | None = None,
        feature_ids: str | Mapping[str, str] | None = None,
        min_known: float | None = None,
    ) -> dict[str, pd.DataFrame]:
        """Find the features that mark groups of cells, by values that are imputed or denoised.

        Args:
            cells: the cells, as of `embed`.
            groupby: column of obs with the groups.
            modality: whose features are compared.
            out: a file for the tables, too (.csv, .csv.gz, .parquet): one, with a column `group`.
            groups: those asked for; by default all.
            reference: the group to compare them with; by default all other cells.
            from_: modalities to infer values from; by default all that a cell has.
            batch: the batch to decode for, or "average"; or levels by covariate, where the others
                are drawn.
            features: those asked for; by default all.
            least_change: log2 fold change from which a pair of cells counts as different.
            pairs: pairs of cells that are drawn for each group.
            seed: of what is drawn.
            cells_modality: which modality an AnnData holds, as `modality` of `embed`.
            layer: where raw counts lie, as of `embed`.
            feature_ids: column of var that names the features, likewise.
            min_known: least share of a modality's features that must be there.

        Returns:
            By group a table of features, see `clue_dist.inference.differential.compare_groups`.
        """
        path = parse_output(out, require_table_path)
        opened = open_cells(
            cells,
            self.trained_model,
            _ARGUMENTS,
            modality=cells_modality,
            layer=layer,
            feature_ids=feature_ids,
            min_known=min_known,
        )
        choices = DifferentialChoices(
            modality,
            groupby,
            groups=groups,
            reference=reference,
            from_=from_,
            batch=batch,
            features=features,
            least_change=least_change,
            pairs=pairs,
            seed=seed,
        )
        tables = compare_groups(self.trained_model, opened, choices)
        if path is not None:
            run_on_first_rank(lambda: write_differences(tables, path))
        return tables
