"""Share the rounds of a batch among the strata of a store.

Where every stratum is owed a round or more, shares are rounded and all batches are alike. Else each
stratum gets the whole part of what it is owed in every batch, and takes turns for the rest: a
stratum of 0.3 rounds stands in three batches of ten.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from clue_dist.errors import ConfigError, format_count

_ROUNDING = 1e-9  # of a round; what floating point may be off


class BatchShares(NamedTuple):
    """What each stratum gets of a micro-batch, see `CellPlan`."""

    every_batch: dict[str, int]  # cells by stratum; 0 of one that has turns only
    # Rounds by stratum, on average, of those that take turns. Their order says who follows whom.
    turns: dict[str, float]


def share_rounds(
    batch_size: int,
    lanes: int,
    weights: Mapping[str, float],
    modalities: Mapping[str, Collection[str]],
) -> BatchShares:
    """Share a batch among the strata by their weights.

    Every batch has at least one round of each modality, whichever strata have their turn: every
    rank runs every encoder at every step.

    Args:
        batch_size: cells of one global micro-batch.
        lanes: number of lanes; a round is one cell of a stratum for every lane.
        weights: by stratum, of any sum.
        modalities: what the cells of each stratum carry.

    Raises:
        ConfigError: the batch has too few rounds for the modalities.
    """
    rounds, total = batch_size // lanes, sum(weights.values())
    owed = {stratum: weight / total * rounds for stratum, weight in weights.items()}
    if min(owed.values()) >= 1 - _ROUNDING:
        whole, turns = _round_shares(owed, rounds), {}
    else:
        # With fewer, a stratum may have to share a round with one that carries what it lacks.
        needed = len({name for stratum in owed for name in modalities[stratum]})
        if needed > rounds:
            raise ConfigError(
                "the batch is too small for the modalities of this store",
                got=f"{batch_size} cells / {lanes} lanes = {format_count(rounds, 'round')}, where "
                f"{needed} are needed to hold every modality",
                fix=f"--set data.batch_size={lanes * needed} or more",
            )
        groups = _group_by_modality(owed, modalities, rounds)
        owed = _raise_groups(owed, groups, rounds)
        whole = {stratum: int(share + _ROUNDING) for stratum, share in owed.items()}
        # Members of a group follow each other, so that one of them always has its turn. Behind them
        # strata with as many modalities do, so that batches have about as many pairs each.
        by_size = sorted(owed, key=lambda stratum: -len(modalities[stratum]))
        order = dict.fromkeys([*(stratum for group in groups for stratum in group), *by_size])
        rests = {stratum: owed[stratum] - whole[stratum] for stratum in order}
        turns = {s: rest for s, rest in rests.items() if rest > _ROUNDING or not whole[s]}
    return BatchShares({stratum: share * lanes for stratum, share in whole.items()}, turns)


def _round_shares(owed: Mapping[str, float], rounds: int) -> dict[str, int]:
    """Whole rounds of every stratum; those that lack most get what is left."""
    shares = {stratum: max(1, int(share)) for stratum, share in owed.items()}
    while sum(shares.values()) < rounds:
        shares[max(shares, key=lambda s: owed[s] - shares[s])] += 1
    return shares


def _group_by_modality(
    owed: Mapping[str, float], modalities: Mapping[str, Collection[str]], rounds: int
) -> list[list[str]]:
    """Find groups of strata such that each modality is carried by every member of some group.

    A group is owed a round or more, where its modality is. Modalities of few cells come first, as
    they have the least choice. There are at most as many groups as modalities.
    """
    names = {name for stratum in owed for name in modalities[stratum]}
    carriers = {
        name: sorted((s for s in owed if name in modalities[s]), key=lambda s: -owed[s])
        for name in sorted(names)
    }
    groups: list[list[str]] = []
    group_of_modality: dict[str, int] = {}
    for name in sorted(carriers, key=lambda name: sum(owed[s] for s in carriers[name])):
        if name in group_of_modality:
            continue
        free = [s for s in carriers[name] if not any(s in group for group in groups)]
        group: list[str] = []
        while free and sum(owed[s] for s in group) < 1 - _ROUNDING:
            group.append(free.pop(0))
        if not group:  # other groups have all of them: the largest is taken out
            group = carriers[name][:1]
            groups = [[s for s in other if s not in group] for other in groups]
        groups.append(group)
        shared_names = set.intersection(*(set(modalities[s]) for s in group))
        group_of_modality |= dict.fromkeys(shared_names, len(groups) - 1)
    if len(groups) == rounds:  # no round is left for the other strata, so they join groups
        for stratum in sorted(set(owed).difference(*groups)):
            groups[group_of_modality[min(modalities[stratum])]].append(stratum)
    return groups


def _raise_groups(
    owed: Mapping[str, float], groups: list[list[str]], rounds: int
) -> dict[str, float]:
    """Give every group a round at least; all other shares shrink by one factor."""
    sums = [sum(owed[s] for s in group) for group in groups]
    raised: set[int] = set()
    while True:
        kept = rounds - len(raised)
        rest = rounds - sum(sums[i] for i in raised)
        factor = kept / rest if rest > _ROUNDING else 0.0
        short = {i for i, size in enumerate(sums) if size * factor < 1 - _ROUNDING}
        if short <= raised:
            break
        raised |= short
    shares = {stratum: share * factor for stratum, share in owed.items()}
    for i in raised:
        shares |= {stratum: owed[stratum] / sums[i] for stratum in groups[i]}
    return shares


def weigh_strata(
    sizes: Mapping[str, int], paired: Mapping[str, bool], paired_share: float | str, batch_size: int
) -> dict[str, float]:
    """Weigh strata so that those of paired cells get a given share of the batch.

    Inside the paired strata, and inside the others, weights go by the number of cells.

    Args:
        sizes: cells, by stratum.
        paired: whether the cells of a stratum have two or more modalities.
        paired_share: between 0 and 1, or "auto". "auto" gives paired cells twice the share that
            they have of the data, between a half and four fifths, but at most half of them to one
            batch: the contrastive term would take copies of a cell for other cells.
        batch_size: cells of one global micro-batch.

    Raises:
        ConfigError: the share is not between 0 and 1.
    """
    pairs = sum(size for stratum, size in sizes.items() if paired[stratum])
    single = sum(size for stratum, size in sizes.items() if not paired[stratum])
    if not pairs or not single:
        return {stratum: float(size) for stratum, size in sizes.items()}
    if paired_share == "auto":
        paired_share = min(max(2 * pairs / (pairs + single), 0.5), 0.8, pairs / 2 / batch_size)
    share = float(paired_share)
    if not 0 < share < 1:
        raise ConfigError("data.paired_share must lie between 0 and 1", got=paired_share)
    return {
        stratum: size / pairs * share if paired[stratum] else size / single * (1 - share)
        for stratum, size in sizes.items()
    }
