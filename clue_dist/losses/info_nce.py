"""InfoNCE between the modalities of paired cells (van den Oord et al., 2018), over all ranks.

Shapes: B cells of this rank, n of them with two modalities, N such of all ranks, K modalities, M
members of a trunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from clue_dist.data.batch import PairRows

_NO_CANDIDATE = -1e4  # logits are cosines times 100 at most
# Where fewer cells than this are of a cell's biological batch, those of other batches count so much
# that there are as many in effect: hardly anything can be learnt from a few.
FEWEST_CANDIDATES = 64


def compute_info_nce(
    z: Tensor,
    pair_rows: PairRows,
    batch_code: Tensor,
    log_scale: Tensor,
    batch_separation: Tensor | None,
    same_modality: float,
    across_ranks: bool = True,
) -> Tensor:
    """InfoNCE between the modalities of paired cells, both directions.

    Each cell of this rank finds its partner among all pairs of the global batch. The other ranks'
    z are gathered, and gradients flow back to them. Where every rank has the same cells, `z` holds
    all pairs.

    Args:
        z: (M, B, K source, .), compared by cosine. What stands where a modality is not observed is
            not read.
        pair_rows: the cells that have two modalities; of equal rows on every rank.
        batch_code: (B,), biological batches.
        log_scale: (), log of the inverse temperature.
        batch_separation: (K,), how far each modality sets biological batches apart. Where two
            modalities both do, negatives come from the cell's own batch, as far as it has enough
            of them. None: other batches always count as much.
        same_modality: weight with which a profile is told from other cells' profiles of its own
            modality, too (1 is NT-Xent, Chen et al., 2020).
        across_ranks: whether the other ranks hold further cells of the batch.

    Returns:
        The mean over directions, pairs and the M members, ().
    """
    every_z, every_code, rank, world = z, batch_code, 0, 1
    if across_ranks and dist.is_initialized() and dist.get_world_size() > 1:
        rank, world = dist.get_rank(), dist.get_world_size()
        every_z, every_code = _gather_ranks(z, batch_code)
    total, n_pairs = z.new_zeros(()), 0
    for (a, b), rows in pair_rows.items():
        n_cells, first = len(rows), rank * len(rows)  # this rank's cells among all ranks' pairs
        every_row = torch.cat([rows + of_rank * z.shape[1] for of_rank in range(world)])
        bias = None  # what is added to logits
        if batch_separation is not None:
            least = 1 - torch.minimum(batch_separation[a], batch_separation[b])
            bias = _weigh_other_batches(batch_code[rows], every_code[every_row], least)
        keys = {k: F.normalize(every_z[:, every_row, k], dim=-1) for k in (a, b)}
        for source, target in ((a, b), (b, a)):
            queries = log_scale.exp() * keys[source].narrow(1, first, n_cells)  # (M, n, .)
            partners = keys[target].narrow(1, first, n_cells)
            total_odds = sum_odds(queries, keys[target], bias)
            if same_modality:
                odds = sum_odds(queries, keys[source], bias, offset=first)
                total_odds = torch.logaddexp(total_odds, odds + math.log(same_modality))
            losses = total_odds - (queries * partners).sum(-1)
            total = total + losses.mean(0).sum()
        n_pairs += n_cells
    return total / max(2 * n_pairs, 1)


def _weigh_other_batches(batch_code: Tensor, every_code: Tensor, least: Tensor) -> Tensor:
    """The log of how much each of N keys counts for each of n cells, (n, N).

    A model that is to tell a cell from those of other batches learns to tell batches apart, if both
    modalities tell the batch. Cells of an unknown batch may be of any, so that they count in full
    for all cells, and all for them.

    Args:
        batch_code: (n,), biological batches of the cells; -1: unknown.
        every_code: (N,), those of the keys.
        least: (), how much those of other batches count where there are enough others.
    """
    both_known = (batch_code >= 0)[:, None] & (every_code >= 0)[None]
    is_other = (batch_code[:, None] != every_code[None]) & both_known
    n_others = is_other.sum(1, keepdim=True)
    lacking = FEWEST_CANDIDATES - (len(every_code) - n_others)
    weight = torch.maximum(lacking / n_others.clamp_min(1), least).clamp(0, 1)
    return (is_other * weight.log()).nan_to_num(0.0).clamp_min(_NO_CANDIDATE)


def sum_odds(
    queries: Tensor, keys: Tensor, bias: Tensor | None = None, offset: int | None = None
) -> Tensor:
    """The log of the sum of exp(query . key + bias) over keys, (M, n).

    Memory is that of one matrix of logits for each call: they are never put side by side.

    Args:
        queries: (M, n, .).
        keys: (M, N, .).
        bias: (n, N), which has no gradient; None: 0.
        offset: where the queries begin among the keys, which are of the same modality then: no
            query is compared with itself.
    """
    log_sum: Tensor = _LogSumOfOdds.apply(queries, keys, bias, offset)
    return log_sum


class _LogSumOfOdds(torch.autograd.Function):
    """As torch's own operations have it, with a third of the passes over the matrix of odds."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, bias: Tensor | None, offset: int | None
    ) -> Tensor:
        odds = queries @ keys.mT
        if bias is not None:
            odds += bias
        if offset is not None:
            odds.diagonal(offset, -2, -1).fill_(_NO_CANDIDATE)
        largest = odds.amax(-1, keepdim=True)
        odds.sub_(largest).exp_()
        total = odds.sum(-1, keepdim=True)
        ctx.save_for_backward(queries, keys, odds, total)
        return (largest + total.log()).squeeze(-1)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        queries, keys, odds, total = ctx.saved_tensors
        # Of each query; it scales the rows of products, instead of those of the matrix of odds.
        scale = gradient.unsqueeze(-1) / total
        return scale * (odds @ keys), odds.mT @ (scale * queries), None, None


def _gather_ranks(z: Tensor, batch_code: Tensor) -> tuple[Tensor, Tensor]:
    """All ranks' z, (M, world * B, ...), with gradient, and batch codes, (world * B,)."""
    of_ranks = [torch.empty_like(batch_code) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, batch_code)
    return _GatherWithGradient.apply(z.transpose(0, 1)).transpose(0, 1), torch.cat(of_ranks)


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
