"""Cuts a store into one for training and one for tests; rows are copied as they are coded.

Both parts are ordinary stores. Their manifests say which store they are parts of and by which rule,
so that a model trained on one part is known not to have seen the other.

Labels, batches and lengths of rows are read first, to know how large both parts are. Then every
block is read once, and its cells go to the shards of both parts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

import clue_dist
from clue_dist.errors import DataError, format_count, list_names
from clue_dist.store import layout
from clue_dist.store.manifest import Manifest
from clue_dist.store.manifest_parts import FileDigest, PackedModality, Segment
from clue_dist.store.reader import SegmentReader, Store
from clue_dist.store.seen_cells import identify_cells
from clue_dist.store.shuffle import derive_key, hash_barcodes
from clue_dist.store.writer import commit_store, create_store
from data_prep.conversion.strata import LargestBlock, measure_cell_bytes
from data_prep.jobs.job_folder import claim_job
from data_prep.part_writer import SegmentWriter, take_cells

Side = Literal["train", "test"]
SIDES: tuple[Side, ...] = ("train", "test")
CELLS, BATCH = "cells", "batch"
STEP_CELLS = 2**16  # cells of which narrow arrays are read at once


@dataclass(frozen=True)
class SplitRule:
    """Which cells go to the test part."""

    # "cells"; "batch", or the column that batches were read from; a covariate of batches; or a
    # column of categories that the store keeps
    by: str = CELLS
    share: float = 0.2  # of all cells, where `by` is "cells"
    test_names: tuple[str, ...] = ()  # batches, levels, or categories of the column, else
    seed: int = 0  # another seed draws other cells

    def describe(self) -> dict[str, Any]:
        """Describe the rule, JSON-able; equal rules cut a store alike."""
        if self.by == CELLS:
            return {"by": CELLS, "test_share": self.share, "seed": self.seed}
        return {"by": self.by, "test": sorted(self.test_names)}

    def digest(self) -> str:
        """Hash the rule."""
        text = json.dumps(self.describe(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class _PartSurvey:
    """What one part gets of a segment, as it is counted."""

    block_cells: int
    n_cells: int = 0
    barcode_width: int = 1
    tallies: dict[str, np.ndarray] = field(default_factory=dict)  # by field: cells of each code
    # By sparse modality, non-zeros and numbers in `rest` of the largest block.
    largest: dict[str, tuple[LargestBlock, LargestBlock]] = field(default_factory=dict)


def split_store(
    location: str | Path, rule: SplitRule, out_train: Path, out_test: Path
) -> tuple[Manifest, Manifest]:
    """Cut a store in two.

    Args:
        location: the store, a folder or a URL; it stays as it is.
        rule: which cells go to the test part.
        out_train: where the other cells go.
        out_test: where the cells of the test part go.

    Returns:
        The manifests of both parts.

    Raises:
        StoreError: there is no sound store, or something is at one of the outputs.
        DataError: a part would have no cells; the store has no such batches or column.
    """
    store = Store(location)
    store.manifest.verify_fingerprint(store.root)
    rule = _call_batches_batch(store.manifest, rule)
    is_test = {name: _choose_test_cells(reader, rule) for name, reader in store.segments.items()}
    n_test = sum(int(chosen.sum()) for chosen in is_test.values())
    if n_test in (0, store.manifest.n_cells):
        raise DataError(
            "one of the two parts would have no cells",
            where=store.root,
            got=f"{n_test:,} of {store.manifest.n_cells:,} cells for tests",
            fix="choose another share, or other batches",
        )
    planned = _plan_parts(store, rule, is_test)
    outs = {"train": out_train.resolve(), "test": out_test.resolve()}
    with ExitStack() as stack:
        folders = {}
        for side in SIDES:
            description = {"store": store.fingerprint, "rule": rule.describe(), "side": side}
            job = stack.enter_context(claim_job(outs[side], description, "split"))
            folders[side] = job / "store"
            shutil.rmtree(folders[side], ignore_errors=True)  # of a run that was killed
            create_store(folders[side], planned[side])
        shards = _copy_cells(store, is_test, planned, folders)
        train, test = (
            commit_store(
                folders[side], outs[side], planned[side].model_copy(update={"shards": shards[side]})
            )
            for side in SIDES
        )
    return train, test


def _call_batches_batch(manifest: Manifest, rule: SplitRule) -> SplitRule:
    """The rule that says "batch" where it names the only column that batches were read from."""
    vocabulary = manifest.batch_vocabulary
    is_column = rule.by in vocabulary.covariates and rule.by not in manifest.obs_columns
    return replace(rule, by=BATCH) if is_column and not vocabulary.has_several else rule


def _choose_test_cells(reader: SegmentReader, rule: SplitRule) -> np.ndarray:
    """Find the cells of a segment that go to the test part, (n_cells,) bool."""
    names: list[str] = []
    if rule.by != CELLS:
        names = _list_names(reader.manifest, rule)
    # The barcode alone decides, so that a cell falls on the same side of every such cut. A part
    # that is cut again is shuffled anew: by the same hashes, all its cells would be on one side.
    key = derive_key(rule.seed, "split", len(reader.manifest.provenance.get("parts", [])))
    parts = []
    for positions in _iterate_positions(reader):
        if rule.by == CELLS:
            hashes = hash_barcodes(reader.read_barcodes(positions), key)
            parts.append(hashes < np.uint64(min(int(rule.share * 2.0**64), 2**64 - 1)))
            continue
        if rule.by == BATCH or rule.by in reader.manifest.batch_covariates:
            codes = reader.read_codes(BATCH, positions)
        else:
            codes = reader.read_kept_column(rule.by, positions)
        wanted = [code for code, name in enumerate(names) if name in rule.test_names]
        parts.append(np.isin(codes, wanted))
    return np.concatenate(parts)


def _list_names(manifest: Manifest, rule: SplitRule) -> list[str]:
    """List the batches, their levels, or the categories of a kept column, that codes name.

    Raises:
        DataError: there is no such column, or it lacks one of the names.
    """
    columns = {
        name: column.categories
        for name, column in manifest.obs_columns.items()
        if column.kind == "category"
    }
    columns |= manifest.batch_covariates | {BATCH: manifest.batches}
    if rule.by not in columns:
        raise DataError(
            "the store cannot be cut by this",
            where=f"--by {rule.by}",
            expected=list_names([CELLS, *columns]),
            fix="`convert --keep-obs COLUMN` keeps a column of obs in the store",
        )
    if unknown := [name for name in rule.test_names if name not in columns[rule.by]]:
        raise DataError(
            f"the store has no such {rule.by}",
            where=f"--test {list_names(rule.test_names)}",
            got=list_names(unknown),
            expected=list_names(dict.fromkeys(filter(None, columns[rule.by])), 30),
        )
    return columns[rule.by]


def _iterate_positions(reader: SegmentReader) -> Iterator[np.ndarray]:
    """Iterate over the positions of a segment, whole blocks at a time."""
    step = max(STEP_CELLS // reader.block_cells, 1) * reader.block_cells
    for start in range(0, reader.n_cells, step):
        yield np.arange(start, min(start + step, reader.n_cells))


def _plan_parts(
    store: Store, rule: SplitRule, is_test: Mapping[str, np.ndarray]
) -> dict[Side, Manifest]:
    """Plan the manifests of both parts, which have no shards yet."""
    surveys = {
        side: {
            name: _survey_part(reader, is_test[name] == (side == "test"))
            for name, reader in store.segments.items()
        }
        for side in SIDES
    }
    manifest, vocabulary = store.manifest, store.manifest.batch_vocabulary
    whole = [name for name in identify_cells(manifest) if ":" not in name]
    cut = {"whole": whole, "rule": rule.digest(), "cut": rule.describe()}
    parts = manifest.provenance.get("parts", [])
    planned: dict[Side, Manifest] = {}
    for side, by_segment in surveys.items():
        # The codes of the test part are those of the other one, as `--features-from` makes them.
        known = [] if side == "train" else [planned["train"]]
        names = {
            field: _list_occurring(manifest, field, by_segment, known)
            for field in ("batch", "label")
        }
        content = {
            "batches": names["batch"],
            "batch_covariates": vocabulary.choose_batches(names["batch"]).list_covariates(),
            "labels": names["label"],
            "strata": _describe_segments(manifest, by_segment),
            "shards": {},
            "metadata": {},
            "provenance": manifest.provenance
            | {
                "tool": f"data_prep {clue_dist.__version__}",
                "parts": [*parts, cut | {"side": side}],
            },
        }
        part = manifest.model_copy(update=content)
        planned[side] = Manifest.model_validate(part.model_dump())  # a copy is not validated
    return planned


def _survey_part(reader: SegmentReader, chosen: np.ndarray) -> _PartSurvey:
    """Count what some cells of a segment take, (n_cells,) bool; no counts are read."""
    manifest = reader.manifest
    n_names = {"batch": len(manifest.batches), "label": len(manifest.labels)}
    survey = _PartSurvey(reader.block_cells)
    survey.tallies = {field: np.zeros(n, np.int64) for field, n in n_names.items()}
    sparse = [name for name in reader.modalities if manifest.modalities[name].storage != "dense"]
    for name in sparse:
        survey.largest[name] = (LargestBlock(reader.block_cells), LargestBlock(reader.block_cells))
    for positions in _iterate_positions(reader):
        kept = positions[chosen[positions]]
        if not len(kept):
            continue
        survey.n_cells += len(kept)
        widths = np.char.str_len(reader.read_barcodes(kept))
        survey.barcode_width = max(survey.barcode_width, int(widths.max()))
        for field_name, tally in survey.tallies.items():
            codes = reader.read_codes(field_name, kept)
            tally += np.bincount(codes[codes >= 0], minlength=len(tally))
        blocks = np.unique(positions // reader.block_cells)
        for name, (codes_largest, rest_largest) in survey.largest.items():
            lengths = reader.read_lengths(name, blocks).reshape(-1, 3)[kept - positions[0]]
            nonzeros, far_gaps, high_counts = lengths.astype(np.int64).T
            codes_largest.add_cells(nonzeros)
            rest_largest.add_cells(far_gaps + 2 * high_counts)
    return survey


def _list_occurring(
    manifest: Manifest, field_name: str, surveys: Mapping[str, _PartSurvey], known: list[Manifest]
) -> list[str]:
    """List the batches, or labels, that a part has: first those that the other part lists."""
    names, listed = (
        (manifest.batches, [name for part in known for name in part.batches])
        if field_name == "batch"
        else (manifest.labels, [name for part in known for name in part.labels])
    )
    tally = sum(survey.tallies[field_name] for survey in surveys.values())
    occurring = [
        name for name, n in zip(names, np.broadcast_to(tally, len(names)), strict=True) if n
    ]
    return listed + [name for name in occurring if name not in listed]


def _describe_segments(
    manifest: Manifest, surveys: Mapping[str, _PartSurvey]
) -> dict[str, Segment]:
    """Describe the segments of a part; of one that gets no cells, the number goes to the next."""
    strata: dict[str, Segment] = {}
    numbers: dict[str, int] = {}
    for name, survey in surveys.items():
        if not survey.n_cells:
            continue
        segment, stratum = manifest.strata[name], layout.name_stratum(name)
        numbers[stratum] = numbers.get(stratum, 0) + 1
        packed = {
            modality: _repack_modality(packing, survey, modality)
            for modality, packing in segment.packed.items()
        }
        cell_bytes = max(
            measure_cell_bytes(
                packing, manifest.modalities[modality].n_features, manifest.block_cells
            )
            for modality, packing in packed.items()
        )
        tallies = {
            field_name: {
                text: n
                for text, n in zip(names, survey.tallies[field_name].tolist(), strict=True)
                if n
            }
            for field_name, names in (("batch", manifest.batches), ("label", manifest.labels))
        }
        strata[layout.name_segment(segment.modalities, numbers[stratum])] = Segment(
            modalities=segment.modalities,
            n_cells=survey.n_cells,
            shard_blocks=layout.choose_shard_blocks(
                cell_bytes, survey.n_cells, manifest.block_cells
            ),
            barcode_width=survey.barcode_width,
            packed=packed,
            batch_counts=tallies["batch"],
            label_counts=tallies["label"],
        )
    return strata


def _repack_modality(packing: PackedModality, survey: _PartSurvey, modality: str) -> PackedModality:
    """Describe how a part packs a modality: as the whole does, in blocks of other sizes."""
    if modality not in survey.largest:
        return packing
    codes, rest = (largest.find_largest() for largest in survey.largest[modality])
    return packing.model_copy(update={"capacity": codes, "rest": rest})


def _copy_cells(
    store: Store,
    is_test: Mapping[str, np.ndarray],
    planned: Mapping[Side, Manifest],
    folders: Mapping[Side, Path],
) -> dict[Side, dict[str, FileDigest]]:
    """Copy the cells of every segment into the shards of both parts; read every block once."""
    shards: dict[Side, dict[str, FileDigest]] = {side: {} for side in SIDES}
    numbers: dict[tuple[Side, str], int] = {}
    for name, reader in store.segments.items():
        writers = {}
        for side in SIDES:
            if (is_test[name] == (side == "test")).any():
                stratum = layout.name_stratum(name)
                numbers[side, stratum] = numbers.get((side, stratum), 0) + 1
                target = layout.name_segment(reader.modalities, numbers[side, stratum])
                writers[side] = SegmentWriter(store.manifest, planned[side], folders[side], target)
        blocks = np.arange(reader.n_blocks)
        for start in range(0, reader.n_blocks, reader.segment.shard_blocks):
            some = blocks[start : start + reader.segment.shard_blocks]
            read = {modality: reader.read_blocks(modality, some) for modality in reader.modalities}
            first, stop = some[0] * reader.block_cells, (some[-1] + 1) * reader.block_cells
            chosen = is_test[name][first:stop]
            for side, writer in writers.items():
                rows = np.flatnonzero(chosen == (side == "test"))
                if len(rows):
                    writer.add_cells(take_cells(reader, read, first, rows))
        for side, writer in writers.items():
            shards[side] |= writer.finish()
    return {side: dict(sorted(digests.items())) for side, digests in shards.items()}


def format_split(outs: tuple[Path, Path], parts: tuple[Manifest, Manifest]) -> str:
    """Say in a line for each part what it holds."""
    return "\n".join(
        f"{out}: {format_count(part.n_cells, 'cell')}, fingerprint {part.fingerprint[:16]}"
        for out, part in zip(outs, parts, strict=True)
    )
