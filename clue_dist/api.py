"""The front door: train a model, load one, and ask it, from a notebook, a script or `deepspeed`."""

from __future__ import annotations

import atexit
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from clue_dist import config as configs
from clue_dist.checkpoint.run_folder import list_checkpoints
from clue_dist.config import Config
from clue_dist.errors import STOPPED
from clue_dist.files import parse_path
from clue_dist.process import print_line
from clue_dist.ranks import Ranks
from clue_dist.trained_run import Run, TrainingData, find_store_path, load

__all__ = ["Run", "fit", "load"]

T = TypeVar("T")


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
    folder = parse_path(str(out))
    ranks = Ranks.from_environment()
    read = _run_on_ranks(ranks, lambda: _read_config(config, settings or {}, folder))

    from data_prep.from_python import ConversionRequest

    request = ConversionRequest(
        batch_key, label_key, layer, feature_ids, kinds or {}, modality, conversion
    )
    _train_on(data, request, read, ranks, resume, init_from)
    # Weights are kept as the best by validation: a run without any has only what it saved last.
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
    complete = config.model_copy(update={"store": store})
    setup, warm_start = _run_on_ranks(
        ranks, lambda: prepare_run(complete, ranks.world, resume, earlier)
    )
    gc.unfreeze()  # what a notebook holds must not be kept from the collector
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


def _run_on_ranks(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run `work` on every rank, whether they have joined or not; if one fails, all of them do."""
    if not ranks.have_joined():
        return ranks.run_before_joining(work)
    results: list[T] = []
    ranks.run_on_all(lambda: results.append(work()))  # what it returns need not be JSON
    return results[0]


def _find_store(data: TrainingData, request: Any, run: Path) -> str:
    """Where the store to train on lies; cells that are in none are converted first."""
    place = find_store_path(data)
    if place is not None:
        return place

    from data_prep.from_python import convert_cells

    store = run.with_name(f"{run.name}.zarr")
    store.parent.mkdir(parents=True, exist_ok=True)
    convert_cells(data, store, request)
    return str(store)
