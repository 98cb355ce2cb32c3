"""What the model must know of each modality: the defaults of its kind, overridden by the config."""

from __future__ import annotations

from dataclasses import dataclass

from clue_dist.config import Config
from clue_dist.errors import ConfigError
from clue_dist.kinds import KINDS
from clue_dist.model.likelihoods import LIKELIHOODS
from clue_dist.store.manifest_parts import Modality

# Where the config says "auto", a decoder scores at most so many features in a step. The estimate
# stays unbiased; docs/results.md has what models of 4,096 and of 512 features reach on real cells.
AUTO_FEATURES = 512


@dataclass(frozen=True)
class ModalitySpec:
    """One modality, as the model takes it."""

    n_features: int
    normalise: str  # a method of `model.trunk.normalise_counts`
    likelihood: str  # a key of `model.likelihoods.LIKELIHOODS`
    features_per_step: int | None  # a random subset that the decoder scores; None: all features
    thinning: float = 0.0  # the largest share of entries that training hides from the encoder


def specify_modalities(modalities: dict[str, Modality], config: Config) -> dict[str, ModalitySpec]:
    """Specify every modality of a store.

    Args:
        modalities: by name, in the store's order, which becomes the model's.
        config: settings of the run.

    Raises:
        ConfigError: the config names a modality that the store lacks, asks for CLR on a modality
            stored sparse, or takes real values for counts.
    """
    unknown = [name for name in config.modalities if name not in modalities]
    if unknown:
        raise ConfigError(
            "the config names a modality that the store lacks",
            where="modalities",
            got=unknown,
            expected=list(modalities),
        )
    return {
        name: _specify_modality(name, modality, config) for name, modality in modalities.items()
    }


def _specify_modality(name: str, modality: Modality, config: Config) -> ModalitySpec:
    settings, kind = config.modalities.get(name), KINDS[modality.kind]
    normalise, likelihood = kind.normalise, kind.likelihood
    if settings is not None and settings.normalise != "auto":
        normalise = settings.normalise
    if settings is not None and settings.likelihood != "auto":
        likelihood = settings.likelihood
    if normalise == "clr" and modality.storage == "sparse":
        dense_kinds = [row.name for row in KINDS.values() if row.storage == "dense"]
        raise ConfigError(
            f"clr needs a modality that is stored dense (kinds {' and '.join(dense_kinds)})",
            where=f"modalities.{name}.normalise",
        )
    fits_real_values = LIKELIHOODS[likelihood].takes_real_values and normalise == kind.normalise
    if kind.real_values and not fits_real_values:
        raise ConfigError(
            f"a modality of kind {kind.name} holds real values, not counts",
            where=f"modalities.{name}",
            got=f"likelihood {likelihood}, normalise {normalise}",
            expected=f"{kind.likelihood} and {kind.normalise}",
            fix="convert it again with --kind if it does hold counts",
        )
    wanted = config.model.decoder.features_per_step
    limit = AUTO_FEATURES if wanted == "auto" else wanted
    subset = limit if limit < modality.n_features else None
    thinning = config.objective.thinning if kind.thinned else 0.0
    return ModalitySpec(modality.n_features, normalise, likelihood, subset, thinning)
