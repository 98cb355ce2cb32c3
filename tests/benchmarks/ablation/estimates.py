"""What is told without training: how far counting noise lets anybody get, where more pairs lead, how models grow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from clue_dist import matching
from clue_dist.config import ModelConfig, load_config
from clue_dist.model.clue import CLUE
from clue_dist.model.modality_spec import ModalitySpec
from tests.benchmarks import common, mosaic
from tests.distributed.command import ROOT

COUNTS_OF_MODALITIES = (2, 3, 4, 8)


def counted_anew(counts: sp.csr_matrix, seed: int) -> matching.Scores:
    """How well counts (cells, features) find a Poisson draw with themselves as rates, by Euclidean distance of square
    roots, on which scale every count has the same noise."""
    rates = counts.toarray().astype(float)
    roots = [np.sqrt(x + 3 / 8) for x in (rates, np.random.default_rng(seed).poisson(rates))]
    far = np.full(
        (len(rates), 1), 1e3 * np.abs(roots[0]).max()
    )  # seen from there, cosines are distances
    return matching.compute_scores(*(np.hstack([x, far]) for x in roots), np.zeros(len(rates)))


def limit(values: Sequence[float]) -> float:
    """Where three values lead whose differences shrink by the same factor each time; NaN if they do not shrink."""
    first, second, third = values
    if first == second:
        return math.nan
    ratio = (third - second) / (second - first)
    return third + (third - second) * ratio / (1 - ratio) if 0 <= ratio < 1 else math.nan


def parameters() -> str:
    """Millions of parameters of the encoders of atlas.json, projections aside, as modalities become more."""
    rows = [["million parameters of the encoders", *(f"K = {k}" for k in COUNTS_OF_MODALITIES)]]
    for name, shared in (("one trunk a modality", True), ("separate encoders", False)):
        model = load_config(
            ROOT / mosaic.RECIPE, [f"model.trunk.shared={str(shared).lower()}"]
        ).model
        counts = [encoder_parameters(k, model) for k in COUNTS_OF_MODALITIES]
        rows.append([name, *(f"{n / 1e6:.2f}" for n in counts)])
    return common.aligned(rows)


def encoder_parameters(k: int, model: ModelConfig) -> int:
    """Of the trunks behind their projections, and of the heads."""
    spec = ModalitySpec(
        n_features=model.trunk.projection, normalise="log", likelihood="nb", features_per_step=None
    )
    clue = CLUE({f"m{i}": spec for i in range(k)}, 1, model)
    parts = [clue.heads, *(clue.get_trunk(name).ensemble for name in clue.modalities)]
    return sum(p.numel() for part in parts for p in part.parameters())
