"""The K x K encoders q(z_j | x_k) of eq. 6: small heads on K trunks, in one batched product."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from clue_dist.model.layers import ReadAffine

MAX_LOG_VARIANCE = 8.0  # bound of an expert, and the negative of the least one
START_LOG_VARIANCE = -2.0  # a standard deviation of about 0.4


class CrossEncoderHeads(nn.Module):
    """h of every source modality -> mean and log-variance of every target's z.

    The wide layers are in the trunks, so parameters grow as K there and as K^2 only here. With many
    modalities that is much: a rank above 0 lets all sources share the matrix of a target, to which
    each source adds one of low rank, so that H * d * K^2 weights become H * d * K + rank * d * K^2.

    Args:
        n_modalities: K.
        members: M, networks side by side in each trunk. Each gives every M-th dimension of each z.
        width: H, of h.
        latent: d, dimensions of each z_k.
        shared: whether a trunk serves all K targets; else it holds M networks for each of them.
        rank: of what tells the heads of one target apart; 0: each head has a matrix of its own.
    """

    def __init__(
        self,
        n_modalities: int,
        members: int,
        width: int,
        latent: int,
        shared: bool = True,
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.n_modalities, self.members, self.shared = n_modalities, members, shared
        self.rank = rank
        targets = n_modalities if shared else 1  # targets of one network
        self.grid = (targets, 2, latent // members)  # 2: mean and log-variance
        networks, outputs = n_modalities**2 * members // targets, math.prod(self.grid)
        matrices = members if rank else networks
        self.weight = nn.Parameter(torch.randn(matrices, width, outputs) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(networks, 1, outputs))
        with torch.no_grad():  # log-variances start near START_LOG_VARIANCE, whatever the input
            self.weight.view(matrices, width, *self.grid)[:, :, :, 1].mul_(0.1)
            self.bias.view(networks, 1, *self.grid)[:, :, :, 1].fill_(START_LOG_VARIANCE)
        if rank:  # all sources start with the same heads
            self.reduce = nn.Parameter(torch.randn(networks, width, rank) / width**0.5)
            self.expand = nn.Parameter(torch.zeros(networks, rank, outputs))

    def forward(
        self,
        source: int,
        h: Tensor,
        affine: ReadAffine,
        n_whole: int | None = None,
        n_means: int = 0,
    ) -> tuple[Tensor, ...]:
        """Apply the heads of a source modality.

        Args:
            source: its number, in model order.
            h: (N, n, H), normalised, by network; N is M, or M * K where nothing is shared.
            affine: what is still to be done to it.
            n_whole: how many rows are wanted whole, the first ones; None: all.
            n_means: of how many dimensions of each z, the first ones, means alone are wanted of the
                other rows.

        Returns:
            Mean and log-variance, each (n_whole, K target, d), and the means of the other rows,
            where they are wanted, (n - n_whole, K target, n_means). In float32.
        """
        weight, bias = affine().fold_into(*self.select_weights(source))
        if n_whole is None:
            return self.arrange_outputs(torch.baddbmm(bias, h, weight))
        # The gradient of a split is put together in one piece, that of slices is not. That of the
        # weights takes half the time where what they read lies in one piece.
        parts = h.split([n_whole, h.shape[1] - n_whole], 1)
        whole, others = (part.contiguous() for part in parts)
        outputs = self.arrange_outputs(torch.baddbmm(bias, whole, weight))
        weight, bias = (self._select_outputs(values, 1, n_means) for values in (weight, bias))
        means = torch.baddbmm(bias, others, weight)
        return *outputs, *self.arrange_outputs(means, n_means)

    def select_weights(self, source: int, with_variance: bool = True) -> tuple[Tensor, Tensor]:
        """The linear layer on h of a source, for its means alone or for its variances, too.

        Args:
            source: its number, in model order.
            with_variance: whether log-variances are wanted, too.

        Returns:
            Weights (N, H, outputs) and biases (N, 1, outputs), for `arrange_outputs`.
        """
        networks, parts = self._list_networks(source), 1 + with_variance
        weight, bias = (
            self._select_outputs(values, parts, None)
            for values in (self._compose_weight(networks), self.bias[networks])
        )
        return weight, bias

    def _select_outputs(self, values: Tensor, parts: int, n_dims: int | None) -> Tensor:
        """Of weights or biases, the last axis of which is `grid`, those of some outputs.

        Args:
            values: (N, ., outputs).
            parts: 1: of means alone, 2: of log-variances, too.
            n_dims: of how many dimensions of each z, the first ones; None: of all d.
        """
        return values.unflatten(-1, self.grid)[..., :parts, : self._split(n_dims)].flatten(2)

    def arrange_outputs(self, outputs: Tensor, n_dims: int | None = None) -> tuple[Tensor, ...]:
        """Read what the layer of `select_weights` gives.

        Args:
            outputs: (N, n, outputs).
            n_dims: for how many dimensions of each z outputs were selected; None: all d.

        Returns:
            Mean and, where it was selected, log-variance, each (n, K target, n_dims), float32.
        """
        outputs = outputs.unflatten(-1, (self.grid[0], -1, self._split(n_dims)))
        if self.shared:
            outputs = outputs.permute(1, 2, 3, 4, 0)
        else:
            outputs = outputs.view(self.members, self.n_modalities, *outputs.shape[1:])
            outputs = outputs.squeeze(3).permute(2, 1, 3, 4, 0)
        mean, *log_var = outputs.flatten(-2).float().unbind(2)
        bound = MAX_LOG_VARIANCE
        return mean, *(values.clamp(-bound, bound) for values in log_var)

    def _split(self, n_dims: int | None) -> int:
        """How many of the first `n_dims` dimensions of a z each member gives; None: of all d."""
        return self.grid[2] if n_dims is None else n_dims // self.members

    def _list_networks(self, source: int) -> slice:
        """The networks of a source modality."""
        n_networks = len(self.bias) // self.n_modalities
        return slice(source * n_networks, (source + 1) * n_networks)

    def _compose_weight(self, networks: slice) -> Tensor:
        """The matrices of a source's heads, (N, H, outputs)."""
        if not self.rank:
            return self.weight[networks]
        return torch.baddbmm(self.weight, self.reduce[networks], self.expand[networks])
