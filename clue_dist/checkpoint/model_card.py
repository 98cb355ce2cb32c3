"""The two files that describe a run in its folder: config.json and model.json."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from clue_dist.config import Config
from clue_dist.errors import ResumeError, list_names
from clue_dist.files import translate_write_errors, write_file
from clue_dist.store.batch_vocabulary import BatchVocabulary, require_fitting_levels
from clue_dist.store.manifest import is_store
from clue_dist.store.manifest_parts import Modality
from clue_dist.store.provenance import Provenance
from clue_dist.store.reader import Store
from clue_dist.store.seen_cells import identify_cells


class ModelCard(BaseModel):
    """model.json: what the weights expect of a store."""

    model_config = ConfigDict(extra="forbid")

    fingerprint: str  # fingerprint of the store that the model was trained on
    modalities: dict[str, Modality] = Field(min_length=1)  # with their features, by name
    batches: list[str]  # the biological batches that the decoders know
    # What identifies the cells that training saw, those of earlier runs, too: see `identify_cells`.
    seen_cells: list[str] = []
    # For people, of the store that the model was trained on; runs of earlier versions lack both.
    labels: list[str] = []
    n_cells: int = 0
    # The column of obs that gave the batches at conversion; "" where none did, or that is unknown.
    batch_key: str = ""
    # Where several columns gave the batches: by name, the level of each batch, or "".
    batch_covariates: dict[str, list[str]] = {}

    @model_validator(mode="after")
    def _require_levels_of_batches(self) -> ModelCard:
        """Refuse covariates that do not give every batch a combination of levels of its own."""
        require_fitting_levels(self.batches, self.batch_covariates)
        return self

    @property
    def batch_vocabulary(self) -> BatchVocabulary:
        """The batches, and their levels of each covariate."""
        return BatchVocabulary.from_lists(self.batches, self.batch_covariates, self.batch_key)

    def to_json(self) -> str:
        """The card as the text of its file; what few models have is left out of that of others."""
        unused = set() if self.batch_covariates else {"batch_covariates"}
        return self.model_dump_json(indent=1, exclude=unused)

    @property
    def identities(self) -> frozenset[str]:
        """What identifies the cells that training saw, in a card of an earlier version, too."""
        return frozenset({self.fingerprint, *self.seen_cells} - {""})


def write_model_card(
    run_folder: Path, store: Store, config: Config, earlier: ModelCard | None = None
) -> None:
    """Write config.json and model.json, so that a run folder explains itself a year later.

    Args:
        run_folder: folder of the run.
        store: the cells that it is trained on.
        config: its settings, resolved.
        earlier: card of the run whose weights it began with, or its own from before.

    Raises:
        SavingError: they could not be written.
    """
    seen = identify_cells(store.manifest)
    if earlier is not None:
        seen += sorted(earlier.identities)
    card = ModelCard(
        fingerprint=store.fingerprint,
        modalities=store.manifest.modalities,
        batches=store.manifest.batches,
        seen_cells=list(dict.fromkeys(seen)),
        labels=store.manifest.labels,
        n_cells=store.manifest.n_cells,
        batch_covariates=store.manifest.batch_covariates,
        batch_key=Provenance.model_validate(store.manifest.provenance).columns.get("batch", ""),
    )
    with translate_write_errors("what the run is", run_folder):
        run_folder.mkdir(parents=True, exist_ok=True)
        write_file(run_folder / "config.json", config.to_json(), durable=True)
        write_file(run_folder / "model.json", card.to_json(), durable=True)


def find_model_card(run: Path) -> ModelCard | None:
    """Read what the weights of a run expect of a store; None where that is missing or damaged."""
    try:
        return read_model_card(run)
    except ResumeError:
        return None


def read_model_card(run: Path) -> ModelCard:
    """Read what the weights of a run expect of a store.

    Raises:
        ResumeError: there is no run, or model.json is damaged.
    """
    path = run / "model.json"
    if not path.is_file():
        raise ResumeError(
            "no run here",
            where=run,
            got="no model.json",
            fix=_suggest_run(run),
        )
    try:
        return ModelCard.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ResumeError(
            "model.json is damaged",
            where=run,
            got=str(error)[:500],
            fix="train again, or restore the file",
        ) from error


def _suggest_run(folder: Path) -> str:
    """Say how to come to a run where there is none."""
    if is_store(folder):
        return "this is a store; name the folder of a run that was trained on it"
    if runs := sorted(path.parent for path in folder.glob("*/model.json")):
        return f"name one of the runs in it: {list_names(runs)}"
    return "train one: `clue train --config ...`, in Python `clue_dist.fit`"
