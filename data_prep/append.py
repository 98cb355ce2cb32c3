"""More cells for a store that is there: new segments of its strata, and a manifest that lists them too.

Nothing of the store is rewritten but its manifest, which is renamed into place last: until then it is the store that it
was. A killed addition goes on when it is typed again.

    STORE.addition.partial/              a conversion like any other (see `convert`), fitted to the store's features
    STORE/strata/<rna+adt.2>/            where its strata go; unknown to the store until the manifest is written
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

from clue_dist.errors import DataError, StoreError, list_names
from clue_dist.files import write_file
from clue_dist.store import layout, svd
from clue_dist.store.location import Location, parse_location
from clue_dist.store.manifest import FileDigest, Manifest
from clue_dist.store.reader import SegmentReader, Store
from clue_dist.store.writer import hash_metadata
from data_prep.conversion.cells import CellTable
from data_prep.convert import ConversionOptions, build_store, describe_conversion, format_notes
from data_prep.jobs.job_folder import (
    claim_job,
    discard_job,
    find_partial_folder,
    normalise_json,
    read_job,
)
from data_prep.jobs.whole_files import remove_leftovers
from data_prep.jobs.workers import WorkerPool
from data_prep.readers.fragments import ConversionInput
from data_prep.readers.source import decode_barcodes

APPENDED = "appended"  # in the provenance: one entry for each addition
BUILT = "addition.json"  # in the addition's folder: its manifest; from here on its strata may be in the store
DONE = "becomes"  # in the addition's folder: the fingerprint that the store is about to get
BLOCKS = 4096  # whose barcodes are read at once


def append_cells(
    inputs: Sequence[ConversionInput],
    where: str | Location,
    options: ConversionOptions,
    pool: WorkerPool,
) -> Manifest:
    """Add the cells of `inputs`; returns the store's new manifest, whose fingerprint is another.

    options: `features_from`, `block_cells` and `codec` are the store's own, whatever they say; choices: bins alone.

    Raises:
        DataError: inputs that are not what they should be, modalities the store lacks, cells that are in it already;
            other cells were added meanwhile.
        StoreError: no store there, or not a folder; another addition is under way; the disk is full.
    """
    root = parse_location(where)
    if not isinstance(root, Path):
        raise StoreError(
            "cells can only be added to a folder",
            where=where,
            fix="add them there, then copy it again",
        )
    root = (
        root.resolve()
    )  # a link may lead to another disk, and the addition must lie beside the store
    out = root.with_name(root.name + ".addition")
    store = Store(root)
    old = store.manifest
    _forget_svd(root, old)  # of other cells, if the last addition was killed before it came to it
    if _was_committed(find_partial_folder(out), describe_conversion(inputs, options, old), old):
        return old
    options = replace(options, features_from=root, block_cells=old.block_cells, codec=old.codec)
    with claim_job(out, describe_conversion(inputs, options, old), "addition") as folder:
        if Manifest.read(root).fingerprint != old.fingerprint:
            raise DataError(
                "other cells were added meanwhile", where=root, fix="run the same command again"
            )
        built = _built(folder)
        _remove_strays(root, old, {} if built is None else _segments(built, old))
        if built is None:
            built = build_store(
                inputs, options, old, folder, pool, lambda cells: _refuse_known(cells, store)
            )
            write_file(folder / BUILT, built.model_dump_json())
        return _graft(built, folder, old, root)


def _was_committed(partial: Path, wanted: dict[str, Any], now: Manifest) -> bool:
    """Whether these inputs are in the store already, added by a run that was killed right after its commit. What it
    left is removed, whatever it was."""
    before = read_job(partial)
    if before is None or not any(
        done.read_text() == now.fingerprint for done in partial.glob(f"*/{DONE}")
    ):
        return False
    discard_job(partial)
    decided = (
        "inputs",
        "features",
        "columns",
    )  # the rest is the store's, which is another one since
    return all(before.get(key) == normalise_json(wanted)[key] for key in decided)


def _built(folder: Path) -> Manifest | None:
    path = folder / BUILT
    return Manifest.model_validate_json(path.read_bytes()) if path.exists() else None


def _remove_strays(root: Path, manifest: Manifest, coming: Mapping[str, str]) -> None:
    """Strata in the store's folder that neither it nor this addition knows: of an addition that was given up."""
    for folder in (root / "strata").iterdir():
        if (
            folder.is_dir()
            and folder.name not in manifest.strata
            and folder.name not in coming.values()
        ):
            shutil.rmtree(folder)
    remove_leftovers(root / "strata")
    (root / f"{layout.MANIFEST}.tmp").unlink(missing_ok=True)


def _refuse_known(cells: CellTable, store: Store) -> None:
    known = [found for reader in store.segments.values() for found in _known(cells, reader)]
    if known:
        names = np.concatenate(known)
        raise DataError(
            f"{len(names)} cells are in the store already",
            where=store.root,
            got=list_names(decode_barcodes(names)),
            expected="cells with barcodes of their own",
            fix="other cells with the same barcodes need a prefix, `lane2:FILE`; for more modalities of the same "
            "cells, convert all files again",
        )


def _known(cells: CellTable, reader: SegmentReader) -> Iterator[np.ndarray]:
    """Barcodes of a stratum that are also new ones."""
    step = BLOCKS * reader.block_cells
    for first in range(0, reader.n_cells, step):
        found = cells.among(
            reader.read_barcodes(np.arange(first, min(first + step, reader.n_cells)))
        )
        if len(found):
            yield found


def _segments(addition: Manifest, old: Manifest) -> dict[str, str]:
    """What the strata of an addition are called in the store."""
    there = Counter(layout.name_stratum(name) for name in old.strata)
    return {
        name: layout.name_segment(s.modalities, there[name] + 1)
        for name, s in addition.strata.items()
    }


def _graft(addition: Manifest, folder: Path, old: Manifest, root: Path) -> Manifest:
    """Move the strata of an addition into the store as further segments, then commit."""
    for name, modality in addition.modalities.items():
        if modality != old.modalities[name]:
            raise RuntimeError(f"an addition with other features of {name} than its store")
    names = _segments(addition, old)
    notes = {APPENDED: [*old.provenance.get(APPENDED, []), addition.provenance]}
    new = old.model_copy(
        update={
            "batches": addition.batches,
            "labels": addition.labels,
            "strata": old.strata | {names[name]: s for name, s in addition.strata.items()},
            "shards": dict(sorted((old.shards | _renamed(addition, names)).items())),
            "provenance": old.provenance | notes,
        }
    )
    new = Manifest.model_validate(new.model_dump())
    found = dict(old.metadata)
    for name, final in names.items():
        _move(folder / "store" / "strata" / name, root / "strata" / final)
        found |= hash_metadata(root, f"strata/{final}")
    new = new.model_copy(update={"metadata": found})
    write_file(folder / DONE, new.compute_fingerprint())
    new = new.write(root)
    _forget_svd(root, new)
    return new


def _forget_svd(root: Path, now: Manifest) -> None:
    """Remove an SVD that is not of the cells there are now."""
    try:
        svd.list_svds(root, now)
    except StoreError:
        shutil.rmtree(root / svd.FOLDER)
        print(f"{root}: the stored SVD was of the cells before, and is gone", file=sys.stderr)


def _renamed(addition: Manifest, names: dict[str, str]) -> dict[str, FileDigest]:
    out: dict[str, FileDigest] = {}
    for key, shard in addition.shards.items():
        strata, name, rest = key.split("/", 2)
        out[f"{strata}/{names[name]}/{rest}"] = shard
    return out


def _move(source: Path, target: Path) -> None:
    """Give a stratum its final name; where it has it already, an earlier run that was killed did so."""
    if not source.exists():
        return
    try:
        os.rename(source, target)
    except OSError as error:
        raise StoreError(
            "the store cannot be written", where=target, got=error, fix="mend that, then go on"
        ) from error


def format_addition(manifest: Manifest) -> str:
    """What a person should know after an addition."""
    notes = manifest.provenance[APPENDED][-1]
    lines = [f"{manifest.n_cells:,} cells, fingerprint {manifest.fingerprint[:16]}"]
    lines += [f"  {name}: {s.n_cells:,} cells" for name, s in manifest.strata.items()]
    return "\n".join(lines + format_notes(manifest, notes))
