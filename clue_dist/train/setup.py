"""From a config and a store to all that training needs to know, checked before training is set up."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clue_dist import config as configs
from clue_dist.config import Config
from clue_dist.data import plan as plans
from clue_dist.data.batch import Batch, BatchPart, assemble_batch
from clue_dist.data.plan import CellPlan
from clue_dist.errors import ConfigError
from clue_dist.files import parse_path
from clue_dist.model.clue import ModalitySpec, specify_modalities
from clue_dist.store.layout import name_stratum
from clue_dist.store.reader import Store
from clue_dist.store.svd import StoredSvd
from clue_dist.train.projection_start import ProjectionStart, choose_projection_starts


@dataclass(frozen=True)
class Setup:
    """What training needs to know of a config and a store."""

    config: Config  # every "auto" is resolved
    store: Store
    specs: dict[str, ModalitySpec]  # by modality
    plan: CellPlan  # which cells each rank sees at each step
    train_cells: dict[str, int]  # by segment of a stratum; the first cells of each
    held_out_cells: dict[str, int]  # by segment of a stratum; the last cells of each
    total_steps: int  # optimizer steps until training is done
    projection_starts: dict[str, ProjectionStart]  # by modality

    @property
    def run_folder(self) -> Path:
        """Where checkpoints, the best weights and the log go."""
        return Path(self.config.run)

    @property
    def has_paired_cells(self) -> bool:
        """Whether validation can score pairs."""
        return any(
            n and len(self.store.segments[s].modalities) > 1 for s, n in self.held_out_cells.items()
        )

    def count_epochs(self, step: int) -> float:
        """Passes over as many cells as there are, after so many steps."""
        assert self.config.data.batch_size != "auto"
        return round(step * self.config.data.batch_size / sum(self.train_cells.values()), 2)

    @property
    def stored_svds(self) -> dict[str, StoredSvd]:
        """Those of the store that projections start from, by modality."""
        return {
            m: start.stored_svd
            for m, start in self.projection_starts.items()
            if start.stored_svd is not None
        }

    def load_held_out_batch(self) -> Batch | None:
        """The validation cells of every stratum as one batch; None if nothing is held out."""
        if not any(self.held_out_cells.values()):
            return None
        parts = []
        for name, n in self.held_out_cells.items():
            reader = self.store.segments[name]
            positions = np.arange(self.train_cells[name], self.train_cells[name] + n)
            if n:
                rows = {m: reader.read_located_rows(m, positions) for m in reader.modalities}
                parts.append(BatchPart(rows, reader.read_codes("batch", positions)))
        return assemble_batch(self.store.modalities, parts)

    def format_summary(self) -> str:
        """What a dry run prints."""
        c = self.config
        lines = [f"store {c.store}  fingerprint {self.store.fingerprint[:12]}  run {c.run}"]
        lines += [
            f"  {m}: {s.n_features} features, {s.normalise} -> {s.likelihood}, {self.projection_starts[m].description}"
            for m, s in self.specs.items()
        ]
        for stratum, share in self.plan.stratum_shares.items():
            mine = [name for name in self.train_cells if name_stratum(name) == stratum]
            train, held = (
                sum(n[name] for name in mine) for n in (self.train_cells, self.held_out_cells)
            )
            parts = f" in {len(mine)} segments" if len(mine) > 1 else ""
            lines.append(
                f"  stratum {stratum}: {train} cells{parts}, {held} held out, {share} in each batch"
            )
        lines.append(
            f"  {self.total_steps} steps of {c.data.batch_size} cells ({c.train.epochs:g} epochs), "
            f"validation every {c.train.validate_every}, ZeRO-{c.train.zero_stage}, {c.train.precision}"
        )
        return "\n".join(lines)


def prepare_setup(config: Config, world: int, *, writes: bool = True) -> Setup:
    """Open the store, resolve what is "auto", and check that the two fit. writes: whether a run folder is needed.

    Raises:
        StoreError: no store, or a damaged one.
        ConfigError: settings that cannot work on this store or on this number of ranks.
    """
    configs.require_paths(config, *([] if writes else ["store"]))
    if writes:
        _check_run_folder(Path(config.run))
    store = Store(config.store)
    store.manifest.verify_fingerprint(store.root)  # whether a run may go on is decided by it
    specs = specify_modalities(store.manifest.modalities, config)
    sizes = {s: r.n_cells for s, r in store.segments.items()}
    paired = {s: len(r.modalities) > 1 for s, r in store.segments.items()}
    _check_pairs(config, store, paired)
    if config.data.lanes % world:
        raise ConfigError(
            "the number of ranks must divide data.lanes, or the ranks would not see the same composition of cells",
            got=f"{config.data.lanes} lanes % {world} ranks = {config.data.lanes % world}",
            fix=f"--set data.lanes={world * -(-config.data.lanes // world)} (of a new run), or another number of ranks",
        )
    holdout = _holdout(config, sizes, paired)
    train = {s: n - holdout[s] for s, n in sizes.items()}
    config = resolve_auto_settings(config, sum(train.values()))
    assert config.data.batch_size != "auto"
    assert config.train.epochs != "auto"
    micro = config.data.batch_size // config.train.grad_accum
    weights = _weights(config, train, paired, micro)
    share = plans.share_slots(
        micro, config.data.lanes, weights
    )  # by stratum; its segments take turns
    plan = CellPlan(
        config.seed,
        train,
        share,
        config.data.lanes,
        config.data.window_blocks,
        store.manifest.block_cells,
    )
    total = max(1, round(config.train.epochs * sum(train.values()) / config.data.batch_size))
    return Setup(
        config,
        store,
        specs,
        plan,
        train,
        holdout,
        total,
        choose_projection_starts(config, store, specs),
    )


def resolve_auto_settings(config: Config, n_train: int) -> Config:
    """Put numbers where the config says "auto": small data get small batches and many epochs, an atlas not."""
    t, d = config.train, config.data
    step = d.lanes * t.grad_accum
    size = d.batch_size if d.batch_size != "auto" else step * -(-_auto_batch(n_train) // step)
    per_epoch = max(1.0, n_train / size)
    epochs = (
        t.epochs
        if t.epochs != "auto"
        else round(min(max(1.0, AUTO_STEPS / per_epoch), AUTO_EPOCHS), 2)
    )
    total = max(1, round(epochs * per_epoch))
    every = t.validate_every if t.validate_every != "auto" else max(1, min(total // 20, 2000))
    save = t.checkpoint_every if t.checkpoint_every != "auto" else max(1, min(total // 4, 2000))
    numbers = {"epochs": epochs, "validate_every": every, "checkpoint_every": save}
    return config.model_copy(
        update={
            "data": d.model_copy(update={"batch_size": size}),
            "train": t.model_copy(update=numbers),
        }
    )


AUTO_STEPS = 1500  # a small data set is seen often enough to make so many steps ...
AUTO_EPOCHS = 60.0  # ... but never more often than this


def _auto_batch(n_train: int) -> int:
    """A power of two: 128 below 2,000 cells, 512 up to half a million, 4096 from 4 million on."""
    for size, limit in (
        (128, 2_000),
        (256, 4_000),
        (512, 500_000),
        (1024, 1_000_000),
        (2048, 4_000_000),
    ):
        if n_train < limit:
            return size
    return 4096


def _holdout(
    config: Config, sizes: Mapping[str, int], paired: Mapping[str, bool]
) -> dict[str, int]:
    """Cells to hold out per stratum: of the paired strata where there are any, else of all. One cell scores nothing."""
    used = {s: n for s, n in sizes.items() if paired[s] or not any(paired.values())}
    wanted = min(config.data.holdout * sum(used.values()), config.data.holdout_max)
    share = {s: int(wanted * n / sum(used.values())) if s in used else 0 for s, n in sizes.items()}
    return {s: n if n > 1 else 0 for s, n in share.items()}


def _check_run_folder(run: Path) -> None:
    """Whether the run folder can be made and written, before any rank waits for another."""
    there = next(p for p in (parse_path(str(run)), *run.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        got = "a folder without write permission" if there.is_dir() else "a file"
        raise ConfigError(
            "the run folder cannot be written", where=f"run={run}", got=f"{there} is {got}"
        )


def _weights(
    config: Config, train: Mapping[str, int], paired: Mapping[str, bool], micro: int
) -> dict[str, float]:
    """By stratum."""
    own = config.data.weights
    strata: dict[str, int] = {}
    for name, n in train.items():
        strata[name_stratum(name)] = strata.get(name_stratum(name), 0) + n
    if own is None:
        return plans.weigh_strata(strata, paired, config.data.paired_share, micro)
    if set(own) != set(strata) or min(own.values()) <= 0:
        raise ConfigError(
            "data.weights must give every stratum a positive weight",
            got=own,
            expected=sorted(strata),
        )
    return dict(own)


def _check_pairs(config: Config, store: Store, paired: Mapping[str, bool]) -> None:
    unseen = [
        m for m in store.modalities if not any(m in r.modalities for r in store.segments.values())
    ]
    if unseen:
        raise ConfigError(
            "no cell of the store carries these modalities",
            where=config.store,
            got=", ".join(unseen),
        )
    if len(store.modalities) > 1 and not any(paired.values()) and config.objective.lambda_cross > 0:
        raise ConfigError(
            "no cell of the store carries two modalities, so the cross-encoders have nothing to learn from",
            where=config.store,
            got=f"strata {', '.join(paired)}",
            expected="at least one stratum of paired cells",
            fix="add paired cells to the conversion (their barcodes must be equal in both files), "
            "or train independent VAEs with --set objective.lambda_cross=0",
        )
