"""Which features each modality gets, and where the columns of each source go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clue_dist.errors import DataError, format_count, list_names
from clue_dist.kinds import KINDS, infer_kind
from clue_dist.store import layout
from clue_dist.store.feature_reference import FeatureReference
from clue_dist.store.manifest_parts import Modality
from clue_dist.store.region_names import RegionSpelling, find_spelling
from data_prep.features.agreement import (
    NamedSource,
    list_missing_features,
    require_same_features,
    require_similar_names,
)
from data_prep.features.spelling import TALLIES, drop_tallies
from data_prep.options import FeatureChoice
from data_prep.readers.genome_bins import bin_peaks, order_along_genome
from data_prep.readers.source import OpenedSource, Source, SourceHead


@dataclass(frozen=True)
class FeaturePlan:
    """The features of every modality, and how the sources come by them."""

    modalities: dict[str, Modality]  # as the manifest will list them
    # For each source, the target of each column. -1 drops it; columns with one target are summed;
    # None keeps all columns as they are.
    columns: list[np.ndarray | None]
    notes: list[dict[str, Any]]  # for each source, what it lacks or has beside, for the provenance

    def keep_features(
        self, sources: Sequence[OpenedSource], kept: Mapping[str, np.ndarray]
    ) -> FeaturePlan:
        """Plan for some of the features only.

        Args:
            sources: the inputs, with their heads.
            kept: ascending places of the features to keep, by modality. Others stay as they are.
        """
        modalities, columns = dict(self.modalities), list(self.columns)
        for name, places in kept.items():
            features = modalities[name].features
            chosen = [features[i] for i in places]
            modalities[name] = modalities[name].model_copy(update={"features": chosen})
            # The last entry is for columns that were dropped before: their -1 stays -1.
            new_places = np.full(len(features) + 1, -1, np.int32)
            new_places[places] = np.arange(len(places))
            for i, (source, head) in enumerate(sources):
                if source.modality == name:
                    old_places = columns[i]
                    if old_places is None:
                        old_places = np.arange(len(head.features))
                    columns[i] = new_places[old_places]
        return replace(self, modalities=modalities, columns=columns)


def plan_features(
    sources: Sequence[OpenedSource],
    kinds: Mapping[str, str],
    choices: Mapping[str, FeatureChoice],
    reference: FeatureReference | None,
    added: Collection[str] = (),
) -> FeaturePlan:
    """Decide the features of every modality.

    Args:
        sources: the inputs, with their heads.
        kinds: kinds of modalities whose name does not say what they measure.
        choices: by modality; the default is `FeatureChoice()`.
        reference: a store or model, which decides the features alone, but for
        added: modalities that it does not have, and that come after its own.

    Raises:
        DataError: feature names repeat; files have different features, or name them differently;
            the reference lacks a modality, or has one that is `added`; a file shares no feature
            with the reference or with the list that was given.
    """
    for source, head in sources:
        _refuse_repeated_features(source, head)
    _require_id_columns(sources)
    names = list(dict.fromkeys(source.modality for source, _ in sources))
    named = [
        _name_features(source, head, choices.get(source.modality, FeatureChoice()))
        for source, head in sources
    ]
    modalities = _take_modalities(names, reference, added) if reference is not None else {}
    decided = {name: modality.features for name, modality in modalities.items()}
    decided |= {name: list(choice.listed) for name, choice in choices.items() if choice.listed}
    named = _respell_regions(named, decided)
    for name in [name for name in names if name not in modalities]:
        files = [file for file in named if file.source.modality == name]
        choice = choices.get(name, FeatureChoice())
        modalities[name] = _create_modality(name, kinds, files, choice)
    _require_plain_names(names)
    columns, notes = [], []
    for file in named:
        wanted = modalities[file.source.modality].features
        columns.append(None if file.features == wanted else _place_columns(file, wanted))
        note = _compare_features(wanted, file.features)
        notes.append(note | ({"respelled": file.respelled} if file.respelled else {}))
    return FeaturePlan(modalities, columns, notes)


def _refuse_repeated_features(source: Source, head: SourceHead) -> None:
    """Refuse a source in which a feature name occurs more than once."""
    if len(set(head.features)) < len(head.features):
        repeated = [name for name, times in Counter(head.features).items() if times > 1]
        raise DataError(
            f"{format_count(len(repeated), 'feature name')} more than once",
            where=source.display_name,
            got=list_names(repeated),
            fix="make them unique (`adata.var_names_make_unique()`), or add up the columns of "
            "one gene",
        )


def _require_id_columns(sources: Sequence[OpenedSource]) -> None:
    """Refuse a column that `--feature-ids` asks for and that no file has."""
    for asked in {s.id_columns for s, _ in sources if s.id_columns is not None}:
        files = [opened for opened in sources if opened.source.id_columns == asked]
        if not any(head.name_column for _, head in files):
            columns = dict.fromkeys(column for _, head in files for column in head.var_columns)
            file_names = list_names(source.display_name for source, _ in files)
            raise DataError(
                "no file has the column of var asked for",
                where=f"--feature-ids {asked}: {file_names}",
                got=f"columns: {list_names(columns, 30) or 'none'}",
                fix="name one of these columns, or leave --feature-ids out to use var_names",
            )


def _require_plain_names(modalities: Sequence[str]) -> None:
    """Refuse names of modalities that cannot name a folder, alone or all together."""
    for name in modalities:
        if not layout.MODALITY_NAME.fullmatch(name) or name in layout.RESERVED_NAMES:
            raise DataError(
                "a modality needs a plain name",
                got=repr(name),
                expected="up to 64 letters, digits, _ -; not 'obs'",
            )
    if len(layout.name_segment(list(modalities))) > layout.MAX_STRATUM_NAME:
        raise DataError(
            "the names of all modalities are too long for the name of a folder",
            got=list_names(modalities),
            fix="name them shorter: `NAME=FILE`",
        )


def _name_features(source: Source, head: SourceHead, choice: FeatureChoice) -> NamedSource:
    """Name a source's features as the store would: bins, if these are asked for."""
    features = head.features
    if choice.bin_width is not None:
        features = bin_peaks(features, choice.bin_width, source.display_name)
    return NamedSource(source, head, features)


def _respell_regions(
    files: Sequence[NamedSource], decided: Mapping[str, list[str]]
) -> list[NamedSource]:
    """Spell the regions of all files of a modality alike: as its features, if these are decided.

    Otherwise the first file decides.

    decided: the features of some modalities.
    """
    spellings: dict[str, RegionSpelling | None] = {}
    known: dict[tuple[str, int], list[str]] = {}  # many files share one list
    respelled = []
    for file in files:
        name = file.source.modality
        if name not in spellings:
            spellings[name] = find_spelling(decided.get(name, file.features))
        spelling = spellings[name]
        # Millions of genes need not be looked at.
        if spelling is None or find_spelling(file.features) is None:
            respelled.append(file)
            continue
        key = name, id(file.features)
        if key not in known:
            known[key] = [spelling.respell_region(feature) for feature in file.features]
        changes = zip(file.features, known[key], strict=True)
        first = next((change for change in changes if change[0] != change[1]), None)
        if first is not None:
            file = replace(file, features=known[key], respelled=first)
        respelled.append(file)
    return respelled


def _take_modalities(
    names: list[str], reference: FeatureReference, added: Collection[str]
) -> dict[str, Modality]:
    """Take the modalities with these names, but for added ones, from a reference in its order."""
    if known := [name for name in added if name in reference.modalities]:
        raise DataError(
            "modalities that what these cells should fit (`--features-from`) has are not new",
            where=f"--new-modality {' '.join(known)}",
            fix="leave them out of --new-modality",
        )
    unknown = [name for name in names if name not in reference.modalities and name not in added]
    if unknown:
        raise DataError(
            "modalities that what these cells should fit (`--features-from`) does not have",
            got=list_names(unknown),
            expected=list_names(reference.modalities),
            fix="name them as it does, `NAME=FILE`, or leave their files out; to train a model on "
            f"with them, `--new-modality {unknown[0]}`",
        )
    return {name: modality for name, modality in reference.modalities.items() if name in names}


def _create_modality(
    name: str, kinds: Mapping[str, str], files: list[NamedSource], choice: FeatureChoice
) -> Modality:
    """Create a modality with the features that are listed, or those of its files."""
    kind = infer_kind(name, kinds)
    if choice.listed is None:
        features = _combine_features(name, files, choice)
        if not KINDS[kind].real_values:
            features = drop_tallies(features)
    else:
        features = list(choice.listed)
    file_names = list_names(file.display_name for file in files)
    if not features:
        raise DataError(
            f"no feature of modality {name!r} is left",
            where=file_names,
            fix="use `--features union`, or check that the files name their features alike",
        )
    if len(features) > layout.MAX_FEATURES:
        raise DataError(
            "more features than a store holds",
            where=file_names,
            got=len(features),
            expected=layout.MAX_FEATURES,
            fix="bin or choose them: `--bins`, `--top`, `--features FILE`",
        )
    return Modality(kind=kind, storage=KINDS[kind].storage, features=features)


def _combine_features(name: str, files: list[NamedSource], choice: FeatureChoice) -> list[str]:
    """Combine the features of all files as the choice says.

    They keep the order of the first file; bins lie along the genome.
    """
    require_similar_names(name, files, choice)
    unique = [dict.fromkeys(file.features) for file in files]
    features = list(unique[0])
    if choice.effective_mode == "same":
        require_same_features(name, files)
    elif choice.effective_mode == "intersection":
        features = [f for f in features if all(f in others for others in unique[1:])]
    else:
        features = list(dict.fromkeys(f for names in unique for f in names))
    return order_along_genome(set(features)) if choice.bin_width else features


def _place_columns(file: NamedSource, wanted: list[str]) -> np.ndarray:
    """Find where each column of a source goes, (columns,) int32; -1 = dropped."""
    places = {feature: place for place, feature in enumerate(wanted)}
    columns = np.array([places.get(feature, -1) for feature in file.features], np.int32)
    if not (columns >= 0).any():
        modality = file.source.modality
        raise DataError(
            f"no feature of modality {modality!r} is known to the store or list it should fit",
            where=file.display_name,
            got=list_names(file.features, 5),
            expected=list_names(wanted, 5),
            fix="both must name their features alike: `--feature-ids COLUMN` takes the names from "
            "a column of var; bins need the same `--bins`",
        )
    return columns


def _compare_features(wanted: list[str], features: list[str]) -> dict[str, Any]:
    """Note what a source lacks of the wanted features, and what it has beside them."""
    missing, others = (
        list_missing_features(wanted, features),
        list_missing_features(features, wanted),
    )
    extra = drop_tallies(others)
    tallies = [name for name in others if name in TALLIES]
    return ({"tallies": tallies} if tallies else {}) | {
        "missing": len(missing),
        "extra": len(extra),
        "first_missing": missing[:10],
        "first_extra": extra[:10],
    }
