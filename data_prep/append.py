"""More cells for a store: further segments of its strata, and a manifest that lists these too.

Nothing of the store is rewritten but its manifest, which is renamed into place last: until then
the store is what it was before. A killed addition goes on when the same command is typed again.

    STORE.addition.partial/       a conversion like any other, fitted to the store's features
    STORE/strata/<rna+adt.2>/     a new segment, unknown to the store until its manifest is written
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.errors import DataError, StoreError, format_count, list_names
from clue_dist.files import TEMPORARY_ENDING, write_file
from clue_dist.store import layout, svd
from clue_dist.store.location import Location, parse_location
from clue_dist.store.manifest import Manifest
from clue_dist.store.manifest_parts import FileDigest
from clue_dist.store.reader import SegmentReader, Store
from clue_dist.store.writer import hash_metadata
from data_prep.conversion.cells import CellTable
from data_prep.convert import build_store, describe_conversion, format_notes, format_segments
from data_prep.jobs.job_folder import (
    claim_job,
    discard_job,
    find_partial_folder,
    normalise_json,
    read_job,
)
from data_prep.jobs.whole_folders import remove_leftovers
from data_prep.jobs.workers import WorkerPool
from data_prep.planned_cells import ConversionOptions
from data_prep.readers.fragments import ConversionInput
from data_prep.readers.source import decode_barcodes

APPENDED = "appended"  # in the provenance: the notes of each addition
BUILT_FILE = "addition.json"  # in the job's folder: the manifest of the addition, once it is built
COMMIT_FILE = "becomes"  # in the job's folder: the fingerprint that the store is about to get
STEP_BLOCKS = 4096  # whose barcodes are read at once


def append_cells(
    inputs: Sequence[ConversionInput],
    store_location: str | Location,
    options: ConversionOptions,
    pool: WorkerPool,
) -> Manifest:
    """Add the cells of some inputs to a store.

    Args:
        inputs: one modality of one file each.
        store_location: the store, a folder.
        options: `features_from`, `block_cells` and `codec` are replaced by those of the store. Of
            features, the width of bins alone may be chosen.
        pool: the workers.

    Returns:
        The new manifest of the store; its fingerprint is another one.

    Raises:
        DataError: the inputs are not what they should be, have modalities that the store lacks, or
            cells that are in it already; other cells were added meanwhile.
        StoreError: there is no store, or it is not in a folder; another addition is under way; the
            disk is full.
    """
    root = parse_location(store_location)
    if not isinstance(root, Path):
        raise StoreError(
            "cells can only be added to a folder",
            where=store_location,
            fix="add them there, then copy it again",
        )
    root = root.resolve()  # a link may lead to another disk; the job must lie beside the store
    out = root.with_name(root.name + ".addition")
    store = Store(root)
    before = store.manifest
    _remove_outdated_svd(root, before)  # the last addition may have been killed before it did so
    if _was_committed(
        find_partial_folder(out), describe_conversion(inputs, options, before), before
    ):
        return before
    options = replace(
        options,
        features_from=root,
        block_cells=before.block_cells,
        codec=before.codec,
        kept_obs=tuple(before.obs_columns),
        known_obs=before.obs_columns,
    )
    with claim_job(out, describe_conversion(inputs, options, before), "addition") as job:
        if Manifest.read(root).fingerprint != before.fingerprint:
            raise DataError(
                "other cells were added meanwhile", where=root, fix="run the same command again"
            )
        addition = _read_built_addition(job)
        segments = {} if addition is None else _name_segments(addition, before)
        _remove_stray_strata(root, {*before.strata, *segments.values()})
        if addition is None:
            addition = build_store(
                inputs, options, before, job, pool, lambda cells: _refuse_known_cells(cells, store)
            )
            # From here on, strata of the addition may be in the store already.
            write_file(job / BUILT_FILE, addition.model_dump_json())
        return _commit_addition(addition, job, before, root)


def _was_committed(partial: Path, description: dict[str, Any], manifest: Manifest) -> bool:
    """Find out whether a killed run has added these inputs already, right before it was killed.

    What such a run has left is removed, whatever its inputs were.
    """
    job_before = read_job(partial)
    commits = [file.read_text() for file in partial.glob(f"*/{COMMIT_FILE}")]
    if job_before is None or manifest.fingerprint not in commits:
        return False
    discard_job(partial)
    # The rest of the description is the store's, which has become another one since.
    decisive = ("inputs", "features", "columns")
    wanted = normalise_json(description)
    return all(job_before.get(key) == wanted[key] for key in decisive)


def _read_built_addition(job: Path) -> Manifest | None:
    """Read the manifest of an addition that a killed run has built; None where there is none."""
    path = job / BUILT_FILE
    return Manifest.model_validate_json(path.read_bytes()) if path.exists() else None


def _name_segments(addition: Manifest, before: Manifest) -> dict[str, str]:
    """Name the segments that the strata of an addition become in the store."""
    counts = Counter(layout.name_stratum(name) for name in before.strata)
    return {
        name: layout.name_segment(stratum.modalities, counts[name] + 1)
        for name, stratum in addition.strata.items()
    }


def _remove_stray_strata(root: Path, known: set[str]) -> None:
    """Remove what an addition that was given up has left in the store."""
    for folder in (root / "strata").iterdir():
        if folder.is_dir() and folder.name not in known:
            shutil.rmtree(folder)
    remove_leftovers(root / "strata")
    (root / f"{layout.MANIFEST}{TEMPORARY_ENDING}").unlink(missing_ok=True)


def _refuse_known_cells(cells: CellTable, store: Store) -> None:
    """Refuse cells whose barcodes the store has already."""
    known = [found for reader in store.segments.values() for found in _find_known(cells, reader)]
    if known:
        barcodes = np.concatenate(known)
        raise DataError(
            f"the store already has {format_count(len(barcodes), 'cell')} of these",
            where=store.root,
            got=list_names(decode_barcodes(barcodes)),
            expected="cells with barcodes of their own",
            fix="other cells with the same barcodes need a prefix, `lane2:FILE`; for more "
            "modalities of the same cells, convert all files again",
        )


def _find_known(cells: CellTable, reader: SegmentReader) -> Iterator[np.ndarray]:
    """Find the barcodes of a segment that new cells have too, some blocks at a time."""
    step = STEP_BLOCKS * reader.block_cells
    for start in range(0, reader.n_cells, step):
        positions = np.arange(start, min(start + step, reader.n_cells))
        known = cells.find_known_barcodes(reader.read_barcodes(positions))
        if len(known):
            yield known


def _commit_addition(addition: Manifest, job: Path, before: Manifest, root: Path) -> Manifest:
    """Move the strata of an addition into the store as further segments, then commit."""
    for name, modality in addition.modalities.items():
        if modality != before.modalities[name]:
            raise RuntimeError(f"an addition with other features of {name} than its store")
    segments = _name_segments(addition, before)
    notes = addition.provenance | {"before": before.fingerprint}
    additions = [*before.provenance.get(APPENDED, []), notes]
    strata = {segments[name]: stratum for name, stratum in addition.strata.items()}
    after = before.model_copy(
        update={
            "batches": addition.batches,
            "batch_covariates": addition.batch_covariates,
            "labels": addition.labels,
            "obs_columns": addition.obs_columns,
            "strata": before.strata | strata,
            "shards": dict(sorted((before.shards | _rename_shards(addition, segments)).items())),
            "provenance": before.provenance | {APPENDED: additions},
        }
    )
    after = Manifest.model_validate(after.model_dump())  # a copy is not validated
    metadata = dict(before.metadata)
    for name, segment in segments.items():
        _move_stratum(job / "store" / "strata" / name, root / "strata" / segment)
        metadata |= hash_metadata(root, f"strata/{segment}")
    after = after.model_copy(update={"metadata": metadata})
    # A run that is killed after the next line has added its cells: `_was_committed` tells so.
    write_file(job / COMMIT_FILE, after.compute_fingerprint())
    after = after.write(root)
    _remove_outdated_svd(root, after)
    return after


def _rename_shards(addition: Manifest, segments: Mapping[str, str]) -> dict[str, FileDigest]:
    """Give the shards of an addition the paths that they have in the store."""
    shards: dict[str, FileDigest] = {}
    for path, shard in addition.shards.items():
        strata, name, rest = path.split("/", 2)
        shards[f"{strata}/{segments[name]}/{rest}"] = shard
    return shards


def _move_stratum(source: Path, target: Path) -> None:
    """Give a stratum its place in the store, unless a run that was killed has done so."""
    if not source.exists():
        return
    try:
        os.rename(source, target)
    except OSError as error:
        raise StoreError(
            "the store cannot be written",
            where=target,
            got=error,
            fix="correct that, then run the same command again",
        ) from error


def _remove_outdated_svd(root: Path, manifest: Manifest) -> None:
    """Remove the stored SVD if it is of other cells than the store has."""
    try:
        svd.list_svds(root, manifest)
    except StoreError:
        shutil.rmtree(root / svd.FOLDER)
        print(f"{root}: the stored SVD was of other cells and is removed", file=sys.stderr)


def format_addition(manifest: Manifest) -> str:
    """Say in a few lines what a person should know after an addition."""
    notes = manifest.provenance[APPENDED][-1]
    return "\n".join([*format_segments(manifest), *format_notes(manifest, notes)])
