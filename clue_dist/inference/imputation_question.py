"""What is asked of a model that imputes, checked and looked up in the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Tensor

from clue_dist.errors import ConfigError, list_names, name_argument, suggest_names
from clue_dist.inference.cells.named_counts import list_chosen
from clue_dist.inference.load_model import TrainedModel
from clue_dist.kinds import KINDS
from clue_dist.model.imputation import ValueDecoder
from clue_dist.number_checks import require_number
from clue_dist.store.batch_vocabulary import BatchVocabulary
from clue_dist.store.obs_columns import name_value

OWN, AVERAGE = "own", "average"  # choices of a batch, beside the names of batches
MEAN, LOWER, UPPER, SAMPLE = "X", "lower", "upper", "sample-"  # matrices of an answer
# Units of an answer: those of counts, and that of real values.
COUNTS, SHARES, LOG_SHARES = "counts", "counts per 10,000", "ln(1 + counts per 10,000)"
VALUES = "values"
# Draws of a cell and feature from which the interval is taken, or more where its share asks for
# that. With 99 draws and the value itself the ranks of 90% lie exactly between two draws.
INTERVAL_DRAWS = 99
LARGEST_SEED = 2**63 - 1  # that the file of an answer holds
LARGEST_INTERVAL = 0.999  # which takes 1,999 draws


@dataclass(frozen=True)
class ImputationChoices:
    """What is asked for; see docs/answers.md."""

    modality: str  # whose values are asked for
    _: KW_ONLY
    from_: str | Sequence[str] | None = None  # to infer them from; None: all that a cell has
    # Name of a batch, "own" (of each cell, "average" where unknown), or "average"; or a level by
    # covariate, as {"donor": "d1"} or "donor=d1", where the other covariates are each cell's own.
    batch: str | Sequence[str] | Mapping[str, str] = OWN
    features: str | Sequence[str] | None = None  # None: all
    # Total counts of the profile that is expected, or "own", those of each cell; None: expected
    # shares, per 10,000 counts.
    library_size: float | str | None = None
    log1p: bool = False  # E ln(1 + counts per 10,000) instead, as scanpy's log1p of a profile
    samples: int = 0  # draws of a profile, with the noise of counts
    interval: float | None = None  # share of draws in the central interval, such as 0.9
    threshold: float | None = None  # smaller values become zero, and the matrices sparse
    seed: int = 0


@dataclass(frozen=True)
class ImputationQuestion:
    """The choices as numbers of the model."""

    choices: ImputationChoices
    trained_model: TrainedModel
    decoder: ValueDecoder
    sources: tuple[str, ...]
    features: list[str]
    # By covariate of batches the level for all cells, -1: averaged; None: each cell's own.
    fixed_levels: tuple[int | None, ...]
    typical_library: float  # of training cells, where a cell's own is not known

    @property
    def has_counts(self) -> bool:
        """Whether values are counts, which can be shares and logarithms."""
        return not KINDS[self.trained_model.modalities[self.choices.modality].kind].real_values

    @property
    def matrices(self) -> list[str]:
        """Names of the matrices of the answer."""
        bounds = [LOWER, UPPER] if self.choices.interval is not None else []
        return [MEAN, *bounds, *(f"{SAMPLE}{i}" for i in range(self.choices.samples))]

    def choose_levels(self, batches: BatchVocabulary) -> Tensor:
        """Choose the levels to decode for.

        Args:
            batches: of the cells.

        Returns:
            Of each batch the level by covariate, (batches + 1, C) int64; -1: averaged. The last row
            is for cells of an unknown batch, whose code is -1.
        """
        known = self.trained_model.batch_vocabulary.encode_levels(batches)
        levels = torch.from_numpy(np.vstack([known, np.full((1, known.shape[1]), -1)]))
        for covariate, fixed in enumerate(self.fixed_levels):
            if fixed is not None:
                levels[:, covariate] = fixed
        return levels

    @property
    def n_draws(self) -> int:
        """Draws of each cell."""
        share, samples = self.choices.interval, self.choices.samples
        return samples if share is None else max(samples, plan_interval(share)[0])


def plan_interval(share: float) -> tuple[int, int]:
    """Plan how a central interval is read off sorted draws.

    Of a continuous value, n draws and the value itself are in any order. So the value lies between
    the draws of ranks r and n + 1 - r with probability 1 - 2r / (n + 1).

    Args:
        share: the least probability that is asked for, below 1.

    Returns:
        The number of draws n, and the rank r, at least 1.
    """
    beyond, rounding = (1 - share) / 2, 1e-9
    n_draws = max(INTERVAL_DRAWS, math.ceil(1 / beyond - 1 - rounding))
    return n_draws, math.floor((n_draws + 1) * beyond + rounding)


def read_question(trained_model: TrainedModel, choices: ImputationChoices) -> ImputationQuestion:
    """Check the choices, and look up what they name.

    Raises:
        ConfigError: the model does not know a modality, a feature or the batch; a share or a size
            out of range; shares or logarithms of real values.
    """
    known = trained_model.modalities
    given, chosen = list_chosen(choices.from_), list_chosen(choices.features)
    _require_known("modality", choices.modality, list(known), "modality")
    for name in given or []:
        _require_known("from_", name, list(known), "modality")
    if given == []:
        raise ConfigError(
            "no modality to impute from is named",
            where=name_argument("from_"),
            got="an empty list",
            expected=list_names(known),
            fix="leave it out, which takes whatever a cell has",
        )
    modality = known[choices.modality]
    features = modality.features if chosen is None else chosen
    places = {name: place for place, name in enumerate(modality.features)}
    for name in features:
        _require_known("features", name, modality.features, f"feature of {choices.modality}")
    if not features:
        raise ConfigError(
            "no feature is asked for", where=name_argument("features"), got="an empty list"
        )
    if repeated := [name for name, times in Counter(features).items() if times > 1]:
        raise ConfigError(
            "a feature is asked for twice",
            where=name_argument("features"),
            got=list_names(repeated),
        )
    levels = _read_levels(choices.batch, trained_model.batch_vocabulary)
    _require_numbers(choices, KINDS[modality.kind].real_values)
    numbers = torch.tensor([places[name] for name in features])
    decoder = ValueDecoder(
        trained_model.model,
        choices.modality,
        None if choices.features is None else numbers,
    )
    sources = tuple(name for name in known if given is None or name in given)
    typical = trained_model.model.get_trunk(choices.modality).typical_library
    return ImputationQuestion(choices, trained_model, decoder, sources, features, levels, typical)


def _read_levels(
    batch: str | Sequence[str] | Mapping[str, str], known: BatchVocabulary
) -> tuple[int | None, ...]:
    """Read the level that all cells get, by covariate of the model; None: each cell's own."""
    is_list = isinstance(batch, (Sequence, Mapping)) and not isinstance(batch, str)
    words = batch if is_list else [batch]
    if not words:
        raise ConfigError(
            "no batch is named",
            where=name_argument("batch"),
            got=words,
            expected=f"{_list_choices(known)}, or a batch's name",
        )
    if isinstance(words, Sequence):
        words = [name_value(word) for word in words]  # a lane may have a number
        if len(words) == 1 and words[0] in (OWN, AVERAGE):
            return (None if words[0] == OWN else -1,) * len(known.covariates)
        if len(words) == 1 and words[0] in known.names:
            return tuple(known.encode_levels(known)[known.names.index(words[0])].tolist())
        pairs = [word.partition("=") for word in words]
        if not all(sign and covariate in known.covariates for covariate, sign, _ in pairs):
            _require_known("batch", " ".join(words), known.names, "batch", _list_choices(known))
        named = {covariate: level for covariate, _, level in pairs}
        if len(named) < len(pairs):
            raise ConfigError(
                "two levels of one covariate", where=name_argument("batch"), got=" ".join(words)
            )
        words = named
    numbers, fixed = known.number_levels(), dict.fromkeys(known.covariates)
    for covariate, level in ((name, name_value(chosen)) for name, chosen in words.items()):
        _require_known("batch", covariate, list(known.covariates), "covariate of batches")
        if level not in (OWN, AVERAGE):
            levels, others = known.list_levels(covariate), f"{OWN}, {AVERAGE}"
            _require_known("batch", level, levels, covariate, others)
        fixed[covariate] = {OWN: None, AVERAGE: -1}.get(level, numbers.get((covariate, level)))
    return tuple(fixed.values())


def _list_choices(known: BatchVocabulary) -> str:
    """List what a batch may be besides its name, for messages."""
    levels = [f"{name}=LEVEL" for name in known.covariates] if known.has_several else []
    return list_names([OWN, AVERAGE, *levels])


def _require_known(
    argument: str, name: str, known: Sequence[str], what: str, others: str = ""
) -> None:
    """Require that the model knows a name; else name the nearest ones."""
    if name in known:
        return
    listed = list_names(known) or "none"
    raise ConfigError(
        f"the model knows no such {what}",
        where=name_argument(argument),
        got=name,
        expected=f"{others}, or one of {listed}" if others else listed,
        fix=suggest_names(name, known),
    )


def _require_numbers(choices: ImputationChoices, real_values: bool) -> None:
    """Require numbers that mean something."""
    size, interval = choices.library_size, choices.interval
    require_number(name_argument("seed"), choices.seed, 0, LARGEST_SEED, whole=True)
    require_number(name_argument("samples"), choices.samples, whole=True)
    if size is not None and size != OWN:
        name = f"{name_argument('library_size')}, unless it is {OWN!r}"
        require_number(name, size, above=True)
    if interval is not None:
        require_number(name_argument("interval"), interval, 0, LARGEST_INTERVAL, above=True)
    if choices.threshold is not None:
        require_number(name_argument("threshold"), choices.threshold)
    if real_values and (choices.log1p or size is not None):
        raise ConfigError(
            "real values have no library size",
            where=f"modality {choices.modality}",
            fix="ask for neither a library size nor log1p",
        )
