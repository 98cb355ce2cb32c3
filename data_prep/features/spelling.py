"""Features that are called differently in several files, and rows that are no features at all."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from clue_dist.store.region_names import find_spelling, match_region, sample_features

# Rows in which programs count reads that belong to no feature: CITE-seq-Count now and before,
# HTSeq, STAR. Then sums of a cell, which scanpy and Seurat put beside its counts.
TALLIES = frozenset(
    [
        "unmapped",
        "Unmapped",
        "no_match",
        "total_reads",
        "bad_struct",
        "__no_feature",
        "__ambiguous",
        "__too_low_aQual",
        "__not_aligned",
        "__alignment_not_unique",
        "N_unmapped",
        "N_multimapping",
        "N_noFeature",
        "N_ambiguous",
        "total_counts",
        *(f"n{what}_{assay}" for what in ("Count", "Feature") for assay in ("RNA", "ADT", "ATAC")),
    ]
)


def find_shift(features: Sequence[str], known: Collection[str]) -> tuple[str, str] | None:
    """Find out whether regions are known ones but for starts that differ by one.

    Args:
        features: names, of which some are looked at.
        known: names of other regions, spelled alike.

    Returns:
        One of the regions, and the known one; None where most are known, or no region with another
        start either.
    """
    if find_spelling(features) is None:
        return None
    sample = sample_features(features)
    for step in (-1, 1):
        shifted = {name: _move_start(name, step) for name in sample}
        found = [name for name, other in shifted.items() if other in known and name not in known]
        if 2 * len(found) > len(sample):
            return found[0], shifted[found[0]]
    return None


def _move_start(name: str, step: int) -> str:
    match = match_region(name)
    if match is None:
        return name
    chromosome, before_start, start, before_end, end = match.groups()
    return f"{chromosome}{before_start}{int(start) + step}{before_end}{end}"


def drop_tallies(features: list[str]) -> list[str]:
    """List the features without the rows that are none."""
    if TALLIES.isdisjoint(features):
        return features
    return [feature for feature in features if feature not in TALLIES]
