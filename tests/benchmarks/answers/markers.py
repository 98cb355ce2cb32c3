"""Features that mark cell types: how many of ours does scanpy's `rank_genes_groups` name, too?"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np

from clue_dist.api.trained_run import Run as TrainedRun
from tests.benchmarks.commands import run_command
from tests.benchmarks.matching import PEERS
from tests.benchmarks.report import Result
from tests.benchmarks.scores import find_typed

FIRST = 20  # features of a type that are compared, a quarter of all where there are few
FEWEST_TESTED = 10  # cells of a type
TYPE = "type"  # the column that names it
SCRIPT, PINS = PEERS / "rank_genes.py", PEERS / "wnn.txt"  # muon brings scanpy along

# The features of a table of counts by group, the first mark most.
Ranking = Callable[[ad.AnnData, Sequence[str]], dict[str, list[str]]]


def score_markers(
    run: TrainedRun, cells: md.MuData, rank_features: Ranking
) -> Iterator[tuple[str, Result]]:
    """Score by modality how many of the first features of a type agree, mean over types."""
    for name, table in cells.mod.items():
        is_typed, labels = find_typed(table.obs)
        typed = md.MuData({m: t[is_typed].copy() for m, t in cells.mod.items()})
        types, counts = np.unique(labels[is_typed], return_counts=True)
        chosen = [str(label) for label in types[counts >= FEWEST_TESTED]]
        typed.obs[TYPE] = typed[name].obs[TYPE] = labels[is_typed]
        found = run.differential(typed, groupby=TYPE, modality=name, groups=chosen, min_known=0)
        others = rank_features(typed[name], chosen)
        known = set(next(iter(found.values())).index)  # what the model knows, scanpy's aside
        first = min(FIRST, max(1, len(known) // 4))
        shares = []
        for label, ranked in found.items():
            tested = [feature for feature in others[label] if feature in known][:first]
            shares.append(np.isin(ranked.index[:first], tested).mean())
        yield name, {"overlap": float(np.mean(shares)), "first": first, "types": len(chosen)}


def rank_by_scanpy(
    cells: ad.AnnData, groups: Sequence[str], python: Path, folder: Path, threads: int
) -> dict[str, list[str]]:
    """Rank features by scanpy, in an environment of its own, see `peers/rank_genes.py`.

    Args:
        cells: raw counts (N, F), the column `type` in obs.
        groups: the types that are compared, each with all other cells.
        python: of the environment.
        folder: takes the cells, the answer and the log.
        threads: of linear algebra.
    """
    path, out = folder / "cells.h5ad", folder / "ranking.json"
    ad.AnnData(cells.X, cells.obs[[TYPE]], cells.var[[]]).write_h5ad(path)
    run_command([python, SCRIPT, path, TYPE, out, *groups], folder / "log.txt", threads)
    return dict(json.loads(out.read_text()))
