"""Differential analysis: which features differ between groups of cells, by what a model expects.

As in scvi-tools (Boyeau et al., 2019; mode "change"): cells of a group and of the others are paired
at random, z of each is drawn from its posterior, and both are decoded for the same batch, which is
drawn, too. The share of pairs whose log fold change is large is the probability of a difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from clue_dist.errors import ConfigError, list_names, name_argument, suggest_names
from clue_dist.inference.cells import Cells
from clue_dist.inference.cells.memory_obs import read_named_column
from clue_dist.inference.cells.named_counts import list_chosen
from clue_dist.inference.imputation_question import (
    AVERAGE,
    ImputationChoices,
    ImputationQuestion,
    read_question,
)
from clue_dist.inference.load_model import TrainedModel
from clue_dist.inference.output_files import require_table_path, write_table
from clue_dist.inference.stream import read_slices_ahead
from clue_dist.model.imputation import PER_TEN_THOUSAND, infer_target_latent, keep_sources
from clue_dist.number_checks import require_number
from clue_dist.progress import Progress, show_progress
from clue_dist.ranks import Ranks
from clue_dist.store.obs_columns import name_value

# Of the mean share of a feature: what is added to shares, so that features which are hardly there
# do not differ many times over.
PSEUDO_SHARE = 0.1
VALUES_AT_ONCE = 2**22  # decoded for either side of the pairs: 16 MB


@dataclass(frozen=True)
class DifferentialChoices:
    """What is compared; see docs/answers.md."""

    modality: str  # whose features
    groupby: str  # column of obs with the groups
    _: KW_ONLY
    groups: str | Sequence[str] | None = None  # None: every group
    reference: str | None = None  # the group to compare with; None: all other cells
    from_: str | Sequence[str] | None = None  # modalities to infer values from; None: all of a cell
    # Name of a batch, or "average"; or a level by covariate, where the others are drawn.
    batch: str | Sequence[str] | Mapping[str, str] = AVERAGE
    features: str | Sequence[str] | None = None
    least_change: float = 0.25  # log2 fold change that counts; of real values, difference
    pairs: int = 2000  # pairs of cells for each group
    seed: int = 0


def compare_groups(
    trained_model: TrainedModel,
    cells: Cells,
    choices: DifferentialChoices,
    batch_size: int = 4096,
) -> dict[str, pd.DataFrame]:
    """Compare what is expected of cells of each group with what is expected of the others.

    Args:
        trained_model: the model.
        cells: the cells.
        choices: what is compared.
        batch_size: cells encoded at once.

    Returns:
        By group a row for each feature, those that mark the group first: `lfc_mean` (log2 fold
        change, the mean over pairs, by which rows are sorted) and `lfc_std`, `probability` that the
        change is large, `bayes_factor` (its log odds), `mean` and `mean_others` (counts per
        10,000).

    Raises:
        ConfigError: no such column, group, modality, feature or batch; a group without cells; no
            group but the reference; no pairs, or a change below 0.
    """
    require_number(name_argument("pairs"), choices.pairs, 1, whole=True)
    require_number(name_argument("least_change"), choices.least_change)
    if choices.reference is not None:
        choices = replace(choices, reference=name_value(choices.reference))
    question = read_question(
        trained_model,
        ImputationChoices(
            choices.modality,
            from_=choices.from_,
            batch=choices.batch,
            features=choices.features,
            seed=choices.seed,
        ),
    )
    rng = np.random.default_rng(choices.seed)
    slices = cells.slice_cells(batch_size)
    shown = np.concatenate(
        [s.rows for s in slices if set(s.modalities) & set(question.sources)] or [np.empty(0, int)]
    )
    labels = _read_groups(cells, choices, np.sort(shown))
    groups = _list_groups(labels, choices)
    pairs = {group: _draw_pairs(labels, group, choices, rng) for group in groups}
    latents = _draw_latents(question, cells, np.stack(list(pairs.values())), batch_size)
    n_pairs = len(groups) * choices.pairs
    with show_progress("comparing pairs", n_pairs, unit="pair") as progress:
        return {
            group: _compare_pairs(question, choices, latents[number], progress)
            for number, group in enumerate(groups)
        }


def write_differences(tables: Mapping[str, pd.DataFrame], out: Path) -> None:
    """Write what `compare_groups` gives as one table, whose first columns are group and feature."""
    require_table_path(out)
    write_table(pd.concat(tables, names=["group"]).reset_index(), out)


def _read_groups(cells: Cells, choices: DifferentialChoices, shown: np.ndarray) -> np.ndarray:
    """The group of each cell, (N,) names; "" of those without, or without a source."""
    names = read_named_column(cells.read_obs(), "groupby", choices.groupby, "obs")
    labels = np.full(len(names), "", object)
    labels[shown] = names[shown]
    return labels


def _list_groups(labels: np.ndarray, choices: DifferentialChoices) -> list[str]:
    """The groups to compare, each with cells and with others to compare them with."""
    known = sorted(set(labels) - {""})
    chosen = list_chosen(choices.groups)
    wanted = known if chosen is None else [*dict.fromkeys(map(name_value, chosen))]
    others = [] if choices.reference is None else [choices.reference]
    for argument, named in (("groups", wanted), ("reference", others)):
        if absent := [name for name in named if name not in known]:
            raise ConfigError(
                f"there is no cell of a group of {choices.groupby}",
                where=name_argument(argument),
                got=list_names(absent),
                expected=list_names(known) or "none has a source to infer from",
                fix=suggest_names(absent[0], known),
            )
    if len(known) < 2 or not wanted:
        raise ConfigError(
            "nothing to compare with",
            where=name_argument("groupby", choices.groupby),
            got=f"groups: {list_names(known) or 'none'}",
            expected="two groups or more",
        )
    compared = [name for name in wanted if name != choices.reference]
    if not compared:
        raise ConfigError(
            "no group but the reference is asked for",
            where=name_argument("reference", choices.reference),
            got=f"groups: {list_names(wanted)}",
            expected=f"another of {list_names(known)}",
        )
    return compared


def _draw_pairs(
    labels: np.ndarray, group: str, choices: DifferentialChoices, rng: np.random.Generator
) -> np.ndarray:
    """Rows of cells of a group, and of as many others, (2, pairs)."""
    inside = labels == group
    others = labels == choices.reference if choices.reference else ~inside & (labels != "")
    return np.stack([rng.choice(np.flatnonzero(part), choices.pairs) for part in (inside, others)])


def _draw_latents(
    question: ImputationQuestion, cells: Cells, rows: np.ndarray, batch_size: int
) -> Tensor:
    """Draw z of every cell named in `rows` (..., n), one for each time that it is: (..., n, d)."""
    trained_model, device = question.trained_model, Ranks().choose_device()
    model, modalities = trained_model.model.to(device), list(trained_model.modalities)
    wanted, place = rows.ravel(), np.full(cells.n_cells, -1)
    drawn = torch.zeros(len(wanted), model.latent)
    generator = torch.Generator(device).manual_seed(question.choices.seed)
    slices = [s for s in cells.slice_cells(batch_size) if np.isin(s.rows, wanted).any()]
    for cell_slice, batch in read_slices_ahead(cells, slices, "encoding", Ranks()):
        place[:] = -1
        place[cell_slice.rows] = np.arange(cell_slice.n_cells)
        times = np.flatnonzero(place[wanted] >= 0)
        with torch.inference_mode():
            shown = keep_sources(batch, modalities, question.sources).to(device)
            latent = infer_target_latent(model, shown, question.choices.modality)
            chosen = latent.select_rows(torch.from_numpy(place[wanted[times]]).to(device))
            drawn[times] = chosen.draw_sample(generator).cpu()
    return drawn.view(*rows.shape, model.latent)


def _compare_pairs(
    question: ImputationQuestion,
    choices: DifferentialChoices,
    latents: Tensor,
    progress: Progress,
) -> pd.DataFrame:
    """The table of one group from z of its pairs, (2, pairs, d)."""
    decoder, device = question.decoder, Ranks().choose_device()
    generator = torch.Generator().manual_seed(choices.seed)
    n_pairs = latents.shape[1]
    batches = decoder.batches.cpu()
    levels = batches[torch.randint(len(batches), (n_pairs,), generator=generator)]
    for covariate, fixed in enumerate(question.fixed_levels):
        if fixed is not None and fixed >= 0:
            levels[:, covariate] = fixed
    # Shares are of the whole modality, whichever of its features are asked for.
    n_features = question.trained_model.modalities[choices.modality].n_features
    changes = _Changes(decoder.width, PSEUDO_SHARE * PER_TEN_THOUSAND / n_features)
    step = max(1, VALUES_AT_ONCE // decoder.width)
    for start in range(0, n_pairs, step):
        part = slice(start, start + step)
        library = torch.full((len(levels[part]), 1), PER_TEN_THOUSAND, device=device)
        with torch.inference_mode():
            inside, outside = (
                decoder.compute_mean(z[part].to(device), levels[part].to(device), library).cpu()
                for z in latents
            )
        changes.add_pairs(
            inside.double(), outside.double(), question.has_counts, choices.least_change
        )
        progress.mark_done(len(inside))
    return changes.build_table(question.features)


class _Changes:
    """Sums over pairs of how F features change; `pseudo` is added to counts per 10,000."""

    def __init__(self, n_features: int, pseudo: float) -> None:
        self.n_pairs, self.pseudo = 0, pseudo
        self.sums = torch.zeros(5, n_features, dtype=torch.float64)

    def add_pairs(self, inside: Tensor, outside: Tensor, has_counts: bool, least: float) -> None:
        """Add values (n, F) of cells of the group, and of those that they are paired with."""
        change = inside - outside
        if has_counts:
            change = torch.log2((inside + self.pseudo) / (outside + self.pseudo))
        is_large = change.abs() > least
        terms = (change, change**2, is_large.double(), inside, outside)
        self.sums += torch.stack([term.sum(0) for term in terms])
        self.n_pairs += len(inside)

    def build_table(self, features: Sequence[str]) -> pd.DataFrame:
        mean, square, large, inside, outside = (self.sums / self.n_pairs).numpy()
        deviation = np.sqrt(np.maximum(square - mean**2, 0))
        # One more pair of either kind, so that no odds are infinite.
        odds = (large * self.n_pairs + 1) / ((1 - large) * self.n_pairs + 1)
        table = pd.DataFrame(
            {
                "lfc_mean": mean,
                "lfc_std": deviation,
                "probability": large,
                "bayes_factor": np.log(odds),
                "mean": inside,
                "mean_others": outside,
            },
            index=pd.Index(features, name="feature"),
        )
        return table.sort_values("lfc_mean", ascending=False)
