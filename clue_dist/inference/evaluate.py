"""Scores a trained model: do the modalities of paired cells, each seen alone, find each other?

And is z one space: do modalities, patterns of them and batches mix in it, do labels stay apart?
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.config import MIN_KNOWN
from clue_dist.errors import ConfigError, name_argument
from clue_dist.files import write_file
from clue_dist.inference.cells import SegmentSlice, choose_modalities, open_store_cells
from clue_dist.inference.embed import describe_embedding
from clue_dist.inference.load_model import TrainedModel
from clue_dist.inference.output_files import (
    make_scratch_folder,
    require_output_format,
    translate_output_errors,
)
from clue_dist.inference.query import holds_training_cells
from clue_dist.inference.score_tables import (
    COMMON_SPACE,
    HAS_PAIRS,
    JOINT_SCORES,
    SEEN,
    WITHIN_TYPE,
    WITHOUT_DEPTH,
    list_warnings,
)
from clue_dist.inference.stream import Embedding, compute_embedding
from clue_dist.metrics import integration, matching, matching_controls
from clue_dist.number_checks import require_number
from clue_dist.process import print_error
from clue_dist.ranks import Ranks
from clue_dist.store.batch_vocabulary import UNKNOWN, BatchVocabulary
from clue_dist.store.reader import Store

MOST_SEARCHED_CELLS = 20_000  # where nobody says: the search for neighbours is quadratic


def evaluate_store(
    trained_model: TrainedModel,
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

    Every cell of the store that carries both modalities of a pair counts for its matching, and
    every cell for the joint z. Where no two modalities share two cells, be the model of a single
    one or the cells unpaired, the joint z alone is scored. Where neighbours are searched, of more
    than `max_cells` or MOST_SEARCHED_CELLS an even part is taken.

    Args:
        trained_model: the model.
        store: cells that the model has not seen.
        out: the file to write.
        run: the run's folder, to be named in the output.
        max_cells: take an even part of each segment, so many paired cells in all, and so many of
            all for the joint z. That is a random draw, as segments are stored shuffled.
        min_known: the least share of a modality's features that each file must have had.
        batch_size: cells embedded at once.
        ranks: this process among the others; by default it is alone.

    Returns:
        For each ordered pair "rna->adt": `cells`; `global` and `within_batch`, both directions
        averaged; `directed`, from the first to the second alone; `chance`, what blind embeddings
        get; `unknown_cells`, if any, whose batch is unknown: `within_batch` leaves them out and
        has `cells`, the others; `mixing`, `mixing_ilisi` and, where labels are known, `transfer`,
        of `mixing_cells` cells; of the same cells FOSCTTM `within_type`, where types have enough of
        them, and `without_depth`, where both modalities are counts. `joint` is about the joint z,
        as `score_joint_latent` gives it, `worst_island` beside it. `about` says what was scored,
        and whether the model was trained on it.

    Raises:
        StoreError: features that are not the model's.
        ConfigError: `out` is a folder or in none, or another job is writing it; `max_cells` is
            below 2.
        ResumeError: the model gives NaN.
    """
    ranks = ranks or Ranks()
    require_scores_path(out, max_cells)
    store = choose_modalities(store, trained_model)
    sample = _ScoredSample.choose_cells(store, max_cells)
    asked = open_store_cells(store, trained_model, min_known, sample.count_cells())
    slices = asked.slice_cells(batch_size)
    with make_scratch_folder(out, ranks) as scratch:
        embedding = compute_embedding(
            trained_model,
            asked,
            scratch,
            slices,
            per_modality=bool(sample.paired),
            with_depth=bool(sample.paired),
            ranks=ranks,
        )
        cells = _EmbeddedCells.read_from(store, slices, embedding)
        result = _score_pairs(store, cells, asked.modalities, sample, ranks)
        has_pairs = bool(result)
        result[JOINT_SCORES] = _score_joint(store, cells, sample.joint, ranks)
        result["about"] = describe_embedding(trained_model, asked, run) | {
            "cells": sum(sample.paired.values()),
            "max_cells": max_cells,
            SEEN: holds_training_cells(store, trained_model.seen_cells),
            HAS_PAIRS: has_pairs,
            COMMON_SPACE: trained_model.has_common_space,
        }
        ranks.run_on_first(lambda: _write_scores(out, result))
    if ranks.is_first:  # beside the scores, which the caller shows next
        for text in list_warnings(result):
            print_error(f"warning: {text}")
    return result


def _write_scores(out: Path, result: dict[str, Any]) -> None:
    """Write scores as JSON."""
    text = json.dumps(_replace_nan(result), indent=1, allow_nan=False)
    with translate_output_errors(out):
        write_file(out, f"{text}\n")


def require_scores_path(out: Path, max_cells: int | None) -> None:
    """Require a name that ends in .json, in a folder that is there, and two cells or more.

    Raises:
        ConfigError: they are not.
    """
    if out.is_dir():
        raise ConfigError(
            "the scores go into a file",
            where=name_argument("out", out),
            got="a folder",
            fix=f"name a file in it: {out}/scores.json",
        )
    require_output_format(out, [".json"])  # a name of cells, mistyped, would be replaced by scores
    if max_cells is not None:
        require_number(name_argument("max_cells"), max_cells, 2, whole=True)  # matching needs two


def count_paired_cells(store: Store, max_cells: int | None = None) -> dict[str, int]:
    """How many cells to take of each segment with two modalities or more.

    Args:
        store: the cells.
        max_cells: the most in all; by default every one.
    """
    paired = {name: s.n_cells for name, s in store.manifest.strata.items() if len(s.modalities) > 1}
    return paired if max_cells is None else _take_part(paired, max_cells)


def _take_part(sizes: Mapping[str, int], most: int) -> dict[str, int]:
    """An even part of each segment, `most` cells in all; everything where there are fewer."""
    total = sum(sizes.values())
    if total <= most:
        return dict(sizes)
    # Differences of rounded edges: each segment's part is even, and the sum is exact.
    edges = [stop * most // total for stop in itertools.accumulate(sizes.values(), initial=0)]
    taken = [stop - start for start, stop in itertools.pairwise(edges)]
    return dict(zip(sizes, taken, strict=True))


@dataclass(frozen=True)
class _ScoredSample:
    """How many cells of each segment are scored: the first ones, which are a random draw."""

    paired: dict[str, int]  # for matching
    joint: dict[str, int]  # for the joint z
    most_neighbours: int  # cells in all whose neighbours are searched

    @classmethod
    def choose_cells(cls, store: Store, max_cells: int | None) -> _ScoredSample:
        """Choose an even part of each segment, or what can be scored."""
        sizes = {name: segment.n_cells for name, segment in store.manifest.strata.items()}
        most = max_cells or MOST_SEARCHED_CELLS
        return cls(count_paired_cells(store, max_cells), _take_part(sizes, most), most)

    def count_cells(self) -> dict[str, int]:
        """Count the cells of each segment that take part in any score."""
        return {name: max(self.paired.get(name, 0), n) for name, n in self.joint.items()}


@dataclass(frozen=True)
class _EmbeddedCells:
    """The cells that were embedded, and what the store says about them."""

    embedding: Embedding
    slices: Sequence[SegmentSlice]
    patterns: np.ndarray  # (N,) names of what was observed in a cell, such as "rna+adt"
    batches: np.ndarray  # (N,) codes, -1 where unknown
    labels: np.ndarray  # (N,) names, "" where unknown

    @classmethod
    def read_from(
        cls, store: Store, slices: Sequence[SegmentSlice], embedding: Embedding
    ) -> _EmbeddedCells:
        """Read what a store says about its embedded cells."""
        batches, labels = (
            np.concatenate(
                [store.segments[s.segment].read_codes(name, s.positions) for s in slices]
            )
            for name in ("batch", "label")
        )
        patterns = {
            name: "+".join(segment.modalities) for name, segment in store.manifest.strata.items()
        }
        return cls(
            embedding,
            slices,
            np.concatenate([np.full(s.n_cells, patterns[s.segment]) for s in slices]),
            batches,
            np.array([*store.manifest.labels, ""])[labels],  # -1, unknown, is the last
        )

    def read_levels(self, known: BatchVocabulary, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Read the levels of some cells, (n,) names by covariate; nothing of one covariate."""
        codes = self.batches[rows]  # -1, unknown, is the last
        return {
            name: np.array([*levels, UNKNOWN])[codes]
            for name, levels in known.list_covariates().items()
        }

    def name_batches(self, known: BatchVocabulary, rows: np.ndarray) -> np.ndarray:
        """Name the batches of some cells, (n,), UNKNOWN where one is not known."""
        return np.array([*known.names, UNKNOWN])[self.batches[rows]]

    def find_rows(self, counts: Mapping[str, int]) -> np.ndarray:
        """Find the rows of the first cells of each segment, of which `counts` says how many."""
        ends = (min(s.n_cells, counts.get(s.segment, 0) - s.start) for s in self.slices)
        return np.concatenate(
            [s.rows[: max(0, end)] for s, end in zip(self.slices, ends, strict=True)]
        )


def _score_pairs(
    store: Store,
    cells: _EmbeddedCells,
    modalities: list[str],
    sample: _ScoredSample,
    ranks: Ranks,
) -> dict[str, Any]:
    """The scores of every ordered pair of modalities that share two cells or more."""
    strata, alone = store.manifest.strata, cells.embedding.alone
    result: dict[str, Any] = {}
    for first, second in itertools.combinations(modalities, 2):
        counts = {
            name: n_cells
            for name, n_cells in sample.paired.items()
            if {first, second} <= set(strata[name].modalities)
        }
        rows = cells.find_rows(counts)
        if len(rows) < 2:
            continue
        batch = cells.name_batches(store.manifest.batch_vocabulary, rows)
        directed = matching.score_directions(alone[first][rows], alone[second][rows], batch, ranks)
        averaged = matching.average_directions(directed)
        chance = matching.compute_chance(batch)
        n_unknown = int((~integration.mark_labelled_cells(batch)).sum())
        unknown = {}
        if 0 < n_unknown < len(rows):
            averaged["within_batch"]["cells"] = len(rows) - n_unknown
            unknown["unknown_cells"] = n_unknown
        searched = cells.find_rows(_take_part(counts, sample.most_neighbours))
        mixing = _score_profiles(cells, (first, second), searched, ranks)
        names = {"forward": f"{first}->{second}", "backward": f"{second}->{first}"}
        for direction, name in names.items():
            result[name] = {
                "cells": len(rows),
                **averaged,
                "directed": directed[direction],
                "chance": chance,
                **unknown,
                **mixing,
            }
    return result


def _score_profiles(
    cells: _EmbeddedCells, pair: tuple[str, str], rows: np.ndarray, ranks: Ranks
) -> dict[str, Any]:
    """How the profiles of two modalities mix, and what else there is to their matching.

    Labels may pass from one to the other; types and sequencing depth may explain FOSCTTM.
    """
    first, second = (cells.embedding.alone[name][rows] for name in pair)
    scores: dict[str, Any] = {
        "mixing_cells": len(rows),
        **integration.score_mixing(first, second, ranks),
    }
    labels = cells.labels[rows]
    known = integration.mark_labelled_cells(labels)
    if len(np.unique(labels[known])) > 1:
        scores["transfer"] = integration.transfer_labels(first, second, labels, ranks)
    within = matching_controls.score_within_types(first[known], second[known], labels[known], ranks)
    if within:
        scores[WITHIN_TYPE] = within
    log_depth = cells.embedding.log_depth
    if log_depth.keys() >= set(pair):
        depths = np.stack([log_depth[name][rows] for name in pair], axis=1)
        scores[WITHOUT_DEPTH] = matching_controls.score_without_depth(first, second, depths, ranks)
    return scores


def _score_joint(
    store: Store, cells: _EmbeddedCells, counts: Mapping[str, int], ranks: Ranks
) -> dict[str, Any]:
    """The scores of z from everything observed; the pattern that is the worst island by name."""
    rows, known = cells.find_rows(counts), store.manifest.batch_vocabulary
    scores = {"store_cells": store.manifest.n_cells} | integration.score_joint_latent(
        cells.embedding.joint[rows],
        cells.patterns[rows],
        cells.name_batches(known, rows),
        cells.labels[rows],
        ranks,
        cells.read_levels(known, rows),
    )
    if islands := scores.get("islands"):
        scores["worst_island"] = max(islands, key=islands.__getitem__)
    return scores


def _replace_nan(value: Any) -> Any:
    """JSON has no NaN: the score of a scope without a group of two cells becomes null."""
    if isinstance(value, dict):
        return {key: _replace_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
