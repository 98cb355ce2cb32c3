"""Is z one space: do modalities and batches mix in it, and do cell types stay apart?

docs/glossary.md says what each number means. Two embeddings of the same cells, each from one
modality, are scaled to length 1 before their neighbours are searched; the joint z is taken as it
is. Cells of label "" or "nan" count as cells without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clue_dist.neighbours.nearest import Neighbours, find_neighbours, scale_to_length_one
from clue_dist.ranks import Ranks

MIXING_NEIGHBOURS = 30  # of which the shares of modalities and patterns are taken
LABEL_NEIGHBOURS = 15  # which vote for a label
PERPLEXITY = 30  # how many neighbours count, in effect, for LISI
LISI_NEIGHBOURS = 3 * PERPLEXITY
MOST_SILHOUETTES = 10_000  # cells of which silhouettes are taken
SCIB_MEASURES = ("kbet", "nmi", "ari")
# scib-metrics counts a cell among its neighbours; its own benchmark takes so many of them.
_KBET_NEIGHBOURS, _LEIDEN_NEIGHBOURS = 50, 15
_BISECTIONS = 60
_CELLS_AT_ONCE = 2**14  # whose neighbours are weighed


def measure_mixing(
    first: np.ndarray | Tensor, second: np.ndarray | Tensor, ranks: Ranks | None = None
) -> float:
    """Measure the share of a profile's 30 nearest that come from the other modality.

    Args:
        first: (N, D), cells seen through one modality; every rank passes the same.
        second: (N, D), the same cells seen through another.
        ranks: processes that share the work. All must call, and all get the result.

    Raises:
        DataError: values that are not finite.
    """
    return _measure_other_share(*_pool_profiles(first, second, MIXING_NEIGHBOURS, ranks))


def score_mixing(
    first: np.ndarray | Tensor, second: np.ndarray | Tensor, ranks: Ranks | None = None
) -> dict[str, float]:
    """Score how the profiles of two modalities mix: `mixing` and `mixing_ilisi`.

    Arguments and errors are those of `measure_mixing`.
    """
    neighbours, modality = _pool_profiles(first, second, LISI_NEIGHBOURS, ranks)
    return {
        "mixing": _measure_other_share(neighbours, modality),
        "mixing_ilisi": measure_ilisi(neighbours, modality),
    }


def transfer_labels(
    first: np.ndarray | Tensor,
    second: np.ndarray | Tensor,
    labels: np.ndarray,
    ranks: Ranks | None = None,
) -> float:
    """Measure how well labels of one modality's profiles tell those of the other's.

    A profile gets the label that `predict_labels` gives it.

    Args:
        first: (N, D), cells seen through one modality; every rank passes the same.
        second: (N, D), the same cells seen through another.
        labels: (N,) names.
        ranks: processes that share the work. All must call, and all get the result.

    Returns:
        The share of right labels, mean of both directions; NaN of fewer than two labelled cells.
    """
    known = mark_labelled_cells(labels)
    if known.sum() < 2:
        return float("nan")
    rows = torch.from_numpy(np.flatnonzero(known))
    profiles = [scale_to_length_one(_select_rows(points, rows)) for points in (first, second)]
    codes, cells = np.unique(labels[known], return_inverse=True)[1], np.arange(known.sum())
    shares = [
        (predict_labels(queries, keys, codes, cells, cells, ranks) == codes).mean()
        for queries, keys in (profiles, profiles[::-1])
    ]
    return float(np.mean(shares))


def predict_labels(
    queries: np.ndarray | Tensor,
    keys: np.ndarray | Tensor,
    codes: np.ndarray,
    query_cells: np.ndarray,
    key_cells: np.ndarray,
    ranks: Ranks | None = None,
) -> np.ndarray:
    """Predict the label of each query: that of most of the 15 nearest keys of other cells.

    Args:
        queries: (n, D); every rank passes the same.
        keys: (m, D).
        codes: (m,), the label of each key; of labels with as many votes the lowest is taken.
        query_cells: (n,), the cell that each query is of.
        key_cells: (m,), the cell that each key is of; no two keys are of one cell.
        ranks: processes that share the work. All must call, and all get the result.

    Returns:
        (n,) codes.
    """
    found = find_neighbours(queries, LABEL_NEIGHBOURS + 1, keys, ranks).indices
    is_other = key_cells[found] != query_cells[:, None]
    # Where the own cell is not among the 16 nearest, the last of these has no vote either.
    return elect_labels(codes[found], is_other & (is_other.cumsum(1) <= LABEL_NEIGHBOURS))


def score_joint_latent(
    latent: np.ndarray,
    patterns: np.ndarray,
    batches: np.ndarray,
    labels: np.ndarray,
    ranks: Ranks | None = None,
    covariates: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> dict[str, Any]:
    """Score z of cells from everything observed in them.

    Args:
        latent: (N, D); every rank passes the same.
        patterns: (N,) names of the set of modalities that each cell has.
        batches: (N,) names, "" where unknown.
        labels: (N,) names, likewise.
        ranks: processes that share the work. All must call, and all get the result.
        covariates: by name (N,) levels, likewise, where several make up the batches.

    Returns:
        `cells` and, of two patterns or more, `islands` by pattern; of two batches or more
        `ilisi`, `ilisi_random` and `kbet`, and `covariates`, which holds the first two of each;
        of two labels or more `labelled_cells`, `accuracy`, `clisi`, `nmi`, `ari` and `asw`.
        Cells of an unknown batch or level are left out; `unknown_cells` counts them, if any.
        SCIB_MEASURES are there where scib-metrics is installed.

    Raises:
        DataError: values that are not finite.
    """
    ranks = ranks or Ranks()
    scores: dict[str, Any] = {"cells": len(latent)}
    if len(latent) < 3:  # a cell of two has one neighbour, whatever z is
        return scores
    neighbours = find_neighbours(latent, LISI_NEIGHBOURS, ranks=ranks)
    if len(np.unique(patterns)) > 1:
        scores["islands"] = measure_islands(neighbours, patterns)
    if _tells_cells_apart(batches):
        known, among = _select_known(latent, neighbours, batches, ranks)
        scores |= _score_batches(among, batches, known)
        scores |= ranks.run_on_first(lambda: _measure_kbet(among, batches[known]))
    varied = {name: each for name, each in covariates.items() if _tells_cells_apart(each)}
    for name, levels in varied.items():
        known, among = _select_known(latent, neighbours, levels, ranks)
        scores.setdefault("covariates", {})[name] = _score_batches(among, levels, known)
    if _tells_cells_apart(labels):
        known, among = _select_known(latent, neighbours, labels, ranks)
        scores["labelled_cells"] = int(known.sum())
        scores |= ranks.run_on_first(lambda: _score_labels(latent[known], among, labels[known]))
    return scores


def _tells_cells_apart(names: np.ndarray) -> bool:
    """Whether cells have two names or more, those aside whose name is unknown."""
    known = mark_labelled_cells(names)
    return len(np.unique(names[known])) > 1 and int(known.sum()) > 2


def _select_known(
    latent: np.ndarray, neighbours: Neighbours, names: np.ndarray, ranks: Ranks
) -> tuple[np.ndarray, Neighbours]:
    """Which cells have a known name, (N,) bool, and the neighbours among these."""
    known = mark_labelled_cells(names)
    if not known.all():
        neighbours = find_neighbours(latent[known], LISI_NEIGHBOURS, ranks=ranks)
    return known, neighbours


def mark_labelled_cells(labels: np.ndarray) -> np.ndarray:
    """Mark the cells whose label, or batch, says something, (N,) bool."""
    return ~np.isin(labels.astype(str), ["", "nan"])


def measure_islands(neighbours: Neighbours, patterns: np.ndarray) -> dict[str, float]:
    """Measure, by pattern, the share of 30 neighbours with the same one over its share of cells.

    Args:
        neighbours: of N cells among themselves.
        patterns: (N,) names.
    """
    names, codes = np.unique(patterns, return_inverse=True)
    is_same = codes[neighbours.indices[:, :MIXING_NEIGHBOURS]] == codes[:, None]
    islands = {}
    for code, name in enumerate(names):
        members = codes == code
        n_others = int(members.sum()) - 1
        if n_others:  # a cell that is alone of its kind has no share to compare with
            expected = n_others / (len(codes) - 1)
            islands[str(name)] = float(is_same[members].mean() / expected)
    return islands


def measure_ilisi(neighbours: Neighbours, groups: np.ndarray) -> float:
    """Measure how groups mix around cells: 0 where each sees its own, 1 where all are alike.

    The median over cells of the inverse Simpson index of the groups around them, scaled
    (Korsunsky et al., 2019).

    Args:
        neighbours: of N cells among themselves, LISI_NEIGHBOURS of each where there are so many.
        groups: (N,) names or codes, two different ones or more.
    """
    index, n_groups = _compute_inverse_simpson(neighbours, groups)
    return float((np.median(index) - 1) / (n_groups - 1))


def _score_batches(
    neighbours: Neighbours, batches: np.ndarray, known: np.ndarray
) -> dict[str, float]:
    """How well batches, or levels of a covariate, mix, beside what they do where dealt anew."""
    batches, n_unknown = batches[known], int((~known).sum())
    scores: dict[str, float] = {
        "ilisi": measure_ilisi(neighbours, batches),
        "ilisi_random": measure_ilisi(neighbours, deal_batches(batches)),
    }
    return scores | ({"unknown_cells": n_unknown} if n_unknown else {})


def deal_batches(batches: np.ndarray) -> np.ndarray:
    """Deal the batches of cells at random among them, (N,): what perfect mixing looks like.

    Batches of other sizes, and so few neighbours, keep iLISI from 1.
    """
    return np.random.default_rng(0).permutation(batches)


def measure_clisi(neighbours: Neighbours, labels: np.ndarray) -> float:
    """Measure how labels stay apart: `measure_ilisi` of labels, turned so that 1 is best."""
    return 1 - measure_ilisi(neighbours, labels)


def measure_label_accuracy(neighbours: Neighbours, labels: np.ndarray) -> float:
    """Measure the share of cells whose label is that of most of their 15 nearest cells.

    This is cross-validation that leaves out one cell at a time.

    Args:
        neighbours: of N cells among themselves.
        labels: (N,) names.
    """
    codes = np.unique(labels, return_inverse=True)[1]
    votes = codes[neighbours.indices[:, :LABEL_NEIGHBOURS]]
    return float((elect_labels(votes, np.ones(votes.shape, bool)) == codes).mean())


def _pool_profiles(
    first: np.ndarray | Tensor,
    second: np.ndarray | Tensor,
    n_neighbours: int,
    ranks: Ranks | None,
) -> tuple[Neighbours, np.ndarray]:
    """Neighbours among the profiles of both modalities, and the modality of each, (2N,)."""
    both = (first, second)
    pool = torch.cat([scale_to_length_one(torch.as_tensor(u).to(torch.float64)) for u in both])
    modality = np.repeat([0, 1], [len(points) for points in both])
    return find_neighbours(pool, n_neighbours, ranks=ranks), modality


def _measure_other_share(neighbours: Neighbours, modality: np.ndarray) -> float:
    nearest = modality[neighbours.indices[:, :MIXING_NEIGHBOURS]]
    return float((nearest != modality[:, None]).mean())


def _select_rows(points: np.ndarray | Tensor, rows: Tensor) -> Tensor:
    tensor = torch.as_tensor(points).to(torch.float64)
    return tensor[rows.to(tensor.device)]


def elect_labels(votes: np.ndarray, is_counted: np.ndarray) -> np.ndarray:
    """The code with most votes in each row, (n,); of as many votes the lowest.

    Args:
        votes: (n, k) codes.
        is_counted: (n, k), which votes count.
    """
    n_codes = int(votes.max()) + 1
    places = votes + n_codes * np.arange(len(votes))[:, None]
    counts = np.bincount(places[is_counted], minlength=n_codes * len(votes))
    return counts.reshape(len(votes), n_codes).argmax(1)


def _compute_inverse_simpson(neighbours: Neighbours, groups: np.ndarray) -> tuple[np.ndarray, int]:
    """Inverse Simpson index of the groups around each cell, (N,), and how many groups there are.

    Neighbours are weighted as in t-SNE. Equal to 5 digits to `lisi_knn` of scib-metrics 0.5.10,
    which is given a cell itself and its 90 neighbours.
    """
    names, codes = np.unique(groups, return_inverse=True)
    simpson = np.zeros(len(codes))
    # In slices, as weights are searched for in several arrays of their size.
    for start in range(0, len(codes), _CELLS_AT_ONCE):
        part = slice(start, start + _CELLS_AT_ONCE)
        weights = _weigh_neighbours(neighbours.distances[part], np.log(PERPLEXITY))
        nearest = codes[neighbours.indices[part]]
        for code in range(len(names)):
            simpson[part] += (weights * (nearest == code)).sum(1) ** 2
    return 1 / simpson, len(names)


def _weigh_neighbours(distances: np.ndarray, entropy: float) -> np.ndarray:
    """exp(-beta distance), (N, k), rows scaled to 1, with the beta that gives the entropy."""
    # The nearest neighbour gets the largest weight, whatever the scale of z is.
    further = distances - distances[:, :1]
    low, high = np.full((len(further), 1), -50.0), np.full((len(further), 1), 50.0)  # ln beta
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        weights = np.exp(-np.exp(middle) * further)
        weights /= weights.sum(1, keepdims=True)
        found = -(weights * np.log(np.maximum(weights, 1e-300))).sum(1, keepdims=True)
        low = np.where(found > entropy, middle, low)
        high = np.where(found > entropy, high, middle)
    return weights


def _score_labels(
    latent: np.ndarray, neighbours: Neighbours, labels: np.ndarray
) -> dict[str, float]:
    """How cells of a label stay together; `nmi` and `ari` only where scib-metrics is installed."""
    from sklearn.metrics import silhouette_score  # here, as training needs none of it

    # Silhouettes are quadratic, too, and defined of two labels or more that cells share.
    sample = np.random.default_rng(0).permutation(len(latent))[:MOST_SILHOUETTES]
    silhouette = 0.0
    if 1 < len(np.unique(labels[sample])) < len(sample):
        silhouette = silhouette_score(latent[sample], labels[sample])
    scores = {
        "accuracy": measure_label_accuracy(neighbours, labels),
        "clisi": measure_clisi(neighbours, labels),
        "asw": float((silhouette + 1) / 2),
    }
    scib = _import_scib()
    if scib is not None:
        found = scib.nmi_ari_cluster_labels_leiden(
            _list_scib_neighbours(neighbours, _LEIDEN_NEIGHBOURS), labels
        )
        scores |= {name: float(value) for name, value in found.items()}
    return scores


def _measure_kbet(neighbours: Neighbours, batches: np.ndarray) -> dict[str, float]:
    """Share of cells around which batches are as everywhere; nothing without scib-metrics."""
    scib = _import_scib()
    if scib is None:
        return {}
    codes = np.unique(batches, return_inverse=True)[1]
    rate, *_ = scib.kbet(_list_scib_neighbours(neighbours, _KBET_NEIGHBOURS), codes)
    return {"kbet": float(rate)}


def _import_scib() -> Any:
    """scib-metrics, or None where it is not installed."""
    try:
        import scib_metrics
    except ImportError:
        return None
    return scib_metrics


def _list_scib_neighbours(neighbours: Neighbours, count: int) -> Any:
    """Neighbours as scib-metrics takes them, the cell itself first."""
    from scib_metrics.nearest_neighbors import NeighborsResults

    cells = np.arange(len(neighbours.indices))[:, None]
    indices = np.hstack([cells, neighbours.indices[:, : count - 1]])
    distances = np.hstack([np.zeros(cells.shape), neighbours.distances[:, : count - 1]])
    return NeighborsResults(indices=indices, distances=distances)
