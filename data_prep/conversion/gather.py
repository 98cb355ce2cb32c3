"""The second pass of a conversion: every shard collects its rows from the spools and is written.

WORK/manifest.json          for the tasks: the manifest, which has no shards yet
WORK/shards/rna-000000.json          one for each task: size and hash of the files it has written
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clue_dist.files import TEMPORARY_ENDING, write_file
from clue_dist.store.manifest import Manifest
from clue_dist.store.manifest_parts import FileDigest
from clue_dist.store.writer import ShardCells, write_shard
from data_prep.conversion.kept_obs import gather_kept_values
from data_prep.conversion.spool import read_spools
from data_prep.jobs.array_files import load_array
from data_prep.jobs.workers import WorkerPool, run_missing


@dataclass(frozen=True)
class _GatherTask:
    """Write one shard of a segment."""

    manifest: Path
    store: Path
    segment: str
    shard: int
    cells: Path  # what `settle_strata` has written of the segment
    spools: Path  # a folder for each modality
    sources: Path  # a folder for each source, with the columns of obs that are kept
    out: Path


def gather_shards(
    manifest: Manifest, store: Path, work: Path, pool: WorkerPool
) -> dict[str, FileDigest]:
    """Write every shard of a store; return size and hash of each file."""
    (work / "shards").mkdir(exist_ok=True)
    manifest_file = work / "manifest.json"
    manifest_file.write_text(manifest.model_dump_json())
    tasks = {}
    for name, segment in manifest.strata.items():
        shard_cells = segment.shard_blocks * manifest.block_cells
        cells = work / "strata" / name
        for shard in range(-(-segment.n_cells // shard_cells)):
            out = work / "shards" / f"{name}-{shard:06d}.json"
            spools, sources = work / "spools", work / "sources"
            tasks[out] = _GatherTask(manifest_file, store, name, shard, cells, spools, sources, out)
    run_missing(pool, "write", _gather_shard, tasks)
    shards: dict[str, FileDigest] = {}
    for path in tasks:
        digests = json.loads(path.read_text())
        shards |= {file: FileDigest(**digest) for file, digest in digests.items()}
    return dict(sorted(shards.items()))


def _gather_shard(task: _GatherTask) -> None:
    """Collect the rows of one shard from all spools, and write its files."""
    manifest = Manifest.model_validate_json(task.manifest.read_bytes())
    segment = manifest.strata[task.segment]
    shard_cells = segment.shard_blocks * manifest.block_cells
    span = slice(task.shard * shard_cells, (task.shard + 1) * shard_cells)
    # Mapped: only this shard's cells are read.
    keys, batch, label, barcodes = (
        load_array(task.cells / f"{name}.npy")[span]
        for name in ("keys", "batch", "label", "barcodes")
    )
    modalities = {}
    for name in segment.modalities:
        n_features = manifest.modalities[name].n_features
        # A spool with this ending belongs to a worker that died while it wrote.
        spools = sorted(p for p in (task.spools / name).iterdir() if p.suffix != TEMPORARY_ENDING)
        packed = segment.packed[name]
        modalities[name] = read_spools(spools, np.asarray(keys), n_features, packed)
    kept: list[np.ndarray] = []
    if manifest.obs_columns:
        folders = sorted(task.sources.iterdir())
        kept = gather_kept_values(manifest.obs_columns, folders, np.asarray(keys))
    cells = ShardCells(modalities, batch, label, barcodes, kept)
    written = write_shard(task.store, manifest, task.segment, task.shard, cells)
    digests = json.dumps({file: digest.model_dump() for file, digest in written.items()})
    write_file(task.out, digests, unique=True)  # a worker given up for dead may still write it
