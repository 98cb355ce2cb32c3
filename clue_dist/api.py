"""The front door: train a model, load one, and ask it, from a notebook, a script or `deepspeed`."""

from __future__ import annotations

import atexit
import gc
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeAlias

import anndata as ad
import mudata as md
import numpy as np

from clue_dist import config as configs
from clue_dist.checkpoint.run_folder import list_checkpoints
from clue_dist.config import MIN_KNOWN, Config
from clue_dist.files import parse_path
from clue_dist.inference.cells import CellSource, MemoryCells, open_cells, open_source
from clue_dist.inference.describe_run import describe_run
from clue_dist.inference.embed import collect_embedding, embed_anndata, embed_cells
from clue_dist.inference.load_model import TrainedModel, load_model
from clue_dist.process import print_line
from clue_dist.ranks import Ranks
from clue_dist.store.layout import MANIFEST
from clue_dist.store.reader import Store

STOPPED = 75  # exit code after a stop signal: saved, not finished, start me again (EX_TEMPFAIL)

TrainingData: TypeAlias = ad.AnnData | md.MuData | Store | str | Path | Sequence[str | Path]


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


def fit(
    data: TrainingData,
    out: str | Path,
    *,
    batch_key: str | None = None,
    label_key: str | None = None,
    layer: str | Mapping[str, str] | None = None,
    feature_ids: str | Mapping[str, str] | None = None,
    modality: str | None = None,
    kinds: Mapping[str, str] | None = None,
    conversion: Sequence[str] = (),
    config: str | Path | Mapping[str, Any] = "atlas",
    settings: Mapping[str, Any] | None = None,
    resume: str = "auto",
    init_from: str | Path | None = None,
) -> Run:
    """Train a model on cells, in this process, or over all ranks that a launcher started.

    What is not a store is converted into one beside `out`, `OUT.zarr`. Called again, training goes
    on where it was stopped, as by Ctrl-C.

    Args:
        data: an AnnData or MuData in memory; files, each as `python -m data_prep convert` takes it
            ("rna=cells.h5ad"); or a store.
        out: the run's folder.
        batch_key: column of obs with the batch; by default `batch`, where there is one.
        label_key: column of obs with the cell type; by default `cell_type`, where there is one.
        layer: where raw counts lie, for all modalities or by modality; by default X.
        feature_ids: column of var that names the features, instead of var_names, likewise.
        modality: what an AnnData holds, where its features do not say.
        kinds: by modality, kinds that names do not say: {"hto": "adt"}.
        conversion: further flags of `python -m data_prep convert`: ["--top", "rna=4000"].
        config: a recipe's name, a JSON file, or what it would hold.
        settings: settings that differ from it, by dotted path: {"train.epochs": 20}. Unless they
            say otherwise, nothing is logged to wandb.
        resume: "auto" goes on from the newest checkpoint, "never" begins anew, a folder names the
            checkpoint to go on from.
        init_from: a run whose weights to begin with.

    Returns:
        The run, with its best weights.

    Raises:
        DataError: the cells are not what they should be.
        ConfigError: settings that cannot work.
        StoreError: no sound store; a store of other cells is beside `out`.
        ResumeError: training cannot go on from what is in `out`.
        KeyboardInterrupt: Ctrl-C stopped training, which was saved.
        SystemExit: another signal did so; its code is 75.
    """
    from data_prep.from_python import ConversionRequest

    request = ConversionRequest(
        batch_key, label_key, layer, feature_ids, kinds or {}, modality, conversion
    )
    folder = parse_path(str(out))
    ranks = Ranks.from_environment()
    read = ranks.run_before_joining(lambda: _read_config(config, settings or {}, folder))
    _train_on(data, request, read, ranks, resume, init_from)
    # A run without cells that are held out has no best weights.
    return load(folder, "best" if list_checkpoints(folder / "best") else "last")


def _read_config(
    config: str | Path | Mapping[str, Any], settings: Mapping[str, Any], folder: Path
) -> Config:
    """The settings of a run, but for its store."""
    # wandb would take over a run that a notebook has open.
    chosen = {"log.wandb": "disabled"} | dict(settings) | {"run": str(folder)}
    words = [f"{name}={json.dumps(value)}" for name, value in chosen.items()]
    if isinstance(config, Mapping):
        return configs.parse_config(deepcopy(dict(config)), "config", words)
    return configs.load_config(config, words)


def _train_on(
    data: TrainingData,
    request: Any,
    config: Config,
    ranks: Ranks,
    resume: str,
    init_from: str | Path | None,
) -> None:
    """Convert cells where they are no store, and train on them; every rank must call."""
    from clue_dist.train.arguments import prepare_run
    from clue_dist.train.engine import join_process_group

    join_process_group(ranks)
    # The group of one process stays for the next call: DeepSpeed keeps handles of it.
    atexit.register(ranks.leave_group)
    run = Path(config.run)
    store = ranks.run_on_first(lambda: _find_store(data, request, run))
    earlier = None if init_from is None else parse_path(str(init_from))
    prepared = []
    ranks.run_on_all(
        lambda: prepared.append(
            prepare_run(config.model_copy(update={"store": store}), ranks.world, resume, earlier)
        )
    )
    gc.unfreeze()  # what a notebook holds must not be kept from the collector
    setup, warm_start = prepared[0]
    if ranks.is_first:
        print_line(setup.format_summary())

    from clue_dist.train.loop import run_training

    result = run_training(setup, ranks, resume, warm_start)
    if result.interrupted:
        raise KeyboardInterrupt("training was stopped and saved; the same call goes on")
    if not result.finished:
        sys.exit(STOPPED)
    if ranks.is_first:
        print_line(f"{result.format_ending()}: {run}")


def _find_store(data: TrainingData, request: Any, run: Path) -> str:
    """Where the store to train on lies; cells that are in none are converted first."""
    place = _find_store_path(data)
    if place is not None:
        return place

    from data_prep.from_python import convert_cells

    store = run.with_name(f"{run.name}.zarr")
    store.parent.mkdir(parents=True, exist_ok=True)
    convert_cells(data, store, request)
    return str(store)


def _find_store_path(data: TrainingData) -> str | None:
    """Where a store lies; None where the cells are in none yet."""
    if isinstance(data, Store):
        return str(data.root)
    if isinstance(data, (str, Path)):
        text = str(data)
        if ("://" in text and "=" not in text) or (parse_path(text) / MANIFEST).is_file():
            return text
    return None


class Run:
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
        batch_key: str | None = None,
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
        source = open_source(cells)
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
        if out is not None:
            path = parse_path(str(out))
            embed_cells(
                self.trained_model,
                opened,
                path,
                run=self.folder,
                per_modality=per_modality,
                batch_size=batch_size,
                ranks=self._join_ranks(),
            )
            return path
        if isinstance(source, (ad.AnnData, md.MuData)):
            assert isinstance(opened, MemoryCells)
            joint = embed_anndata(
                self.trained_model, source, opened, per_modality=per_modality, batch_size=batch_size
            )
            return joint if source is cells else source
        return collect_embedding(
            self.trained_model,
            opened,
            self.folder,
            per_modality=per_modality,
            batch_size=batch_size,
        )

    def evaluate(
        self,
        cells: TrainingData,
        *,
        out: str | Path | None = None,
        max_cells: int | None = None,
        min_known: float = MIN_KNOWN,
        batch_size: int = 4096,
    ) -> dict[str, Any]:
        """Score how well modalities match in cells, and whether z is one space.

        Args:
            cells: cells that carry several modalities and that the model has not seen, a store; or
                what `fit` takes, which is converted for the model into a folder that goes again.
            out: a file for the scores.
            max_cells: score a random part.
            min_known: least share of a modality's features that each file must have had.
            batch_size: cells embedded at once.

        Returns:
            The scores, see `clue_dist.inference.evaluate`.
        """
        from clue_dist.inference.evaluate import evaluate_store

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "scores.json" if out is None else parse_path(str(out))
            return evaluate_store(
                self.trained_model,
                self._open_store(cells, Path(folder)),
                path,
                run=self.folder,
                max_cells=max_cells,
                min_known=min_known,
                batch_size=batch_size,
                ranks=Ranks() if out is None else self._join_ranks(),
            )

    def report(
        self, *, embedding: str | Path | None = None, scores: str | Path | None = None
    ) -> Path:
        """Write a page about the run, RUN/report/index.html.

        Args:
            embedding: what `embed` has written, of which a UMAP is shown.
            scores: what `evaluate` has written, shown as a table.

        Returns:
            The page.
        """
        from clue_dist.inference.report import write_report

        embedding_path, scores_path = (
            None if path is None else parse_path(str(path)) for path in (embedding, scores)
        )
        return write_report(self.folder, embedding_path, scores_path)

    def _open_store(self, cells: TrainingData, folder: Path) -> Store:
        """The store that the cells are, or one that is made of them in a folder."""
        if isinstance(cells, Store):
            return cells
        place = _find_store_path(cells)
        if place is None:
            from data_prep.from_python import ConversionRequest, convert_cells

            request = ConversionRequest(flags=["--features-from", str(self.folder)])
            place = str(folder / "cells.zarr")
            convert_cells(cells, Path(place), request)
        return Store(place)

    def _join_ranks(self) -> Ranks:
        """The ranks that a launcher started, who all call alike."""
        return Ranks.from_environment().join_group()
