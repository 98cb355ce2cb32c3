"""Is a store that was damaged ever served wrong, and does `data_prep check` find every damage and name its place?

.venv/bin/python -m tests.benchmarks.damage --json OUT.json [--quick]

A small store of four strata, sparse and dense modalities, is converted, and damaged at random places, one at a time:
chunks inside shards, shards, metadata, the manifest. After each, the store is checked and all of it is read.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from clue_dist.errors import StoreError
from clue_dist.process import run_main
from clue_dist.store import layout
from clue_dist.store.reader import Store
from data_prep.check import check_store
from tests.benchmarks import common
from tests.benchmarks.common import Bar, Result, Run
from tests.benchmarks.damage.harm import KINDS, PLACES, Kind, damages, done
from tests.benchmarks.damage.serve import Values, everything, wrong_values
from tests.distributed.command import ROOT
from tests.unit.prep_helpers import convert_files, make_anndata, make_counts, write_h5mu

DAMAGES, QUICK = 100, 12  # of each kind
FOUND = Bar(
    f"damages of {len(KINDS) * DAMAGES} that `data_prep check` finds and names",
    ">=",
    len(KINDS) * DAMAGES,
)
WRONG = Bar("wrong values served", "<=", 0)
SOURCES = (
    "clue_dist/store",
    "clue_dist/data",
    "data_prep",
    "tests/benchmarks/damage",
    "tests/unit/prep_helpers.py",
)

FOOTNOTES = f"""\
places: {", ".join(PLACES)} in turns; a chunk is missing or truncated by a shard's index with a checksum that fits
found: check lists a problem or refuses the store, and names the damaged file
refused: Store, its readers or the loader raised StoreError
what none refused holds nothing that they read: metadata of groups, provenance, spaces"""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    return common.parser("damage", __doc__, "damage").parse_args(words)


def runs_of(args: argparse.Namespace) -> list[Run]:
    digest = common.digest(*(ROOT / part for part in SOURCES), str(args.quick))
    return [Run(kind, "mosaic", 0, 0, digest) for kind in KINDS]


def store_in(folder: Path) -> Path:
    """A store of rna, atac (binary), adt (dense) and other (dense, real numbers), in four strata of several shards."""
    have = {
        "rna": slice(0, 300),
        "adt": slice(0, 200),
        "other": slice(0, 100),
        "atac": slice(200, 420),
    }
    parts = {}
    for seed, (name, mine) in enumerate(have.items()):
        counts = make_counts(420, 30, seed, prefix=name)[mine]
        values = {"atac": counts.clip(upper=1), "other": counts / 7}.get(name, counts)
        number = np.arange(mine.start, mine.stop)
        obs = {
            "batch": [f"batch-{i % 3}" for i in number],
            "cell_type": [f"type-{i % 5}" for i in number],
        }
        parts[name] = make_anndata(values, **obs)
    given = write_h5mu(folder / "cells.h5mu", **parts)
    with mock.patch.object(layout, "SHARD_BYTES", 1):  # so that few cells fill several shards
        convert_files(folder / "cells.zarr", str(given), block_cells=4, kinds={"other": "dense"})
    return folder / "cells.zarr"


def do(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    """All damages of a kind."""
    root = store_in(folder)
    kind = next(k for k in KINDS if k == run.method)
    return damaged(root, everything(Store(root)), kind, QUICK if args.quick else DAMAGES, run.seed)


def damaged(root: Path, sound: Values, kind: Kind, count: int, seed: int) -> Result:
    """`count` random damages of the sound store at `root`, of which all values are `sound`."""
    missed, wrong, refused, places = [], 0, 0, dict.fromkeys(PLACES, 0)
    for damage in damages(root, kind, count, seed):
        places[damage.what] += 1
        with done(damage, root):
            problems = checked(root)
            if not any(damage.file in problem for problem in problems):
                missed.append(f"{damage}; told: {problems}")
            values, any_refused = wrong_values(root, sound)
        wrong, refused = wrong + values, refused + any_refused
    totals = {"damages": count, "found": count - len(missed), "refused": refused, "wrong": wrong}
    return totals | {"places": places, "missed": missed}


def checked(root: Path) -> list[str]:
    """What `data_prep check` tells."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return check_store(root)
        except StoreError as error:
            return [str(error)]


def told(record: Result) -> str:
    return f"{record['found']} of {record['damages']} found, {record['wrong']} wrong values"


def table(records: Sequence[Result]) -> str:
    rows = [["kind", "damages", *PLACES, "found", "refused", "wrong values"]]
    for r in records:
        numbers = [r["damages"], *r["places"].values(), r["found"], r["refused"], r["wrong"]]
        rows.append([r["method"], *map(str, numbers)])
    missed = [line for r in records for line in r["missed"]]
    return "\n".join([common.aligned(rows), *(["", "not found:", *missed] if missed else [])])


def bars_of(records: Sequence[Result], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Judged where all kinds were done, and never on a quick look."""
    whole = not args.quick and len(records) == len(KINDS)
    yield FOUND.judged(sum(r["found"] for r in records) if whole else None)
    yield WRONG.judged(sum(r["wrong"] for r in records) if whole else None)


def main() -> None:
    args = arguments()
    common.carry_out(
        args,
        runs_of(args),
        common.Steps(lambda run, folder: do(run, folder, args)),
        told,
        table,
        FOOTNOTES,
        lambda records: bars_of(records, args),
    )


if __name__ == "__main__":
    run_main(main)
