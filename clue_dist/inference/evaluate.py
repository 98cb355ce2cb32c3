"""Scores a trained model: do the modalities of paired cells, each seen alone, find each other?"""

from __future__ import annotations

import itertools
import json
import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist import matching
from clue_dist.errors import ConfigError, StoreError
from clue_dist.files import write_file
from clue_dist.inference.embed import check_query, describe_embedding
from clue_dist.inference.output_files import (
    check_output_folder,
    make_scratch_folder,
    translate_output_errors,
)
from clue_dist.inference.query import MIN_KNOWN, holds_training_cells
from clue_dist.inference.stream import (
    Embedding,
    LoadedModel,
    SegmentSlice,
    compute_embedding,
    slice_segments,
)
from clue_dist.ranks import Ranks
from clue_dist.store.reader import Store

SEEN = "seen_in_training"  # in `about` of the scores: whether the model was trained on the cells
SEEN_WARNING = (
    "The model was trained on this store: these are scores of cells that it has seen, and cells "
    "that it has not seen match less well. To hold cells out, convert them to a store of their "
    "own, which is not trained on (`python -m data_prep convert ... --features-from RUN`), and "
    "score that."
)


def evaluate_store(
    trained_model: LoadedModel,
    store: Store,
    out: Path,
    *,
    run: Path | str,
    max_cells: int | None = None,
    min_known: float = MIN_KNOWN,
    batch_size: int = 4096,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Write `scores.json`. All ranks call this, and all get its content.

    Every cell of the store that carries both modalities of a pair counts.

    Args:
        trained_model: the model.
        store: cells that the model has not seen.
        out: the file to write.
        run: the run's folder, to be named in the output.
        max_cells: take an even part of each segment, so many cells in all. That is a random draw,
            as segments are stored shuffled.
        min_known: the least share of a modality's features that each file must have had.
        batch_size: cells embedded at once.
        ranks: this process among the others; by default it is alone.

    Returns:
        For each ordered pair "rna->adt": `cells`; `global` and `within_batch`, both directions
        averaged; `directed`, from the first to the second alone; `chance`, what blind embeddings
        get. `about` says what was scored, and whether the model was trained on it.

    Raises:
        StoreError: no cell carries two modalities; features that are not the model's.
        ConfigError: `out` is a folder or in none, or another job is writing it; `max_cells` is
            below 2.
        ResumeError: the model gives NaN.
    """
    ranks = ranks or Ranks()
    check_scores_path(out, max_cells)
    check_query(trained_model, store, min_known, ranks)
    slices = slice_segments(store, batch_size, count_paired_cells(store, max_cells))
    modalities = [name for name in trained_model.modalities if name in store.modalities]
    with make_scratch_folder(out, ranks) as scratch:
        embedding = compute_embedding(
            trained_model, store, scratch, slices, per_modality=True, ranks=ranks
        )
        result = _score_pairs(store, embedding, modalities, ranks)
        result["about"] = describe_embedding(trained_model, store, run) | {
            "cells": len(embedding.joint),
            "max_cells": max_cells,
            SEEN: holds_training_cells(store, trained_model.seen_cells),
        }

        def write_scores() -> None:
            text = json.dumps(_replace_nan(result), indent=1, allow_nan=False)
            with translate_output_errors(out):
                write_file(out, f"{text}\n")

        ranks.run_on_first(write_scores)
    return result


def check_scores_path(out: Path, max_cells: int | None) -> None:
    """Require a file in a folder that is there, and two cells or more.

    Raises:
        ConfigError: they are not.
    """
    if out.is_dir():
        raise ConfigError(
            "the scores go into a file",
            where=f"--out {out}",
            got="a folder",
            fix=f"--out {out}/scores.json",
        )
    check_output_folder(out)
    if max_cells is not None and max_cells < 2:
        raise ConfigError(
            "matching needs two cells", where="--max-cells", got=max_cells, expected="2 or more"
        )


def count_paired_cells(store: Store, max_cells: int | None = None) -> dict[str, int]:
    """How many cells to take of each segment with two modalities or more.

    Args:
        store: the cells.
        max_cells: the most in all; by default every one.

    Raises:
        StoreError: no cell carries two modalities.
    """
    paired = {name: s.n_cells for name, s in store.manifest.strata.items() if len(s.modalities) > 1}
    if not paired:
        raise StoreError(
            "no cell carries two modalities, so there is no true match to look for",
            where=store.root,
            got=f"strata {', '.join(store.manifest.strata)}",
            fix="evaluate on a store with paired cells",
        )
    if max_cells is None:
        return paired
    # Differences of rounded edges: each segment's part is even, and the sum is exact.
    edges = [0, *itertools.accumulate(paired.values())]
    part = min(1.0, max_cells / edges[-1])
    taken = [int(stop * part) - int(start * part) for start, stop in itertools.pairwise(edges)]
    return dict(zip(paired, taken, strict=True))


def format_scores(result: dict[str, Any]) -> str:
    """The scores as a table in text, chance beside each of them; a warning if cells were seen."""
    titles = "".join(f"{metric:>10}{'chance':>10}" for metric in matching.METRICS)
    head = f"{'pair':<16}{'scope':<14}{'cells':>9}{titles}"
    lines = [head, "-" * len(head)]
    for pair, entry in result.items():
        for scope in matching.SCOPES if pair != "about" else ():
            numbers = "".join(
                f"{entry[scope][metric]:>10.4f}{entry['chance'][scope][metric]:>10.4f}"
                for metric in matching.METRICS
            )
            lines.append(f"{pair:<16}{scope:<14}{entry['cells']:>9,}{numbers}")
    if result.get("about", {}).get(SEEN):
        lines += ["", *textwrap.wrap(f"warning: {SEEN_WARNING}", 100)]
    return "\n".join(lines)


def _score_pairs(
    store: Store, embedding: Embedding, modalities: list[str], ranks: Ranks
) -> dict[str, Any]:
    """The scores of every ordered pair of modalities that share two cells or more."""
    batch = np.concatenate(
        [store.segments[s.segment].read_codes("batch", s.positions) for s in embedding.slices]
    )
    result: dict[str, Any] = {}
    for first, second in itertools.combinations(modalities, 2):
        paired = _mark_paired(store, embedding.slices, {first, second})
        if paired.sum() < 2:
            continue
        directed = matching.score_directions(
            embedding.alone[first][paired], embedding.alone[second][paired], batch[paired], ranks
        )
        averaged = matching.average_directions(directed)
        chance = matching.compute_chance(batch[paired])
        names = {"forward": f"{first}->{second}", "backward": f"{second}->{first}"}
        for direction, name in names.items():
            result[name] = {
                "cells": int(paired.sum()),
                **averaged,
                "directed": directed[direction],
                "chance": chance,
            }
    if not result:
        raise StoreError(
            "no two modalities share two cells",
            where=store.root,
            got=f"{len(batch)} paired cells taken",
        )
    return result


def _mark_paired(store: Store, slices: list[SegmentSlice], pair: set[str]) -> np.ndarray:
    """Which cells carry both modalities of a pair, (N,) bool."""
    segments = store.manifest.strata
    return np.concatenate(
        [np.full(s.n_cells, pair <= set(segments[s.segment].modalities)) for s in slices]
    )


def _replace_nan(value: Any) -> Any:
    """JSON has no NaN: the score of a scope without a group of two cells becomes null."""
    if isinstance(value, dict):
        return {key: _replace_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
