"""How sure a partner is: the probability that two profiles are of one cell, calibrated on pairs.

The model of it has three numbers. If a candidate's chance went as exp(cosine / temperature), a pair
would have a likelihood ratio: how much likelier it is than a random one, by either modality. The
log of it, scaled and shifted (Platt, 1999), is added to the log odds of a random pair, one to the
number of candidates. So a calibration on few cells holds for many, where each pair is less sure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clue_dist.errors import DataError, format_count
from clue_dist.neighbours.nearest import scale_to_length_one
from clue_dist.neighbours.partner_settings import PartnerSettings
from clue_dist.neighbours.partners import find_partners
from clue_dist.progress import show_progress

FEWEST_PAIRS = 50  # that a calibration needs
_MOST_PAIRS = 4_000  # that the temperature is fitted on
_MOST_JUDGED = 50_000  # pairs of a calibration; of more, a random part stands for all
_MOST_COMPARED = 20_000  # keys that odds are computed against; of more, an even part stands for all
_SLICE_ELEMENTS = 2**22
_TEMPERATURES = np.geomspace(0.005, 0.5, 15)


@dataclass(frozen=True)
class PairConfidence:
    """The probability that profiles of two modalities are of one cell."""

    temperature: float = 0.07  # in units of cosine similarity; the default suits four real sets
    slope: float = 1.0  # of the log likelihood ratio
    intercept: float = 0.0
    n_pairs: int = 0  # that it was calibrated on

    @property
    def is_calibrated(self) -> bool:
        """Whether it was fitted on pairs of the model and the cells at hand."""
        return self.n_pairs > 0

    def compute_confidence(
        self, first: np.ndarray, second: np.ndarray, rows: np.ndarray, columns: np.ndarray
    ) -> np.ndarray:
        """Compute the probability that pairs of profiles are of one cell, (n,).

        Args:
            first: (N, D), all profiles of the first modality among which a partner was sought.
            second: (M, D), the same of the second.
            rows: (n,), of `first`.
            columns: (n,), of `second`.
        """
        ratios = _compare_pairs(first, second, rows, columns, self.temperature)
        odds = self.intercept + self.slope * ratios + _compute_random_odds(first, second)
        return np.asarray(1 / (1 + np.exp(-odds)))


def fit_pair_confidence(
    first: np.ndarray, second: np.ndarray, settings: PartnerSettings
) -> PairConfidence:
    """Calibrate on cells that were measured in both modalities.

    The model must not have been trained on them: pairs of training match better than new ones.

    Args:
        first: (N, D), profiles by the first modality.
        second: (N, D), row i is of the same cell as row i of `first`.
        settings: how partners are sought, whose best ones are judged.

    Raises:
        DataError: fewer than FEWEST_PAIRS cells.
    """
    from sklearn.linear_model import LogisticRegression

    n_pairs = min(len(first), _MOST_JUDGED)
    # Drawn, as every second cell may be of one lane, say.
    judged = np.sort(np.random.default_rng(0).permutation(len(first))[:n_pairs])
    first, second = first[judged], second[judged]
    if n_pairs < FEWEST_PAIRS:
        raise DataError(
            "too few pairs to calibrate confidence on",
            got=f"{format_count(n_pairs, 'cell')} with both modalities",
            expected=f"{FEWEST_PAIRS} or more",
        )
    temperature = _fit_temperature(first[:_MOST_PAIRS], second[:_MOST_PAIRS])
    # One partner for each cell: of more, the second would be judged as often as the first.
    chosen = find_partners(first, second, settings).tocoo()
    order = np.lexsort((-chosen.data, chosen.row))
    rows, place = np.unique(chosen.row[order], return_index=True)
    columns = chosen.col[order][place]
    ratios = _compare_pairs(first, second, rows, columns, temperature)
    random_odds = _compute_random_odds(first, second)
    is_true = rows == columns
    if is_true.all() or not is_true.any():
        # Nothing tells good from bad: half a pair of the other kind keeps odds finite.
        share = (is_true.sum() + 0.5) / (n_pairs + 1)
        odds = float(np.log(share / (1 - share)))
        return PairConfidence(temperature, 0.0, odds - random_odds, n_pairs)
    fitted = LogisticRegression(C=100.0).fit(ratios[:, None], is_true)
    slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    return PairConfidence(temperature, slope, intercept - random_odds, n_pairs)


def _fit_temperature(first: np.ndarray, second: np.ndarray) -> float:
    """The temperature at which true partners are most probable, of those of a grid."""
    x, y = _scale_profiles(first, second)
    sums = np.zeros(len(_TEMPERATURES))
    for queries, keys in ((x, y), (y, x)):
        for rows in _slice_rows(len(queries), len(keys)):
            cosines = queries[rows] @ keys.T
            partner = cosines.diagonal(rows.start)
            for place, temperature in enumerate(_TEMPERATURES):
                everyone = torch.logsumexp(cosines / temperature, 1)
                sums[place] += float((partner / temperature - everyone).sum())
    return float(_TEMPERATURES[sums.argmax()])


def _compare_pairs(
    first: np.ndarray,
    second: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    temperature: float,
) -> np.ndarray:
    """Log likelihood ratios of pairs, the mean of both directions, (n,)."""
    x, y = _scale_profiles(first, second)
    # In slices, as rows of the profiles would fill the memory.
    cosine = torch.empty(len(rows))
    for part in _slice_rows(len(rows), x.shape[1]):
        cosine[part] = (x[rows[part]] * y[columns[part]]).sum(1)
    ratios = np.zeros(len(rows))
    for queries, keys, places in ((x, y, rows), (y, x, columns)):
        everyone = _sum_candidates(queries, keys, places, temperature)
        # Of an even part of the keys the pair itself may not be one: it is added, at most.
        ln_share = (cosine / temperature - torch.maximum(everyone, cosine / temperature)).double()
        share = ln_share.exp().clamp(max=1 - 1e-6)
        ratios += (ln_share - torch.log1p(-share)).numpy() / 2
    return ratios - _compute_random_odds(first, second)


def _compute_random_odds(first: np.ndarray, second: np.ndarray) -> float:
    """Log odds of a random pair, the mean of both directions."""
    return -float(np.mean([np.log(max(len(u) - 1, 1)) for u in (first, second)]))


def _sum_candidates(
    queries: Tensor, keys: Tensor, places: np.ndarray, temperature: float
) -> Tensor:
    """ln of the sum of exp(cosine / temperature) over all keys, for some queries, (n,)."""
    step = -(-len(keys) // _MOST_COMPARED)
    compared = keys[::step]
    unique, inverse = np.unique(places, return_inverse=True)
    sums = torch.empty(len(unique))
    with show_progress("comparing partners", len(unique)) as progress:
        for rows in _slice_rows(len(unique), len(compared)):
            cosines = queries[unique[rows]] @ compared.T
            sums[rows] = torch.logsumexp(cosines.div_(temperature), 1)
            progress.mark_done(rows.stop - rows.start)
    return sums[inverse] + np.log(len(keys) / len(compared))


def _scale_profiles(first: np.ndarray, second: np.ndarray) -> tuple[Tensor, Tensor]:
    x, y = (scale_to_length_one(torch.as_tensor(u).detach().float().cpu()) for u in (first, second))
    return x, y


def _slice_rows(n_rows: int, n_keys: int) -> list[slice]:
    step = max(1, _SLICE_ELEMENTS // n_keys)
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]
