"""The conversion: any inputs -> one committed store. Read `build_store` for the whole of it.

In the first pass (`scatter`), ranges of rows are read, validated, aligned and spooled, sorted by
their place in the shuffle. In the second pass (`gather`), each shard collects its rows from the
spools and is written. Memory is bounded by a range or a shard. Every task leaves its result under
its final name or not at all, so a killed conversion goes on by skipping what is there. Nothing
depends on the order of tasks, so any number of workers gives the same bytes.

    JOB/work/        what tasks read and leave (JOB: the folder that `claim_job` yields)
    JOB/store/       the store to be; renamed to OUT once the manifest is in it
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import clue_dist
from clue_dist.errors import format_count, list_names
from clue_dist.store import layout
from clue_dist.store.feature_reference import FeatureReference, read_feature_reference
from clue_dist.store.manifest import Manifest
from clue_dist.store.writer import commit_store, create_store
from data_prep.conversion import scatter
from data_prep.conversion.cells import CellTable
from data_prep.conversion.counts import SourceReading, find_largest_rounding
from data_prep.conversion.gather import gather_shards
from data_prep.conversion.kept_obs import plan_kept_columns, write_kept_values
from data_prep.conversion.strata import FinalStrata, build_manifest, count_unknown, settle_strata
from data_prep.features.plan import FeaturePlan
from data_prep.features.selection import SelectedFeatures, select_variable_features
from data_prep.jobs.array_files import load_array
from data_prep.jobs.job_folder import claim_job
from data_prep.jobs.whole_folders import remove_leftovers
from data_prep.jobs.workers import WorkerPool
from data_prep.options import COVARIATE, FIELDS, NO_COLUMN, FeatureChoice
from data_prep.planned_cells import (
    ConversionOptions,
    PlannedCells,
    list_modality_files,
    plan_cells,
    refuse_equal_modalities,
)
from data_prep.readers.fragments import ConversionInput, FragmentsSource
from data_prep.readers.listed_cells import identify_lists
from data_prep.readers.source import OpenedSource, Source, SourceHead

MANY_CELLS = 20  # from which on batches of a single cell are hardly meant


def convert_inputs(
    inputs: Sequence[ConversionInput], out: Path, options: ConversionOptions, pool: WorkerPool
) -> Manifest:
    """Convert inputs into a store; go on where an interrupted run of the same job has stopped.

    Args:
        inputs: one modality of one file each.
        out: the store to be.
        options: what decides the result, beside the inputs.
        pool: the workers.

    Raises:
        DataError: the inputs are not what they should be (see `build_store`).
        StoreError: something is at `out` already, or another job was or is under way there.
    """
    reference = None
    if options.features_from is not None:
        reference = read_feature_reference(options.features_from)
    with claim_job(out, describe_conversion(inputs, options, reference)) as job:
        manifest = build_store(inputs, options, reference, job, pool)
        return commit_store(job / "store", out, manifest)


def build_store(
    inputs: Sequence[ConversionInput],
    options: ConversionOptions,
    reference: FeatureReference | None,
    job: Path,
    pool: WorkerPool,
    refuse_cells: Callable[[CellTable], None] = lambda cells: None,
) -> Manifest:
    """Write all shards of the store to be.

    Args:
        inputs: one modality of one file each.
        options: what decides the result, beside the inputs.
        reference: the store or model whose modalities and features the inputs are fitted to.
        job: the folder of the job.
        pool: the workers.
        refuse_cells: raises an error where the cells cannot be taken.

    Returns:
        The manifest of the store, which is not written yet.

    Raises:
        DataError: the inputs are not what they should be (see `count_fragments`, `plan_features`,
            `join_cells_by_barcode`, `canonicalise_rows`, `select_variable_features`), or two
            modalities are the same.
    """
    choices, work, store = options.feature_choices, job / "work", job / "store"
    decided = [c for name, c in choices.items() if name not in options.new_modalities]
    if reference and any(c.mode or c.listed or c.top_features for c in decided):
        raise ValueError("features are chosen, although another store decides them")
    planned = plan_cells(inputs, options, reference, work, pool)
    sources, cells = planned.sources, planned.cells
    refuse_cells(cells)
    heads = [head for _, head in sources]
    kept = plan_kept_columns(heads, options.kept_obs, options.known_obs)
    write_kept_values(kept, heads, cells.row_folders)
    if len(planned.plan.modalities) > 1:
        lines = [f"pairing of {format_count(len(cells), 'cell')}:", *planned.describe_pairing()]
        print(*lines, sep="\n", file=sys.stderr, flush=True)

    # First pass, after one or two more over the modalities whose features are chosen by cells.
    scatter.prepare_sources(sources, work, pool)
    readings = planned.plan_readings(options, work)
    refuse_equal_modalities(readings, planned.plan)
    planned, selected = _select_features(planned, readings, options, work, pool)
    if selected:
        readings = planned.plan_readings(options, work)
    plan = planned.plan
    spools = scatter.scatter_rows(readings, work / "spools", pool)

    # Second pass, once it is known what every cell takes.
    files, block_cells = list_modality_files(sources), options.block_cells
    final = settle_strata(cells, plan.modalities, files, spools, block_cells, work / "strata")
    provenance = _describe_provenance(sources, plan, cells, final, options, selected)
    manifest = build_manifest(final, cells, plan.modalities, block_cells, options.codec, provenance)
    manifest = manifest.model_copy(update={"obs_columns": kept})
    create_store(store, manifest)
    shards = gather_shards(manifest, store, work, pool)
    remove_leftovers(store)  # leftovers of workers that were killed while this process lived on
    return manifest.model_copy(update={"shards": shards})


def _select_features(
    planned: PlannedCells,
    readings: Sequence[SourceReading],
    options: ConversionOptions,
    work: Path,
    pool: WorkerPool,
) -> tuple[PlannedCells, dict[str, SelectedFeatures]]:
    """The plan with the features that are kept, and how they were chosen, by modality."""
    selected = select_variable_features(
        readings,
        planned.plan,
        planned.cells,
        options.feature_choices,
        work / "select",
        scatter.TASK_ENTRIES,
        pool,
    )
    kept = {name: features.places for name, features in selected.items()}
    return replace(planned, plan=planned.plan.keep_features(planned.sources, kept)), selected


def describe_conversion(
    inputs: Sequence[ConversionInput],
    options: ConversionOptions,
    reference: FeatureReference | None,
) -> dict[str, Any]:
    """Describe all that decides the result, for `claim_job`.

    If any of it changes, what an interrupted run left is of no use.
    """
    choices = sorted(options.feature_choices.items())
    by_modality = {name: dict(row) for name, row in options.obs_columns.by_modality.items()}
    return {
        "inputs": [source.describe_identity() for source in inputs],
        "options": {
            "seed": options.seed,
            "block_cells": options.block_cells,
            "codec": options.codec,
            "kinds": options.kinds,
        }
        | ({"pairing": options.pairing} if options.pairing else {})
        | ({"round": True} if options.round_counts else {})
        | ({"keep_obs": list(options.kept_obs)} if options.kept_obs else {})
        | ({"new": list(options.new_modalities)} if options.new_modalities else {})
        | ({"kept": identify_lists(options.kept_cells)} if options.kept_cells else {}),
        "features": {name: choice.describe_identity() for name, choice in choices},
        "columns": dict(options.obs_columns.by_field)
        | ({"modalities": by_modality} if by_modality else {}),
        "features_from": reference.fingerprint if reference else None,
        "version": [clue_dist.__version__, layout.VERSION],
    }


def _describe_provenance(
    sources: Sequence[OpenedSource],
    plan: FeaturePlan,
    cells: CellTable,
    final: FinalStrata,
    options: ConversionOptions,
    selected: Mapping[str, SelectedFeatures],
) -> dict[str, Any]:
    """Say where the cells came from, and what was left out.

    Files have their base names only: a store may be passed on.
    """
    numbers = {name: m for m, name in enumerate(plan.modalities)}
    inputs = []
    for i, (source, head) in enumerate(sources):
        keys = load_array(cells.row_folders[i] / "keys.npy")
        n_empty = final.count_lost_rows(keys, numbers[source.modality])
        counted = {"empty": n_empty, "features": plan.notes[i]}
        inputs.append(_describe_source(source, head, counted, cells.row_folders[i]))
    fields = [*FIELDS, *(COVARIATE + name for name in cells.covariates)]
    unknown = {f"without_{field}": count_unknown(final, cells, field) for field in fields}
    merged = {"paired_by_core": cells.n_merged} if cells.barcode_hash.by_core else {}
    return {
        "tool": f"data_prep {clue_dist.__version__}",
        "seed": options.seed,
        "inputs": inputs,
        "features": {
            name: options.feature_choices.get(name, FeatureChoice()).describe_identity()
            for name in plan.modalities
        },
        "selected": {name: features.note for name, features in selected.items()},
        # A field without a column says so: cells that are added later are read likewise.
        "columns": dict.fromkeys(FIELDS, NO_COLUMN) | dict(options.obs_columns.by_field),
        "cells": {"in": len(cells), "dropped": final.n_dropped} | unknown | merged,
    }


def _describe_source(
    source: Source, head: SourceHead, counted: Mapping[str, Any], row_folder: Path
) -> dict[str, Any]:
    """Say what a file is, what was `counted` of it, and how it was read."""
    note: dict[str, Any] = {
        "file": source.display_name,
        "modality": source.modality,
        "dataset": source.dataset,
        "cells": head.n_rows,
        **counted,
        "names": head.name_column or "var_names",
    }
    if isinstance(source, FragmentsSource):
        note["counted"] = source.counted_unit
    if change := find_largest_rounding(row_folder):
        note["rounded_by"] = change
    missing = {name: codes.missing_texts for name, codes in head.fields.items()}
    if any(missing.values()):
        note["missing_texts"] = {name: list(texts) for name, texts in missing.items() if texts}
    return note


def format_conversion(manifest: Manifest) -> str:
    """Say in a few lines what a person should know after a conversion."""
    return "\n".join([*format_segments(manifest), *format_notes(manifest, manifest.provenance)])


def format_segments(manifest: Manifest) -> list[str]:
    """List how many cells a store has, in each of its segments too."""
    lines = [f"{format_count(manifest.n_cells, 'cell')}, fingerprint {manifest.fingerprint[:16]}"]
    for name, segment in manifest.strata.items():
        lines.append(f"  {name}: {format_count(segment.n_cells, 'cell')}")
    return lines


def format_notes(manifest: Manifest, notes: Mapping[str, Any]) -> list[str]:
    """Say what became of the inputs of a conversion, or of an addition to a store.

    Args:
        manifest: manifest of the store.
        notes: what the provenance says of this conversion, or addition.
    """
    lines = []
    covariates = [COVARIATE + name for name in manifest.batch_covariates]
    fields = dict.fromkeys(covariates or ["batch"], manifest.batches) | {"label": manifest.labels}
    for field, names in fields.items():
        if names and (n_cells := notes["cells"].get(f"without_{field}")):
            column = notes["columns"].get(field, NO_COLUMN)
            lines.append(
                f"  {format_count(n_cells, 'cell')} without {field.removeprefix(COVARIATE)}: the "
                f"files have nothing in column {column!r} of obs"
            )
    if 2 * len(manifest.batches) > manifest.n_cells >= MANY_CELLS:
        columns = [notes["columns"].get(field, NO_COLUMN) for field in covariates or ["batch"]]
        lines.append(
            f"  warning: {len(manifest.batches):,} batches of {manifest.n_cells:,} cells: does "
            f"{list_names(map(repr, columns))} of obs tell batches apart? `--batch-key` names "
            "another column, or none"
        )
    for name, note in notes["selected"].items():
        lines.append(f"  {name}: {note['kept']:,} of {note['of']:,} features, {note['by']}")
    if notes["cells"]["dropped"]:
        lines.append(
            f"  dropped: {format_count(notes['cells']['dropped'], 'cell')} with no counts at all"
        )
    for note in notes["inputs"]:
        if note["empty"]:
            lines.append(
                f"  {note['file']}: {format_count(note['empty'], 'cell')} without counts of "
                f"{note['modality']}, which counts as not measured there"
            )
        if "rounded_by" in note:
            change = f"{note['rounded_by']:.1g}"
            lines.append(f"  {note['file']}: counts were rounded, by {change} at most")
        for column, texts in note.get("missing_texts", {}).items():
            named = list_names(map(repr, texts))
            lines.append(f"  {note['file']}: cells whose {column} is {named} have none")
        lines += format_feature_note(note["file"], note["features"])
    return lines


def format_feature_note(file: str, note: Mapping[str, Any]) -> list[str]:
    """Say how the features of a file fit those of the store.

    Args:
        file: the file.
        note: what `plan_features` has noted of it.
    """
    lines = []
    if respelled := note.get("respelled"):
        before, after = respelled
        lines.append(f"  {file}: regions are spelled {before} there, {after} here")
    if tallies := note.get("tallies"):
        verb = "is no feature and is" if len(tallies) == 1 else "are no features and are"
        lines.append(f"  {file}: {list_names(tallies)} {verb} left out")
    for which, fate in (("missing", "taken as zero"), ("extra", "left out")):
        if n_features := note[which]:
            first = list_names(note[f"first_{which}"])
            lines.append(
                f"  {file}: {format_count(n_features, 'feature')} {which}, {fate} ({first})"
            )
    return lines
