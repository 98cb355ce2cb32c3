"""Which cells there are: rows joined by barcode across modalities, batch and label of each, in shuffled order.

A hash of its barcode, keyed by the seed, gives a cell its place in the shuffle of all. So cells are joined one range of
hashes after another, in the order in which they will lie, and memory does not grow with their number.

    WORK/cells/rows/000-000000000000/    rows of a source: hash, barcode, codes; sorted by hash
    WORK/cells/joined/0003/              cells of one range of hashes, and which rows they have
    WORK/sources/000/                    of each row of a source: its spool key, its batch
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.errors import DataError, list_names
from clue_dist.store.shuffle import derive_key, hash_barcodes
from data_prep.conversion.spool import GROUP_SHIFT
from data_prep.jobs.whole_files import flush_arrays, make_whole_folder, map_array, save_array
from data_prep.jobs.workers import WorkerPool, run_missing
from data_prep.options import ObsColumns
from data_prep.readers.source import Source, SourceHead, decode_barcodes

ROWS = 2**18  # of a source that a task lists at once
RANGE = 2**18  # rows of a range of hashes, about; some 40 MB
TOLD = 10  # barcodes that an error names


@dataclass(frozen=True)
class CellRange:
    """Cells of one range of hashes, in shuffled order. first: place of the first in the shuffle of all; hashes: (n,)
    uint64, ascending; barcodes: (n,) bytes, `dataset:barcode`; planned: (n,) int64, bit m set where the inputs list
    modality m; codes: per field, (n,) int32 into `Cells.names`, -1 = unknown."""

    first: int
    hashes: np.ndarray
    barcodes: np.ndarray
    planned: np.ndarray
    codes: dict[str, np.ndarray]

    @property
    def keys(self) -> np.ndarray:
        """Spool keys: planned strata apart, shuffled inside. (n,) int64."""
        out: np.ndarray = (self.planned << GROUP_SHIFT) + np.arange(
            self.first, self.first + len(self.planned)
        )
        return out


@dataclass(frozen=True)
class CellTable:
    """Every cell of the inputs, in folders. starts: (P + 1,), place of the first cell of each; key: of the hash; names:
    per field; sources: folders of `keys.npy` and `batch.npy`, a number for each row."""

    folders: list[Path]
    starts: np.ndarray
    key: int
    names: dict[str, list[str]]
    sources: list[Path]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def parts(self) -> Iterator[CellRange]:
        """In shuffled order."""
        for folder, first in zip(self.folders, self.starts.tolist(), strict=False):
            codes = {field: np.load(folder / f"{field}.npy") for field in self.names}
            hashes, barcodes, planned = (
                np.load(folder / f"{name}.npy") for name in ("hashes", "barcodes", "planned")
            )
            yield CellRange(first, hashes, barcodes, planned, codes)

    def among(self, barcodes: np.ndarray) -> np.ndarray:
        """Those of `barcodes`, (n,) bytes, that are a cell's."""
        hashes = hash_barcodes(barcodes, self.key)
        part = np.searchsorted(_bounds(len(self.folders)), hashes, side="right") - 1
        found = []
        for p in np.unique(part).tolist():
            there = np.load(self.folders[p] / "hashes.npy", mmap_mode="r")
            names = np.load(self.folders[p] / "barcodes.npy", mmap_mode="r")
            mine = np.flatnonzero(part == p)
            first, last = (
                np.searchsorted(there, hashes[mine], side=side) for side in ("left", "right")
            )  # type: ignore[call-overload]
            hits = np.flatnonzero(last > first)
            found += [
                barcodes[mine[i]]
                for i in hits.tolist()
                if barcodes[mine[i]] in names[first[i] : last[i]]
            ]
        return np.array(found, barcodes.dtype)


def extract_places(keys: np.ndarray) -> np.ndarray:
    """Of spool keys, places in the shuffle of all cells."""
    out: np.ndarray = keys & ((1 << GROUP_SHIFT) - 1)
    return out


@dataclass(frozen=True)
class _List:
    source: Source
    key: int
    codes: dict[str, np.ndarray]  # the final code of each of the source's own, -1 last
    lo: int
    hi: int
    out: Path


@dataclass(frozen=True)
class _Join:
    rows: list[list[Path]]  # of each source
    modality: list[int]
    fields: list[str]
    low: int
    high: int
    out: Path


def join_cells_by_barcode(
    sources: Sequence[Source],
    heads: Sequence[SourceHead],
    modalities: Sequence[str],
    known: Mapping[str, list[str]],
    keys: ObsColumns,
    seed: int,
    work: Path,
    pool: WorkerPool,
) -> CellTable:
    """Join the rows of all sources into cells. known: per field, names whose codes are taken already.

    Raises:
        DataError: a barcode twice in a modality of a data set; batch or label in dispute; a column that no file has.
    """
    n_rows = sum(head.n_rows for head in heads)
    if not n_rows:
        raise DataError(
            "the inputs hold no cells", where=list_names(s.display_name for s in sources)
        )
    names = {}
    for field in keys.by_field:
        _require_column(field, keys, heads)
        names[field] = _vocabulary(field, heads, known.get(field, []))
    key, of = derive_key(seed, "cells"), [list(modalities).index(s.modality) for s in sources]

    listing: list[dict[Path, _List]] = []
    for i, (source, head) in enumerate(zip(sources, heads, strict=True)):
        codes = {field: _renumbering(head, field, names[field]) for field in names}
        outs = {
            lo: work / "cells" / "rows" / f"{i:03d}-{lo:012d}" for lo in range(0, head.n_rows, ROWS)
        }
        listing.append(
            {
                p: _List(source, key, codes, lo, min(lo + ROWS, head.n_rows), p)
                for lo, p in outs.items()
            }
        )
    run_missing(
        pool, "list cells", _list_rows, {p: task for tasks in listing for p, task in tasks.items()}
    )

    bounds = [*_bounds(-(-n_rows // RANGE)).tolist(), 2**64]
    folders = [work / "cells" / "joined" / f"{p:04d}" for p in range(len(bounds) - 1)]
    rows = [list(tasks) for tasks in listing]
    joining = {
        out: _Join(rows, of, list(names), low, high, out)
        for out, low, high in zip(folders, bounds[:-1], bounds[1:], strict=True)
    }
    run_missing(pool, "join cells", _join_range, joining)
    _refuse_problems(folders, sources, modalities, names)
    counts = [len(np.load(folder / "planned.npy", mmap_mode="r")) for folder in folders]
    own = [work / "sources" / f"{i:03d}" for i in range(len(sources))]
    cells = CellTable(folders, np.concatenate([[0], np.cumsum(counts)]), key, names, own)
    _write_rows(cells, [head.n_rows for head in heads])
    return cells


def _bounds(ranges: int) -> np.ndarray:
    """The first hash of each of so many ranges."""
    return np.array([(p << 64) // ranges for p in range(ranges)], np.uint64)


def _list_rows(task: _List) -> None:
    """Rows of a source, sorted by the hash of their barcodes."""
    head, dataset = task.source.read_head(), task.source.dataset
    barcodes = head.barcodes[task.lo : task.hi]
    if dataset:
        barcodes = np.char.add(f"{dataset}:".encode(), barcodes)
    hashes = hash_barcodes(barcodes, task.key)
    order = np.argsort(hashes)
    with make_whole_folder(task.out) as folder:
        save_array(folder / "hashes.npy", hashes[order])
        save_array(folder / "barcodes.npy", barcodes[order])
        save_array(folder / "rows.npy", order + task.lo)
        for field, final in task.codes.items():
            own = (
                head.fields[field].codes[task.lo : task.hi]
                if field in head.fields
                else np.full(len(order), -1)
            )
            save_array(folder / f"{field}.npy", final[own][order])


def _join_range(task: _Join) -> None:
    """The cells whose hashes lie in one range; what is wrong with them is written down, to be told of all ranges."""
    parts = [
        (i, folder, _within(folder, task.low, task.high))
        for i, of in enumerate(task.rows)
        for folder in of
    ]

    def load(name: str) -> np.ndarray:
        return np.concatenate(
            [np.load(folder / f"{name}.npy", mmap_mode="r")[span] for _, folder, span in parts]
        )

    hashes, barcodes, rows = load("hashes"), load("barcodes"), load("rows")
    source = np.concatenate([np.full(span.stop - span.start, i) for i, _, span in parts])
    order = np.lexsort((barcodes, hashes))
    new = np.ones(len(order), bool)
    new[1:] = (hashes[order[1:]] != hashes[order[:-1]]) | (
        barcodes[order[1:]] != barcodes[order[:-1]]
    )
    cell = np.empty(len(order), np.int64)
    cell[order] = np.cumsum(new) - 1
    names = barcodes[order[new]]
    of = [np.flatnonzero(source == i) for i in range(len(task.rows))]

    twice: dict[int, Any] = {}
    planned = np.zeros(len(names), np.int64)
    for m in sorted(set(task.modality)):
        mine = np.concatenate([of[i] for i in range(len(of)) if task.modality[i] == m])
        times = np.bincount(cell[mine], minlength=len(names))
        planned |= (times > 0).astype(np.int64) << m
        if len(repeated := np.sort(names[times > 1])):
            twice[m] = {"number": len(repeated), "first": decode_barcodes(repeated[:TOLD]).tolist()}
    dispute = {}
    with make_whole_folder(task.out) as folder:
        for field in task.fields:
            agreed, told = _agreed(load(field), cell, of, names)
            save_array(folder / f"{field}.npy", agreed)
            if told:
                dispute[field] = told
        save_array(folder / "hashes.npy", hashes[order[new]])
        save_array(folder / "barcodes.npy", names)
        save_array(folder / "planned.npy", planned)
        for i, mine in enumerate(of):
            save_array(folder / f"rows-{i:03d}.npy", np.stack([rows[mine], cell[mine]]))
        (folder / "problems.json").write_text(json.dumps({"twice": twice, "dispute": dispute}))


def _within(folder: Path, low: int, high: int) -> slice:
    hashes = np.load(folder / "hashes.npy", mmap_mode="r")
    start = int(np.searchsorted(hashes, np.uint64(low)))
    stop = len(hashes) if high == 2**64 else int(np.searchsorted(hashes, np.uint64(high)))
    return slice(start, stop)


def _agreed(
    codes: np.ndarray, cell: np.ndarray, of: Sequence[np.ndarray], names: np.ndarray
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """One code per cell, and the cells whose sources disagree. codes, cell: of each row; of: rows of each source."""
    out = np.full(len(names), -1, np.int32)
    number, first = 0, []
    for i, mine in enumerate(of):
        theirs, before = codes[mine], out[cell[mine]]
        wrong = np.flatnonzero((theirs >= 0) & (before >= 0) & (theirs != before))
        number += len(wrong)
        some = wrong[np.argsort(names[cell[mine[wrong]]])][:TOLD]
        texts = decode_barcodes(names[cell[mine[some]]]).tolist()
        first += [
            [t, int(before[w]), int(theirs[w]), i]
            for t, w in zip(texts, some.tolist(), strict=True)
        ]
        out[cell[mine]] = np.where(theirs >= 0, theirs, before)
    return out, {"number": number, "first": first} if number else None


def _refuse_problems(
    folders: Sequence[Path],
    sources: Sequence[Source],
    modalities: Sequence[str],
    names: Mapping[str, list[str]],
) -> None:
    problems = [json.loads((folder / "problems.json").read_text()) for folder in folders]
    for m, modality in enumerate(modalities):
        number, first = _all_of([problem["twice"].get(str(m)) for problem in problems])
        if number:
            raise DataError(
                f"{number} barcodes occur more than once in modality {modality!r} of one data set",
                where=list_names(
                    dict.fromkeys(s.display_name for s in sources if s.modality == modality)
                ),
                got=list_names(first) + (f" ... and {number - TOLD} more" if number > TOLD else ""),
                expected="each cell once",
                fix="if the files are different data sets, keep them apart with a prefix: `lane1:FILE lane2:FILE`",
            )
    for field, values in names.items():
        number, first = _all_of([problem["dispute"].get(field) for problem in problems])
        if number:
            raise DataError(
                f"the modalities of {number} cells disagree on their {field}",
                where=sources[first[0][3]].display_name,
                got=list_names(
                    f"{barcode}: {values[a]!r} and {values[b]!r}" for barcode, a, b, _ in first
                ),
                expected="one value per cell, or none",
                fix="mend the column; if the barcodes name different cells, prefix the data sets: `lane1:FILE`",
            )


def _all_of(told: Sequence[Any]) -> tuple[int, list[Any]]:
    """How many there are of a problem in all ranges, and the first of them. told: of each range, None where none is."""
    found = [of for of in told if of]
    return sum(of["number"] for of in found), sorted(name for of in found for name in of["first"])[
        :TOLD
    ]


def _write_rows(cells: CellTable, n_rows: Sequence[int]) -> None:
    """Key and batch of every row of every source, in files: by this process alone, as rows of a range lie anywhere."""
    arrays = []
    for folder, n in zip(cells.sources, n_rows, strict=True):
        of = ("keys", np.int64), ("batch", np.int32)
        arrays.append({name: map_array(folder / f"{name}.npy", dtype, (n,)) for name, dtype in of})
    for part, folder in zip(cells.parts(), cells.folders, strict=True):
        keys = part.keys
        for i, mine in enumerate(arrays):
            rows, cell = np.load(folder / f"rows-{i:03d}.npy")
            if len(rows):
                mine["keys"][rows], mine["batch"][rows] = keys[cell], part.codes["batch"][cell]
    flush_arrays(array for mine in arrays for array in mine.values())


def _require_column(field: str, keys: ObsColumns, heads: Sequence[SourceHead]) -> None:
    if field in keys.explicit_fields and not any(field in head.fields for head in heads):
        columns = sorted({column for head in heads for column in head.obs_columns})
        raise DataError(
            f"no input has the {field} column asked for",
            where=f"--{field}-key {keys.by_field[field]}",
            got=f"columns: {list_names(columns, 30) or 'none'}",
            fix="name one of these columns",
        )


def _vocabulary(field: str, heads: Sequence[SourceHead], known: list[str]) -> list[str]:
    new = {name for head in heads if field in head.fields for name in head.fields[field].names}
    return known + sorted(new - set(known))


def _renumbering(head: SourceHead, field: str, names: list[str]) -> np.ndarray:
    """The code of each of a source's own names; the last one, which -1 means, stays unknown."""
    code_of = {name: i for i, name in enumerate(names)}
    own = head.fields[field].names if field in head.fields else []
    return np.array([code_of[name] for name in own] + [-1], np.int32)
