"""ln p(x | parameters) of the five likelihoods, for sparse and dense counts alike, in float32.

A sparse profile never becomes dense: ln p(x) = sum over all features of ln p(0) + sum over non-zeros of
ln p(x) - ln p(0). Each likelihood gives these two pieces. Terms that hold no parameter, such as -ln x!, are left out.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from clue_dist.data.batch import Counts


class LikelihoodParameters(NamedTuple):
    """What a decoder gives for n cells and F features.

    rate: (n, F); theta: (F,) log inverse dispersion (nb, zinb) or log standard deviation (normal); library: (n, 1)
    counts of the cell; gate: (n, F) logit of an extra zero (zinb).
    """

    rate: Tensor
    theta: Tensor
    library: Tensor
    gate: Tensor | None = None

    @property
    def log_mean(self) -> Tensor:
        """ln mu = ln library + ln sigmoid(rate): a feature takes a share between 0 and 1 of the cell's counts."""
        return self.library.log() + F.logsigmoid(self.rate)

    def at(self, row: Tensor, column: Tensor) -> LikelihoodParameters:
        """The parameters of single entries, each (nnz,)."""
        flat = row * self.rate.shape[1] + column
        gate = None if self.gate is None else self.gate.reshape(-1).gather(0, flat)
        return LikelihoodParameters(
            self.rate.reshape(-1).gather(0, flat), self.theta[column], self.library[row, 0], gate
        )


class Likelihood(Protocol):
    def zero(self, p: LikelihoodParameters) -> Tensor:
        """ln p(0)."""

    def gain(self, x: Tensor, p: LikelihoodParameters) -> Tensor:
        """ln p(x) - ln p(0), up to terms without parameters."""


MAX_LOG_R = 7.0  # an NB with r = 1,100 is as good as a Poisson


class NegativeBinomial:
    """Mean mu, inverse dispersion r = exp(theta): variance mu + mu^2 / r."""

    def zero(self, p: LikelihoodParameters) -> Tensor:
        theta = p.theta.clamp(max=MAX_LOG_R)
        return -theta.exp() * F.softplus(p.log_mean - theta)

    def gain(self, x: Tensor, p: LikelihoodParameters) -> Tensor:
        theta = p.theta.clamp(max=MAX_LOG_R)
        return log_rising_factorial(theta.exp(), x) + x * F.logsigmoid(p.log_mean - theta)


STIRLING = 8.0


def log_rising_factorial(r: Tensor, x: Tensor) -> Tensor:
    """ln Gamma(r + x) - ln Gamma(r), also where both are large and nearly equal: by Stirling's series from r = 8 on, to
    1e-6, with a gradient that float32 does not drown."""
    large = r.clamp(min=STIRLING)
    y = x + large
    series = (large - 0.5) * torch.log1p(x / large) + x * (y.log() - 1) + (1 / y - 1 / large) / 12
    small = r.clamp(max=STIRLING)
    return torch.where(r > STIRLING, series, torch.lgamma(x + small) - torch.lgamma(small))


class ZeroInflatedNegativeBinomial:
    """A zero with probability sigmoid(gate), else negative binomial."""

    nb = NegativeBinomial()

    def zero(self, p: LikelihoodParameters) -> Tensor:
        assert p.gate is not None
        return torch.logaddexp(F.logsigmoid(p.gate), F.logsigmoid(-p.gate) + self.nb.zero(p))

    def gain(self, x: Tensor, p: LikelihoodParameters) -> Tensor:
        assert p.gate is not None
        log_p = F.logsigmoid(-p.gate) + self.nb.zero(p) + self.nb.gain(x, p)
        return torch.where(x > 0, log_p - self.zero(p), 0.0)


class Poisson:
    """Mean mu."""

    def zero(self, p: LikelihoodParameters) -> Tensor:
        return -p.log_mean.exp()

    def gain(self, x: Tensor, p: LikelihoodParameters) -> Tensor:
        return x * p.log_mean


class Bernoulli:
    """Open or closed: x > 0 with odds library * exp(rate), so that deeper cells open more."""

    def zero(self, p: LikelihoodParameters) -> Tensor:
        return -F.softplus(p.rate + p.library.log())

    def gain(self, x: Tensor, p: LikelihoodParameters) -> Tensor:
        return (x > 0) * (p.rate + p.library.log())


class Normal:
    """Real values: mean `rate`, standard deviation exp(theta)."""

    def zero(self, p: LikelihoodParameters) -> Tensor:
        return -0.5 * (p.rate * (-p.theta).exp()) ** 2 - p.theta

    def gain(self, x: Tensor, p: LikelihoodParameters) -> Tensor:
        return (x * p.rate - 0.5 * x**2) * (-2 * p.theta).exp()


LIKELIHOODS: dict[str, Likelihood] = {
    "nb": NegativeBinomial(),
    "zinb": ZeroInflatedNegativeBinomial(),
    "poisson": Poisson(),
    "bernoulli": Bernoulli(),
    "normal": Normal(),
}


def log_likelihood(name: str, counts: Counts, p: LikelihoodParameters) -> Tensor:
    """ln p of n profiles in nats, (n,)."""
    likelihood = LIKELIHOODS[name]
    everywhere = likelihood.zero(p).sum(1)
    if isinstance(counts, Tensor):
        return everywhere + likelihood.gain(counts, p).sum(1)
    gain = likelihood.gain(counts.values, p.at(counts.list_entry_rows(), counts.indices.long()))
    return everywhere + counts.sum_rows(gain)
