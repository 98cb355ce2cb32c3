"""What is told without training: counting noise, where more pairs lead, how models grow."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp

from clue_dist.config import ModelConfig
from clue_dist.config_file import load_config
from clue_dist.metrics import matching
from clue_dist.model.clue import CLUE
from clue_dist.model.modality_spec import ModalitySpec
from clue_dist.train.auto_settings import resolve_auto_settings
from tests.benchmarks import mosaic, report
from tests.distributed.command import ROOT

LARGEST = 10**6  # cells, of which the sizes of a model do not depend
MODALITIES = (2, 3, 4, 8)  # how many, in the table of parameters


def match_recounts(counts: sp.csr_matrix, seed: int) -> matching.Scores:
    """How well counts (cells, features) find a Poisson draw with themselves as rates.

    By the Euclidean distance of square roots, on which scale every count has the same noise.
    """
    rates = counts.toarray().astype(float)
    draws = (rates, np.random.default_rng(seed).poisson(rates))
    roots = [np.sqrt(values + 3 / 8) for values in draws]
    # Seen from far away, cosines are distances.
    far = np.full((len(rates), 1), 1e3 * np.abs(roots[0]).max())
    return matching.compute_scores(*(np.hstack([x, far]) for x in roots), np.zeros(len(rates)))


def extrapolate_limit(values: Sequence[float]) -> float:
    """Where three values lead whose differences shrink by one factor; NaN if they do not shrink."""
    first, second, third = values
    if first == second:
        return math.nan
    ratio = (third - second) / (second - first)
    return third + (third - second) * ratio / (1 - ratio) if 0 <= ratio < 1 else math.nan


def tabulate_parameters() -> str:
    """Millions of parameters of atlas.json's encoders, as modalities become more."""
    table = pd.DataFrame(index=pd.Index(MODALITIES, name="modalities"))
    for name, shared in (("one trunk a modality", "true"), ("separate encoders", "false")):
        config = load_config(ROOT / mosaic.RECIPE, [f"model.trunk.shared={shared}"])
        models = {k: resolve_auto_settings(config, LARGEST, k).model for k in MODALITIES}
        counts = [count_encoders(k, model) / 1e6 for k, model in models.items()]
        table[f"million parameters, {name}"] = counts
    return report.format_table(table)


def count_encoders(k: int, model: ModelConfig) -> int:
    """Parameters of the trunks of k modalities behind their projections, and of the heads."""
    width = model.trunk.projection
    spec = ModalitySpec(n_features=width, normalise="log", likelihood="nb", features_per_step=None)
    clue = CLUE({f"m{i}": spec for i in range(k)}, 1, model)
    parts = [clue.heads, *(clue.get_trunk(name).ensemble for name in clue.modalities)]
    return sum(p.numel() for part in parts for p in part.parameters())
