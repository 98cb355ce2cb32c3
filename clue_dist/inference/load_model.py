"""A trained run as others use it: what describes it in its folder, and its weights, ready to embed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clue_dist import config as configs
from clue_dist.checkpoint.model_card import ModelCard
from clue_dist.checkpoint.run_folder import (
    find_damage,
    iterate_sound_checkpoints,
    list_checkpoints,
    load_weights,
)
from clue_dist.config import Config
from clue_dist.errors import ResumeError
from clue_dist.model.clue import CLUE, PRIVATE_SCALE, specify_modalities
from clue_dist.store.manifest import Modality


@dataclass(frozen=True)
class TrainedModel:
    """A trained model, ready to embed: modalities in the model's order."""

    model: CLUE
    modalities: dict[str, Modality]
    name: str
    config: Config

    @property
    def latent(self) -> int:
        return self.model.latent

    @property
    def private(self) -> int:
        return self.model.n_private

    @property
    def private_scale(self) -> float:
        return PRIVATE_SCALE


def load_model(run: Path, checkpoint: str = "best") -> TrainedModel:
    """The weights of a run: of the best validation, the last saved, or by the name of a committed checkpoint.

    Raises:
        ResumeError: no run there, nothing saved yet, damaged weights, or those of another model.
    """
    if not (run / "model.json").is_file():
        raise ResumeError(
            "no run here",
            where=run,
            got="no model.json",
            fix="train one: deepspeed launch/train.py --config ...",
        )
    config = configs.load_config(run / "config.json")
    try:
        card = ModelCard.model_validate_json((run / "model.json").read_bytes())
    except (OSError, ValueError) as error:
        got = str(error)[:500]
        raise ResumeError(
            "model.json is damaged", where=run, got=got, fix="train again, or restore the file"
        ) from error
    folder = _weights_folder(run, checkpoint)
    if folder is None:
        raise ResumeError(
            "the run holds no such weights",
            where=run,
            got=checkpoint,
            expected="best, last, or a name like step-00001200",
            fix="train at least until the first validation",
        )
    problem = find_damage(folder)
    if problem:
        raise ResumeError("the weights are damaged", where=folder, got=problem)
    try:
        model = CLUE(specify_modalities(card.modalities, config), len(card.batches), config.model)
    except (RuntimeError, MemoryError) as error:  # torch's own, of no memory
        got, fix = (
            str(error).partition("\n")[0],
            "restore config.json and model.json as training wrote them",
        )
        raise ResumeError(
            "the model of these settings cannot be made", where=run, got=got, fix=fix
        ) from None
    load_weights(model, folder, "use the version of clue_dist that trained them")
    return TrainedModel(model.eval(), card.modalities, folder.name, config)


def _weights_folder(run: Path, checkpoint: str) -> Path | None:
    if checkpoint in ("best", "last"):
        return next(
            iterate_sound_checkpoints(run / {"best": "best", "last": "checkpoints"}[checkpoint]),
            None,
        )
    named = [
        p
        for folder in ("best", "checkpoints")
        for p in list_checkpoints(run / folder)
        if p.name == checkpoint
    ]
    return named[0] if named else None
