"""The weights that training begins with: set from cells, or taken over from an earlier run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clue_dist import config_file
from clue_dist.checkpoint.kept_config import load_kept_config
from clue_dist.checkpoint.model_card import ModelCard, read_model_card
from clue_dist.checkpoint.run_folder import UNFIT, find_damage, list_checkpoints, read_weights
from clue_dist.config import Config
from clue_dist.errors import (
    ConfigError,
    ResumeError,
    format_count,
    list_names,
    name_argument,
    shorten_error,
)
from clue_dist.model.clue import CLUE
from clue_dist.model.initialise import initialise_model
from clue_dist.model.modality_spec import specify_modalities
from clue_dist.model.weight_transfer import transfer_weights
from clue_dist.store.batch_vocabulary import BatchVocabulary
from clue_dist.train.setup import Setup

# Settings of the model that mean nothing to weights which are trained already.
_FREE_SETTINGS = (
    "model.trunk.projection_init",
    "model.trunk.projection_lr",
    "model.trunk.dropout",
    "model.decoder.dropout",
    "model.decoder.features_per_step",
    "model.discriminator.dropout",
)


def set_initial_weights(model: CLUE, setup: Setup) -> None:
    """Set weights from a sample of training cells."""
    trunk = setup.config.model.trunk
    initialise_model(
        model,
        setup.store,
        setup.train_cells,
        trunk.projection_init != "random",
        setup.config.seed,
        setup.stored_svds,
        trunk.batch_shrinkage,
    )


@dataclass(frozen=True)
class WarmStart:
    """The weights of an earlier run, with which a new run begins."""

    run: Path  # folder of the earlier run
    weights: Path  # the committed folder that holds them
    card: ModelCard  # what the earlier run knows
    modalities: list[str]  # modalities of the store
    batches: BatchVocabulary  # biological batches of the store

    @property
    def new_modalities(self) -> list[str]:
        """Modalities of the store that the earlier run does not know."""
        return [name for name in self.modalities if name not in self.card.modalities]

    def set_weights(self, model: CLUE, setup: Setup) -> None:
        """Set the weights of a model, those of new modalities from training cells.

        Raises:
            ResumeError: the weights are damaged or those of another model.
        """
        problem = find_damage(self.weights)
        if problem:
            raise ResumeError(
                "the weights to begin with are damaged", where=self.weights, got=problem
            )
        if self.new_modalities:
            set_initial_weights(model, setup)
        known = self.card.batch_vocabulary.match_levels(self.batches)
        try:
            transfer_weights(model, read_weights(self.weights), list(self.card.modalities), known)
        except UNFIT as error:
            raise ResumeError(
                "the weights to begin with do not fit the model of these settings",
                where=self.weights,
                got=shorten_error(error),
                fix=_name_config(self.run),
            ) from error

    def describe_weights(self) -> list[str]:
        """Say in lines what is kept of the earlier run, what is new, and what is left out."""
        known = self.card
        lines = [f"  begins with the weights of {self.weights}"]
        for title, before, now in (
            ("modalities", list(known.modalities), self.modalities),
            ("batches", known.batches, self.batches.names),
        ):
            groups = {
                "kept": [name for name in now if name in before],
                "new": [name for name in now if name not in before],
                "left out": [name for name in before if name not in now],
            }
            texts = [f"{group}: {list_names(names, 5)}" for group, names in groups.items() if names]
            lines.append(f"    {title} {'; '.join(texts)}")
        if list(known.modalities) != self.modalities:
            lines.append("    discriminator new, as the modalities differ")
        return lines


def plan_warm_start(run: Path, setup: Setup) -> WarmStart:
    """Find the weights of an earlier run and check that a new one can begin with them.

    Those that validation chose are taken, else the last that were saved. They are not read yet.

    Args:
        run: folder of the earlier run.
        setup: the new run.

    Raises:
        ResumeError: there is no such run, or it has no weights.
        ConfigError: the store has other features, or the settings make another model.
    """
    card, config = read_model_card(run), load_kept_config(run)
    saved = [*list_checkpoints(run / "best"), *list_checkpoints(run / "checkpoints")]
    if not saved:
        raise ResumeError(
            "the run to begin with holds no weights",
            where=name_argument("init_from", run),
            fix="train it at least until its first validation",
        )
    _require_same_features(run, card, setup)
    _require_same_model(run, card, config, setup)
    manifest = setup.store.manifest
    return WarmStart(run, saved[0], card, list(manifest.modalities), manifest.batch_vocabulary)


def follow_head_rank(config: Config, run: Path) -> Config:
    """Take the rank of the heads from an earlier run where the config leaves it open.

    "auto" follows from the number of modalities, of which the new run may have more or fewer.

    Args:
        config: the settings of the new run.
        run: folder of the earlier run; `plan_warm_start` says what is wrong with it.
    """
    if config.model.head_rank != "auto" or not (run / "config.json").exists():
        return config
    rank = load_kept_config(run).model.head_rank
    return config.model_copy(update={"model": config.model.model_copy(update={"head_rank": rank})})


def _require_same_features(run: Path, card: ModelCard, setup: Setup) -> None:
    """Check that the modalities which both know have the same features, in the same order."""
    modalities = setup.store.manifest.modalities
    where = name_argument("init_from", run)
    known = [name for name in modalities if name in card.modalities]
    if not known:
        raise ConfigError(
            "the run to begin with knows no modality of the store",
            where=where,
            got=list_names(card.modalities),
            expected=list_names(modalities),
        )
    for name in known:
        before, now = card.modalities[name], modalities[name]
        if before != now:
            missing = set(before.features).symmetric_difference(now.features)
            differing = f"such as {min(missing)}" if missing else "in another order"
            raise ConfigError(
                f"the store has other features of {name} than the run to begin with",
                where=where,
                got=f"{format_count(now.n_features, 'feature')} of kind {now.kind}, {differing}",
                expected=f"the {before.n_features} of the run, of kind {before.kind}",
                fix=f"convert the cells with --features-from {run}",
            )


def _require_same_model(run: Path, card: ModelCard, config: Config, setup: Setup) -> None:
    """Check that the settings make the model that was trained."""
    changed = [
        key
        for key in config_file.compare_settings(config, setup.config)
        if key.startswith("model.") and key not in _FREE_SETTINGS
    ]
    specs = specify_modalities(card.modalities, config)
    for name in setup.specs.keys() & specs.keys():
        for field in ("normalise", "likelihood"):
            if getattr(setup.specs[name], field) != getattr(specs[name], field):
                changed.append(f"modalities.{name}.{field}")
    if changed:
        raise ConfigError(
            "the settings make another model than that of the run to begin with",
            where=name_argument("init_from", run),
            got=f"changed: {', '.join(sorted(changed))}",
            fix=_name_config(run),
        )


def _name_config(run: Path) -> str:
    """What to type so that the settings are those of a run."""
    return f"use its settings: --config {run / 'config.json'} --set store=... run=..."
