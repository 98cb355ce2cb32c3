"""p(x_k | z_k): z_k and the cell's batch -> parameters of the modality's likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clue_dist.config import DecoderConfig
from clue_dist.data.batch import Counts, SparseCounts, compute_library_size
from clue_dist.model.entry_kernels import copy_selected_entries
from clue_dist.model.fused import FUSED_LIKELIHOODS, can_fuse
from clue_dist.model.layers import MLP
from clue_dist.model.likelihoods import LIKELIHOODS, LikelihoodParameters
from clue_dist.model.noise import Noise

BATCH_WIDTH = 16  # components that describe a biological batch to the decoder


class Decoder(nn.Module):
    """z and the batch code of n cells -> ln p(x | z).

    The batch enters here alone, so that cells of an unseen batch can be embedded. It enters as the
    sum of what describes its levels: one of each covariate, as donor and chemistry. So a
    combination of known levels can be decoded that no cell had.

    Args:
        likelihood: a key of `LIKELIHOODS`.
        n_features: features of the modality.
        n_batches: biological batches of the store; with one, the decoder does not ask for it.
        latent: width of z.
        config: widths and depths.
        levels: (n_batches, C) int64, the levels of each batch by C covariates, numbered over all of
            them; -1: unknown. None: each batch is a level of one covariate.
    """

    def __init__(
        self,
        likelihood: str,
        n_features: int,
        n_batches: int,
        latent: int,
        config: DecoderConfig,
        levels: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.likelihood, self.n_features = LIKELIHOODS[likelihood], n_features
        self.fused_name = likelihood if likelihood in FUSED_LIKELIHOODS else None
        self.set_levels(torch.arange(max(n_batches, 1))[:, None] if levels is None else levels)
        n_levels = int(self.levels.max()) + 1
        self.batch = nn.Embedding(n_levels, BATCH_WIDTH) if n_batches > 1 else None
        self.mlp = MLP(
            latent + (BATCH_WIDTH if self.batch else 0), config.hidden, config.depth, config.dropout
        )
        self.rate = OutputLayer(self.mlp.width, n_features)
        self.gate = OutputLayer(self.mlp.width, n_features) if self.likelihood.has_gate else None
        self.theta = SecondParameter(n_features, self.likelihood.theta_learning_rate)

    @property
    def levels(self) -> Tensor:
        """The levels of each batch, (n_batches, C) int64; -1: unknown."""
        return self._levels_of_code[:-1]

    def set_levels(self, levels: Tensor) -> None:
        """Set the levels of each batch, (n_batches, C).

        They are no buffer: they follow from the batches, which the model card lists.
        """
        # The last row is that of the code -1, an unknown batch.
        self._levels_of_code = torch.cat([levels, torch.full_like(levels[:1], -1)])

    def find_levels(self, batch_code: Tensor) -> Tensor:
        """Find the levels of batches, (n, C) int64; -1: unknown.

        Args:
            batch_code: (n,) int64; -1: unknown.
        """
        if self.batch is None:  # a single batch, which nothing asks for
            return torch.zeros_like(batch_code)[:, None]
        if self._levels_of_code.device != batch_code.device:
            self._levels_of_code = self._levels_of_code.to(batch_code.device)
        return self._levels_of_code[batch_code]

    def forward(
        self,
        z: Tensor,
        batch_code: Tensor,
        counts: Counts,
        noise: Noise | None = None,
        rows: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Score each profile.

        Args:
            z: (n, d), or several of each cell, (S, n, d).
            batch_code: (n,) int64; -1: unknown.
            counts: the n profiles.
            noise: for dropout, in training.
            rows: (n,), the cells' rows in the batch; None: all of them.
            features: (F,), sorted. Only these are scored, and the sum is scaled up to an unbiased
                estimate of that over all features.

        Returns:
            ln p of each profile in nats, (n,) or (S, n).
        """
        library, levels = compute_library_size(counts).unsqueeze(1), self.find_levels(batch_code)
        parameters = self.compute_parameters(z, levels, library, noise, rows, features)
        scale = 1.0 if features is None else self.n_features / len(features)
        if self.fused_name and can_fuse(parameters.rate):
            return scale * self._score_by_kernels(self.fused_name, counts, parameters, features)
        if features is None:
            return self.likelihood.score_profiles(counts, parameters)
        counts = select_features(counts, features)
        return scale * self.likelihood.score_profiles(counts, parameters)

    def compare_with_mean(
        self, z: Tensor, batch_code: Tensor, counts: Counts, features: Tensor | None = None
    ) -> Tensor:
        """Score each profile by its own z, less its score by what all z are decoded to on average.

        Arguments are those of `forward`, with one z of each cell; so is the result, (n,).
        """
        library, levels = compute_library_size(counts).unsqueeze(1), self.find_levels(batch_code)
        decoded = self.compute_parameters(z, levels, library, features=features)
        counts = counts if features is None else select_features(counts, features)
        ln_p, ln_p_of_mean = (
            self.likelihood.score_profiles(counts, parameters)
            for parameters in (decoded, self.likelihood.average_cells(decoded))
        )
        scale = 1.0 if features is None else self.n_features / len(features)
        return scale * (ln_p - ln_p_of_mean)

    @staticmethod
    def _score_by_kernels(
        likelihood: str,
        counts: Counts,
        parameters: LikelihoodParameters,
        features: Tensor | None,
    ) -> Tensor:
        """What `Likelihood.score_profiles` gives of the features, on a GPU."""
        from clue_dist.model.fused.likelihood import score_counts

        return score_counts(likelihood, counts, *parameters, features)

    def compute_parameters(
        self,
        z: Tensor,
        levels: Tensor,
        library: Tensor,
        noise: Noise | None = None,
        rows: Tensor | None = None,
        features: Tensor | None = None,
    ) -> LikelihoodParameters:
        """Decode z of n cells, in float32.

        Args:
            z: (n, d), or (S, n, d).
            levels: (n, C) int64, of the cells' batches; -1: unknown.
            library: (n, 1), total counts that the profiles have, or are to have.
            noise: for dropout, in training.
            rows: (n,), the cells' rows in the batch; None: all of them.
            features: (F,), sorted; None: all of them.
        """
        if self.batch is not None:
            known = (levels >= 0).unsqueeze(2)  # an unknown level is the zero vector
            batch = (self.batch(levels.clamp_min(0)) * known).sum(1)
            z = torch.cat([z, batch.expand(*z.shape[:-1], -1)], -1)
        h = self.mlp(z.to(self.rate.weight.dtype), noise, rows)
        gate = None if self.gate is None else self.gate(h, features).float()
        return LikelihoodParameters(
            self.rate(h, features).float(), self.theta(features).float(), library, gate
        )


class OutputLayer(nn.Module):
    """A linear layer to all features, or to some of them."""

    def __init__(self, width: int, n_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_features, width) * 0.1 / width**0.5)
        self.bias = nn.Parameter(torch.zeros(n_features))
        # Called with the gradient of the scored features' weights, (F, width), be it of all: what
        # it returns takes its place.
        self.row_hook: Callable[[Tensor], Tensor] | None = None

    def forward(self, h: Tensor, features: Tensor | None) -> Tensor:
        """(n, width) -> (n, features), or (n, F) of `features` (F,)."""
        rows = self._select_rows(features)
        if self.row_hook is not None and rows.requires_grad:
            rows.register_hook(self.row_hook)
        return h @ rows.T + (self.bias if features is None else self.bias[features])

    def _select_rows(self, features: Tensor | None) -> Tensor:
        """The weights of some features, (F, width), or a view of all.

        The gradient of indexing is a matrix for all features, filled with zeros. Where there is one
        already, a sparse gradient adds to its rows alone. On a GPU that would wait for the device.
        """
        if features is None:
            return self.weight.view_as(self.weight)
        if self.weight.grad is None or self.weight.is_cuda:
            return self.weight[features]
        return F.embedding(features, self.weight, sparse=True)


class SecondParameter(nn.Module):
    """theta, the second parameter of a likelihood: one logarithm for each feature.

    Args:
        n_features: features of the modality.
        lr_scale: its learning rate, relative to `train.lr`.
    """

    def __init__(self, n_features: int, lr_scale: float = 1.0) -> None:
        super().__init__()
        self.lr_scale = lr_scale
        self.weight = nn.Parameter(torch.zeros(n_features))

    def forward(self, features: Tensor | None) -> Tensor:
        """(features,), or (F,) of `features` (F,)."""
        return self.weight if features is None else self.weight[features]


def select_features(counts: Counts, features: Tensor) -> Counts:
    """Select columns of counts and number them anew; features: (F,), sorted."""
    if isinstance(counts, Tensor):
        return counts[:, features]
    place = torch.full((counts.n_features,), -1, dtype=torch.int32, device=features.device)
    place[features] = torch.arange(len(features), dtype=torch.int32, device=features.device)
    select = _copy_selected if features.device.type == "cpu" else _pick_selected
    return select(counts, place, len(features))


def _pick_selected(counts: SparseCounts, place: Tensor, n_selected: int) -> SparseCounts:
    """Select features, given the new number of each, (features,) int32; -1: not selected."""
    indices = place.index_select(0, counts.indices)
    is_kept = indices >= 0
    # How many entries are kept before each one, and in all.
    n_kept = is_kept.new_zeros(len(indices) + 1, dtype=torch.int32)
    torch.cumsum(is_kept, 0, dtype=torch.int32, out=n_kept[1:])
    kept = is_kept.nonzero()[:, 0]
    return SparseCounts(
        n_kept.index_select(0, counts.indptr),
        indices.index_select(0, kept),
        counts.values.index_select(0, kept),
        n_selected,
        counts.has_zeros,
    )


def _copy_selected(counts: SparseCounts, place: Tensor, n_selected: int) -> SparseCounts:
    """Do as `_pick_selected`, in one pass over the non-zeros."""
    selected = counts.copy_entries(
        lambda given, made: copy_selected_entries(*given, place.numpy(), *made)
    )
    return replace(selected, n_features=n_selected)
