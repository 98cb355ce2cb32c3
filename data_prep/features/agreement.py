"""Whether the files of a modality name their features alike, and what to do where they do not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from clue_dist.errors import DataError, format_count, list_names
from clue_dist.store.region_names import find_spelling, sample_features
from data_prep.features.spelling import drop_tallies, find_shift
from data_prep.options import FeatureChoice
from data_prep.readers.source import Source, SourceHead

_ENSEMBL_ID = re.compile(r"ENS[A-Z]*G\d+")
_VERSIONED_ID = re.compile(r"ENS[A-Z]*G\d+\.\d+")


@dataclass(frozen=True)
class NamedSource:
    """A source whose features have the names that the store would give them."""

    source: Source
    head: SourceHead
    features: list[str]  # one for each column; of bins, several may be the same
    # Of features that the file spells otherwise: its spelling of the first one, and the store's.
    respelled: tuple[str, str] | None = None

    @property
    def display_name(self) -> str:
        """The file, for messages."""
        return self.source.display_name


@dataclass(frozen=True)
class DifferingFeatures:
    """The mistake of files of a modality that name their features alike, but have other ones."""

    modality: str
    n_shared: int  # features that every file has
    kept_share: float  # share of its features that an intersection keeps of each file at least


@dataclass(frozen=True)
class DifferingNames:
    """The mistake of files of a modality that name their features by other rules."""

    modality: str


def require_same_features(name: str, files: Sequence[NamedSource]) -> None:
    """Refuse files whose features are not those of the first file, in any order."""
    first = files[0]
    for file in files[1:]:
        missing = drop_tallies(list_missing_features(first.features, file.features))
        extra = drop_tallies(list_missing_features(file.features, first.features))
        if not missing and not extra:
            continue
        unique = [set(drop_tallies(each.features)) for each in files]
        n_shared = len(set.intersection(*unique))
        raise DataError(
            f"the files of modality {name!r} have different features",
            where=f"{file.display_name}, against {first.display_name}",
            got=f"{len(missing)} missing ({list_names(missing) or 'none'}); "
            f"{len(extra)} extra ({list_names(extra) or 'none'}); "
            f"{n_shared} in every file of the modality",
            expected="the same features, in any order",
            fix="add `--features intersection` (those in every file), `--features union` (absent "
            f"ones are zero), or `--features {name}=FILE` (those of a list); peaks that differ fit "
            f"together as `--bins {name}=5000`",
            mistake=DifferingFeatures(name, n_shared, n_shared / max(map(len, unique))),
        )


def require_similar_names(name: str, files: list[NamedSource], choice: FeatureChoice) -> None:
    """Refuse files that cannot be brought together, as their features are not named alike.

    Files that share no feature are refused, except where a union of disjoint panels is asked for.
    So are files of different naming that share less than half of the smaller one's features: many
    annotations call genes without a symbol by their id, so that some always agree.
    """
    first = files[0]
    known = set(first.features)
    first_naming = _guess_naming(first.features)
    for file in files[1:]:
        _require_equal_starts(name, first, file, known)
        n_shared, naming = len(known.intersection(file.features)), _guess_naming(file.features)
        few_shared = 2 * n_shared < min(len(known), len(file.features))
        is_union = choice.effective_mode == "union"
        if (few_shared and naming != first_naming) or not (n_shared or is_union):
            shared = f"{format_count(n_shared, 'feature')} alone" if n_shared else "no feature"
            columns = [list_names(each.head.var_columns, 20) or "none" for each in (first, file)]
            raise DataError(
                f"the files of modality {name!r} share {shared}",
                where=f"{first.display_name} and {file.display_name}",
                got=f"{first_naming} ({list_names(first.features, 3)}) and "
                f"{naming} ({list_names(file.features, 3)})",
                expected="features named alike",
                fix=f"take the names from a column of var, `--feature-ids {name}=COLUMN` (a file "
                f"without keeps its); columns of {first.display_name}: {columns[0]}; "
                f"of {file.display_name}: {columns[1]}",
                mistake=DifferingNames(name),
            )
        known.update(file.features)


def _require_equal_starts(
    name: str, first: NamedSource, file: NamedSource, known: set[str]
) -> None:
    """Refuse regions that are those of another file but for their starts, which differ by one."""
    shift = find_shift(file.features, known)
    if shift is not None:
        shifted, region = shift
        raise DataError(
            f"the files of modality {name!r} have the same regions with starts that differ by one",
            where=f"{file.display_name}, against {first.display_name}",
            got=f"{shifted} for {region}",
            expected="starts counted alike, from 0 or from 1",
            fix=f"rename the regions of one file, or count both in bins: `--bins {name}=5000`",
            mistake=DifferingNames(name),
        )


def _guess_naming(features: list[str]) -> str:
    """Say what most of the features are called by."""
    sample = sample_features(features)

    def are_most(pattern: re.Pattern[str]) -> bool:
        return sum(bool(pattern.match(feature)) for feature in sample) > len(sample) / 2

    if are_most(_ENSEMBL_ID):
        return "Ensembl ids" + (" with versions" if are_most(_VERSIONED_ID) else "")
    if find_spelling(features) is not None:
        return "regions of chromosomes named " + ("chr1" if sample[0].startswith("chr") else "1")
    return "names"


def list_missing_features(wanted: list[str], features: list[str]) -> list[str]:
    """List the wanted features that are not among `features`, each once."""
    if wanted == features:
        return []
    known = set(features)
    return [feature for feature in dict.fromkeys(wanted) if feature not in known]
