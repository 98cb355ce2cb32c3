"""What decides a conversion, and the cells that it will write; of matrices, no count is read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from clue_dist.errors import DataError, format_count, list_names
from clue_dist.store import layout
from clue_dist.store.feature_reference import FeatureReference
from clue_dist.store.layout import Codec
from clue_dist.store.obs_columns import KeptColumn
from clue_dist.store.shuffle import derive_key
from data_prep.conversion.cells import BarcodeHash, CellTable
from data_prep.conversion.counts import AlignmentTarget, SourceReading
from data_prep.conversion.join_cells import join_cells_by_barcode
from data_prep.conversion.pairing import (
    PairingSurvey,
    format_pairing,
    refuse_row_numbers,
    survey_pairing,
)
from data_prep.conversion.scatter import find_scratch
from data_prep.features.plan import FeaturePlan, plan_features
from data_prep.jobs.array_files import load_array, save_array
from data_prep.jobs.workers import WorkerPool
from data_prep.options import FeatureChoice, ObsColumns, Pairing
from data_prep.readers.fragments import ConversionInput, count_fragments
from data_prep.readers.listed_cells import keep_listed_cells
from data_prep.readers.source import OpenedSource, Source

_COMPARED_ROWS = 64  # cells by which a modality is found to be a copy of another


@dataclass(frozen=True)
class ConversionOptions:
    """What decides the result, beside the inputs."""

    seed: int = 0  # seed of the shuffle
    block_cells: int = layout.BLOCK_CELLS
    codec: Codec = "balanced"
    # By modality; the others have `FeatureChoice()`.
    feature_choices: Mapping[str, FeatureChoice] = field(default_factory=dict)
    features_from: str | Path | None = None  # a store or model whose features are taken
    new_modalities: tuple[str, ...] = ()  # that these do not have
    # Kinds of the modalities whose name says none.
    kinds: dict[str, str] = field(default_factory=dict)
    obs_columns: ObsColumns = field(default_factory=ObsColumns)
    pairing: Pairing | None = None  # None: exact, but numbers of rows are refused
    # For modalities that are no fragments: a list of barcodes, or a modality, whose cells are kept.
    kept_cells: Mapping[str, str] = field(default_factory=dict)
    round_counts: bool = False  # whether counts may be fractions, which are rounded
    kept_obs: tuple[str, ...] = ()  # columns of obs that the store keeps; `all` alone: all of them
    # Columns of the store that cells are added to.
    known_obs: Mapping[str, KeptColumn] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedCells:
    """The cells of a conversion before any count is read, and the features they are to have."""

    sources: list[OpenedSource]
    plan: FeaturePlan
    cells: CellTable

    def plan_readings(self, options: ConversionOptions, work: Path) -> list[SourceReading]:
        """Plan how tasks read the rows of each source, once `prepare_sources` has sorted them.

        Where columns go is saved to files, which the tasks read.

        Args:
            options: whether counts are rounded.
            work: the folder for the files of this job.
        """
        readings = []
        for i, (source, head) in enumerate(self.sources):
            folder, column_file = self.cells.row_folders[i], None
            if (places := self.plan.columns[i]) is not None:
                column_file = folder / "columns.npy"
                save_array(column_file, places)
            modality = self.plan.modalities[source.modality]
            target = AlignmentTarget(
                modality.kind, modality.n_features, column_file, options.round_counts, folder
            )
            scratch = find_scratch(work, i)
            readings.append(SourceReading(source, target, head.n_rows, head.nnz, scratch, folder))
        return readings

    def survey_pairs(self) -> PairingSurvey:
        """Count the cells that have each set of modalities."""
        parts = ((part.barcodes, part.planned) for part in self.cells.iterate_ranges())
        return survey_pairing(parts, len(self.cells))

    def describe_pairing(self) -> list[str]:
        """Say which cells pair."""
        modalities = list(self.plan.modalities)
        lines = format_pairing(self.survey_pairs(), modalities, list_modality_files(self.sources))
        if self.cells.n_merged:
            lines.append(f"  paired by their core: {format_count(self.cells.n_merged, 'barcode')}")
        if self.cells.n_ambiguous:
            lines.append(
                f"  left apart: {format_count(self.cells.n_ambiguous, 'cell')} whose core several "
                "others have: name the data set of each file, `lane1:FILE`"
            )
        return lines


def plan_cells(
    inputs: Sequence[ConversionInput],
    options: ConversionOptions,
    reference: FeatureReference | None,
    work: Path,
    pool: WorkerPool,
) -> PlannedCells:
    """Find out which cells and features the inputs have; of matrices, no counts are read.

    Args:
        inputs: one modality of one file each.
        options: what decides the result, beside the inputs.
        reference: manifest of the store whose modalities and features the inputs are fitted to.
        work: the folder for what tasks leave.
        pool: the workers.

    Raises:
        DataError: the inputs are not what they should be (see `count_fragments`, `plan_features`,
            `join_cells_by_barcode`).
    """
    by_core = options.pairing == "core"
    counted = count_fragments(inputs, options.feature_choices, work / "fragments", pool, by_core)
    sources = _open_sources(keep_listed_cells(counted, options.kept_cells, by_core, work / "kept"))
    plan = plan_features(
        sources, options.kinds, options.feature_choices, reference, options.new_modalities
    )
    if options.pairing != "exact":
        refuse_row_numbers(sources)
    barcode_hash = BarcodeHash(derive_key(options.seed, "cells"), by_core)
    cells = join_cells_by_barcode(
        sources, list(plan.modalities), reference, options.obs_columns, barcode_hash, work, pool
    )
    return PlannedCells(sources, plan, cells)


def refuse_equal_modalities(readings: Sequence[SourceReading], plan: FeaturePlan) -> None:
    """Refuse two modalities that have the same values of the same cells and features.

    A copy is found in whatever order it has cells and features, by the first cells of the source
    that it is compared with.

    Args:
        readings: how the rows of the sources are read, whatever their format.
        plan: the features of each modality.

    Raises:
        DataError: two modalities do so.
    """
    for one, other in itertools.combinations(readings, 2):
        first, second = one.source.modality, other.source.modality
        if first == second:
            continue
        features, others = (plan.modalities[name].features for name in (first, second))
        if len(features) != len(others) or {*features} != {*others}:
            continue
        places = {feature: place for place, feature in enumerate(others)}
        if _have_same_values(one, other, [places[feature] for feature in features]):
            raise DataError(
                "two modalities are the same values",
                where=other.source.display_name,
                got=f"{first}, {second}",
                expected="a file, a part of a file, a layer or a list of features for each",
                fix=f"correct the file of {second}; `python -m data_prep doctor "
                f"{other.source.display_name}` lists the parts of this one",
            )


def _have_same_values(one: SourceReading, other: SourceReading, places: list[int]) -> bool:
    """Whether the first cells of a source have the same values in another one.

    Args:
        one: the source.
        other: the other one.
        places: (features,), the place in `other` of each feature of `one`.
    """
    if not (one.n_rows and other.n_rows):
        return False
    n_rows = min(_COMPARED_ROWS, one.n_rows)
    # A cell has the same key in all its modalities.
    keys, other_keys = (load_array(each.row_folder / "keys.npy") for each in (one, other))
    order = np.argsort(keys[:n_rows])
    found = np.flatnonzero(np.isin(other_keys, keys[:n_rows]))
    found = found[np.argsort(other_keys[found])]
    if not np.array_equal(keys[order], other_keys[found]):
        return False
    rows = sp.csr_matrix(one.read_rows(0, n_rows))[order]
    other_rows = [sp.csr_matrix(other.read_rows(row, row + 1)) for row in found.tolist()]
    return bool(rows.count_nonzero() and (rows != sp.vstack(other_rows)[:, places]).nnz == 0)


def _open_sources(sources: Sequence[Source]) -> list[OpenedSource]:
    """Read the head of every source.

    Files may be many: equal lists of features are kept once.
    """
    opened: list[OpenedSource] = []
    for source in sources:
        head = source.read_head()
        equal = (other.features for _, other in opened if other.features == head.features)
        head = replace(head, features=next(equal, head.features))
        opened.append(OpenedSource(source, head))
    return opened


def list_modality_files(sources: Sequence[OpenedSource]) -> dict[str, str]:
    """List the files of each modality, for messages."""
    files: dict[str, list[str]] = {}
    for source, _ in sources:
        files.setdefault(source.modality, []).append(source.display_name)
    return {modality: list_names(names) for modality, names in files.items()}
