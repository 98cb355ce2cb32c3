"""Which columns a modality gets, and where each source's own columns go."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clue_dist.errors import DataError, list_names
from clue_dist.kinds import KINDS, infer_kind
from clue_dist.store import layout
from clue_dist.store.manifest import Manifest, Modality
from data_prep.options import FeatureChoice
from data_prep.readers.genome_bins import bin_peaks, order_along_genome
from data_prep.readers.source import Source, SourceHead

_ENSEMBL = re.compile(r"ENS[A-Z]*G\d+")
_VERSION = re.compile(r"ENS[A-Z]*G\d+\.\d+")
_REGION = re.compile(r"[^:]+[:_-]\d+[-_]\d+")


@dataclass(frozen=True)
class FeaturePlan:
    """modalities: as the manifest will list them; columns: per source, its columns' places (-1 = dropped; several may
    share a place: they are added up) or None where they are in place already; notes: per source, what was missing or
    extra, for the provenance.
    """

    modalities: dict[str, Modality]
    columns: list[np.ndarray | None]
    notes: list[dict[str, Any]]

    def narrowed(
        self, sources: Sequence[Source], heads: Sequence[SourceHead], kept: Mapping[str, np.ndarray]
    ) -> FeaturePlan:
        """The plan with only the features `kept`, ascending places by modality; other modalities stay as they are."""
        modalities, columns = dict(self.modalities), list(self.columns)
        for name, places in kept.items():
            features = self.modalities[name].features
            modalities[name] = self.modalities[name].model_copy(
                update={"features": [features[i] for i in places]}
            )
            moved = np.full(
                len(features) + 1, -1, np.int32
            )  # the last one: columns that were dropped before
            moved[places] = np.arange(len(places))
            for i, source in enumerate(sources):
                if source.modality == name:
                    own = columns[i]
                    columns[i] = moved[np.arange(len(heads[i].features)) if own is None else own]
        return replace(self, modalities=modalities, columns=columns)


def plan_features(
    sources: Sequence[Source],
    heads: Sequence[SourceHead],
    kinds: Mapping[str, str],
    choices: Mapping[str, FeatureChoice],
    reference: Manifest | None,
) -> FeaturePlan:
    """Decide the features of every modality, by its choice (default: `Choice()`), or by `reference` alone.

    Raises:
        DataError: feature names that repeat, sets that differ, names of different kinds, modalities the reference
            lacks, no overlap with it or with the list that was given.
    """
    for source, head in zip(sources, heads, strict=True):
        _reject_repeated(source, head)
    _require_ids(sources, heads)
    names = list(dict.fromkeys(s.modality for s in sources))
    own = [
        _own(source, head, choices.get(source.modality, FeatureChoice()))
        for source, head in zip(sources, heads, strict=True)
    ]
    if reference is None:
        modalities = {}
        for name in names:
            mine = [i for i, s in enumerate(sources) if s.modality == name]
            files = [(sources[i], heads[i], own[i]) for i in mine]
            modalities[name] = _new_modality(name, kinds, files, choices.get(name, FeatureChoice()))
    else:
        modalities = _from_reference(names, reference)
    for name in names:
        if not layout.MODALITY_NAME.fullmatch(name) or name in layout.RESERVED_NAMES:
            expected = "up to 64 letters, digits, _ -; not 'obs'"
            raise DataError("a modality needs a plain name", got=repr(name), expected=expected)
    if len(layout.name_segment(names)) > layout.MAX_STRATUM_NAME:
        fix = "name them shorter: `NAME=FILE`"
        raise DataError(
            "the names of all modalities are too long for a folder's",
            got=list_names(names),
            fix=fix,
        )

    columns, notes = [], []
    for source, theirs in zip(sources, own, strict=True):
        wanted = modalities[source.modality].features
        columns.append(None if theirs == wanted else _places(source, theirs, wanted))
        notes.append(_note(wanted, theirs))
    return FeaturePlan(modalities, columns, notes)


def _own(source: Source, head: SourceHead, choice: FeatureChoice) -> list[str]:
    """A source's features as the store would call them; with bins, several may have one name."""
    return (
        head.features
        if choice.bin_width is None
        else bin_peaks(head.features, choice.bin_width, source.display_name)
    )


def _places(source: Source, own: list[str], wanted: list[str]) -> np.ndarray:
    """Where each of a source's own columns goes, (features,) int32; -1 = dropped."""
    place = {feature: i for i, feature in enumerate(wanted)}
    columns = np.array([place.get(feature, -1) for feature in own], np.int32)
    if not (columns >= 0).any():
        raise DataError(
            f"no feature of modality {source.modality!r} is known to the store or list it should fit",
            where=source.display_name,
            got=list_names(own, 5),
            expected=list_names(wanted, 5),
            fix="both must name their features alike: `--feature-ids COLUMN` takes the names from a column of var; "
            "bins need the same `--bins`",
        )
    return columns


_File = tuple[
    Source, SourceHead, list[str]
]  # with the file's features as the store would call them


def _new_modality(
    name: str, kinds: Mapping[str, str], files: list[_File], choice: FeatureChoice
) -> Modality:
    kind = infer_kind(name, kinds)
    features = list(choice.listed) if choice.listed is not None else _together(name, files, choice)
    if not features:
        fix = "use `--features union`, or check that the files name their features alike"
        raise DataError(
            f"no feature of modality {name!r} is left",
            where=list_names(s.display_name for s, _, _ in files),
            fix=fix,
        )
    if len(features) > layout.MAX_FEATURES:
        where, fix = (
            list_names(s.display_name for s, _, _ in files),
            "bin or choose them: `--bins`, `--top`, `--features FILE`",
        )
        got = len(features)
        raise DataError(
            "more features than a store holds",
            where=where,
            got=got,
            expected=layout.MAX_FEATURES,
            fix=fix,
        )
    return Modality(kind=kind, storage=KINDS[kind].storage, features=features)


def _together(name: str, files: list[_File], choice: FeatureChoice) -> list[str]:
    """The features of all files: those of the first in its order, or what mode makes of them; bins along the genome."""
    _require_alike(name, files, choice)
    sets = [dict.fromkeys(own) for _, _, own in files]
    features = list(sets[0])
    if choice.effective_mode == "same":
        for source, _, own in files[1:]:
            _require_same(name, files[0][0], features, source, own)
    elif choice.effective_mode == "intersection":
        features = [f for f in features if all(f in own for own in sets[1:])]
    else:
        features = list(dict.fromkeys(f for own in sets for f in own))
    return order_along_genome(set(features)) if choice.bin_width else features


def _require_same(
    name: str, first: Source, features: list[str], source: Source, own: list[str]
) -> None:
    note = _note(features, own)
    if note["missing"] or note["extra"]:
        raise DataError(
            f"the files of modality {name!r} have different features",
            where=f"{source.display_name}, against {first.display_name}",
            got=f"{note['missing']} missing ({list_names(_lacking(features, own)) or 'none'}); "
            f"{note['extra']} extra ({list_names(_lacking(own, features)) or 'none'})",
            expected="the same features, in any order",
            fix="add `--features intersection` (those in every file), `--features union` (absent ones are zero), or "
            f"`--features {name}=FILE` (those of a list); peaks that differ fit together as `--bins {name}=5000`",
        )


def _require_alike(name: str, files: list[_File], choice: FeatureChoice) -> None:
    """Files that share nothing cannot be brought together, save disjoint panels that a union of them is asked for; nor
    can files that name their features differently, where less than half of the smaller one are named alike: many
    annotations call genes without a symbol by their id."""
    first, head, own = files[0]
    before = set(own)
    for source, other, theirs in files[1:]:
        shared, differ = len(before.intersection(theirs)), _naming(own) != _naming(theirs)
        few = differ and 2 * shared < min(len(before), len(theirs))
        if few or (not shared and choice.effective_mode != "union"):
            raise DataError(
                f"the files of modality {name!r} share {f'{shared:,} features alone' if shared else 'no feature'}",
                where=f"{first.display_name} and {source.display_name}",
                got=f"{_naming(own)} ({list_names(own, 3)}) and {_naming(theirs)} ({list_names(theirs, 3)})",
                expected="features named alike",
                fix=f"take the names from a column of var, `--feature-ids {name}=COLUMN` (a file without keeps its); "
                f"columns of {first.display_name}: {list_names(head.var_columns, 20) or 'none'}; "
                f"of {source.display_name}: {list_names(other.var_columns, 20) or 'none'}",
            )
        before.update(theirs)


def _naming(features: list[str]) -> str:
    """What most of the features are called by."""
    sample = features[:: max(1, len(features) // 200)]
    if sum(bool(_ENSEMBL.match(f)) for f in sample) > len(sample) / 2:
        versions = sum(bool(_VERSION.match(f)) for f in sample) > len(sample) / 2
        return "Ensembl ids" + (" with versions" if versions else "")
    if sum(bool(_REGION.fullmatch(f)) for f in sample) > len(sample) / 2:
        return "regions of chromosomes named " + ("chr1" if sample[0].startswith("chr") else "1")
    return "names"


def _require_ids(sources: Sequence[Source], heads: Sequence[SourceHead]) -> None:
    """A column that `--feature-ids` asks for is in one file at least."""
    for asked in {s.id_columns for s in sources if s.id_columns is not None}:
        mine = [(s, h) for s, h in zip(sources, heads, strict=True) if s.id_columns == asked]
        if not any(head.name_column for _, head in mine):
            columns = dict.fromkeys(column for _, head in mine for column in head.var_columns)
            raise DataError(
                "no file has the column of var asked for",
                where=f"--feature-ids {asked}: {list_names(s.display_name for s, _ in mine)}",
                got=f"columns: {list_names(columns, 30) or 'none'}",
                fix="name one of these columns, or leave --feature-ids out to use var_names",
            )


def _from_reference(names: list[str], reference: Manifest) -> dict[str, Modality]:
    unknown = [name for name in names if name not in reference.modalities]
    if unknown:
        raise DataError(
            "modalities that the store, whose features these cells should fit, does not have",
            got=list_names(unknown),
            expected=list_names(reference.modalities),
            fix="name them as that store does: `NAME=FILE`",
        )
    return {name: modality for name, modality in reference.modalities.items() if name in names}


def _reject_repeated(source: Source, head: SourceHead) -> None:
    seen: set[str] = set()
    repeated = list(dict.fromkeys(f for f in head.features if f in seen or seen.add(f)))  # type: ignore[func-returns-value]
    if repeated:
        fix = (
            "make them unique (`adata.var_names_make_unique()`), or add up the columns of one gene"
        )
        raise DataError(
            f"{len(repeated)} feature names occur more than once",
            where=source.display_name,
            got=list_names(repeated),
            fix=fix,
        )


def _lacking(wanted: list[str], there: list[str]) -> list[str]:
    have = set(there)
    return [f for f in dict.fromkeys(wanted) if f not in have]


def _note(wanted: list[str], there: list[str]) -> dict[str, Any]:
    missing, extra = _lacking(wanted, there), _lacking(there, wanted)
    return {
        "missing": len(missing),
        "extra": len(extra),
        "first_missing": missing[:10],
        "first_extra": extra[:10],
    }
