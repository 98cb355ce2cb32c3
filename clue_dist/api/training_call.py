"""Training as a call: settings, cells that are converted where they are in no store, the ranks."""

from __future__ import annotations

import atexit
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import anndata as ad
import mudata as md

from clue_dist import config_file
from clue_dist.config import Config
from clue_dist.errors import STOPPED, list_names
from clue_dist.files import parse_path
from clue_dist.process import print_error, print_line
from clue_dist.ranks import Ranks
from clue_dist.store.layout import MANIFEST
from clue_dist.store.reader import Store

# What `fit` is told of a conversion: arguments that count for nothing of a store.
_READING_ARGUMENTS = ("batch_key", "label_key", "layer", "feature_ids", "modality", "kinds")
TrainingData: TypeAlias = ad.AnnData | md.MuData | Store | str | Path | Sequence[str | Path]
T = TypeVar("T")


def read_settings(
    config: str | Path | Mapping[str, Any], settings: Mapping[str, Any], folder: Path
) -> Config:
    """Read the settings of a run, but for its store.

    Args:
        config: a recipe's name, a JSON file, or what it would hold.
        settings: settings that differ from it, by dotted path. Unless they say otherwise, nothing
            is logged to wandb.
        folder: of the run.

    Raises:
        ConfigError: settings that cannot work.
    """
    # wandb would take over a run that a notebook has open.
    chosen = {"log.wandb": "disabled"} | dict(settings) | {"run": str(folder)}
    words = [f"{name}={json.dumps(value)}" for name, value in chosen.items()]
    if isinstance(config, Mapping):
        return config_file.parse_config(deepcopy(dict(config)), "config", words)
    return config_file.load_config(config, words)


def train_on_cells(
    data: TrainingData,
    request: Any,
    config: Config,
    ranks: Ranks,
    resume: str,
    init_from: str | Path | None,
) -> None:
    """Convert cells where they are no store, and train on them; every rank must call.

    Args:
        data: the cells.
        request: how they are converted, a `ConversionRequest`.
        config: the settings.
        ranks: this process among the others.
        resume: where a run that is in its folder goes on from, see `fit`.
        init_from: the run whose weights to begin with.

    Raises:
        ClueError: what `fit` raises.
    """
    from clue_dist.train.arguments import prepare_run
    from clue_dist.train.engine import join_process_group

    join_process_group(ranks)
    # The group of one process stays for the next call: DeepSpeed keeps handles of it.
    atexit.register(ranks.leave_group)
    run = Path(config.run)
    store = ranks.run_on_first(lambda: _find_store(data, request, run))
    earlier = None if init_from is None else parse_path(str(init_from))
    complete = config.model_copy(update={"store": store})
    setup, warm_start = run_on_ranks(
        ranks, lambda: prepare_run(complete, ranks.world, resume, earlier)
    )
    setup = setup.agree_on_precision(ranks)
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


def run_on_ranks(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run `work` on every rank, whether they have joined or not; if one fails, all of them do.

    Args:
        ranks: this process among the others.
        work: what each rank does.

    Returns:
        What `work` returned on this rank.
    """
    if not ranks.have_joined():
        return ranks.run_before_joining(work)
    results: list[T] = []
    ranks.run_on_all(lambda: results.append(work()))  # what it returns need not be JSON
    return results[0]


def _find_store(data: TrainingData, request: Any, run: Path) -> str:
    """Where the store to train on lies; cells that are in none are converted first."""
    place = find_store_path(data)
    if place is not None:
        given = [name for name in _READING_ARGUMENTS if getattr(request, name)]
        if given:
            print_error(
                f"warning: of no effect: {list_names(given)}; {place} is a store, whose conversion "
                "has read the cells already"
            )
        return place

    from clue_dist.train.setup import require_writable_run
    from data_prep.from_python import convert_cells

    require_writable_run(run)  # before a conversion that may take hours
    store = run.with_name(f"{run.name}.zarr")
    store.parent.mkdir(parents=True, exist_ok=True)
    convert_cells(data, store, request)
    return str(store)


def find_store_path(data: TrainingData) -> str | None:
    """Find where a store lies; None where the cells are in none yet."""
    if isinstance(data, Store):
        return str(data.root)
    if isinstance(data, (str, Path)):
        text = str(data)
        if ("://" in text and "=" not in text) or (parse_path(text) / MANIFEST).is_file():
            return text
    return None
