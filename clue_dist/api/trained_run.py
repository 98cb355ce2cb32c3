"""A trained model that can be asked about cells, as `load` and `fit` of the package give it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import mudata as md
import numpy as np

from clue_dist.api.comparison_methods import ComparisonMethods
from clue_dist.api.evaluation_methods import EvaluationMethods
from clue_dist.api.imputation_methods import ImputationMethods
from clue_dist.api.training_call import (
    TrainingData,
    read_settings,
    run_on_ranks,
    train_on_cells,
)
from clue_dist.checkpoint.run_folder import list_checkpoints
from clue_dist.errors import ConfigError, list_names, name_argument, suggest_names
from clue_dist.files import parse_path
from clue_dist.inference.answer_files import require_answer_path
from clue_dist.inference.cells import (
    Cells,
    CellSource,
    MemoryCells,
    find_source_file,
    open_cells,
    open_source,
)
from clue_dist.inference.describe_run import describe_run
from clue_dist.inference.embed import (
    EMBEDDING_FORMATS,
    KEY,
    collect_embedding,
    embed_anndata,
    embed_cells,
)
from clue_dist.inference.export import CardTexts, export_run
from clue_dist.inference.load_model import TrainedModel, load_model
from clue_dist.inference.new_batches import tune_batches
from clue_dist.inference.output_files import parse_output
from clue_dist.inference.score_tables import name_scores_file
from clue_dist.inference.shift import EmbeddingShift, measure_shift
from clue_dist.ranks import Ranks, run_on_first_rank
from clue_dist.store.reader import Store


def load(folder: str | Path, checkpoint: str = "best") -> Run:
    """Load a trained model.

    Args:
        folder: folder of a run, or of a model that was shared.
        checkpoint: "best" (of validation), "last" (saved), or the name of a checkpoint.

    Raises:
        ResumeError: there is no trained model.
    """
    path = parse_path(str(folder))
    return Run(path, load_model(path, checkpoint))


def load_newest(folder: Path) -> Run:
    """Load the best weights of a run, or those that it saved last where it had no validation.

    Args:
        folder: of the run.

    Raises:
        ResumeError: there are neither.
    """
    return load(folder, "best" if list_checkpoints(folder / "best") else "last")


class Run(ImputationMethods, ComparisonMethods, EvaluationMethods):
    """A trained model that can be asked about cells.

    Args:
        folder: its folder.
        trained_model: the model with its weights.
    """

    def __init__(self, folder: Path, trained_model: TrainedModel) -> None:
        self.folder, self.trained_model = folder, trained_model

    def __repr__(self) -> str:
        return describe_run(self.folder, self.trained_model)

    def embed(
        self,
        cells: CellSource,
        *,
        out: str | Path | None = None,
        per_modality: bool = True,
        modality: str | None = None,
        modalities: Sequence[str] | None = None,
        layer: str | Mapping[str, str] | None = None,
        feature_ids: str | Mapping[str, str] | None = None,
        batch_key: str | Sequence[str] | None = None,
        min_known: float | None = None,
        batch_size: int = 4096,
    ) -> np.ndarray | ad.AnnData | md.MuData | Path:
        """Embed cells: where each lies in the space of all modalities.

        `obsm["X_clue"]` holds that, from everything observed in a cell, `obsm["X_clue_var"]` how
        sure it is, `obs["clue_modalities"]` what was observed.

        Args:
            cells: an AnnData or MuData in memory, into which the embedding is written; or a path
                or a store.
            out: an .h5mu, .h5ad or .zarr to write instead, without counts; over all ranks.
            per_modality: whether z from each modality alone is wanted, too.
            modality: which modality of the model an AnnData holds, where its features do not say.
            modalities: those to use; by default all that the model knows.
            layer: where raw counts lie, for all modalities or by modality; by default X.
            feature_ids: column of var that names the features, instead of var_names, likewise.
            batch_key: column of obs with the batch, which need not be the model's.
            min_known: least share of a modality's features that must be there.
            batch_size: cells embedded at once.

        Returns:
            Of cells in memory the joint z, (N, K * d) float32; of a path or store an AnnData or
            MuData with the embedding; `out`, where that is given.

        Raises:
            DataError: cells in memory that cannot be brought to the model's features.
            StoreError: modalities or features of a store that are not the model's.
            ConfigError: `out` cannot be written.
        """
        path = parse_output(
            out, lambda path: require_answer_path(path, EMBEDDING_FORMATS, find_source_file(cells))
        )
        # Where the answer goes into a file, the counts may stay in theirs.
        source = open_source(cells, leave_counts=out is not None)
        opened = open_cells(
            source,
            self.trained_model,
            modality=modality,
            modalities=modalities,
            layer=layer,
            feature_ids=feature_ids,
            batch_key=batch_key,
            min_known=min_known,
        )
        if path is None:
            table = self._embed_in_memory(source, opened, per_modality, batch_size)
            is_open = isinstance(cells, (ad.AnnData, md.MuData))
            return table.obsm[KEY] if is_open else table
        embed_cells(
            self.trained_model,
            opened,
            path,
            run=self.folder,
            per_modality=per_modality,
            batch_size=batch_size,
            ranks=Ranks.from_environment().join_group(),
        )
        return path

    def export(
        self,
        out: str | Path,
        scores: str | Path | Mapping[str, Any] | None = None,
        *,
        cells: CellSource | None = None,
        title: str = "",
        data: str = "",
        licence: str = "",
    ) -> Path:
        """Write the model, and a card that explains it, into a folder to be shared.

        Args:
            out: the folder to make.
            scores: what `evaluate` has returned or written, for the card.
            cells: reference cells that travel with the model: z and obs, no counts. As of `embed`,
                or an .h5ad that `embed` has written.
            title: of the card; by default the folder's name.
            data: what was measured, and where it can be had.
            licence: terms under which others may use the model.

        Returns:
            The folder.
        """
        name, card = self.trained_model.name, CardTexts(title, data, licence)
        target = parse_path(str(out))
        with name_scores_file(scores) as file:
            run_on_first_rank(
                lambda: export_run(
                    self.folder, target, checkpoint=name, scores=file, texts=card, cells=cells
                )
            )
        return target

    def fine_tune(
        self,
        cells: TrainingData,
        out: str | Path,
        *,
        train: Literal["batches", "all"] = "batches",
        new_modalities: str | Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        **choices: Any,
    ) -> Run:
        """Train a copy of the model on: its batches alone, or all its weights.

        Args:
            cells: cells of new batches, as of `embed`; to train all weights, old and new cells
                together, paired or not, as `fit` takes them.
            out: the folder to make, which holds the new model. Called again, the training of all
                weights goes on where it was stopped.
            train: "batches" finds what the decoders must know of new batches, and z of every cell
                stays. "all" trains all of the run's best weights on, and z moves.
            new_modalities: modalities of the cells that the model does not have.
            settings: of training, by dotted path, where they are not those of the run.
            choices: `layer`, `batch_key` and others, as `embed` takes them, or, to train all
                weights, as `fit` does.

        Returns:
            The new model.

        Raises:
            ConfigError: another word for `train` or for one of the choices; `settings` or
                `new_modalities` where batches alone are learnt.
            ClueError: what `embed` raises of the cells, or `fit`.
        """
        if train not in ("batches", "all"):
            raise ConfigError(
                "no such training",
                where=name_argument("train"),
                got=repr(train),
                expected="'batches' or 'all'",
            )
        folder = parse_path(str(out))
        new_modalities = [new_modalities] if isinstance(new_modalities, str) else new_modalities
        if train == "all":
            self._train_on_all(cells, folder, new_modalities, settings or {}, choices)
            return load_newest(folder)
        if new_modalities or settings:
            raise ConfigError(
                "new batches are learnt without settings, and without new modalities",
                got=f"new_modalities={list(new_modalities)}, settings={dict(settings or {})}",
                fix='fine_tune(..., train="all")',
            )
        _require_known(choices, _list_reading_choices(), "fine_tune")
        opened = open_cells(cells, self.trained_model, **choices)
        tune_batches(self.folder, self.trained_model, opened, folder)
        return load(folder)

    def measure_shift(
        self, earlier: Run | str | Path, cells: CellSource, **choices: Any
    ) -> EmbeddingShift:
        """Measure by how much the joint z of cells differs from that of an earlier model.

        Args:
            earlier: the model that this one was trained on from, say, or its folder.
            cells: cells with modalities that both know.
            choices: as `embed` takes them.

        Raises:
            ConfigError: another word for one of the choices.
        """
        _require_known(choices, _list_reading_choices(), "measure_shift")
        earlier = earlier if isinstance(earlier, Run) else load(earlier)
        models = earlier.trained_model, self.trained_model
        return measure_shift(*models, *(open_cells(cells, model, **choices) for model in models))

    def _embed_in_memory(
        self,
        source: ad.AnnData | md.MuData | Store,
        opened: Cells,
        per_modality: bool,
        batch_size: int,
    ) -> ad.AnnData | md.MuData:
        """Embed cells in memory into the object that holds them, and those of a store into one."""
        if isinstance(source, Store):
            return collect_embedding(
                self.trained_model,
                opened,
                self.folder,
                per_modality=per_modality,
                batch_size=batch_size,
            )
        assert isinstance(opened, MemoryCells)
        embed_anndata(
            self.trained_model, source, opened, per_modality=per_modality, batch_size=batch_size
        )
        return source

    def _train_on_all(
        self,
        cells: TrainingData,
        folder: Path,
        new_modalities: Sequence[str],
        settings: Mapping[str, Any],
        choices: Mapping[str, Any],
    ) -> None:
        """Train all weights on with the run's settings; cells get the run's features."""
        from clue_dist.train.arguments import list_further_settings
        from data_prep.from_python import ConversionRequest, split_words

        known = [field.name for field in fields(ConversionRequest)]
        _require_known(choices, known, 'fine_tune, train="all"')
        flags = ["--features-from", str(self.folder)]
        flags += [word for name in new_modalities for word in ("--new-modality", name)]
        flags += split_words(choices.get("conversion", ()))
        request = ConversionRequest(**{**choices, "conversion": flags})
        ranks, config_file = Ranks.from_environment(), self.folder / "config.json"
        config = run_on_ranks(
            ranks,
            lambda: read_settings(
                config_file, list_further_settings(config_file) | dict(settings), folder
            ),
        )
        train_on_cells(cells, request, config, ranks, "auto", self.folder)


def _list_reading_choices() -> list[str]:
    """List what a person may choose of how cells are read."""
    parameters = inspect.signature(open_cells).parameters.values()
    return [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]


def _require_known(choices: Mapping[str, Any], known: Sequence[str], method: str) -> None:
    """Require that choices have the names that they have elsewhere."""
    for name in choices:
        if name not in known:
            raise ConfigError(
                "no such argument",
                where=method,
                got=name,
                expected=list_names(known),
                fix=suggest_names(name, known),
            )
