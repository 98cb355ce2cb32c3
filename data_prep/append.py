"""More cells for a store that is there: new segments of its strata, and a manifest that lists them too.

Nothing of the store is rewritten but its manifest, which is renamed into place last: until then it is the store that it
was. A killed addition goes on when it is typed again.

    STORE.addition.partial/              a conversion like any other (see `convert`), fitted to the store's features
    STORE/strata/<rna+adt.2>/            where its strata go; unknown to the store until the manifest is written
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clue_dist.errors import DataError, StoreError, listed
from clue_dist.store import layout, svd
from clue_dist.store.manifest import Manifest, Shard
from clue_dist.store.reader import Store, StratumReader
from clue_dist.store.writer import metadata
from data_prep.cells import Cells
from data_prep.convert import Options, build, description
from data_prep.inputs import Input
from data_prep.job import job
from data_prep.sources import decode
from data_prep.tasks import Pool

APPENDED = "appended"  # in the provenance: one entry for each addition
BUILT = "addition.json"  # in the addition's folder: its manifest; from here on its strata may be in the store
DONE = "becomes"  # in the addition's folder: the fingerprint that the store is about to get
BLOCKS = 4096  # whose barcodes are read at once


def append(inputs: Sequence[Input], root: Path, options: Options, pool: Pool) -> Manifest:
    """Add the cells of `inputs`; returns the store's new manifest, whose fingerprint is another.

    options: `features_from`, `block_cells` and `codec` are the store's own, whatever they say.

    Raises:
        DataError: inputs that are not what they should be, modalities the store lacks, cells that are in it already.
        StoreError: no store there, another addition is under way, or the disk is full.
    """
    store = Store(root)
    old = store.manifest
    partial = root.with_name(root.name + ".addition.partial")
    if (partial / DONE).exists() and (partial / DONE).read_text() == old.fingerprint:
        shutil.rmtree(partial)  # left by a run that was killed after its commit
        return old
    options = replace(options, features_from=root, block_cells=old.block_cells, codec=old.codec)
    with job(partial.with_suffix(""), description(inputs, options, old)) as partial:
        if not (partial / BUILT).exists():
            built = build(inputs, options, old, partial, pool, lambda cells: _refuse_known(cells, store))
            _write(partial / BUILT, built.model_dump_json())
        addition = Manifest.model_validate_json((partial / BUILT).read_bytes())
        return _graft(addition, partial, old, root)


def _refuse_known(cells: Cells, store: Store) -> None:
    known = [found for reader in store.strata.values() for found in _known(cells, reader)]
    if known:
        names = np.concatenate(known)
        raise DataError(
            f"{len(names)} cells are in the store already",
            where=store.root,
            got=listed(decode(names)),
            expected="cells with barcodes of their own",
            fix="other cells with the same barcodes need a prefix, `lane2:FILE`; for more modalities of the same "
            "cells, convert all files again",
        )


def _known(cells: Cells, reader: StratumReader) -> Iterator[np.ndarray]:
    """Barcodes of a stratum that are also new ones."""
    step = BLOCKS * reader.block_cells
    for first in range(0, reader.n_cells, step):
        found = cells.among(reader.barcodes(np.arange(first, min(first + step, reader.n_cells))))
        if len(found):
            yield found


def _graft(addition: Manifest, partial: Path, old: Manifest, root: Path) -> Manifest:
    """Move the strata of an addition into the store as further segments, then commit."""
    segments = Counter(layout.group_of(name) for name in old.strata)
    names = {name: layout.stratum_name(s.modalities, segments[name] + 1) for name, s in addition.strata.items()}
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
        _move(partial / "store" / "strata" / name, root / "strata" / final)
        found |= metadata(root, f"strata/{final}")
    new = new.model_copy(update={"metadata": found})
    shutil.rmtree(root / svd.FOLDER, ignore_errors=True)  # of other cells from now on
    _write(partial / DONE, new.computed_fingerprint())
    return new.write(root)


def _renamed(addition: Manifest, names: dict[str, str]) -> dict[str, Shard]:
    out: dict[str, Shard] = {}
    for key, shard in addition.shards.items():
        strata, name, rest = key.split("/", 2)
        out[f"{strata}/{names[name]}/{rest}"] = shard
    return out


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.rename(path)


def _move(source: Path, target: Path) -> None:
    """Give a stratum its final name; where it has it already, an earlier run that was killed did so."""
    if not source.exists():
        return
    if target.exists():
        shutil.rmtree(target)  # of an addition that was given up
    try:
        os.rename(source, target)
    except OSError as error:
        raise StoreError("the store cannot be written", where=target, got=error, fix="mend that, then go on") from error


def appended(manifest: Manifest) -> str:
    """What a person should know after an addition."""
    lines = [f"{manifest.n_cells:,} cells, fingerprint {manifest.fingerprint[:16]}"]
    lines += [f"  {name}: {s.n_cells:,} cells" for name, s in manifest.strata.items()]
    return "\n".join([*lines, "  a stored SVD is gone: it was of the cells before"])
