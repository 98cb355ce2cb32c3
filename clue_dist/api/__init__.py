"""The front door: train a model, load one, and ask it, from a notebook, a script or `deepspeed`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clue_dist.api.trained_run import Run, load, load_newest
from clue_dist.api.training_call import TrainingData, read_settings, run_on_ranks, train_on_cells
from clue_dist.files import parse_path
from clue_dist.ranks import Ranks

__all__ = ["Run", "fit", "load"]


def fit(
    data: TrainingData,
    out: str | Path,
    *,
    batch_key: str | Sequence[str] | None = None,
    label_key: str | None = None,
    layer: str | Mapping[str, str] | None = None,
    feature_ids: str | Mapping[str, str] | None = None,
    modality: str | None = None,
    kinds: Mapping[str, str] | None = None,
    conversion: str | Sequence[str] = (),
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
        batch_key: column of obs with the batch; by default `batch`, where there is one. A list
            names several covariates, as donor and chemistry.
        label_key: column of obs with the cell type; by default `cell_type`, where there is one.
        layer: where raw counts lie, for all modalities or by modality; by default X.
        feature_ids: column of var that names the features, instead of var_names, likewise.
        modality: what an AnnData holds, where its features do not say.
        kinds: by modality, kinds that names do not say: {"hto": "adt"}.
        conversion: further flags of `python -m data_prep convert`: "--top rna=4000", or a list of
            words.
        config: a recipe's name, a JSON file, or what it would hold.
        settings: settings that differ from it, by dotted path: {"train.epochs": 20}. Unless they
            say otherwise, nothing is logged to wandb.
        resume: "auto" goes on from the newest checkpoint, "never" refuses a folder that holds a
            run, and a checkpoint's folder goes on from there.
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
    folder = parse_path(str(out))
    ranks = Ranks.from_environment()
    read = run_on_ranks(ranks, lambda: read_settings(config, settings or {}, folder))

    from data_prep.from_python import ConversionRequest

    request = ConversionRequest(
        batch_key, label_key, layer, feature_ids, kinds or {}, modality, conversion
    )
    train_on_cells(data, request, read, ranks, resume, init_from)
    return load_newest(folder)
