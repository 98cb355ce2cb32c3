"""Fragments files become exact counts per cell and genome bin, whatever the sizes of chunks."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clue_dist.errors import DataError, StoreError
from clue_dist.store.reader import Store
from data_prep import inspect
from data_prep.conversion import scatter
from data_prep.readers import fragments
from tests.unit.prep_helpers import (
    assert_same_counts,
    convert_files,
    make_counts,
    read_counts,
    write_h5ad,
)

WIDTH = 1000
CELLS = [f"c{i}" for i in range(30)]


def make_fragments(n: int = 3000, seed: int = 0, cells: list[str] = CELLS) -> pd.DataFrame:
    """Fragments sorted by place, as 10x writes them."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 40_000, n)
    names = np.array(["chr1", "chr2", "chr10", "chrX"])[rng.integers(4, size=n)]
    barcodes = np.array(cells)[rng.integers(len(cells), size=n)]
    end = start + rng.integers(1, 1500, n)
    table = pd.DataFrame(
        {"chromosome": names, "start": start, "end": end, "barcode": barcodes, "reads": 1}
    )
    return table.sort_values(["chromosome", "start"], ignore_index=True)


def write_fragments(
    path: Path, table: pd.DataFrame, comments: str = "# id=sample\n# pipeline=x\n"
) -> Path:
    text = (comments + table.to_csv(sep="\t", header=False, index=False)).encode()
    path.write_bytes(
        gzip.compress(text[:1000]) + gzip.compress(text[1000:]) if path.suffix == ".gz" else text
    )
    return path  # as bgzip does, in more than one gzip member


def count_bins(table: pd.DataFrame, cut_sites: bool = False) -> pd.DataFrame:
    """Cells x bins, one fragment at a time."""
    counts: Counter[tuple[str, str, int]] = Counter()
    for chromosome, start, end, barcode in table.iloc[:, :4].itertuples(index=False):
        for position in [start, end - 1] if cut_sites else [(start + end) // 2]:
            counts[barcode, chromosome, position // WIDTH] += 1
    bins = sorted({key[1:] for key in counts}, key=lambda b: (b[0] == "chrX", len(b[0]), b))
    cells = sorted({key[0] for key in counts})
    values = [[counts[(cell, *b)] for b in bins] for cell in cells]
    return pd.DataFrame(values, cells, [f"{c}:{i * WIDTH}-{(i + 1) * WIDTH}" for c, i in bins])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragments, "CHUNK_LINES", 700)
    monkeypatch.setattr(scatter, "TASK_ENTRIES", 500)


@pytest.mark.parametrize("cut_sites", [False, True])
@pytest.mark.parametrize("name", ["fragments.tsv.gz", "fragments.tsv"])
def test_counts_per_bin(tmp_path: Path, name: str, cut_sites: bool) -> None:
    path = write_fragments(tmp_path / name, make_fragments())
    store = convert_files(
        tmp_path / "s.zarr", f"atac={path}", bins=["atac=1000"], cut_sites=cut_sites
    )
    assert_same_counts(read_counts(store, "atac"), count_bins(make_fragments(), cut_sites))
    facts = inspect.format_facts(inspect.collect_facts(tmp_path / "s.zarr"))
    assert f", {'cut sites' if cut_sites else 'fragments'} counted" in facts
    alone = convert_files(
        tmp_path / "t.zarr", f"atac={path}", bins=["atac=1000"], cut_sites=cut_sites, workers=1
    )
    assert alone.fingerprint == store.fingerprint


def test_only_cells_of_a_list_or_of_another_modality(tmp_path: Path) -> None:
    table, rna = make_fragments(), make_counts(10, 6)
    given = [
        f"atac={write_fragments(tmp_path / 'f.tsv.gz', table)}",
        f"rna={write_h5ad(tmp_path / 'r.h5ad', rna)}",
    ]
    wanted = count_bins(table[table["barcode"].isin(rna.index)])
    (tmp_path / "cells.tsv").write_text("".join(f"{b}\n" for b in [*rna.index, "nobody"]))
    both = convert_files(tmp_path / "b.zarr", *given, bins=["atac=1000"], barcodes=["atac=rna"])
    assert {name: s.n_cells for name, s in both.manifest.strata.items()} == {"atac+rna": 10}
    assert_same_counts(read_counts(both, "atac"), wanted)
    alone = convert_files(
        tmp_path / "a.zarr", given[0], bins=["atac=1000"], barcodes=[str(tmp_path / "cells.tsv")]
    )
    assert_same_counts(read_counts(alone, "atac"), wanted)
    with pytest.raises(
        DataError, match="neither a list of barcodes nor another modality"
    ) as caught:
        convert_files(tmp_path / "x.zarr", *given, bins=["atac=1000"], barcodes=["atac=adt"])
    assert "modalities with cells: rna" in str(caught.value)
    (tmp_path / "cells.tsv").write_text("ACGT-1\n")
    with pytest.raises(DataError, match="no barcode of the file is among those"):
        convert_files(
            tmp_path / "y.zarr",
            given[0],
            bins=["atac=1000"],
            barcodes=[str(tmp_path / "cells.tsv")],
        )


def test_lanes_and_peaks_come_together(tmp_path: Path) -> None:
    """Two lanes that reuse barcodes, the cells of each by its own RNA, beside a matrix of peaks."""
    lanes = {"one": make_fragments(seed=1), "two": make_fragments(seed=2)}
    rna = {"one": make_counts(10, 6), "two": make_counts(5, 6, 1)}
    peaks = pd.DataFrame({"chr1:100-300": [3], "chr3_5000_5100": [1]}, ["p0"])
    given = [
        f"{lane}:atac={write_fragments(tmp_path / f'{lane}.tsv.gz', table)}"
        for lane, table in lanes.items()
    ]
    given += [
        f"{lane}:rna={write_h5ad(tmp_path / f'{lane}.h5ad', table)}" for lane, table in rna.items()
    ]
    with_peaks = f"one:atac={write_h5ad(tmp_path / 'p.h5ad', peaks)}"
    store = convert_files(
        tmp_path / "s.zarr", *given, with_peaks, bins=["atac=1000"], barcodes=["rna"]
    )
    parts = [
        count_bins(lanes[n][lanes[n]["barcode"].isin(rna[n].index)]).rename(f"{n}:{{}}".format)
        for n in lanes
    ]
    parts.append(pd.DataFrame([[3, 1]], ["one:p0"], ["chr1:0-1000", "chr3:5000-6000"]))
    # Barcodes of a list may name their lane, or hold for every lane.
    listed = tmp_path / "cells.txt"
    listed.write_text("".join(f"{lane}:{b}\n" for lane in lanes for b in rna[lane].index))
    flags = {"bins": ["atac=1000"], "barcodes": [f"atac={listed}"]}
    assert (
        convert_files(tmp_path / "l.zarr", *given, with_peaks, **flags).fingerprint
        == store.fingerprint
    )
    stored = read_counts(store, "atac")
    assert set(stored.columns) == {b for part in parts for b in part.columns}
    assert_same_counts(stored, pd.concat(parts).reindex(columns=stored.columns).fillna(0))


def test_killed_while_counting_and_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that were counted are not read again."""
    files = {name: make_fragments(cells=[name + cell for cell in CELLS]) for name in "ab"}
    given = [
        f"atac={write_fragments(tmp_path / f'{name}.tsv.gz', table)}"
        for name, table in files.items()
    ]
    whole = convert_files(tmp_path / "w.zarr", *given, bins=["atac=1000"])
    read_chunks, seen = fragments._read_chunks, []

    def count_calls(given: fragments.FragmentsInput, stop: int = 2) -> object:
        seen.append(given.display_name)
        if len(seen) == stop:
            raise KeyboardInterrupt
        return read_chunks(given)

    monkeypatch.setattr(fragments, "_read_chunks", count_calls)
    with pytest.raises(KeyboardInterrupt):
        convert_files(tmp_path / "s.zarr", *given, bins=["atac=1000"], workers=1)
    monkeypatch.setattr(fragments, "_read_chunks", lambda given: count_calls(given, 0))
    with pytest.raises(StoreError, match="a change of inputs"):
        convert_files(tmp_path / "s.zarr", *given, bins=["atac=1000"], cut_sites=True)
    assert sorted(seen) == ["a.tsv.gz", "b.tsv.gz"]
    failed = seen[1]
    again = convert_files(tmp_path / "s.zarr", *given, bins=["atac=1000"])
    assert seen[2:] == [failed]
    assert again.fingerprint == whole.fingerprint == Store(tmp_path / "s.zarr").fingerprint


def test_what_is_no_fragment(tmp_path: Path) -> None:
    table = make_fragments(50)
    good = write_fragments(tmp_path / "good.tsv", table).read_text()
    lines = good.splitlines(keepends=True)
    broken = {
        "start.tsv": (
            "".join([*lines[:20], "chr1\tten\t20\tc0\t1\n", *lines[20:]]),
            "cannot be read to their end",
        ),
        "short.tsv": (
            "".join([*lines[:20], "chr1\t10\t20\n", *lines[20:]]),
            r"not a fragment\n  where: short\.tsv, fragment 19",
        ),
        "turned.tsv": (
            "".join([*lines[:2], "chr1\t20\t10\tc0\t1\n"]),
            r"turned\.tsv, fragment 1\n  got: chr1 20 10 c0",
        ),
    }
    for name, (text, message) in broken.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=message):
            convert_files(tmp_path / "x.zarr", f"atac={tmp_path / name}", bins=["atac=1000"])
    whole = write_fragments(tmp_path / "cut.tsv.gz", make_fragments(5000)).read_bytes()
    # The last file has a block of an unknown type.
    for damaged in (whole[: len(whole) // 2], whole + gzip.compress(b"")[:10] + b"\x07"):
        (tmp_path / "cut.tsv.gz").write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read to their end"):
            convert_files(
                tmp_path / "x.zarr", f"atac={tmp_path / 'cut.tsv.gz'}", bins=["atac=1000"]
            )
    for empty in ("", "# only\n# comments\n"):
        (tmp_path / "empty.tsv.gz").write_bytes(gzip.compress(empty.encode()))
        with pytest.raises(DataError, match=r"got: (an empty file|a text without a line)"):
            convert_files(
                tmp_path / "x.zarr", f"atac={tmp_path / 'empty.tsv.gz'}", bins=["atac=1000"]
            )
    assert not list(tmp_path.glob("x.zarr*"))


def test_flags_that_do_not_fit(tmp_path: Path) -> None:
    path, rna = (
        write_fragments(tmp_path / "f.tsv.gz", make_fragments(50)),
        write_h5ad(tmp_path / "r.h5ad", make_counts(5, 5)),
    )
    out = tmp_path / "x.zarr"
    with pytest.raises(DataError, match=r"how wide\?(.|\n)*--bins atac=5000"):
        convert_files(out, f"atac={path}")
    with pytest.raises(DataError, match="write it as `atac="):
        convert_files(out, str(path), bins=["atac=1000"])
    with pytest.raises(DataError, match="fragments are of kind atac"):
        convert_files(out, f"rna={path}")
    with pytest.raises(DataError, match="no input is a fragments file"):
        convert_files(out, f"rna={rna}", cut_sites=True)
    with pytest.raises(DataError, match="neither a list of barcodes nor another modality"):
        convert_files(out, f"rna={rna}", barcodes=["rna"])
    with pytest.raises(DataError, match="no such modality"):
        convert_files(out, f"rna={rna}", f"atac={path}", bins=["atac=1000"], barcodes=["adt=rna"])


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (f"10\t{2**32 + 1}", "not a fragment"),
        ("10\t43000000000000", "not a fragment"),  # would be counted on the next chromosome
        (f"5\t{2**63 - 1}", "not a fragment"),
        ("5\t" + "9" * 20, "cannot be read to their end"),
    ],
)
def test_places_beyond_every_chromosome_are_refused(tmp_path: Path, place: str, said: str) -> None:
    path = write_fragments(tmp_path / "fragments.tsv", make_fragments(50))
    path.write_text(f"{path.read_text()}chr1\t{place}\tc0\t1\n")
    with pytest.raises(DataError, match=said):
        convert_files(tmp_path / "s.zarr", f"atac={path}", bins=["atac=1000"])


@pytest.mark.parametrize(
    "name", ["chr1:5-" + "9" * 20, f"chr1:{9 * 10**18}-{9 * 10**18 + 10}", "chr1:٣-٩"]
)
def test_peaks_beyond_every_chromosome_are_not_binned(tmp_path: Path, name: str) -> None:
    peaks = make_counts(20, 2)
    peaks.columns = ["chr²:5-9", name]
    path = write_h5ad(tmp_path / "a.h5ad", peaks)
    with pytest.raises(DataError, match="1 feature named otherwise"):
        convert_files(tmp_path / "s.zarr", f"atac={path}", bins=["atac=1000"])


def test_headers_and_members_within_a_file(tmp_path: Path) -> None:
    """As bgzip, and `cat a.tsv.gz b.tsv.gz`, leave them; ArchR puts a # into barcodes."""
    table = make_fragments(200, cells=[f"S1#{cell}" for cell in CELLS])
    plain = write_fragments(tmp_path / "plain.tsv", table)
    lines = plain.read_text().splitlines(keepends=True)
    header = "# id=x\n# description\n"
    pieces = [header + "".join(lines[:90]), header, "".join(lines[90:]), "", "\n\n"]
    joined = tmp_path / "joined.tsv.gz"
    joined.write_bytes(b"".join(gzip.compress(piece.encode()) for piece in pieces))
    windows = tmp_path / "windows.tsv"
    windows.write_bytes("".join([header, *lines]).replace("\n", "\r\n").encode())
    stores = [
        convert_files(tmp_path / f"{path.stem}.zarr", f"atac={path}", bins=["atac=1000"])
        for path in (plain, joined, windows)
    ]
    assert len({store.fingerprint for store in stores}) == 1


def test_place_of_a_broken_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragments, "CHUNK_LINES", 50)
    path = write_fragments(tmp_path / "f.tsv", make_fragments(200))
    lines = path.read_text().splitlines(keepends=True)
    n_before = 130 - sum(line.startswith("#") for line in lines[:130])
    path.write_text("".join(["# more\n", *lines[:130], "oops\n", *lines[130:]]))
    with pytest.raises(DataError, match=rf"after fragment {n_before}\n  got: 'oops'"):
        convert_files(tmp_path / "s.zarr", f"atac={path}", bins=["atac=1000"])
