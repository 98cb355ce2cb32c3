"""Counts as .csv and .tsv come back whole, whichever way the table lies, or are refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clue_dist.errors import DataError
from data_prep.readers import sorted_entries, text_table
from data_prep.readers.formats import describe_file, find_format
from tests.unit.prep_helpers import (
    assert_same_counts,
    convert_files,
    make_counts,
    read_counts,
    write_h5ad,
)


def _name_sequences(n: int, suffix: str = "-1") -> list[str]:
    letters = np.random.default_rng(7).choice(list("ACGT"), (n, 16))
    return ["".join(row) + suffix for row in letters]


def _make_proteins(n: int = 30, features: int = 4) -> pd.DataFrame:
    counts = make_counts(n, features, prefix="CD", density=0.7)
    counts.index = pd.Index(_name_sequences(n))
    return counts


@pytest.mark.parametrize("separator", [",", "\t", ";", " "])
@pytest.mark.parametrize("in_rows", [True, False])
def test_both_ways_and_every_separator(
    tmp_path: Path, separator: str, in_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorted_entries, "PART_ENTRIES", 50)
    counts, path = _make_proteins(), tmp_path / "adt.txt"
    (counts if in_rows else counts.T).to_csv(path, sep=separator)
    store = convert_files(tmp_path / "s.zarr", f"adt={path}")
    assert_same_counts(read_counts(store, "adt"), counts)


def test_gzipped_table_of_r_without_a_corner(tmp_path: Path) -> None:
    counts = _make_proteins()
    lines = counts.T.to_csv(quoting=2).splitlines()
    lines[0] = lines[0].removeprefix('"",')
    path = tmp_path / "GSM1_adt.csv.gz"
    path.write_bytes(gzip.compress("\r\n".join(lines).encode()))
    store = convert_files(tmp_path / "s.zarr", f"adt={path}")
    assert_same_counts(read_counts(store, "adt"), counts)


def test_barcodes_of_another_file_decide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rna, counts = make_counts(12, 6), make_counts(12, 30, prefix="CD", seed=1)
    rna_file = write_h5ad(tmp_path / "rna.h5ad", rna)
    path = tmp_path / "adt.csv"
    counts.T.to_csv(path)
    store = convert_files(tmp_path / "s.zarr", f"adt={path}", f"rna={rna_file}")
    assert {name: part.n_cells for name, part in store.manifest.strata.items()} == {"adt+rna": 12}
    assert "adt.csv: its columns are cells" in capsys.readouterr().err


def test_names_that_show_nothing_ask_for_a_key(tmp_path: Path) -> None:
    counts, path = make_counts(6, 5), tmp_path / "a.csv"
    counts.to_csv(path)
    with pytest.raises(DataError, match="cells-in-rows"):
        convert_files(tmp_path / "s.zarr", f"adt={path}")
    store = convert_files(tmp_path / "s.zarr", f"adt={path}:cells-in-rows")
    assert_same_counts(read_counts(store, "adt"), counts)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",9\n", ",nine\n", "does not hold numbers"),
        (",9\n", ",\n", "counts must be raw"),
        (",9\n", ",9,9,9\n", "cannot be read to its end"),
        (",9\n", ",-9\n", "counts must be raw"),
        (",9\n", ",9\0\n", "control character"),
        ("CD2", "CD2\0", "control character"),
    ],
)
def test_damaged_tables(tmp_path: Path, old: str, new: str, message: str) -> None:
    counts, path = _make_proteins(), tmp_path / "a.csv"
    counts.iloc[20, 3] = 9
    text = counts.to_csv()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(DataError, match=message):
        convert_files(tmp_path / "s.zarr", f"adt={path}")


def test_what_is_no_table(tmp_path: Path) -> None:
    texts = {
        "fragments.tsv": "chr1\t10\t20\tACGT\t1\nchr1\t30\t40\tACGT\t1\n",
        "numbers.tsv": "chr1\t10\t20\t5\t1\nchr1\t30\t40\t5\t1\n",
        "words.csv": "a,b\nc,d\n",
        "one.txt": "ACGT\nACGT\n",
        "empty.csv": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert not text_table.is_text_table(tmp_path / name)


@pytest.mark.slow
def test_lines_longer_than_a_field_of_csv(tmp_path: Path) -> None:
    counts, path = _make_proteins(9000, 2), tmp_path / "wide.tsv"
    counts.T.to_csv(path, sep="\t")
    description = describe_file(path)
    assert find_format(path).name == "a table as text"
    assert (description.parts[0].n_cells, description.parts[0].n_features) == (9000, 2)


def test_comments_before_the_table(tmp_path: Path) -> None:
    counts, path = _make_proteins(), tmp_path / "bd.csv"
    path.write_text("## pipeline, version\n## date: today, now\n" + counts.to_csv())
    store = convert_files(tmp_path / "s.zarr", f"adt={path}")
    assert_same_counts(read_counts(store, "adt"), counts)
