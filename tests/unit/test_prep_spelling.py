"""Files that spell the same regions differently meet, and rows that are no features go."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from clue_dist.errors import DataError
from clue_dist.store.region_names import RegionSpelling, find_spelling
from data_prep.convert import format_conversion
from tests.unit.prep_helpers import (
    assert_same_counts,
    convert_files,
    make_counts,
    read_counts,
    write_h5ad,
    write_mtx,
)

REGIONS = [("chr1", 1000 * i, 1000 * i + 500) for i in range(12)]


def spell(between: str) -> list[str]:
    return [f"{c}{between[0]}{start}{between[1]}{end}" for c, start, end in REGIONS]


@pytest.mark.parametrize("between", [":-", "--", "__", ":_"])
def test_spelling_of_regions(between: str) -> None:
    names = [*spell(between), "GL000194.1:5-9"]
    spelling = find_spelling(names)
    assert spelling == RegionSpelling(*between)
    assert [spelling.respell_region(name) for name in spell(":-")] == spell(between)
    assert spelling.respell_region("HLA-A") == "HLA-A"
    assert find_spelling(["HLA-A", "CD3", "chr1:0-500"]) is None
    assert find_spelling([]) is None


@pytest.mark.parametrize("flags", [{}, {"features": ["union"]}, {"features": ["intersection"]}])
def test_peaks_come_to_the_spelling_of_the_first_file(
    tmp_path: Path, flags: dict[str, list[str]]
) -> None:
    tables = {"a": make_counts(20, 12, cells="a"), "b": make_counts(20, 12, 1, cells="b")}
    for name, between in (("a", ":-"), ("b", "__")):
        write_h5ad(tmp_path / f"{name}.h5ad", tables[name].set_axis(spell(between), axis=1))
    given = [f"atac={tmp_path / name}.h5ad" for name in tables]
    store = convert_files(tmp_path / "s.zarr", *given, **flags)
    expected = pd.concat(tables.values()).set_axis(spell(":-"), axis=1)
    assert_same_counts(read_counts(store, "atac"), expected)
    said = format_conversion(store.manifest)
    assert "b.h5ad: regions are spelled chr1_0_500 there, chr1:0-500 here" in said
    assert "a.h5ad: regions" not in said


def test_peaks_come_to_the_spelling_of_a_list_or_a_store(tmp_path: Path) -> None:
    table = make_counts(20, 12).set_axis(spell("__"), axis=1)
    given = f"atac={write_h5ad(tmp_path / 'a.h5ad', table)}"
    # Alone, a file decides.
    assert list(read_counts(convert_files(tmp_path / "a.zarr", given), "atac")) == spell("__")
    listed = tmp_path / "peaks.txt"
    listed.write_text("\n".join(spell("--")))
    store = convert_files(tmp_path / "s.zarr", given, features=[f"atac={listed}"])
    assert_same_counts(read_counts(store, "atac"), table.set_axis(spell("--"), axis=1))
    fitted = convert_files(tmp_path / "t.zarr", given, features_from=tmp_path / "s.zarr")
    assert fitted.fingerprint == store.fingerprint


def test_one_file_may_spell_a_peak_in_two_ways(tmp_path: Path) -> None:
    table = make_counts(20, 12)
    both = pd.concat(
        [table.set_axis(spell("--"), axis=1), table.set_axis(spell(":-"), axis=1)], axis=1
    )
    both = both.iloc[:, :20]  # most are spelled with dashes
    store = convert_files(tmp_path / "s.zarr", f"atac={write_h5ad(tmp_path / 'a.h5ad', both)}")
    expected = table.set_axis(spell("--"), axis=1)
    expected.iloc[:, :8] *= 2
    assert_same_counts(read_counts(store, "atac"), expected)


def test_rows_of_reads_without_a_feature_are_left_out(tmp_path: Path) -> None:
    adt = make_counts(20, 5, 1, "p")
    with_tally = adt.assign(unmapped=7, nCount_ADT=adt.sum(axis=1))
    first = write_mtx(tmp_path / "umi_count", with_tally, ["Antibody Capture"] * 7)
    store = convert_files(tmp_path / "s.zarr", f"adt={first}")
    assert_same_counts(read_counts(store, "adt"), adt)
    said = format_conversion(store.manifest)
    assert "umi_count: unmapped, nCount_ADT are no features and are left out" in said
    assert "extra" not in said
    # Of two files, one may lack the row.
    other = make_counts(20, 5, 2, "p", cells="d")
    second = write_h5ad(tmp_path / "b.h5ad", other)
    both = convert_files(tmp_path / "t.zarr", f"adt={first}", f"adt={second}")
    assert_same_counts(read_counts(both, "adt"), pd.concat([adt, other]))
    # A store or list that has the row keeps it.
    listed = tmp_path / "names.txt"
    listed.write_text("\n".join(with_tally.columns))
    kept = convert_files(tmp_path / "u.zarr", f"adt={first}", features=[f"adt={listed}"])
    assert_same_counts(read_counts(kept, "adt"), with_tally)


def test_starts_that_differ_by_one_are_named(tmp_path: Path) -> None:
    table = make_counts(20, 12)
    shifted = [f"chr1-{start + 1}-{end}" for _, start, end in REGIONS]
    a = write_h5ad(tmp_path / "a.h5ad", table[:10].set_axis(spell(":-"), axis=1))
    b = write_h5ad(tmp_path / "b.h5ad", table[10:].set_axis(shifted, axis=1))
    for flags in ({}, {"features": ["union"]}):
        with pytest.raises(DataError, match="with starts that differ by one") as caught:
            convert_files(tmp_path / "s.zarr", f"atac={a}", f"atac={b}", **flags)
        assert "got: chr1:1-500 for chr1:0-500" in str(caught.value)
    binned = convert_files(tmp_path / "b.zarr", f"atac={a}", f"atac={b}", bins=["atac=1000"])
    assert read_counts(binned, "atac").shape == (20, 12)
