"""From a config and a store to all that training needs to know, checked before it begins."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from clue_dist import config_file
from clue_dist.checkpoint.run_folder import RunState
from clue_dist.config import Config
from clue_dist.data.assembly import assemble_batch, read_batch_part
from clue_dist.data.batch import Batch
from clue_dist.data.batch_shares import share_rounds, weigh_strata
from clue_dist.data.plan import CellPlan
from clue_dist.errors import ConfigError, format_count, list_names
from clue_dist.files import parse_path
from clue_dist.model.modality_spec import ModalitySpec, specify_modalities
from clue_dist.ranks import Ranks
from clue_dist.store.layout import name_stratum
from clue_dist.store.manifest import is_store
from clue_dist.store.reader import Store
from clue_dist.store.svd import StoredSvd
from clue_dist.train.auto_settings import resolve_auto_settings, set_found_precision
from clue_dist.train.projection_start import ProjectionStart, choose_projection_starts

MOST_FITTING_CELLS = 4000  # on which the common space is fitted, but for
FEWEST_FITTING_CELLS = 200  # of each segment with several modalities, or all
MOST_PATTERN_CELLS = 1500  # on which islands are measured, but for
FEWEST_PATTERN_CELLS = 20  # of each segment, or all


@dataclass(frozen=True)
class Setup:
    """What training needs to know of a config and a store."""

    config: Config  # every "auto" is resolved
    store: Store
    plan: CellPlan  # which cells each rank sees at each step
    train_cells: dict[str, int]  # by segment of a stratum; the first cells of each
    held_out_cells: dict[str, int]  # by segment of a stratum; the last cells of each
    total_steps: int  # optimizer steps until training is done
    projection_starts: dict[str, ProjectionStart]  # start of the projection of each modality

    @cached_property
    def specs(self) -> dict[str, ModalitySpec]:
        """Specification of each modality, in model order."""
        return specify_modalities(self.store.manifest.modalities, self.config)

    @property
    def run_folder(self) -> Path:
        """Where checkpoints, the best weights and the log go."""
        return Path(self.config.run)

    @property
    def has_paired_cells(self) -> bool:
        """Whether validation can score pairs."""
        return any(
            n_cells and len(self.store.segments[segment].modalities) > 1
            for segment, n_cells in self.held_out_cells.items()
        )

    @property
    def stored_svds(self) -> dict[str, StoredSvd]:
        """The SVDs of the store from which projections start, by modality."""
        return {
            modality: start.stored_svd
            for modality, start in self.projection_starts.items()
            if start.stored_svd is not None
        }

    def agree_on_precision(self, ranks: Ranks) -> Setup:
        """Train in float32 if any rank gains nothing by bfloat16, so that all round alike.

        Args:
            ranks: this rank among all; every rank must call.
        """
        if len(set(ranks.gather_values(self.config.train.precision))) == 1:
            return self
        training = set_found_precision(self.config.train, "fp32")
        return replace(self, config=self.config.model_copy(update={"train": training}))

    def count_epochs(self, step: int) -> float:
        """Count the passes over as many cells as there are, after `step` optimizer steps."""
        assert self.config.data.batch_size != "auto"
        return round(step * self.config.data.batch_size / sum(self.train_cells.values()), 2)

    def load_held_out_batch(self) -> Batch | None:
        """Load the validation cells of every segment as one batch; None if no cell is held out."""
        return self._load_cells(self.train_cells, self.held_out_cells)

    def load_fitting_batch(self) -> Batch | None:
        """Load the training cells with several modalities on which the common space is fitted.

        They are the first of each segment, which is as good as any draw: cells are stored shuffled.
        """
        paired = {
            segment: n_cells
            for segment, n_cells in self.train_cells.items()
            if len(self.store.segments[segment].modalities) > 1
        }
        return self._load_first_cells(paired, MOST_FITTING_CELLS, FEWEST_FITTING_CELLS)

    def load_pattern_batch(self) -> Batch | None:
        """Load the training cells on which islands are measured; None of one stratum alone."""
        if len(self.plan.mean_shares) == 1:
            return None
        return self._load_first_cells(self.train_cells, MOST_PATTERN_CELLS, FEWEST_PATTERN_CELLS)

    def read_held_out_labels(self) -> np.ndarray:
        """Read the labels of the validation cells, (n,) names, "" where one is unknown."""
        names = np.array([*self.store.manifest.labels, ""])
        codes = [np.empty(0, np.int64)]
        for segment, n_cells in self.held_out_cells.items():
            first = self.train_cells[segment]
            positions = np.arange(first, first + n_cells)
            codes.append(self.store.segments[segment].read_codes("label", positions))
        return np.asarray(names[np.concatenate(codes)])  # -1, unknown, is the last

    def _load_first_cells(self, sizes: Mapping[str, int], most: int, fewest: int) -> Batch | None:
        """Load the first cells of segments, in all `most` or so, and at least `fewest` of each.

        The first ones are as good as any draw, as cells are stored shuffled.
        """
        part = min(1.0, most / max(1, sum(sizes.values())))
        taken = {
            segment: min(n_cells, max(math.ceil(n_cells * part), fewest))
            for segment, n_cells in sizes.items()
        }
        return self._load_cells(dict.fromkeys(taken, 0), taken)

    def _load_cells(self, starts: Mapping[str, int], sizes: Mapping[str, int]) -> Batch | None:
        """Load a range of cells of each segment as one batch; None if there are none."""
        if not any(sizes.values()):
            return None
        parts = [
            read_batch_part(
                self.store, segment, np.arange(starts[segment], starts[segment] + n_cells)
            )
            for segment, n_cells in sizes.items()
            if n_cells
        ]
        return assemble_batch(self.store.modalities, parts)

    def format_summary(self) -> str:
        """Format what is trained on what, for people."""
        config, settings = self.config, self.config.train
        fingerprint = self.store.fingerprint[:12]
        lines = [f"store {config.store}  fingerprint {fingerprint}  run {config.run}"]
        for modality, spec in self.specs.items():
            start = self.projection_starts[modality].description
            lines.append(
                f"  {modality}: {format_count(spec.n_features, 'feature')}, "
                f"{spec.normalise} -> {spec.likelihood}, {start}"
            )
        batches = self.store.manifest.batches
        named = f"{len(batches)} ({list_names(batches, 5)})" if batches else "none are known"
        lines += [f"  batches of cells: {named}", *self._list_strata()]
        every = settings.validate_every
        interval = "step" if every == 1 else f"{every} steps"
        epochs = "1 epoch" if settings.epochs == 1 else f"{settings.epochs:g} epochs"
        lines.append(
            f"  {format_count(self.total_steps, 'step')} of {config.data.batch_size} cells "
            f"({epochs}), validation every {interval}, "
            f"ZeRO-{settings.zero_stage}, {settings.precision}"
        )
        return "\n".join(lines)

    def _list_strata(self) -> list[str]:
        """List the strata, their cells, and how many of these a batch holds."""
        lines = []
        for stratum, share in self.plan.mean_shares.items():
            amount = f"{share:.3g}" if share < 100 else f"{share:.0f}"
            names = [name for name in self.train_cells if name_stratum(name) == stratum]
            n_train = sum(self.train_cells[name] for name in names)
            n_held_out = sum(self.held_out_cells[name] for name in names)
            cells = "cell" if n_train == 1 else "cells"
            segments = f" in {len(names)} segments" if len(names) > 1 else ""
            lines.append(
                f"  stratum {stratum}: {n_train} {cells}{segments}, {n_held_out} held out, "
                f"{amount} in each training batch" + " on average" * (stratum in self.plan.turns)
            )
            copies = self.plan.count_copies(stratum)
            if copies > 1 and stratum in self.plan.turns:
                lines.append(f"    up to {copies} copies of a cell in the batches of its turns")
            elif copies > 1:
                lines += [
                    f"    up to {copies} copies of a cell in each training batch: they weigh more",
                    "    than others, and InfoNCE takes them for other cells; leave these out of",
                    "    the store, or lower data.lanes",
                ]
        return lines


def prepare_setup(config: Config, world: int, *, writes: bool = True) -> Setup:
    """Open the store, resolve what is "auto", and check that the two fit.

    Args:
        config: what a person set.
        world: the number of ranks.
        writes: whether there will be a run folder.

    Raises:
        StoreError: there is no store, or a damaged one.
        ConfigError: settings that cannot work on this store or on this number of ranks.
    """
    config_file.require_paths(config, *([] if writes else ["store"]))
    if writes:
        require_writable_run(Path(config.run))
    store = Store(config.store)
    store.manifest.verify_fingerprint(store.root)  # it decides whether a run may go on
    specs = specify_modalities(store.manifest.modalities, config)
    n_cells = {name: segment.n_cells for name, segment in store.segments.items()}
    paired = {name: len(segment.modalities) > 1 for name, segment in store.segments.items()}
    _require_trainable(config, store, any(paired.values()))
    _require_divisible_lanes(config, world)
    held_out_cells = _hold_out_cells(config, n_cells, paired)
    train_cells = {name: n_cells[name] - held_out_cells[name] for name in n_cells}
    config = resolve_auto_settings(config, sum(train_cells.values()), len(specs))
    assert config.data.batch_size != "auto"
    assert config.train.epochs != "auto"
    micro_batch_size = config.data.batch_size // config.train.grad_accum
    weights = _choose_weights(config, train_cells, paired, micro_batch_size)
    modalities = {name: segment.modalities for name, segment in store.segments.items()}
    shares = share_rounds(micro_batch_size, config.data.lanes, weights, modalities)
    plan = CellPlan(
        config.seed,
        train_cells,
        shares.every_batch,
        config.data.lanes,
        config.data.window_blocks,
        store.manifest.block_cells,
        shares.turns,
    )
    total_steps = config.train.epochs * sum(train_cells.values()) / config.data.batch_size
    return Setup(
        config,
        store,
        plan,
        train_cells,
        held_out_cells,
        max(1, round(total_steps)),
        choose_projection_starts(config, store, specs),
    )


def is_run_finished(setup: Setup, state: RunState) -> bool:
    """Whether all steps are done, or too many validations in a row have not been better."""
    patience = setup.config.train.patience
    return state.step >= setup.total_steps or (patience > 0 and state.bad >= patience)


def _hold_out_cells(
    config: Config, n_cells: Mapping[str, int], paired: Mapping[str, bool]
) -> dict[str, int]:
    """How many cells of each segment are held out: of paired segments if any, else of all."""
    used = {name: n for name, n in n_cells.items() if paired[name] or not any(paired.values())}
    total = sum(used.values())
    wanted = min(config.data.holdout * total, config.data.holdout_max)
    shares = {name: int(wanted * n / total) if name in used else 0 for name, n in n_cells.items()}
    return {name: n if n > 1 else 0 for name, n in shares.items()}  # one cell scores nothing


def _choose_weights(
    config: Config,
    train_cells: Mapping[str, int],
    paired: Mapping[str, bool],
    micro_batch_size: int,
) -> dict[str, float]:
    """What share of a batch each stratum gets, before rounding; its segments take turns."""
    weights = config.data.weights
    strata: dict[str, int] = defaultdict(int)
    for segment, n_cells in train_cells.items():
        strata[name_stratum(segment)] += n_cells
    if weights is None:
        return weigh_strata(strata, paired, config.data.paired_share, micro_batch_size)
    if set(weights) != set(strata) or min(weights.values()) <= 0:
        raise ConfigError(
            "data.weights must give every stratum a positive weight",
            got=weights,
            expected=sorted(strata),
        )
    return dict(weights)


# --- what cannot work ---------------------------------------------------------------------------


def require_writable_run(run_folder: Path) -> None:
    """Check that the run folder can be made and written, before ranks wait for each other.

    It must not lie in a store, whose folder may be removed, copied and checked as a whole.

    Raises:
        ConfigError: it does, or cannot be written.
    """
    paths = (parse_path(str(run_folder)), *run_folder.absolute().parents)
    nearest = next(path for path in paths if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        problem = "a folder without write permission" if nearest.is_dir() else "a file"
        raise ConfigError(
            "the run folder cannot be written",
            where=f"run={run_folder}",
            got=f"{nearest} is {problem}",
        )
    store = next(filter(is_store, paths), None)
    if store is not None:
        raise ConfigError(
            "the run folder would lie in a store",
            where=f"run={run_folder}",
            got=f"{store} is a store",
            fix="name another folder: --set run=runs/atlas, in Python `out=`",
        )


def _require_divisible_lanes(config: Config, world: int) -> None:
    """Check that every rank gets as many lanes of a batch."""
    lanes = config.data.lanes
    if lanes % world:
        raise ConfigError(
            "the number of ranks must divide data.lanes, or the ranks would not see the same "
            "composition of cells",
            got=f"{lanes} lanes % {world} ranks = {lanes % world}",
            fix=f"--set data.lanes={world * -(-lanes // world)} (of a new run), or another number "
            "of ranks",
        )


def _require_trainable(config: Config, store: Store, has_pairs: bool) -> None:
    """Check that every modality has cells, and that cross-encoders have pairs to learn from."""
    seen = {name for segment in store.segments.values() for name in segment.modalities}
    unseen = [name for name in store.modalities if name not in seen]
    if unseen:
        raise ConfigError(
            "no cell of the store carries these modalities",
            where=config.store,
            got=", ".join(unseen),
        )
    if len(store.modalities) > 1 and not has_pairs and config.objective.lambda_cross > 0:
        raise ConfigError(
            "no cell of the store carries two modalities, so the cross-encoders have nothing to "
            "learn from",
            where=config.store,
            got=f"strata {', '.join(store.segments)}",
            expected="at least one stratum of paired cells",
            fix="convert cells whose names are equal in two modalities, or name what they have in "
            'common (`--pair-barcodes core`, of `fit` conversion=["--pair-barcodes", "core"]); '
            "or train independent VAEs, with objective.lambda_cross=0",
        )
