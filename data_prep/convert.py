"""The conversion: any inputs -> one committed store. Read `convert` for the whole of it.

First pass (scatter): ranges of rows are read, validated, aligned and spooled, sorted by their shuffled place.
Second pass (gather): each shard collects its rows from the spools and is written. Memory is bounded by a range or
a shard. Every task leaves its result under its final name or not at all, so a killed conversion goes on by
skipping what is there; nothing depends on the order of tasks, so any number of workers gives the same bytes.

    OUT.partial/job.json                 what is being converted; another job is refused
    OUT.partial/work/                    columns, spools, strata: per-cell arrays the tasks read
    OUT.partial/store/                   the store to be; renamed to OUT once the manifest is in it
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

import clue_dist
from clue_dist.errors import listed
from clue_dist.store import layout
from clue_dist.store.manifest import Manifest, Shard
from clue_dist.store.place import place_of
from clue_dist.store.writer import Cells as ShardCells
from clue_dist.store.writer import commit, create, write_shard
from data_prep import cells as cell_table
from data_prep import counts, features, spool, strata
from data_prep.cells import Cells
from data_prep.counts import Target
from data_prep.job import job
from data_prep.sources import Head, Keys, Source, decode
from data_prep.tasks import Pool, Progress

TASK_ENTRIES = 2**20  # stored values of a scatter task, up to eight times as many ...
MANY_TASKS = 2000  # ... where there would be more tasks than this: each shard looks into every spool


@dataclass(frozen=True)
class Options:
    """What decides the result, beside the inputs."""

    seed: int = 0
    block_cells: int = layout.BLOCK_CELLS
    codec: Literal["fast", "small"] = "fast"
    features: features.Mode = "same"
    features_from: str | Path | None = None
    kinds: dict[str, str] = field(default_factory=dict)
    keys: Keys = field(default_factory=Keys)


def convert(sources: list[Source], out: Path, options: Options, pool: Pool) -> Manifest:
    """Convert `sources` into a store at `out`; goes on where an interrupted run of the same job stopped.

    Raises:
        DataError: inputs that are not what they should be (see `cells.join`, `features.plan`, `counts.canonical`).
        StoreError: something is at `out` already, or another job was or is under way there.
    """
    reference = None if options.features_from is None else Manifest.read(place_of(options.features_from))
    with job(out, _description(sources, options, reference)) as partial:
        work, store = partial / "work", partial / "store"
        heads = [source.head() for source in sources]
        plan = features.plan(sources, heads, options.kinds, options.features, reference)
        known = {"batch": reference.batches, "label": reference.labels} if reference else {}
        cells = cell_table.join(sources, heads, list(plan.modalities), known, options.keys, options.seed)

        _prepare(sources, work, pool)
        spools = _scatter(sources, heads, plan, cells, work, pool)
        files = {name: listed(s.where for s in sources if s.modality == name) for name in plan.modalities}
        final = strata.settle(cells, plan.modalities, files, spools, options.block_cells, work / "strata")
        notes = _provenance(sources, heads, plan, cells, final, options)
        manifest = strata.manifest(final, cells, plan.modalities, options.block_cells, options.codec, notes)
        create(store, manifest)
        shards = _gather(manifest, store, work, spools, pool)

        return commit(store, out, manifest.model_copy(update={"shards": shards}))


def _description(sources: list[Source], options: Options, reference: Manifest | None) -> dict[str, Any]:
    """All that decides the result: if any of it changes, what an interrupted run left is of no use."""
    return {
        "inputs": [source.identity() for source in sources],
        "options": {k: v for k, v in vars(options).items() if k not in ("keys", "features_from")},
        "columns": dict(options.keys.columns),
        "features_from": reference.fingerprint if reference else None,
        "version": [clue_dist.__version__, layout.VERSION],
    }


@dataclass(frozen=True)
class _Prepare:
    source: Source
    part: int
    scratch: Path


@dataclass(frozen=True)
class _Scatter:
    source: Source
    target: Target
    lo: int
    hi: int
    scratch: Path
    keys: Path
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


def _run(pool: Pool, title: str, function: Any, tasks: dict[Path, Any]) -> None:
    """Run the tasks whose result is not there yet."""
    missing = [task for path, task in tasks.items() if not path.exists()]
    progress = Progress(title, len(tasks), len(tasks) - len(missing))
    try:
        pool.run(function, missing, progress)
    finally:
        progress.close()


def _prepare(sources: list[Source], work: Path, pool: Pool) -> None:
    """Sort the inputs whose rows cannot be read directly."""
    tasks: dict[Path, _Prepare] = {}
    for i, source in enumerate(sources):
        scratch = work / "prepared" / f"{i:03d}"
        tasks |= {scratch / f"{part:06d}": _Prepare(source, part, scratch) for part in range(source.parts())}
    if tasks:
        _run(pool, "sort entries", _prepare_part, tasks)


def _prepare_part(task: _Prepare) -> None:
    task.source.prepare(task.part, task.scratch)


def _scatter(
    sources: list[Source], heads: list[Head], plan: features.Plan, cells: Cells, work: Path, pool: Pool
) -> dict[str, list[Path]]:
    """Spool every row of every source; returns the spools of each modality."""
    tasks: dict[Path, _Scatter] = {}
    spools: dict[str, list[Path]] = {name: [] for name in plan.modalities}
    entries = min(max(sum(head.nnz for head in heads) // MANY_TASKS, TASK_ENTRIES), 8 * TASK_ENTRIES)
    for i, (source, head) in enumerate(zip(sources, heads, strict=True)):
        folder = work / "sources" / f"{i:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "keys.npy", cells.keys(cells.rows[i]))
        columns = plan.columns[i]
        if columns is not None:
            np.save(folder / "columns.npy", columns)
        modality = plan.modalities[source.modality]
        target = Target(modality.kind, modality.n_features, None if columns is None else folder / "columns.npy")
        step = max(1, entries * head.n_rows // max(head.nnz, 1))
        for lo in range(0, head.n_rows, step):
            out = work / "spools" / source.modality / f"{i:03d}-{lo:012d}"
            hi = min(lo + step, head.n_rows)
            tasks[out] = _Scatter(source, target, lo, hi, work / "prepared" / f"{i:03d}", folder / "keys.npy", out)
            spools[source.modality].append(out)
    _run(pool, "read", _scatter_rows, tasks)
    return spools


def _scatter_rows(task: _Scatter) -> None:
    rows = task.source.read(task.lo, task.hi, task.scratch)
    keys = np.load(task.keys, mmap_mode="r")[task.lo : task.hi]
    spool.write(task.out, np.asarray(keys), counts.canonical(task.source, task.target, rows, task.lo))


def _gather(manifest: Manifest, store: Path, work: Path, spools: dict[str, list[Path]], pool: Pool) -> dict[str, Shard]:
    """Write every shard; returns size and hash of each file."""
    (work / "shards").mkdir(exist_ok=True)
    (work / "manifest.json").write_text(manifest.model_dump_json())
    tasks = {}
    for name, s in manifest.strata.items():
        for shard in range(-(-s.n_cells // (s.shard_blocks * manifest.block_cells))):
            out = work / "shards" / f"{name}-{shard:06d}.json"
            tasks[out] = _Gather(
                work / "manifest.json", store, name, shard, work / "strata" / name, work / "spools", out
            )
    _run(pool, "write", _gather_shard, tasks)
    shards: dict[str, Shard] = {}
    for path in tasks:
        shards |= {key: Shard(**value) for key, value in json.loads(path.read_text()).items()}
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
        packed, n_features = s.packed[name], manifest.modalities[name].n_features
        folders = sorted(p for p in (task.spools / name).iterdir() if p.suffix != ".tmp")
        dtype = packed.values or packed.counts or "uint8"
        modalities[name] = spool.read(folders, np.asarray(obs["keys"]), n_features, dtype)
    cells = ShardCells(modalities, obs["batch"], obs["label"], decode(obs["barcodes"]))
    written = write_shard(task.store, manifest, task.stratum, task.shard, cells)
    temporary = task.out.with_suffix(".tmp")
    temporary.write_text(json.dumps({key: shard.model_dump() for key, shard in written.items()}))
    temporary.rename(task.out)


def _provenance(
    sources: list[Source], heads: list[Head], plan: features.Plan, cells: Cells, final: strata.Final, options: Options
) -> dict[str, Any]:
    """Where the cells came from and what was left out. Base names only: a store may be passed on."""
    inputs = []
    for i, (source, head) in enumerate(zip(sources, heads, strict=True)):
        bit = 1 << list(plan.modalities).index(source.modality)
        empty = int(((final.mask[cells.rows[i]] & bit) == 0).sum())
        note = {
            "file": source.where,
            "modality": source.modality,
            "dataset": source.dataset,
            "cells": head.n_rows,
            "empty": empty,
        }
        inputs.append(note | {"features": plan.notes[i]})
    return {
        "tool": f"data_prep {clue_dist.__version__}",
        "seed": options.seed,
        "inputs": inputs,
        "cells": {"in": len(cells.barcodes), "dropped": int((final.mask == 0).sum())},
    }


def report(manifest: Manifest) -> str:
    """What a person should know after a conversion, in a few lines."""
    notes = manifest.provenance
    lines = [f"{manifest.n_cells:,} cells, fingerprint {manifest.fingerprint[:16]}"]
    lines += [f"  {name}: {s.n_cells:,} cells" for name, s in manifest.strata.items()]
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
                lines.append(
                    f"  {item['file']}: {n:,} features {what}, {became} ({listed(item['features']['first_' + what])})"
                )
    return "\n".join(lines)
