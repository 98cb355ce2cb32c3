"""What of a store a model can embed: modalities that it knows, with the features that it knows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from clue_dist.config import MIN_KNOWN
from clue_dist.errors import ConfigError, StoreError, format_count, list_names, name_argument
from clue_dist.inference.load_model import TrainedModel
from clue_dist.number_checks import require_number
from clue_dist.store.manifest_parts import Modality
from clue_dist.store.provenance import InputFile, Provenance
from clue_dist.store.reader import Store
from clue_dist.store.seen_cells import identify_cells, share_cells

_WARN_BELOW = 0.8  # share of these features below which a file is worth a warning


def select_modalities(store: Store, names: Sequence[str]) -> Store:
    """Hide all but some modalities of a store.

    Args:
        store: the cells.
        names: the modalities to keep.

    Returns:
        A view of the store. Cells that carry none of these modalities are not in it.

    Raises:
        ConfigError: the store has no such modality, or no cell carries any of them.
    """
    where = name_argument("modalities", " ".join(map(str, names)))
    if not names:
        raise ConfigError(
            "no modality is asked for", where=where, expected=list_names(store.modalities)
        )
    if unknown := [name for name in names if name not in store.modalities]:
        raise ConfigError(
            f"{store.name} has no such modality",
            where=where,
            got=list_names(unknown),
            expected=list_names(store.modalities),
        )
    view = copy.copy(store)
    view.segments, strata = {}, {}
    for name, reader in store.segments.items():
        kept = [modality for modality in reader.modalities if modality in names]
        if kept:
            strata[name] = reader.segment.model_copy(update={"modalities": kept})
            view.segments[name] = copy.copy(reader)
            view.segments[name].segment = strata[name]
    if not strata:
        raise ConfigError("no cell carries these modalities", where=where, got=store.name)
    modalities = {m: part for m, part in store.manifest.modalities.items() if m in names}
    view.manifest = store.manifest.model_copy(update={"modalities": modalities, "strata": strata})
    return view


def holds_training_cells(store: Store, seen_cells: frozenset[str]) -> bool:
    """Whether a model was trained on cells of a store.

    Args:
        store: the cells.
        seen_cells: what identifies the cells that the model was trained on; see `identify_cells`.
    """
    return share_cells(identify_cells(store.manifest), seen_cells)


def require_fitting_store(
    store: Store, trained_model: TrainedModel, min_known: float = MIN_KNOWN
) -> list[str]:
    """Require that a model can be asked about the cells of a store.

    Args:
        store: the cells.
        trained_model: the model.
        min_known: the least share of a modality's features that each file must have had.

    Returns:
        Sentences that say what makes answers doubtful.

    Raises:
        ConfigError: `min_known` is no share.
        StoreError: modalities or features that are not the model's, or were hardly measured.
    """
    require_number("min_known", min_known, 0, 1)
    require_known_features(store, trained_model.modalities)
    # What the model was trained on may hold files of few features, as with `--features union`.
    if holds_training_cells(store, trained_model.seen_cells):
        return []
    return require_measured_features(store, min_known)


def require_known_features(store: Store, modalities: dict[str, Modality]) -> None:
    """Require that the model knows each modality of a store: its kind, and its features in order.

    Args:
        store: the cells to embed.
        modalities: the model's, by name.

    Raises:
        StoreError: missing, extra or reordered features, the first 10 of each.
    """
    if unknown := [name for name in store.modalities if name not in modalities]:
        raise StoreError(
            "the model does not know these modalities",
            where=store.name,
            got=list_names(unknown),
            expected=list_names(modalities),
            fix="name them as the model does, at conversion: `clue prep convert NAME=FILE ...`",
        )
    for name, modality in store.manifest.modalities.items():
        where = f"{store.name}: modality {name}"
        known = modalities[name]
        if (modality.kind, modality.storage) != (known.kind, known.storage):
            raise StoreError(
                "a modality is of another kind than the model's",
                where=where,
                got=modality.kind,
                expected=known.kind,
            )
        if modality.features != known.features:
            raise StoreError(
                "the store's features are not the model's",
                where=where,
                got=_compare_features(modality.features, known.features),
                expected=f"the model's {known.n_features} features in their order",
                fix="`python -m data_prep convert ... --features-from RUN` lays the features out "
                "as the model's",
            )


def _compare_features(features: list[str], known: list[str]) -> str:
    """How the features of a store differ from those of the model, in a line."""
    have, want = set(features), set(known)
    pairs = zip(known, features, strict=False)
    lists = {
        "missing": [name for name in known if name not in have],
        "extra": [name for name in features if name not in want],
        "reordered": [k for k, f in pairs if k != f and k in have and f in want],
    }
    return "; ".join(
        f"{len(names)} {what}: {list_names(names)}" for what, names in lists.items() if names
    )


class _FeatureOverlap(NamedTuple):
    """How many of a modality's features a file had; the others are zero in its cells."""

    share: float  # of the modality's features
    n_known: int
    file: InputFile
    modality: Modality

    def __str__(self) -> str:
        return f"{self.file.file}: {self.n_known:,} of {self.modality.n_features:,} features known"


def require_measured_features(store: Store, min_known: float = MIN_KNOWN) -> list[str]:
    """Require that the files of a store had a fair share of the features that the model knows.

    A conversion with `--features-from` fills missing features with zeros. A model takes these for
    genes that are not expressed, say, and embeds such cells without complaint.

    Args:
        store: the cells to embed. What its files had is read in its provenance, if it has any.
        min_known: the least share, in each modality and file.

    Returns:
        Warnings, a line for each modality of which some file lacks a fifth of the features.

    Raises:
        StoreError: some file had less than `min_known`.
    """
    warnings = []
    for name in store.modalities:
        overlaps = sorted(_list_overlaps(store, name), key=lambda overlap: overlap.share)
        poor = [overlap for overlap in overlaps if overlap.share < _WARN_BELOW]
        if not poor:
            continue
        worst = poor[0]
        if worst.share < min_known:
            raise StoreError(
                "next to none of the model's features were measured",
                where=f"{store.name}: modality {name}",
                got=str(worst),
                expected=f"{min_known:.0%} of them or more, named like "
                f"{list_names(worst.modality.features, 3)}",
                fix="names of another column (`convert --feature-ids COLUMN`) may be those of the "
                "model; `--min-known 0`, in Python `min_known=0`, takes the cells all the same",
            )
        more = f", and {format_count(len(poor) - 1, 'more file')} like it" if len(poor) > 1 else ""
        warnings.append(f"{name}: {worst}{more}; the others count as zero, which moves z")
    return warnings


def _list_overlaps(store: Store, name: str) -> Iterator[_FeatureOverlap]:
    """How the features of each input file fit those of a modality, as the provenance says."""
    modality = store.manifest.modalities[name]
    notes = Provenance.model_validate(store.manifest.provenance)
    for file in [file for note in (notes, *notes.appended) for file in note.inputs]:
        # A bin that a fragments file lacks was measured: it was not hit.
        if file.modality == name and not file.counted:
            n_known = modality.n_features - file.features.missing
            yield _FeatureOverlap(n_known / modality.n_features, n_known, file, modality)
