"""Which columns a modality gets, and where each source's own columns go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from clue_dist.errors import DataError, listed
from clue_dist.store import layout
from clue_dist.store.manifest import Manifest, Modality
from data_prep.sources import Head, Source, kind_of

Mode = Literal["same", "intersection", "union"]


@dataclass(frozen=True)
class Plan:
    """modalities: as the manifest will list them; columns: per source, its columns' places (-1 = dropped) or None
    where they are in place already; notes: per source, what was missing or extra, for the provenance.
    """

    modalities: dict[str, Modality]
    columns: list[np.ndarray | None]
    notes: list[dict[str, Any]]


def plan(
    sources: list[Source], heads: list[Head], kinds: dict[str, str], mode: Mode, reference: Manifest | None
) -> Plan:
    """Decide the features of every modality; `reference` decides alone where it is given.

    Raises:
        DataError: feature names that repeat, sets that differ, modalities the reference lacks, no overlap with it.
    """
    for source, head in zip(sources, heads, strict=True):
        _reject_repeated(source, head)
    names = list(dict.fromkeys(s.modality for s in sources))
    of = {name: [(s, h) for s, h in zip(sources, heads, strict=True) if s.modality == name] for name in names}
    if reference is None:
        modalities = {
            name: _new_modality(name, kinds, [h for _, h in of[name]], [s for s, _ in of[name]], mode) for name in names
        }
    else:
        modalities = _from_reference(names, reference)
    for name in names:
        if not layout.NAME.fullmatch(name) or name in layout.RESERVED:
            raise DataError("a modality needs a plain name", got=repr(name), expected="letters, digits, _ -; not 'obs'")

    columns, notes = [], []
    for source, head in zip(sources, heads, strict=True):
        wanted = modalities[source.modality].features
        columns.append(None if head.features == wanted else _places(source, head.features, wanted))
        notes.append(_note(wanted, head.features))
    return Plan(modalities, columns, notes)


def _places(source: Source, own: list[str], wanted: list[str]) -> np.ndarray:
    """Where each of a source's own columns goes, (features,) int32; -1 = dropped."""
    place = {feature: i for i, feature in enumerate(wanted)}
    columns = np.array([place.get(feature, -1) for feature in own], np.int32)
    if not (columns >= 0).any():
        raise DataError(
            f"no feature of modality {source.modality!r} is known to the store it should fit",
            where=source.where,
            got=listed(own, 5),
            expected=listed(wanted, 5),
            fix="both must name their features alike (symbols or ids)",
        )
    return columns


def _new_modality(name: str, kinds: dict[str, str], heads: list[Head], sources: list[Source], mode: Mode) -> Modality:
    kind = kind_of(name, kinds)
    features = heads[0].features
    for source, head in zip(sources[1:], heads[1:], strict=True):
        note = _note(features, head.features)
        if mode == "same" and (note["missing"] or note["extra"]):
            raise DataError(
                f"the files of modality {name!r} have different features",
                where=f"{source.where}, against {sources[0].where}",
                got=f"{note['missing']} missing ({listed(_lacking(features, head.features)) or 'none'}); "
                f"{note['extra']} extra ({listed(_lacking(head.features, features)) or 'none'})",
                expected="the same features, in any order",
                fix="add `--features intersection` (those in every file) or `--features union` (absent ones are zero)",
            )
    if mode == "intersection":
        common = set(features).intersection(*(head.features for head in heads[1:]))
        features = [f for f in features if f in common]
    if mode == "union":
        features = list(dict.fromkeys(f for head in heads for f in head.features))
    if not features:
        fix = "use `--features union`, or check that the files name their features alike"
        raise DataError(f"no feature of modality {name!r} is left", where=listed(s.where for s in sources), fix=fix)
    return Modality(kind=kind, storage=layout.STORAGE[kind], features=features)


def _from_reference(names: list[str], reference: Manifest) -> dict[str, Modality]:
    unknown = [name for name in names if name not in reference.modalities]
    if unknown:
        raise DataError(
            "modalities that the store of `--features-from` does not have",
            got=listed(unknown),
            expected=listed(reference.modalities),
            fix="name them as that store does: `NAME=FILE`",
        )
    return {name: modality for name, modality in reference.modalities.items() if name in names}


def _reject_repeated(source: Source, head: Head) -> None:
    seen: set[str] = set()
    repeated = list(dict.fromkeys(f for f in head.features if f in seen or seen.add(f)))  # type: ignore[func-returns-value]
    if repeated:
        fix = "make them unique (`adata.var_names_make_unique()`), or add up the columns of one gene"
        raise DataError(
            f"{len(repeated)} feature names occur more than once", where=source.where, got=listed(repeated), fix=fix
        )


def _lacking(wanted: list[str], there: list[str]) -> list[str]:
    have = set(there)
    return [f for f in wanted if f not in have]


def _note(wanted: list[str], there: list[str]) -> dict[str, Any]:
    missing, extra = _lacking(wanted, there), _lacking(there, wanted)
    return {"missing": len(missing), "extra": len(extra), "first_missing": missing[:10], "first_extra": extra[:10]}
