"""What a model says of a modality that it is not shown: z of that modality, and its values.

Shapes: B cells, K modalities, d dimensions of each z_k, F features of the modality asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clue_dist.data.batch import Batch
from clue_dist.model.clue import CLUE
from clue_dist.model.likelihoods import LikelihoodParameters, compute_log1p_mean

PER_TEN_THOUSAND = 1e4  # to what total profiles are scaled before ln(1 + x) is taken
N_POINTS = 8  # z's of a cell over which what is expected of it is averaged, an even number


def keep_sources(batch: Batch, modalities: list[str], sources: Collection[str]) -> Batch:
    """Hide all modalities of a batch but some.

    Args:
        batch: B cells.
        modalities: names, in model order.
        sources: those to keep.
    """
    kept = torch.tensor([name in sources for name in modalities], device=batch.observed.device)
    measured = {name: part for name, part in batch.modalities.items() if name in sources}
    return Batch(batch.observed & kept, batch.batch_code, measured)


@dataclass(frozen=True)
class TargetLatent:
    """The Gaussian of z_k of the modality asked for, given what a cell shows."""

    mean: Tensor  # (B, d)
    # What a standard normal vector is multiplied by: standard deviations (B, d), or a factor of the
    # covariance that all cells have in common, (d, d) and lower triangular.
    deviation: Tensor
    is_factor: bool
    theta_shift: float = 0.0  # added to theta of the likelihood

    def select_rows(self, rows: slice | Tensor) -> TargetLatent:
        """The Gaussian of some of the cells."""
        deviation = self.deviation if self.is_factor else self.deviation[rows]
        return replace(self, mean=self.mean[rows], deviation=deviation)

    def draw_sample(self, generator: torch.Generator) -> Tensor:
        """Draw z_k of each cell, (B, d)."""
        noise = torch.randn(
            self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype
        )
        return self.mean + self._scale_noise(noise)

    def place_points(self) -> Tensor:
        """Place `N_POINTS` z_k of each cell, (N_POINTS, B, d), which stand for its Gaussian.

        All cells have the same draws, in pairs on both sides of the mean: so what is expected of a
        cell follows from it alone, and no cell differs from another by chance.
        """
        generator, width = torch.Generator().manual_seed(0), self.mean.shape[1]
        noise = torch.randn(N_POINTS // 2, 1, width, generator=generator).to(self.mean)
        spread = self._scale_noise(noise)
        return torch.cat([self.mean + spread, self.mean - spread])

    def _scale_noise(self, noise: Tensor) -> Tensor:
        """Give standard normal vectors, (B, d) or (S, 1, d), the covariance."""
        return noise @ self.deviation.T if self.is_factor else noise * self.deviation


def infer_target_latent(model: CLUE, batch: Batch, modality: str) -> TargetLatent:
    """Infer z_k of a modality from all that a batch shows, be the modality itself shown or not.

    Where it is shown, it is the z_k whose sample the decoder reads in eq. 8. Else z_k is told by
    the translation. Where that was not fitted, as in runs of earlier versions, cross-encoders tell
    it, and what is private to the modality is the prior's.

    Args:
        model: the model.
        batch: cells that show the same modalities.
        modality: the one asked for.
    """
    posterior, k = model.infer_batch(batch), model.modalities.index(modality)
    shown = [int(source) for source in batch.observed[0].nonzero()[:, 0]]
    fitted = [source for source in model.translation.list_fitted(k) if source in shown]
    if k in shown or not fitted:
        deviation = (0.5 * posterior.joint_log_var[:, k]).exp()
        return TargetLatent(posterior.joint_mean[:, k], deviation, is_factor=False)
    return infer_from_sources(model, posterior.mean, fitted, k)


def infer_from_sources(model: CLUE, mean: Tensor, sources: list[int], target: int) -> TargetLatent:
    """Infer z_k of a target by the translation; arguments as of `predict_latent`."""
    predicted, covariance = model.translation.predict_latent(mean, sources, target)
    shift = float(model.translation.theta_shift[sources, target].mean())
    factor = torch.linalg.cholesky(covariance.double())  # float32 could find it not definite
    return TargetLatent(predicted, factor.to(covariance.dtype), True, shift)


@dataclass(frozen=True)
class ValueDecoder:
    """Decodes z_k into values of some features of a modality.

    A level of -1, unknown, stands for all: what is expected is averaged over the batches of
    training, with the levels put in that are known, and a draw is of one of them at random.
    """

    model: CLUE
    modality: str
    features: Tensor | None = None  # (F,), their numbers; None: all of them
    theta_shift: float = 0.0  # added to theta of the likelihood

    @property
    def batches(self) -> Tensor:
        """The levels of the batches of training, (n, C) int64, of which some batch is one."""
        levels = self.model.get_decoder(self.modality).levels
        complete = levels[(levels >= 0).all(1)]
        return complete if len(complete) else levels

    @property
    def width(self) -> int:
        """F."""
        decoder = self.model.get_decoder(self.modality)
        return decoder.n_features if self.features is None else len(self.features)

    def compute_mean(
        self, z: Tensor, levels: Tensor, library: Tensor, log1p: bool = False
    ) -> Tensor:
        """Compute what is expected of each feature.

        Decoders learn from samples of z. What they say of its mean alone is too sure: too much
        where it is much, too little where it is little. Points that stand for z are a remedy.

        Args:
            z: (B, d), or several of each cell, (S, B, d), over which is averaged.
            levels: (B, C) int64, of the batch; -1: averaged over batches.
            library: (B, 1), total counts of a profile.
            log1p: whether ln(1 + counts per 10,000) is expected of a profile, not its value.

        Returns:
            (B, F).
        """
        average = torch.zeros(len(levels), self.width, device=z.device)
        points = z if z.ndim == 3 else z[None]
        for rows, chosen, share in self._share_batches(levels):
            for point in points:  # one at a time, which the CPU's caches hold
                mean = self._compute_mean(point[rows], chosen, library[rows], log1p)
                average[rows] += mean * (share / len(points))
        return average

    def _share_batches(self, levels: Tensor) -> Iterator[tuple[slice | Tensor, Tensor, float]]:
        """Yield rows of cells, the levels (n, C) that each is decoded for, and their share."""
        known, batches = (levels >= 0).all(1), self.batches.to(levels.device)
        if known.any():
            yield _select_rows(known), levels[known], 1.0
        for partial in levels[~known].unique(dim=0):
            alike = (levels == partial).all(1)
            completed = torch.where(partial >= 0, partial, batches)
            choices, times = completed.unique(dim=0, return_counts=True)
            for chosen, n_times in zip(choices, times.tolist(), strict=True):
                yield (
                    _select_rows(alike),
                    chosen.expand(int(alike.sum()), -1),
                    n_times / len(batches),
                )

    def _compute_mean(self, z: Tensor, levels: Tensor, library: Tensor, log1p: bool) -> Tensor:
        likelihood = self.model.get_decoder(self.modality).likelihood
        parameters = self._decode(z, levels, library)
        if log1p:
            return compute_log1p_mean(likelihood, parameters, PER_TEN_THOUSAND / library)
        return likelihood.compute_mean(parameters)

    def draw_values(
        self, z: Tensor, levels: Tensor, library: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Draw values of each feature, (B, F); arguments as of `compute_mean`."""
        batches = self.batches.to(levels.device)
        drawn = torch.randint(
            len(batches), (len(levels),), generator=generator, device=levels.device
        )
        parameters = self._decode(z, torch.where(levels >= 0, levels, batches[drawn]), library)
        likelihood = self.model.get_decoder(self.modality).likelihood
        return likelihood.draw_values(parameters, generator)

    def _decode(self, z: Tensor, levels: Tensor, library: Tensor) -> LikelihoodParameters:
        decoder = self.model.get_decoder(self.modality)
        parameters = decoder.compute_parameters(z, levels, library, features=self.features)
        return parameters.shift_theta(self.theta_shift)


def _select_rows(is_chosen: Tensor) -> slice | Tensor:
    """Rows of a mask, (B,) bool; of all a view will do."""
    return slice(None) if is_chosen.all() else is_chosen.nonzero()[:, 0]
