"""The methods of a run that tell how good it is: scores of cells, and a page about the run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clue_dist.api.training_call import TrainingData, find_store_path
from clue_dist.config import MIN_KNOWN
from clue_dist.files import parse_path
from clue_dist.inference.cells import find_batch_columns, name_modalities
from clue_dist.inference.load_model import TrainedModel
from clue_dist.inference.score_tables import Scores, name_scores_file
from clue_dist.ranks import Ranks, run_on_first_rank
from clue_dist.store.reader import Store


class EvaluationMethods:
    """A part of `Run`."""

    folder: Path
    trained_model: TrainedModel

    def evaluate(
        self,
        cells: TrainingData,
        *,
        out: str | Path | None = None,
        max_cells: int | None = None,
        modality: str | None = None,
        kinds: Mapping[str, str] | None = None,
        layer: str | Mapping[str, str] | None = None,
        feature_ids: str | Mapping[str, str] | None = None,
        batch_key: str | Sequence[str] | None = None,
        label_key: str | None = None,
        min_known: float = MIN_KNOWN,
        batch_size: int = 4096,
    ) -> Scores:
        """Score how well modalities match in cells, and whether z is one space.

        Cells that the model was trained on are scored with a warning.

        Args:
            cells: cells that the model has not seen, a store; or what `fit` takes, which is
                converted for the model into a folder that goes again. Matching needs cells that
                carry several modalities.
            out: a file for the scores.
            max_cells: score a random part.
            modality: which modality of the model an AnnData holds, where its features do not say.
            kinds: of modalities, as of `fit`, as are the next four, for cells that are in no store.
            layer: where raw counts lie.
            feature_ids: column of var that names the features.
            batch_key: column of obs with the batch; by default that of the training cells.
            label_key: column of obs with the cell type.
            min_known: least share of a modality's features that each file must have had.
            batch_size: cells embedded at once.

        Returns:
            The scores, a dict, see `clue_dist.inference.evaluate`; its repr is a table.
        """
        from clue_dist.inference.evaluate import evaluate_store, require_scores_path
        from data_prep.from_python import ConversionRequest

        if batch_key is None:
            batch_key = find_batch_columns(cells, self.trained_model.batch_vocabulary)
        cells, modality = name_modalities(cells, self.trained_model, modality, feature_ids)
        request = ConversionRequest(
            batch_key,
            label_key,
            layer,
            feature_ids,
            kinds or {},
            modality,
            ["--features-from", str(self.folder)],
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "scores.json" if out is None else parse_path(str(out))
            require_scores_path(path, max_cells)  # a conversion takes minutes
            result = evaluate_store(
                self.trained_model,
                self._open_store(cells, Path(folder), request),
                path,
                run=self.folder,
                max_cells=max_cells,
                min_known=min_known,
                batch_size=batch_size,
                ranks=Ranks() if out is None else Ranks.from_environment().join_group(),
            )
        return Scores(result)

    def report(
        self,
        *,
        embedding: str | Path | None = None,
        scores: str | Path | Mapping[str, Any] | None = None,
        imputed: str | Path | None = None,
        truth: str | Path | None = None,
    ) -> Path:
        """Write a page about the run, RUN/report/index.html; sections it has had stay.

        Args:
            embedding: what `embed` has written: UMAPs, and labels between modalities.
            scores: what `evaluate` has returned or written, shown as tables.
            imputed: what `clue impute` has written, compared with the counts of `truth`.
            truth: the store whose cells were imputed.

        Returns:
            The page.
        """
        from clue_dist.inference.report import write_report

        embedding, imputed = (
            None if path is None else parse_path(str(path)) for path in (embedding, imputed)
        )
        store = None if truth is None else str(truth)
        with name_scores_file(scores) as file:
            page = run_on_first_rank(
                lambda: str(write_report(self.folder, embedding, file, imputed, store))
            )
        return Path(page)

    def _open_store(self, cells: TrainingData, folder: Path, request: Any) -> Store:
        """The store that the cells are, or one that is made of them in a folder."""
        if isinstance(cells, Store):
            return cells
        place = find_store_path(cells)
        if place is not None:
            return Store(place)
        from data_prep.from_python import convert_cells, name_cells

        made, name = folder / "cells.zarr", name_cells(cells)
        convert_cells(cells, made, request, name)
        return Store(made, name)
