"""Scores a trained model: how well the modalities of held-out paired cells find each other, each seen alone."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist import matching
from clue_dist.errors import ConfigError, StoreError
from clue_dist.files import translate_disk_errors, write_file
from clue_dist.inference.embed import describe_embedding
from clue_dist.inference.stream import (
    DISK_FIX,
    Embedding,
    LoadedModel,
    check_output_folder,
    compute_embedding,
    make_scratch_folder,
    require_known_features,
    slice_strata,
)
from clue_dist.ranks import Ranks
from clue_dist.store.reader import Store


def evaluate_store(
    loaded: LoadedModel,
    store: Store,
    out: Path,
    *,
    run: Path | str,
    max_cells: int | None = None,
    batch_size: int = 4096,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Write `scores.json`; all ranks call this, all get its content.

    For each ordered pair "rna->adt": `cells`, `global` and `within_batch` with both directions averaged, `directed`
    with the direction from the first to the second alone, `chance` with what blind embeddings get. `about` says what
    was scored. Every cell of the store that carries both modalities counts; `max_cells` takes an even part of each
    stratum, which is a random draw, as strata are stored shuffled.

    Raises:
        StoreError: no cell carries two modalities; features that are not the model's.
        ConfigError: `out` is a folder or in none, `max_cells` below 2.
        ResumeError: the model gives NaN.
    """
    ranks = ranks or Ranks()
    check_scores_path(out, max_cells)
    require_known_features(store, loaded.modalities)
    pieces = slice_strata(store, batch_size, count_paired_cells(store, max_cells))
    with make_scratch_folder(out, ranks) as scratch:
        done = compute_embedding(loaded, store, scratch, pieces, per_modality=True, ranks=ranks)
        result = _pairs(store, done, [m for m in loaded.modalities if m in store.modalities], ranks)
        result["about"] = describe_embedding(loaded, store, run) | {
            "cells": len(done.joint),
            "max_cells": max_cells,
        }
        if ranks.is_first:
            text = json.dumps(_without_nan(result), indent=1, allow_nan=False)
            with translate_disk_errors(out, DISK_FIX, every=True):
                write_file(out, f"{text}\n")
    return result


def check_scores_path(out: Path, max_cells: int | None) -> None:
    """The scores go into a file of a folder that is there, and come from two cells or more."""
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
    """How many cells to take of each stratum that carries two modalities or more, `max_cells` in all at most."""
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
    edges = [0, *itertools.accumulate(paired.values())]
    part = min(1.0, max_cells / edges[-1])
    taken = [int(hi * part) - int(lo * part) for lo, hi in itertools.pairwise(edges)]
    return dict(zip(paired, taken, strict=True))


def format_scores(result: dict[str, Any]) -> str:
    """The scores as text, chance beside each pair."""
    head = f"{'pair':<16}{'scope':<14}{'cells':>9}" + "".join(
        f"{m:>10}{'chance':>10}" for m in matching.METRICS
    )
    lines = [head, "-" * len(head)]
    for pair, entry in result.items():
        for scope in matching.SCOPES if pair != "about" else ():
            numbers = "".join(
                f"{entry[scope][m]:>10.4f}{entry['chance'][scope][m]:>10.4f}"
                for m in matching.METRICS
            )
            lines.append(f"{pair:<16}{scope:<14}{entry['cells']:>9,}{numbers}")
    return "\n".join(lines)


def _pairs(store: Store, done: Embedding, modalities: list[str], ranks: Ranks) -> dict[str, Any]:
    batch = np.concatenate(
        [store.segments[p.stratum].read_codes("batch", p.positions) for p in done.pieces]
    )
    result: dict[str, Any] = {}
    for a, b in itertools.combinations(modalities, 2):
        both = np.concatenate(
            [_carries(store, p.stratum, a, b, p.stop - p.start) for p in done.pieces]
        )
        if both.sum() < 2:
            continue
        forward_of = matching.score_directions(
            done.alone[a][both], done.alone[b][both], batch[both], ranks
        )
        common = {"cells": int(both.sum()), **matching.average_directions(forward_of)}
        for name, direction in ((f"{a}->{b}", "forward"), (f"{b}->{a}", "backward")):
            result[name] = {
                **common,
                "directed": forward_of[direction],
                "chance": matching.compute_chance(batch[both]),
            }
    if not result:
        raise StoreError(
            "no two modalities share two cells",
            where=store.root,
            got=f"{len(batch)} paired cells taken",
        )
    return result


def _carries(store: Store, stratum: str, a: str, b: str, n: int) -> np.ndarray:
    return np.full(n, {a, b} <= set(store.manifest.strata[stratum].modalities))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: a scope without a group of two cells is null."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
