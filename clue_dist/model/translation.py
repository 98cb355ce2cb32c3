"""z_k as it would be inferred from everything, told from what another modality says.

The cross-encoders q(z_j | x_k) of eq. 6 are trained to meet the others in aligned dimensions, and
beside an expert that knows x_j itself they need not say how far z_j lies from the prior. Decoders
have only seen z_j that x_j took part in. So, where x_j is not shown, z_j is predicted by a linear
regression, from all that a modality says of every z to the mean of q(z_j | everything observed),
private dimensions among them. It is fitted to paired training cells, and held-out pairs tell what
error remains. To that the variance of this q is added, as decoders read samples of it (eq. 8).

Shapes: K modalities, d dimensions of each z_k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Regression(NamedTuple):
    """From what one modality says to z of another."""

    weight: Tensor  # (K * d, d)
    offset: Tensor  # (d,)
    # (d, d), of the error and of q(z_j | everything observed), of which decoders read samples.
    covariance: Tensor


class LatentTranslation(nn.Module):
    """The regressions of all pairs of modalities; buffers, fitted at every validation.

    Args:
        n_modalities: K.
        latent: d.
    """

    def __init__(self, n_modalities: int, latent: int) -> None:
        super().__init__()
        k, d = n_modalities, latent
        self.register_buffer("weight", torch.zeros(k, k, k * d, d))  # by source, then by target
        self.register_buffer("offset", torch.zeros(k, k, d))
        self.register_buffer("covariance", torch.zeros(k, k, d, d))  # 0 where nothing is fitted
        # Added to theta of the target's likelihood; see `choose_theta_shifts`.
        self.register_buffer("theta_shift", torch.zeros(k, k))
        self.theta_shift: Tensor
        self.weight: Tensor
        self.offset: Tensor
        self.covariance: Tensor

    def set_regression(self, source: int, target: int, regression: Regression) -> None:
        """Take over a fitted regression."""
        self.weight[source, target].copy_(regression.weight)
        self.offset[source, target].copy_(regression.offset)
        self.covariance[source, target].copy_(regression.covariance)

    def list_fitted(self, target: int) -> list[int]:
        """List the sources from which a target can be told."""
        fitted = self.covariance[:, target].flatten(1).any(1)
        return [int(source) for source in fitted.nonzero()[:, 0]]

    def predict_latent(
        self, mean: Tensor, sources: list[int], target: int
    ) -> tuple[Tensor, Tensor]:
        """Predict z of a target from one or more sources that all cells have.

        Several predictions are averaged by their precision. As their errors are not independent,
        several sources together are no surer than their average.

        Args:
            mean: (B, K source, K target, d), posterior means of the experts.
            sources: places of the modalities that are shown, fitted ones.
            target: place of the modality asked for.

        Returns:
            Mean (B, d), and the covariance that all cells have in common (d, d).
        """
        precision = torch.linalg.inv(self.covariance[sources, target].double()) / len(sources)
        covariance = torch.linalg.inv(precision.sum(0))
        weighted = mean.new_zeros(len(mean), mean.shape[-1], dtype=torch.float64)
        for source, share in zip(sources, precision, strict=True):
            inputs = mean[:, source].flatten(1)
            predicted = inputs @ self.weight[source, target] + self.offset[source, target]
            weighted += predicted.double() @ share
        return (weighted @ covariance).to(mean.dtype), covariance.to(mean.dtype)


def fit_regressions(
    inputs: Tensor, latents: Tensor, ridges: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Fit latents to inputs by least squares, with each of several ridges.

    Args:
        inputs: (n, D).
        latents: (n, d).
        ridges: what is added to the variance of every input, as multiples of their mean.

    Yields:
        Weight (D, d) and offset (d,).
    """
    centre, mean = inputs.mean(0), latents.mean(0)
    centred = inputs - centre
    covariance = centred.T @ centred / len(inputs)
    shared = centred.T @ (latents - mean) / len(inputs)
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    for ridge in ridges:
        added = ridge * covariance.diagonal().mean() + 1e-9
        weight = torch.linalg.solve(covariance + added * identity, shared)
        yield weight, mean - centre @ weight
