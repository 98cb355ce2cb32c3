"""Features that are called differently in several files, and rows that are no features at all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# Rows in which programs count reads that belong to no feature: CITE-seq-Count now and before,
# HTSeq, STAR.
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
    ]
)
SAMPLED_FEATURES = 200  # looked at to tell whether features are regions; there may be millions

# chromosome, separator, start, separator, end
_REGION = re.compile(r"(.*[^:_-])([:_-])([0-9]+)([-_])([0-9]+)")


@dataclass(frozen=True)
class RegionSpelling:
    """What stands between chromosome, start and end in the name of a region."""

    before_start: str
    before_end: str

    def respell_region(self, name: str) -> str:
        """Spell a region so; another name stays as it is."""
        match = _REGION.fullmatch(name)
        if match is None:
            return name
        chromosome, _, start, _, end = match.groups()
        return f"{chromosome}{self.before_start}{start}{self.before_end}{end}"


def find_spelling(features: Sequence[str]) -> RegionSpelling | None:
    """Find how most of the features are spelled, if most of them are regions of a genome."""
    sample = features[:: max(1, len(features) // SAMPLED_FEATURES)]
    matches = [_REGION.fullmatch(feature) for feature in sample]
    found = Counter(match.group(2, 4) for match in matches if match is not None)
    if 2 * found.total() <= len(sample):
        return None
    return RegionSpelling(*found.most_common(1)[0][0])


def drop_tallies(features: list[str]) -> list[str]:
    """List the features without the rows that are none."""
    if TALLIES.isdisjoint(features):
        return features
    return [feature for feature in features if feature not in TALLIES]
