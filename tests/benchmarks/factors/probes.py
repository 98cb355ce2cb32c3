"""How much of each known factor linear probes read from an embedding, and whether a cell's modalities meet in it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from clue_dist import matching
from tests.benchmarks.factors.simulate import Simulation, mosaic
from tests.benchmarks.mosaic import JOINT

PENALTIES = np.logspace(-1, 5, 13)


def r2(
    z: np.ndarray, factors: np.ndarray, z_test: np.ndarray, factors_test: np.ndarray
) -> np.ndarray:
    """R^2 of each factor on test cells, (factors,); the ridge penalty is chosen on the training cells alone."""
    probe = make_pipeline(StandardScaler(), RidgeCV(PENALTIES, alpha_per_target=True)).fit(
        z, factors
    )
    read = probe.predict(z_test).reshape(
        factors_test.shape
    )  # a single factor comes without its axis
    left = ((read - factors_test) ** 2).sum(0)
    return np.asarray(1 - left / ((factors_test - factors_test.mean(0)) ** 2).sum(0))


def scored(
    simulation: Simulation, z: dict[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, dict[str, list[float]]]:
    """R^2 by source of z, then by whose factors they are; nothing tells the private factors of a modality that was not
    observed. z: of the paired training cells and of the test cells."""
    parts = mosaic(simulation.design)
    return {
        source: {
            whose: r2(train, factors[parts["paired"]], test, factors[parts["test"]]).tolist()
            for whose, factors in simulation.factors.items()
            if source == JOINT or whose in ("shared", *source.split("+"))
        }
        for source, (train, test) in z.items()
    }


def foscttm(z: Mapping[str, np.ndarray], names: Sequence[str]) -> float:
    """Mean over pairs of modalities. z: of the same cells, from each modality alone."""
    return statistics.fmean(matching.compute_foscttm(z[a], z[b]) for a, b in combinations(names, 2))
