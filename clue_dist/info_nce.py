"""InfoNCE between the modalities of paired cells (van den Oord et al., 2018), over all ranks.

Shapes: B cells of this rank, N of all ranks, K modalities, M members of a trunk.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

_NO_CANDIDATE = -1e4  # logits are cosines times 100 at most
# Where fewer cells than this are of a cell's biological batch, those of other batches count so much
# that there are as many in effect: hardly anything can be learnt from a few.
FEWEST_CANDIDATES = 64


def compute_info_nce(
    z: Tensor,
    observed: Tensor,
    batch_code: Tensor,
    log_scale: Tensor,
    batch_told: Tensor | None,
    same_modality: float,
    across_ranks: bool = True,
) -> Tensor:
    """InfoNCE between the modalities of paired cells, both directions.

    Each cell of this rank finds its partner among all pairs of the global batch. The other ranks'
    z are gathered, and gradients flow back to them. Where every rank has the same cells, `z` holds
    all pairs.

    Args:
        z: (M, B, K source, .), compared by cosine.
        observed: (B, K) bool.
        batch_code: (B,), biological batches.
        log_scale: (), log of the inverse temperature.
        batch_told: (K,), how far each modality tells the biological batch. Where two modalities
            both tell it, negatives come from the cell's own batch, as far as it has enough of
            them. None: other batches always count as much.
        same_modality: weight with which a profile is told from other cells' profiles of its own
            modality, too (1 is NT-Xent, Chen et al., 2020).
        across_ranks: whether the other ranks hold further cells of the batch.

    Returns:
        The mean over directions, pairs and the M members, ().
    """
    # Nothing of what stands where a modality is not observed may reach a sum.
    z = F.normalize(z.masked_fill(~observed[..., None], 0.0), dim=-1)
    z = z.transpose(0, 1)  # (B, M, K source, .)
    every_z, every_observed, every_code, first = z, observed, batch_code, 0
    if across_ranks:
        every_z, every_observed, every_code, first = _gather_ranks(z, observed, batch_code)
    place = first + torch.arange(len(z), device=z.device)  # of this rank's cells among all
    is_own = place[:, None] == torch.arange(len(every_z), device=z.device)
    total, pairs = z.new_zeros(()), z.new_zeros(())
    for a, b in combinations(range(observed.shape[1]), 2):
        row, column = observed[:, a] & observed[:, b], every_observed[:, a] & every_observed[:, b]
        # What is added to logits: minus infinity, in effect, where a key is no candidate. Infinity
        # itself would have no gradient where a cell has no candidate at all.
        bias = z.new_zeros(is_own.shape)
        if batch_told is not None:
            least = 1 - torch.minimum(batch_told[a], batch_told[b])
            bias = bias + _weigh_other_batches(batch_code, every_code, column, least)
        bias = bias.masked_fill(~column[None] & row[:, None], _NO_CANDIDATE)
        bias_of_others = bias.masked_fill(is_own, _NO_CANDIDATE)
        for source, target in ((a, b), (b, a)):
            queries = log_scale.exp() * z[:, :, source].transpose(0, 1)  # (M, B, .)
            partners = every_z[place, :, target].transpose(0, 1)
            total_odds = _sum_odds(queries, every_z[:, :, target], bias)
            if same_modality:
                odds = _sum_odds(queries, every_z[:, :, source], bias_of_others)
                total_odds = torch.logaddexp(total_odds, odds + math.log(same_modality))
            losses = total_odds - (queries * partners).sum(-1)
            total = total + (losses.mean(0) * row).sum()
        pairs = pairs + row.sum()
    return total / (2 * pairs).clamp_min(1)


def _weigh_other_batches(
    batch_code: Tensor, every_code: Tensor, is_candidate: Tensor, least: Tensor
) -> Tensor:
    """The log of how much each of N keys counts for each of B cells, (B, N).

    A model that is to tell a cell from those of other batches learns to tell batches apart, if both
    modalities tell the batch.

    Args:
        batch_code: (B,), biological batches of the cells.
        every_code: (N,), those of the keys.
        is_candidate: (N,) bool, the keys that are candidates.
        least: (), how much those of other batches count where there are enough others.
    """
    is_other = batch_code[:, None] != every_code[None]
    n_others = (is_other & is_candidate).sum(1, keepdim=True)
    lacking = FEWEST_CANDIDATES - (is_candidate.sum() - n_others)
    weight = torch.maximum(lacking / n_others.clamp_min(1), least).clamp(0, 1)
    return (is_other * weight.log()).nan_to_num(0.0).clamp_min(_NO_CANDIDATE)


def _sum_odds(queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """The log of the sum of exp(query . key + bias) over keys, (M, B).

    Memory is that of one matrix of logits for each call: they are never put side by side.

    Args:
        queries: (M, B, .).
        keys: (N, M, .).
        bias: (B, N).
    """
    return torch.baddbmm(bias, queries, keys.permute(1, 2, 0)).logsumexp(-1)


def _gather_ranks(
    z: Tensor, observed: Tensor, batch_code: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """All ranks' z (with gradient), observed and batch codes, and where this rank's rows begin."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return z, observed, batch_code, 0
    packed = torch.cat([observed.to(torch.int64), batch_code[:, None]], 1)
    of_ranks = [torch.empty_like(packed) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, packed)
    every = torch.cat(of_ranks)
    first = dist.get_rank() * len(z)
    return _GatherWithGradient.apply(z), every[:, :-1].bool(), every[:, -1], first


class _GatherWithGradient(torch.autograd.Function):
    """Concatenate equally long tensors of all ranks; the ranks' gradients flow back, summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        of_ranks = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, x.contiguous())
        ctx.n_rows = len(x)
        return torch.cat(of_ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.narrow(0, dist.get_rank() * ctx.n_rows, ctx.n_rows)
