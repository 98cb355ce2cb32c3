"""The features that new cells are fitted to: those of a store, or those that a model knows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, Field, ValidationError, model_validator

from clue_dist.errors import StoreError, list_names
from clue_dist.store import layout
from clue_dist.store.batch_vocabulary import BatchVocabulary, require_fitting_levels
from clue_dist.store.location import Location, parse_location, read_file
from clue_dist.store.manifest import Manifest
from clue_dist.store.manifest_parts import Modality
from clue_dist.store.obs_columns import Names

_MODEL_CARD = "model.json"  # in a run folder, and in what is shared of one
# What lies in a run folder, and in the folder of a checkpoint, but in no store.
_CONFIG = "config.json"
_WEIGHT_FOLDERS = ("best", "checkpoints")
_RUN_ENTRIES = (*_WEIGHT_FOLDERS, "metrics.jsonl", "COMMIT.json")


class FeatureReference(Protocol):
    """What new cells are fitted to. A manifest is one."""

    @property
    def modalities(self) -> dict[str, Modality]:
        """Modalities with their features, in order, by name."""
        ...

    @property
    def batches(self) -> list[str]:
        """Batches whose codes new cells must keep."""
        ...

    @property
    def batch_vocabulary(self) -> BatchVocabulary:
        """These batches, and their levels of each covariate."""
        ...

    @property
    def labels(self) -> list[str]:
        """Labels whose codes new cells must keep."""
        ...

    @property
    def fingerprint(self) -> str:
        """Text that differs between any two references that differ."""
        ...


@dataclass(frozen=True)
class ModelFeatures:
    """What a trained model expects of a store; see `FeatureReference`."""

    modalities: dict[str, Modality]
    batch_vocabulary: BatchVocabulary
    fingerprint: str
    labels: list[str] = field(default_factory=list)  # a model knows none

    @property
    def batches(self) -> list[str]:
        """Batches whose codes new cells must keep."""
        return self.batch_vocabulary.names


class _CardFeatures(BaseModel):
    """The part of model.json that concerns features."""

    modalities: dict[str, Modality] = Field(min_length=1)
    batches: Names
    batch_covariates: dict[str, list[str]] = {}
    batch_key: str = ""

    @model_validator(mode="after")
    def _require_levels_of_batches(self) -> _CardFeatures:
        """Refuse covariates that do not give every batch a combination of levels of its own."""
        require_fitting_levels(self.batches, self.batch_covariates)
        return self


def _refuse_incomplete_run(root: Location) -> None:
    """Refuse the folder of a run, or one inside it, that does not say what the model knows."""
    fix = (
        f"copy {_MODEL_CARD} there from the run that trained the model, or give the store that it "
        "was trained on"
    )
    found = [_CONFIG] if read_file(root, _CONFIG, optional=True) is not None else []
    if isinstance(root, Path) and not (root / layout.MANIFEST).exists():
        found += [name for name in _RUN_ENTRIES if (root / name).exists()]
        for folder in (root.resolve(), root.resolve().parent):
            if folder.name in _WEIGHT_FOLDERS and (folder.parent / _MODEL_CARD).is_file():
                found = found or [f"a folder of {folder.parent}"]
                fix = f"give the run folder itself: {folder.parent}"
    if found:
        raise StoreError(
            f"a run without its {_MODEL_CARD}, which lists the features that the model knows",
            where=root,
            got=list_names(found),
            expected=f"a run folder with {_MODEL_CARD}, or a store",
            fix=fix,
        )


def read_feature_reference(place: str | Location) -> FeatureReference:
    """Read what new cells are to be fitted to.

    Args:
        place: a store, a run folder, or a folder to which a model was copied with its model.json.

    Raises:
        StoreError: it is none of these, or damaged, or a server fails.
    """
    root = parse_location(place)
    content = read_file(root, _MODEL_CARD, optional=True)
    if content is None:
        _refuse_incomplete_run(root)
        return Manifest.read(root)
    try:
        card = _CardFeatures.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise StoreError(
            "model.json does not say which features the model knows",
            where=f"{root / _MODEL_CARD}: {'.'.join(map(str, first['loc'])) or 'top level'}",
            got=first["msg"],
            fix="restore the file from the run that trained the model",
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    vocabulary = BatchVocabulary.from_lists(card.batches, card.batch_covariates, card.batch_key)
    return ModelFeatures(card.modalities, vocabulary, f"model {digest}")
