"""ln p(x_k | z_k), the reconstruction term of eq. 5 and 8, of sparse and dense counts alike.

A sparse profile never becomes dense. Its log-likelihood is the sum of ln p(0) over all features
plus the sum of ln p(x) - ln p(0) over its non-zero counts, and each likelihood gives these two
terms; of a dense profile it gives the sum itself. Terms that hold no parameter, such as -ln x!, are
left out. All is computed in float32.

To add a likelihood, write a subclass of `Likelihood` and enter its name in `LIKELIHOODS` below and
in `clue_dist.config.LikelihoodName`. The decoder and the start of training ask the subclass for
what it needs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clue_dist.data.batch import Counts
from clue_dist.model.moments import (
    compute_feature_shares,
    compute_moments,
    estimate_inverse_dispersions,
)
from clue_dist.model.negative_binomial import compute_log_rising_factorial, sum_log_probabilities
from clue_dist.normalise import Rows, sum_columns

MAX_LOG_DISPERSION = 7.0  # a negative binomial with r = 1,100 is as good as a Poisson
LOG1P_NODES = range(-17, 4)  # steps of ln t, see `compute_log1p_mean`
# Given z, the noise that remains is several e-folds away from what the moments of the counts say,
# and a short training has some 300 steps to get there. Where it does not, zeros and E ln(1 + x) are
# wrong.
DISPERSION_LEARNING_RATE = 50.0
NOISE_OF_CONSTANTS = 2e-6  # standard deviation that rounding gives to a constant feature
LEAST_RELATIVE_DEVIATION = 0.01  # of a feature's standard deviation, next to the median feature's


class LikelihoodParameters(NamedTuple):
    """What a decoder gives for n cells and F features.

    Before n there may be an axis of several z of the same cells. What follows from the counts
    alone is computed once for all of them.
    """

    rate: Tensor  # (n, F); each likelihood says what it means
    theta: Tensor  # (F,), log inverse dispersion or log standard deviation
    library: Tensor  # (n, 1), total counts of each cell
    gate: Tensor | None = None  # (n, F), logit of an extra zero, for likelihoods with `has_gate`

    @property
    def log_mean(self) -> Tensor:
        """ln mu = ln library + ln sigmoid(rate): a feature takes a share of the cell's counts."""
        return self.library.log() + F.logsigmoid(self.rate)

    @property
    def mean(self) -> Tensor:
        """mu, (n, F)."""
        return self.library * torch.sigmoid(self.rate)

    def shift_theta(self, shift: float | Tensor) -> LikelihoodParameters:
        """The same, with something added to theta."""
        return self._replace(theta=self.theta + shift)

    def gather_entries(self, row: Tensor, column: Tensor) -> LikelihoodParameters:
        """The parameters of single entries, each (nnz,); row, column: (nnz,)."""
        flat = row * self.rate.shape[-1] + column

        def gather_flat(x: Tensor) -> Tensor:
            x = x.flatten(-2)
            return x.gather(-1, flat.expand(*x.shape[:-1], -1))

        return LikelihoodParameters(
            gather_flat(self.rate),
            self.theta.index_select(0, column),
            self.library[:, 0].index_select(0, row),
            None if self.gate is None else gather_flat(self.gate),
        )


class Likelihood(ABC):
    """A distribution of a feature's values, what it needs of a decoder, and where it starts."""

    has_gate: ClassVar[bool] = False  # the decoder gives the logit of an extra zero, too
    takes_real_values: ClassVar[bool] = False  # instead of counts
    theta_learning_rate: ClassVar[float] = 1.0  # rate of theta, relative to `train.lr`

    @abstractmethod
    def compute_log_zero(self, parameters: LikelihoodParameters) -> Tensor:
        """ln p(0)."""

    @abstractmethod
    def compute_log_gain(self, values: Tensor, parameters: LikelihoodParameters) -> Tensor:
        """ln p(x) - ln p(0), up to terms without parameters."""

    def score_values(self, values: Tensor, parameters: LikelihoodParameters) -> Tensor:
        """ln p of each value, (n, F) or (..., n, F); values: (n, F)."""
        return self.compute_log_zero(parameters) + self.compute_log_gain(values, parameters)

    def score_profiles(self, counts: Counts, parameters: LikelihoodParameters) -> Tensor:
        """ln p of n profiles, (n,) or (..., n)."""
        if isinstance(counts, Tensor):
            return self.score_values(counts, parameters).sum(-1)
        everywhere = self.compute_log_zero(parameters).sum(-1)
        entries = parameters.gather_entries(counts.entry_rows, counts.indices.long())
        gain = self.compute_log_gain(counts.values, entries)
        return everywhere + counts.sum_rows_of_each(gain).view_as(everywhere)

    @abstractmethod
    def compute_mean(self, parameters: LikelihoodParameters) -> Tensor:
        """E x of each feature, (n, F)."""

    @abstractmethod
    def draw_values(self, parameters: LikelihoodParameters, generator: torch.Generator) -> Tensor:
        """Draw x of each feature, (n, F)."""

    def compute_laplace(self, decay: Tensor, parameters: LikelihoodParameters) -> Tensor:
        """E exp(-s x) of each feature, (n, F), for counts; decay: s > 0, (n, 1)."""
        raise NotImplementedError(f"{type(self).__name__} is no distribution of counts")

    def average_cells(self, parameters: LikelihoodParameters) -> LikelihoodParameters:
        """Give all n cells the average of them, at the library of each."""
        gate = None if parameters.gate is None else _average_logits(parameters.gate)
        return parameters._replace(rate=_average_logits(parameters.rate), gate=gate)

    def estimate_start(self, counts: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Rate and theta of each feature before the first step, from a sample of training cells.

        Args:
            counts: (n, features), raw.

        Returns:
            Two arrays (features,). By default the mean is the feature's share of all counts, and
            theta, which is not used, is 0.
        """
        share = compute_feature_shares(counts)
        return np.log(share / (1 - share)), np.zeros(len(share))


class NegativeBinomial(Likelihood):
    """Counts of mean mu and inverse dispersion r = exp(theta), so of variance mu + mu^2 / r."""

    theta_learning_rate = DISPERSION_LEARNING_RATE

    def compute_log_zero(self, parameters: LikelihoodParameters) -> Tensor:
        theta = parameters.theta.clamp(max=MAX_LOG_DISPERSION)
        return -theta.exp() * F.softplus(parameters.log_mean - theta)

    def score_profiles(self, counts: Counts, parameters: LikelihoodParameters) -> Tensor:
        r = parameters.theta.clamp(max=MAX_LOG_DISPERSION).exp()
        return sum_log_probabilities(parameters.rate, r, parameters.library, counts)

    def compute_log_gain(self, values: Tensor, parameters: LikelihoodParameters) -> Tensor:
        theta = parameters.theta.clamp(max=MAX_LOG_DISPERSION)
        rising = compute_log_rising_factorial(theta.exp(), values)
        return rising + values * F.logsigmoid(parameters.log_mean - theta)

    def compute_mean(self, parameters: LikelihoodParameters) -> Tensor:
        return parameters.mean

    def draw_values(self, parameters: LikelihoodParameters, generator: torch.Generator) -> Tensor:
        r = parameters.theta.clamp(max=MAX_LOG_DISPERSION).exp()
        mean = parameters.mean
        # A Poisson whose mean is drawn from a Gamma distribution of shape r.
        relative = torch._standard_gamma(r.expand_as(mean), generator=generator) / r
        return torch.poisson(relative * mean, generator=generator)

    def compute_laplace(self, decay: Tensor, parameters: LikelihoodParameters) -> Tensor:
        r = parameters.theta.clamp(max=MAX_LOG_DISPERSION).exp()
        return torch.exp(-r * torch.log1p(-torch.expm1(-decay) * parameters.mean / r))

    def estimate_start(self, counts: Rows) -> tuple[np.ndarray, np.ndarray]:
        """The mean as for every likelihood of counts, and r as the moments of the sample say."""
        rate, _ = super().estimate_start(counts)
        return rate, np.log(estimate_inverse_dispersions(counts, compute_feature_shares(counts)))


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """A zero with probability sigmoid(gate), else negative binomial."""

    has_gate = True

    def compute_log_zero(self, parameters: LikelihoodParameters) -> Tensor:
        assert parameters.gate is not None
        return torch.logaddexp(
            F.logsigmoid(parameters.gate),
            F.logsigmoid(-parameters.gate) + super().compute_log_zero(parameters),
        )

    def score_profiles(self, counts: Counts, parameters: LikelihoodParameters) -> Tensor:
        return Likelihood.score_profiles(self, counts, parameters)

    def compute_log_gain(self, values: Tensor, parameters: LikelihoodParameters) -> Tensor:
        assert parameters.gate is not None
        log_p = (
            F.logsigmoid(-parameters.gate)
            + super().compute_log_zero(parameters)
            + super().compute_log_gain(values, parameters)
        )
        return torch.where(values > 0, log_p - self.compute_log_zero(parameters), 0.0)

    def compute_mean(self, parameters: LikelihoodParameters) -> Tensor:
        assert parameters.gate is not None
        return torch.sigmoid(-parameters.gate) * super().compute_mean(parameters)

    def draw_values(self, parameters: LikelihoodParameters, generator: torch.Generator) -> Tensor:
        assert parameters.gate is not None
        kept = torch.bernoulli(torch.sigmoid(-parameters.gate), generator=generator)
        return kept * super().draw_values(parameters, generator)

    def compute_laplace(self, decay: Tensor, parameters: LikelihoodParameters) -> Tensor:
        assert parameters.gate is not None
        loss = 1 - super().compute_laplace(decay, parameters)
        return 1 - torch.sigmoid(-parameters.gate) * loss


class Poisson(Likelihood):
    """Counts of mean mu."""

    def compute_log_zero(self, parameters: LikelihoodParameters) -> Tensor:
        return -parameters.log_mean.exp()

    def compute_log_gain(self, values: Tensor, parameters: LikelihoodParameters) -> Tensor:
        return values * parameters.log_mean

    def compute_mean(self, parameters: LikelihoodParameters) -> Tensor:
        return parameters.mean

    def draw_values(self, parameters: LikelihoodParameters, generator: torch.Generator) -> Tensor:
        return torch.poisson(parameters.mean, generator=generator)

    def compute_laplace(self, decay: Tensor, parameters: LikelihoodParameters) -> Tensor:
        return torch.exp(torch.expm1(-decay) * parameters.mean)


class Bernoulli(Likelihood):
    """Open or closed: x > 0 with odds library * exp(rate), so that deeper cells open more."""

    def compute_log_zero(self, parameters: LikelihoodParameters) -> Tensor:
        return -F.softplus(parameters.rate + parameters.library.log())

    def compute_log_gain(self, values: Tensor, parameters: LikelihoodParameters) -> Tensor:
        return (values > 0) * (parameters.rate + parameters.library.log())

    def compute_mean(self, parameters: LikelihoodParameters) -> Tensor:
        return torch.sigmoid(parameters.rate + parameters.library.log())

    def draw_values(self, parameters: LikelihoodParameters, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(self.compute_mean(parameters), generator=generator)

    def compute_laplace(self, decay: Tensor, parameters: LikelihoodParameters) -> Tensor:
        return 1 + torch.expm1(-decay) * self.compute_mean(parameters)

    def estimate_start(self, counts: Rows) -> tuple[np.ndarray, np.ndarray]:
        """The odds are those of the cells with the feature, in a cell of average size."""
        n_cells = counts.shape[0]
        library = np.maximum(sum_columns(counts), 0.5).sum()
        detected = sum_columns(counts, lambda v: (v > 0).astype(np.float64)) / n_cells
        detected = np.clip(detected, 1e-6, 0.999)
        rate = np.log(detected / (1 - detected)) - np.log(library / n_cells)
        return rate, np.zeros(len(rate))


class Normal(Likelihood):
    """Real values of mean `rate` and standard deviation exp(theta)."""

    takes_real_values = True

    def compute_log_zero(self, parameters: LikelihoodParameters) -> Tensor:
        return -0.5 * (parameters.rate * (-parameters.theta).exp()) ** 2 - parameters.theta

    def compute_log_gain(self, values: Tensor, parameters: LikelihoodParameters) -> Tensor:
        return (values * parameters.rate - 0.5 * values**2) * (-2 * parameters.theta).exp()

    def score_values(self, values: Tensor, parameters: LikelihoodParameters) -> Tensor:
        # Of values many deviations from zero, ln p is the small difference of two large terms.
        scaled = (values - parameters.rate) * (-parameters.theta).exp()
        return -0.5 * scaled**2 - parameters.theta

    def compute_mean(self, parameters: LikelihoodParameters) -> Tensor:
        return parameters.rate

    def average_cells(self, parameters: LikelihoodParameters) -> LikelihoodParameters:
        rate = parameters.rate
        return parameters._replace(rate=rate.mean(0, keepdim=True).expand_as(rate))

    def draw_values(self, parameters: LikelihoodParameters, generator: torch.Generator) -> Tensor:
        mean = parameters.rate
        return torch.normal(mean, parameters.theta.exp().expand_as(mean), generator=generator)

    def estimate_start(self, counts: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the sample.

        A feature that is constant in the sample may vary elsewhere, and a tiny deviation would
        outweigh all other features. So deviations have a floor.
        """
        mean, deviation = compute_moments(counts)
        varied = deviation[deviation > NOISE_OF_CONSTANTS]
        floor = LEAST_RELATIVE_DEVIATION * np.median(varied) if len(varied) else 1.0
        return mean, np.log(np.maximum(deviation, floor))


LIKELIHOODS: dict[str, Likelihood] = {
    "nb": NegativeBinomial(),
    "zinb": ZeroInflatedNegativeBinomial(),
    "poisson": Poisson(),
    "bernoulli": Bernoulli(),
    "normal": Normal(),
}


def _average_logits(logits: Tensor) -> Tensor:
    """The logit of the mean probability over cells, for each of them: (n, F) -> (n, F)."""
    # In float32 a probability may round to 0 or 1, of which the logit is infinite.
    probability = torch.sigmoid(logits).mean(0, keepdim=True).clamp(1e-30, 1 - 2**-24)
    return torch.logit(probability).expand_as(logits)


def compute_log1p_mean(
    likelihood: Likelihood, parameters: LikelihoodParameters, scale: Tensor
) -> Tensor:
    """E ln(1 + scale * x) of counts x, what profiles scaled and logged as usual are on average.

    The logarithm of a mean is far above it where counts are few. As ln(1 + y) is the integral over
    t > 0 of (1 - exp(-t y)) exp(-t) / t, the Laplace transform of x is enough. With ln t as the
    variable the integrand is smooth, and steps of 1 leave an error below 1e-3.

    Args:
        likelihood: of counts.
        parameters: of n cells and F features.
        scale: (n, 1).

    Returns:
        (n, F).
    """
    total = torch.zeros_like(parameters.rate)
    for log_t in LOG1P_NODES:
        decay = math.exp(log_t) * scale
        loss = 1 - likelihood.compute_laplace(decay, parameters)
        total += math.exp(-math.exp(log_t)) * loss
    return total
