"""The conversion: any inputs -> one committed store. Read `build` for the whole of it.

First pass (scatter): ranges of rows are read, validated, aligned and spooled, sorted by their shuffled place.
Second pass (gather): each shard collects its rows from the spools and is written. Memory is bounded by a range or
a shard. Every task leaves its result under its final name or not at all, so a killed conversion goes on by
skipping what is there; nothing depends on the order of tasks, so any number of workers gives the same bytes.

    JOB/work/        columns, spools, strata: per-cell arrays the tasks read (JOB: the folder that `job` yields)
    JOB/store/       the store to be; renamed to OUT once the manifest is in it
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import clue_dist
from clue_dist.errors import list_names
from clue_dist.files import write_file
from clue_dist.store import layout
from clue_dist.store.layout import Codec
from clue_dist.store.location import parse_location
from clue_dist.store.manifest import FileDigest, Manifest
from clue_dist.store.writer import ShardCells, commit_store, create_store, write_shard
from data_prep.conversion import cells as cell_table
from data_prep.conversion import spool, strata
from data_prep.conversion.cells import CellTable
from data_prep.conversion.counts import AlignmentTarget, SourceReading
from data_prep.features import plan as features
from data_prep.features.selection import SelectedFeatures, select_variable_features
from data_prep.jobs.job_folder import claim_job
from data_prep.jobs.whole_files import remove_leftovers, save_array
from data_prep.jobs.workers import WorkerPool, run_missing
from data_prep.options import FIELDS, FeatureChoice, ObsColumns
from data_prep.readers.fragments import ConversionInput, FragmentsSource, count_fragments
from data_prep.readers.source import Source, SourceHead

TASK_ENTRIES = 2**20  # stored values of a scatter task, up to six times as many ...
MANY_TASKS = 100  # ... where there would be more tasks than this: each shard looks into every spool, which takes time
MOST_TASKS, MOST_ENTRIES = (
    1000,
    2**25,
)  # beyond these that time would outgrow all other: spools grow, to 32 MB coded


@dataclass(frozen=True)
class ConversionOptions:
    """What decides the result, beside the inputs."""

    seed: int = 0
    block_cells: int = layout.BLOCK_CELLS
    codec: Codec = "balanced"
    feature_choices: Mapping[str, FeatureChoice] = field(
        default_factory=dict
    )  # of features, by modality; else `Choice()`
    features_from: str | Path | None = None
    kinds: dict[str, str] = field(default_factory=dict)
    obs_columns: ObsColumns = field(default_factory=ObsColumns)


def convert_inputs(
    inputs: Sequence[ConversionInput], out: Path, options: ConversionOptions, pool: WorkerPool
) -> Manifest:
    """Convert `inputs` into a store at `out`; goes on where an interrupted run of the same job stopped.

    Raises:
        DataError: inputs that are not what they should be (see `build`).
        StoreError: something is at `out` already, or another job was or is under way there.
    """
    reference = (
        None
        if options.features_from is None
        else Manifest.read(parse_location(options.features_from))
    )
    with claim_job(out, describe_conversion(inputs, options, reference)) as partial:
        return commit_store(
            partial / "store", out, build_store(inputs, options, reference, partial, pool)
        )


def build_store(
    inputs: Sequence[ConversionInput],
    options: ConversionOptions,
    reference: Manifest | None,
    partial: Path,
    pool: WorkerPool,
    accept: Callable[[CellTable], None] = lambda cells: None,
) -> Manifest:
    """All shards of the store to be, in `partial`; returns its manifest, which is not written yet.

    reference: of the store whose modalities and features the inputs are fitted to; accept: may refuse the cells.

    Raises:
        DataError: inputs that are not what they should be (see `count_fragments`, `plan_features`,
            `join_cells_by_barcode`,
            `canonicalise_rows`, `select_variable_features`).
    """
    if reference and any(
        c.mode or c.listed or c.top_features for c in options.feature_choices.values()
    ):
        raise ValueError("features are chosen, though those of another store decide")
    work, store = partial / "work", partial / "store"
    sources = count_fragments(inputs, options.feature_choices, work / "fragments", pool)
    heads = _heads(sources)
    plan = features.plan_features(sources, heads, options.kinds, options.feature_choices, reference)
    known = {"batch": reference.batches, "label": reference.labels} if reference else {}
    cells = cell_table.join_cells_by_barcode(
        sources, heads, list(plan.modalities), known, options.obs_columns, options.seed, work, pool
    )
    accept(cells)

    _prepare(sources, work, pool)
    reading = _reading(sources, heads, plan, cells, work)
    kept = select_variable_features(
        reading, plan, cells, options.feature_choices, work / "select", TASK_ENTRIES, pool
    )
    plan = plan.narrowed(sources, heads, {name: chosen.places for name, chosen in kept.items()})
    spools = _scatter(sources, heads, plan, cells, work, pool)
    files = {
        name: list_names(s.display_name for s in sources if s.modality == name)
        for name in plan.modalities
    }
    final = strata.settle_strata(
        cells, plan.modalities, files, spools, options.block_cells, work / "strata"
    )
    notes = _provenance(sources, heads, plan, cells, final, options, kept)
    manifest = strata.build_manifest(
        final, cells, plan.modalities, options.block_cells, options.codec, notes
    )
    create_store(store, manifest)
    shards = _gather(manifest, store, work, spools, pool)
    remove_leftovers(store)  # of workers that were killed while this process lived on
    return manifest.model_copy(update={"shards": shards})


def describe_conversion(
    inputs: Sequence[ConversionInput], options: ConversionOptions, reference: Manifest | None
) -> dict[str, Any]:
    """All that decides the result: if any of it changes, what an interrupted run left is of no use."""
    return {
        "inputs": [given.describe_identity() for given in inputs],
        "options": {
            k: v
            for k, v in vars(options).items()
            if k not in ("obs_columns", "feature_choices", "features_from")
        },
        "features": {
            name: choice.describe_identity()
            for name, choice in sorted(options.feature_choices.items())
        },
        "columns": dict(options.obs_columns.by_field),
        "features_from": reference.fingerprint if reference else None,
        "version": [clue_dist.__version__, layout.VERSION],
    }


def _heads(sources: Sequence[Source]) -> list[SourceHead]:
    """Of every source; equal lists of features are one, as files may be many."""
    heads: list[SourceHead] = []
    for source in sources:
        head = source.read_head()
        same = next((h.features for h in heads if h.features == head.features), head.features)
        heads.append(replace(head, features=same))
    return heads


@dataclass(frozen=True)
class _Prepare:
    source: Source
    part: int
    scratch: Path


@dataclass(frozen=True)
class _Scatter:
    reading: SourceReading
    lo: int
    hi: int
    out: Path


@dataclass(frozen=True)
class _Gather:
    manifest: Path
    store: Path
    stratum: str
    shard: int
    cells: Path
    spools: Path
    out: Path


def _prepare(sources: Sequence[Source], work: Path, pool: WorkerPool) -> None:
    """Sort the inputs whose rows cannot be read directly."""
    tasks: dict[Path, _Prepare] = {}
    for i, source in enumerate(sources):
        scratch = work / "prepared" / f"{i:03d}"
        tasks |= {
            scratch / f"{part:06d}": _Prepare(source, part, scratch)
            for part in range(source.count_parts())
        }
    if tasks:
        run_missing(pool, "sort entries", _prepare_part, tasks)


def _prepare_part(task: _Prepare) -> None:
    task.source.prepare_part(task.part, task.scratch)


def _reading(
    sources: Sequence[Source],
    heads: Sequence[SourceHead],
    plan: features.FeaturePlan,
    cells: CellTable,
    work: Path,
) -> list[SourceReading]:
    """What the tasks must know to read each source's rows; where its columns go is in a file, like its rows' keys."""
    out = []
    for i, (source, head, folder) in enumerate(zip(sources, heads, cells.sources, strict=True)):
        columns = plan.columns[i]
        if columns is not None:
            save_array(folder / "columns.npy", columns)
        modality = plan.modalities[source.modality]
        target = AlignmentTarget(
            modality.kind, modality.n_features, None if columns is None else folder / "columns.npy"
        )
        out.append(
            SourceReading(
                source, target, head.n_rows, head.nnz, work / "prepared" / f"{i:03d}", folder
            )
        )
    return out


def _scatter(
    sources: Sequence[Source],
    heads: Sequence[SourceHead],
    plan: features.FeaturePlan,
    cells: CellTable,
    work: Path,
    pool: WorkerPool,
) -> dict[str, list[Path]]:
    """Spool every row of every source; returns the spools of each modality."""
    tasks: dict[Path, _Scatter] = {}
    spools: dict[str, list[Path]] = {name: [] for name in plan.modalities}
    entries = _task_entries(sum(head.nnz for head in heads))
    for i, reading in enumerate(_reading(sources, heads, plan, cells, work)):
        modality = reading.source.modality
        for lo, hi in reading.ranges(entries):
            out = work / "spools" / modality / f"{i:03d}-{lo:012d}"
            tasks[out] = _Scatter(reading, lo, hi, out)
            spools[modality].append(out)
    run_missing(pool, "read", _scatter_rows, tasks)
    return spools


def _task_entries(nnz: int) -> int:
    """Stored values of each scatter task, of so many in all inputs."""
    usual = min(max(nnz // MANY_TASKS, TASK_ENTRIES), 6 * TASK_ENTRIES)
    return max(usual, min(nnz // MOST_TASKS, MOST_ENTRIES))


def _scatter_rows(task: _Scatter) -> None:
    keys = np.asarray(np.load(task.reading.folder / "keys.npy", mmap_mode="r")[task.lo : task.hi])
    order = np.argsort(keys)
    spool.write_spool(task.out, keys[order], *task.reading.coded(task.lo, task.hi, order))


def _gather(
    manifest: Manifest, store: Path, work: Path, spools: dict[str, list[Path]], pool: WorkerPool
) -> dict[str, FileDigest]:
    """Write every shard; returns size and hash of each file."""
    (work / "shards").mkdir(exist_ok=True)
    (work / "manifest.json").write_text(manifest.model_dump_json())
    tasks = {}
    for name, s in manifest.strata.items():
        for shard in range(-(-s.n_cells // (s.shard_blocks * manifest.block_cells))):
            out = work / "shards" / f"{name}-{shard:06d}.json"
            tasks[out] = _Gather(
                work / "manifest.json",
                store,
                name,
                shard,
                work / "strata" / name,
                work / "spools",
                out,
            )
    run_missing(pool, "write", _gather_shard, tasks)
    shards: dict[str, FileDigest] = {}
    for path in tasks:
        shards |= {key: FileDigest(**value) for key, value in json.loads(path.read_text()).items()}
    return dict(sorted(shards.items()))


def _gather_shard(task: _Gather) -> None:
    manifest = Manifest.model_validate_json(task.manifest.read_bytes())
    s = manifest.strata[task.stratum]
    size = s.shard_blocks * manifest.block_cells
    part = slice(task.shard * size, (task.shard + 1) * size)
    obs = {
        name: np.load(task.cells / f"{name}.npy", mmap_mode="r")[part]
        for name in ("keys", "batch", "label", "barcodes")
    }
    modalities = {}
    for name in s.modalities:
        n_features = manifest.modalities[name].n_features
        folders = sorted(p for p in (task.spools / name).iterdir() if p.suffix != ".tmp")
        modalities[name] = spool.read_spool(
            folders, np.asarray(obs["keys"]), n_features, s.packed[name]
        )
    cells = ShardCells(modalities, obs["batch"], obs["label"], obs["barcodes"])
    written = write_shard(task.store, manifest, task.stratum, task.shard, cells)
    digests = json.dumps({key: shard.model_dump() for key, shard in written.items()})
    write_file(task.out, digests, unique=True)  # a worker given up for dead may still write it


def _provenance(
    sources: Sequence[Source],
    heads: Sequence[SourceHead],
    plan: features.FeaturePlan,
    cells: CellTable,
    final: strata.FinalStrata,
    options: ConversionOptions,
    kept: Mapping[str, SelectedFeatures],
) -> dict[str, Any]:
    """Where the cells came from and what was left out. Base names only: a store may be passed on."""
    inputs = []
    for i, (source, head) in enumerate(zip(sources, heads, strict=True)):
        bit = 1 << list(plan.modalities).index(source.modality)
        note = {
            "file": source.display_name,
            "modality": source.modality,
            "dataset": source.dataset,
            "cells": head.n_rows,
            "empty": final.lost(np.load(cells.sources[i] / "keys.npy", mmap_mode="r"), bit),
            "features": plan.notes[i],
            "names": head.name_column or "var_names",
        }
        inputs.append(
            note | ({"counted": source.counted_unit} if isinstance(source, FragmentsSource) else {})
        )
    return {
        "tool": f"data_prep {clue_dist.__version__}",
        "seed": options.seed,
        "inputs": inputs,
        "features": {
            name: options.feature_choices.get(name, FeatureChoice()).describe_identity()
            for name in plan.modalities
        },
        "selected": {name: chosen.note for name, chosen in kept.items()},
        "columns": dict(options.obs_columns.by_field),
        "cells": {"in": len(cells), "dropped": final.dropped}
        | {f"without_{field}": strata.count_unknown(final, cells, field) for field in FIELDS},
    }


def format_conversion(manifest: Manifest) -> str:
    """What a person should know after a conversion, in a few lines."""
    lines = [f"{manifest.n_cells:,} cells, fingerprint {manifest.fingerprint[:16]}"]
    lines += [f"  {name}: {s.n_cells:,} cells" for name, s in manifest.strata.items()]
    return "\n".join(lines + format_notes(manifest, manifest.provenance))


def format_notes(manifest: Manifest, notes: Mapping[str, Any]) -> list[str]:
    """What became of the inputs of a conversion, or of an addition to the store, by its notes in the provenance."""
    lines = []
    for what, names in (("batch", manifest.batches), ("label", manifest.labels)):
        if names and (n := notes["cells"][f"without_{what}"]):
            column = notes["columns"][what]
            lines.append(
                f"  {n:,} cells have no {what}: their files have nothing in column {column!r} of obs"
            )
    for name, note in notes["selected"].items():
        lines.append(f"  {name}: {note['kept']:,} of {note['of']:,} features, {note['by']}")
    if notes["cells"]["dropped"]:
        lines.append(f"  dropped: {notes['cells']['dropped']:,} cells with no counts at all")
    for item in notes["inputs"]:
        if item["empty"]:
            lines.append(
                f"  {item['file']}: {item['empty']:,} cells have no {item['modality']} counts and lose that modality"
            )
        for what in ("missing", "extra"):
            if n := item["features"][what]:
                became = "become zero" if what == "missing" else "are dropped"
                first = list_names(item["features"]["first_" + what])
                lines.append(f"  {item['file']}: {n:,} features {what}, {became} ({first})")
    return lines
