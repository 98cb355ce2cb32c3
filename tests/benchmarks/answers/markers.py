"""Features that mark cell types: how many of ours does a t-test on counts name, too?"""

from collections.abc import Iterator

import mudata as md
import numpy as np
from scipy.stats import ttest_ind

from clue_dist.trained_run import Run as TrainedRun
from tests.benchmarks.answers.imputation import log_normalise
from tests.benchmarks.report import Result
from tests.benchmarks.scores import find_typed

FIRST = 20  # features of a type that are compared, a quarter of all where there are few
FEWEST_TESTED = 10  # cells of a type


def score_markers(run: TrainedRun, cells: md.MuData) -> Iterator[tuple[str, Result]]:
    """Score by modality how many of the first features of a type agree, mean over types."""
    for name, table in cells.mod.items():
        is_typed, labels = find_typed(table.obs)
        typed = md.MuData({m: t[is_typed].copy() for m, t in cells.mod.items()})
        types, counts = np.unique(labels[is_typed], return_counts=True)
        chosen = [str(label) for label in types[counts >= FEWEST_TESTED]]
        typed.obs["type"] = labels[is_typed]
        found = run.differential(typed, groupby="type", modality=name, groups=chosen, min_known=0)
        known = table.var_names.isin(next(iter(found.values())).index)
        values = log_normalise(table.X)[is_typed][:, known]
        first = min(FIRST, max(1, known.sum() // 4))
        shares = []
        for label, ranked in found.items():
            tested = rank_features(values, labels[is_typed] == label)[:first]
            shares.append(np.isin(ranked.index[:first], table.var_names[known][tested]).mean())
        yield name, {"overlap": float(np.mean(shares)), "first": int(first), "types": len(chosen)}


def rank_features(values: np.ndarray, is_member: np.ndarray) -> np.ndarray:
    """Rank features by Welch's t of members (n,) against others, as scanpy does by default.

    values: (n, F) ln(1 + counts per 10,000). Returns places of features, the first mark most.
    """
    t = ttest_ind(values[is_member], values[~is_member], equal_var=False).statistic
    return np.argsort(-np.nan_to_num(t, nan=-np.inf), kind="stable")
