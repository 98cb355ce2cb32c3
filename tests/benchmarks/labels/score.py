"""Label accuracy of nearest neighbours, and how batches mix."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

LABEL = "cell_type"
NO_TYPES = ("Mouse", "Multiplets", "T/Mono doublets", "Mis")  # labels that name no cell type
NEIGHBOURS = 15
PERPLEXITY = 30


def typed(obs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Which cells have a label that names a cell type, and the labels of all. obs: (N,)."""
    return ~obs[LABEL].isin(NO_TYPES).to_numpy(), obs[LABEL].astype(str).to_numpy()


def accuracy(z: np.ndarray, labels: np.ndarray) -> float:
    """Share of cells whose label is the majority's of their neighbours, by 5-fold cross-validation."""
    folds = KFold(5, shuffle=True, random_state=0)
    return float(cross_val_score(KNeighborsClassifier(NEIGHBOURS), z, labels, cv=folds).mean())


def transferred(
    known: np.ndarray, known_labels: np.ndarray, z: np.ndarray, labels: np.ndarray
) -> float:
    """The same, with neighbours among other cells whose labels are known."""
    return float(KNeighborsClassifier(NEIGHBOURS).fit(known, known_labels).score(z, labels))


def ilisi(z: np.ndarray, batch: np.ndarray) -> float:
    """Median inverse Simpson index of batches around a cell, scaled to 0 (one batch) .. 1 (all alike).

    Neighbours are weighted as in t-SNE, 3 x perplexity of them (Korsunsky et al., 2019). As `ilisi_knn` of scib-metrics
    0.5.10, to 5 digits, where that is given a cell and its 90 neighbours.
    """
    near = NearestNeighbors(n_neighbors=min(3 * PERPLEXITY, len(z) - 1)).fit(z)
    distance, index = near.kneighbors()  # (N, 90), the cell itself left out
    weight = _weights(distance, np.log(PERPLEXITY))
    names, code = np.unique(batch, return_inverse=True)
    share = np.stack(
        [(weight * (code[index] == b)).sum(1) for b in range(len(names))], 1
    )  # (N, batches)
    return float((np.median(1 / (share**2).sum(1)) - 1) / (len(names) - 1))


def _weights(distance: np.ndarray, entropy: float) -> np.ndarray:
    """exp(-beta distance), rows scaled to 1, with each row's beta such that its entropy is as wanted. (N, k)"""
    distance = distance - distance[:, :1]  # the nearest gets the largest weight, whatever the scale
    low, high = np.full((len(distance), 1), -50.0), np.full((len(distance), 1), 50.0)  # ln beta
    for _ in range(60):
        middle = (low + high) / 2
        weight = np.exp(-np.exp(middle) * distance)
        weight /= weight.sum(1, keepdims=True)
        too_even = -(weight * np.log(np.maximum(weight, 1e-300))).sum(1, keepdims=True) > entropy
        low, high = np.where(too_even, middle, low), np.where(too_even, high, middle)
    return weight
