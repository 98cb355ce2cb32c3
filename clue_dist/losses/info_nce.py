"""InfoNCE between the modalities of paired cells (van den Oord et al., 2018), over all ranks.

Shapes: B cells of this rank, n of them with two modalities, N such of all ranks, K modalities, M
members of a trunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from clue_dist.data.batch import PairRows

# Odds are at most e to this, so that sums of any number of them are finite in float32. A logit that
# is smaller by 127 than the largest possible one is lost: at the highest scale, 100, where a cosine
# is below -0.27.
HEADROOM = 40.0
LEAST_ODDS = 1e-35  # in place of a smaller sum, the gradient of which might not be finite
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
    shift, pairs = log_scale.detach().exp() - HEADROOM, []
    for (a, b), rows in pair_rows.items():
        every_row = torch.cat([rows + of_rank * z.shape[1] for of_rank in range(world)])
        place, weights = slice(rank * len(rows), (rank + 1) * len(rows)), None
        if batch_separation is not None:
            least = 1 - torch.minimum(batch_separation[a], batch_separation[b])
            weights = _weigh_other_batches(every_code[every_row], least, place)
        keys = [F.normalize(every_z[:, every_row, k], dim=-1) for k in (a, b)]
        queries = [log_scale.exp() * profiles[:, place] for profiles in keys]
        pairs.append(PairedProfiles(queries, keys, weights, place))
    # The odds of one direction are those of the other, the other way round.
    sums = [sum_odds(pair.queries[0], pair.keys[1], shift, pair.weights) for pair in pairs]
    sums_over_queries = _sum_over_ranks([over_queries for _, over_queries in sums], world)
    total = z.new_zeros(())
    for pair, (over_keys, _), over_queries in zip(pairs, sums, sums_over_queries, strict=True):
        odds = over_keys, over_queries[:, pair.place]
        total = total + pair.sum_losses(odds, shift, same_modality)
    return total / max(2 * sum(map(len, pair_rows.values())), 1)


class PairedProfiles(NamedTuple):
    """The profiles of cells that have two modalities."""

    queries: list[Tensor]  # of each modality, (M, n, .), this rank's, times the inverse temperature
    keys: list[Tensor]  # of each modality, (M, N, .), those of all ranks, of length 1
    weights: PairWeights | None
    place: slice  # where the queries lie among the keys

    def sum_losses(
        self, odds: tuple[Tensor, Tensor], shift: Tensor, same_modality: float
    ) -> Tensor:
        """InfoNCE of this rank's cells, summed over both directions.

        Args:
            odds: of the cells of each modality, the sum over the candidates of the other, (M, n).
            shift: (), of the logits of these odds.
            same_modality: as of `compute_info_nce`.
        """
        logits = (self.queries[0] * self.keys[1][:, self.place]).sum(-1)  # of the partners
        total = logits.new_zeros(())
        for queries, keys, odds_of_all in zip(self.queries, self.keys, odds, strict=True):
            if same_modality:
                first = self.place.start
                others = sum_odds_of_others(queries, keys, shift, self.weights, first)
                odds_of_all = odds_of_all + same_modality * others
            losses = odds_of_all.clamp_min(LEAST_ODDS).log() + shift - logits
            total = total + losses.mean(0).sum()
        return total


class PairWeights(NamedTuple):
    """How much cells count among the candidates of a cell, each (n, N): 1 or less."""

    of_keys: Tensor  # each of N keys, for each of n queries
    of_queries: Tensor  # each of n queries, where they are the candidates, for each of N keys


def _weigh_other_batches(code: Tensor, least: Tensor, place: slice) -> PairWeights:
    """How much cells of other batches count.

    A model that is to tell a cell from those of other batches learns to tell batches apart, if both
    modalities tell the batch. Cells of an unknown batch may be of any, so that they count in full
    for all cells, and all for them.

    Args:
        code: (N,), biological batches of the keys; -1: unknown.
        least: (), how much those of other batches count where there are enough others.
        place: where the n queries lie among the keys.
    """
    known, in_order = code >= 0, code.sort().values
    alike = torch.searchsorted(in_order, code, right=True) - torch.searchsorted(in_order, code)
    n_others = torch.where(known, known.sum() - alike, 0)
    lacking = FEWEST_CANDIDATES - (len(code) - n_others)
    weight = torch.maximum(lacking / n_others.clamp_min(1), least).clamp(0, 1)
    is_other = (code[place, None] != code) & known[place, None] & known
    return PairWeights(
        torch.where(is_other, weight[place, None], 1.0), torch.where(is_other, weight, 1.0)
    )


def sum_odds(
    queries: Tensor, keys: Tensor, shift: Tensor, weights: PairWeights | None = None
) -> tuple[Tensor, Tensor]:
    """The sums of odds exp(query . key - shift), over keys and over queries, (M, n) and (M, N).

    Args:
        queries: (M, n, .).
        keys: (M, N, .).
        shift: (), without a gradient.
        weights: how much a pair counts in either sum; None: 1.
    """
    of_keys, of_queries = weights or (None, None)
    sums: tuple[Tensor, Tensor] = _SumsOfOdds.apply(queries, keys, shift, of_keys, of_queries, None)
    return sums


def sum_odds_of_others(
    queries: Tensor, keys: Tensor, shift: Tensor, weights: PairWeights | None, first: int
) -> Tensor:
    """As `sum_odds`, over keys alone, which are the queries and others: none is its own candidate.

    Args:
        queries: (M, n, .).
        keys: (M, N, .), of the same modality.
        shift: (), without a gradient.
        weights: how much a key counts; None: 1.
        first: which key is the first of the queries.

    Returns:
        (M, n).
    """
    of_keys = None if weights is None else weights.of_keys
    of_others: Tensor = _SumsOfOdds.apply(queries, keys, shift, of_keys, None, first)[0]
    return of_others


class _SumsOfOdds(torch.autograd.Function):
    """As torch's own operations have it, with a third of the passes over the matrix of odds."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        shift: Tensor,
        of_keys: Tensor | None,
        of_queries: Tensor | None,
        first: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        odds = (queries @ keys.mT).sub_(shift).exp_()
        if first is not None:
            odds.diagonal(first, -2, -1).zero_()
        over_keys = odds if of_keys is None else odds * of_keys
        over_queries = odds if of_queries is None else odds.mul_(of_queries)
        ctx.save_for_backward(queries, keys, over_keys, over_queries)
        ctx.set_materialize_grads(False)
        return over_keys.sum(-1), None if first is not None else over_queries.sum(-2)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, by_query: Tensor, by_key: Tensor | None
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        queries, keys, over_keys, over_queries = ctx.saved_tensors
        by_query = by_query.unsqueeze(-1)
        # The narrow matrix goes first, as CPUs multiply by it from the left in less time.
        if by_key is None:
            of_queries = by_query * (keys.mT @ over_keys.mT).mT
            of_keys = ((by_query * queries).mT @ over_keys).mT
        else:
            gradient = over_keys * by_query  # of each logit
            gradient.addcmul_(over_queries, by_key.unsqueeze(-2))
            of_queries, of_keys = (keys.mT @ gradient.mT).mT, (queries.mT @ gradient).mT
        return of_queries, of_keys, None, None, None, None


def _sum_over_ranks(sums: list[Tensor], world: int) -> list[Tensor]:
    """Sum each tensor (M, .) over ranks; gradients flow back to all of them."""
    if world == 1 or not sums:
        return sums
    every_sum = _SumOverRanks.apply(torch.cat(sums, 1))
    return list(every_sum.split([one.shape[1] for one in sums], 1))


def _gather_ranks(z: Tensor, batch_code: Tensor) -> tuple[Tensor, Tensor]:
    """All ranks' z, (M, world * B, ...), with gradient, and batch codes, (world * B,)."""
    of_ranks = [torch.empty_like(batch_code) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, batch_code)
    return _GatherWithGradient.apply(z.transpose(0, 1)).transpose(0, 1), torch.cat(of_ranks)


class _SumOverRanks(torch.autograd.Function):
    """Add up the tensors of all ranks; the ranks' gradients flow back, summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _add_up(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _add_up(gradient)


def _add_up(x: Tensor) -> Tensor:
    every_sum = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(every_sum)
    return every_sum


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
        return _add_up(gradient).narrow(0, dist.get_rank() * ctx.n_rows, ctx.n_rows)
