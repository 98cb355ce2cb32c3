"""A trained run, ready to embed: what describes it in its folder, and its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clue_dist.checkpoint.kept_config import load_kept_config
from clue_dist.checkpoint.model_card import ModelCard, read_model_card
from clue_dist.checkpoint.run_folder import (
    find_damage,
    iterate_sound_checkpoints,
    list_checkpoints,
    load_weights,
)
from clue_dist.config import Config
from clue_dist.errors import (
    ResumeError,
    format_count,
    list_names,
    name_argument,
    shorten_error,
    suggest_names,
)
from clue_dist.model.clue import CLUE, build_model
from clue_dist.model.modality_spec import specify_modalities
from clue_dist.store.batch_vocabulary import NO_BATCHES, BatchVocabulary
from clue_dist.store.manifest_parts import Modality

# Where in a run those weights lie of which the newest have a name.
_FOLDERS = {"best": "best", "last": "checkpoints"}
# What to do where the weights give NaN.
OTHER_CHECKPOINT = "use another checkpoint: --checkpoint, in Python `clue_dist.load(checkpoint=)`"


@dataclass(frozen=True)
class TrainedModel:
    """A model with the weights of a run."""

    model: CLUE
    modalities: dict[str, Modality]  # in the model's order
    name: str  # of the checkpoint that holds the weights
    config: Config
    # What identifies the cells that it was trained on; see `identify_cells`.
    seen_cells: frozenset[str] = frozenset()
    batch_vocabulary: BatchVocabulary = NO_BATCHES  # that the decoders know
    n_cells: int = 0  # that it was trained on, where that is known

    def __repr__(self) -> str:
        batches = format_count(len(self.batch_vocabulary.names), "batch", "batches")
        return f"TrainedModel({self.name}, {self.modalities}, {batches})"

    @property
    def latent(self) -> int:
        """d, dimensions of each modality's part of z."""
        return self.model.latent

    @property
    def private(self) -> int:
        """How many of the d, the last ones, follow from their modality alone."""
        return self.model.n_private

    @property
    def private_scale(self) -> float:
        """The factor by which private dimensions are shown smaller."""
        return self.model.private_scale

    @property
    def has_common_space(self) -> bool:
        """Whether the weights hold a common space that was fitted."""
        return self.model.space.is_fitted


def load_model(run: Path, checkpoint: str = "best") -> TrainedModel:
    """Load the weights of a run into a model.

    Args:
        run: folder of the run.
        checkpoint: "best" (of validation), "last" (saved), or the name of a checkpoint.

    Raises:
        ResumeError: no run there, nothing saved yet, damaged weights, or those of another model.
        ConfigError: config.json is damaged.
    """
    card = read_model_card(run)
    config = load_kept_config(run)
    folder = require_weights(run, checkpoint)
    problem = find_damage(folder)
    if problem:
        raise ResumeError("the weights are damaged", where=folder, got=problem)
    model = _make_model(run, card, config)
    load_weights(model, folder, "use the version of clue_dist that trained them")
    return TrainedModel(
        model.eval(),
        card.modalities,
        folder.name,
        config,
        card.identities,
        card.batch_vocabulary,
        card.n_cells,
    )


def _make_model(run: Path, card: ModelCard, config: Config) -> CLUE:
    try:
        specs = specify_modalities(card.modalities, config)
        return build_model(specs, card.batch_vocabulary, config.model)
    except (RuntimeError, MemoryError) as error:  # torch has no memory for absurd sizes
        raise ResumeError(
            "the model of these settings cannot be made",
            where=run,
            got=shorten_error(error),
            fix="restore config.json and model.json as training wrote them",
        ) from None


def require_weights(run: Path, checkpoint: str) -> Path:
    """Find the committed folder with the weights that `checkpoint` names.

    Raises:
        ResumeError: the run holds no such weights.
    """
    folder = _find_weights(run, checkpoint)
    if folder is None:
        known = [name for name in _FOLDERS if _find_weights(run, name) is not None]
        known += [path.name for path in _list_weights(run)]
        raise ResumeError(
            "the run holds no such weights",
            where=run,
            got=name_argument("checkpoint", checkpoint),
            expected=list_names(dict.fromkeys(known)) or None,
            fix=suggest_names(checkpoint, known)
            if known
            else "train at least until the first validation",
        )
    return folder


def _find_weights(run: Path, checkpoint: str) -> Path | None:
    """The folder with the weights that `checkpoint` names, if there is one."""
    if checkpoint in _FOLDERS:
        return next(iterate_sound_checkpoints(run / _FOLDERS[checkpoint]), None)
    return next((path for path in _list_weights(run) if path.name == checkpoint), None)


def _list_weights(run: Path) -> list[Path]:
    """The committed folders with weights."""
    return [path for folder in _FOLDERS.values() for path in list_checkpoints(run / folder)]
