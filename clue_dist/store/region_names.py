"""Names of regions of a genome, which programs spell in several ways."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

SAMPLED_FEATURES = 200  # looked at to tell what features are; there may be millions

# chromosome, separator, start, separator, end
_REGION = re.compile(r"(.*[^:_-])([:_-])([0-9]+)([-_])([0-9]+)")


@dataclass(frozen=True)
class RegionSpelling:
    """What stands between chromosome, start and end in the name of a region."""

    before_start: str
    before_end: str

    def respell_region(self, name: str) -> str:
        """Spell a region so; another name stays as it is."""
        match = match_region(name)
        if match is None:
            return name
        chromosome, _, start, _, end = match.groups()
        return f"{chromosome}{self.before_start}{start}{self.before_end}{end}"


def sample_features(features: Sequence[str]) -> Sequence[str]:
    """Pick some of the features, evenly over the list."""
    return features[:: max(1, len(features) // SAMPLED_FEATURES)]


def find_spelling(features: Sequence[str]) -> RegionSpelling | None:
    """Find how most of the features are spelled, if most of them are regions of a genome."""
    sample = sample_features(features)
    matches = [match_region(feature) for feature in sample]
    found = Counter(match.group(2, 4) for match in matches if match is not None)
    if 2 * found.total() <= len(sample):
        return None
    return RegionSpelling(*found.most_common(1)[0][0])


def match_region(name: str) -> re.Match[str] | None:
    """Split the name of a region into chromosome, separator, start, separator and end."""
    return _REGION.fullmatch(name)


def respell_regions(names: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    """Spell regions as the known ones are; other names, and those of other features, stay."""
    spelling = find_spelling(known)
    if spelling is None or find_spelling(names) in (None, spelling):
        return names
    return [spelling.respell_region(name) for name in names]
