"""10x files and Matrix Market folders come back out of the store exactly, or are refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clue_dist.errors import DataError
from data_prep.readers.matrix_market import MatrixMarketSource
from tests.unit.prep_helpers import (
    assert_same_counts,
    convert_files,
    make_counts,
    read_counts,
    write_10x,
    write_mtx,
)

pytestmark = pytest.mark.usefixtures("small_tasks")


TYPES = ["Gene Expression"] * 20 + ["Antibody Capture"] * 6 + ["Peaks"] * 14


def _write_tenx(tmp_path: Path, form: str, counts: pd.DataFrame, types: list[str]) -> Path:
    if form == "h5":
        return write_10x(tmp_path / "a.h5", counts, types)
    return write_mtx(tmp_path / "folder", counts, types, zipped=form == "mtx.gz")


@pytest.mark.parametrize("form", ["h5", "mtx", "mtx.gz"])
def test_10x(tmp_path: Path, form: str) -> None:
    counts = make_counts(80, 40, density=0.5)
    path = _write_tenx(tmp_path, form, counts, TYPES)
    store = convert_files(tmp_path / "s.zarr", str(path))
    for name, columns in {"rna": slice(0, 20), "adt": slice(20, 26), "atac": slice(26, 40)}.items():
        expected = counts.iloc[:, columns]
        assert_same_counts(read_counts(store, name), expected[expected.sum(axis=1) > 0])
    gex = convert_files(tmp_path / "g.zarr", f"gex={path}")
    assert_same_counts(
        read_counts(gex, "gex"), counts.iloc[:, :20][counts.iloc[:, :20].sum(axis=1) > 0]
    )
    with pytest.raises(DataError, match="no such modality"):
        convert_files(tmp_path / "x.zarr", f"dense={path}")


def test_10x_names_that_repeat_take_their_id(tmp_path: Path) -> None:
    counts = make_counts(30, 4, prefix="ENSG")
    path = write_10x(tmp_path / "a.h5", counts, ["Gene Expression"] * 4, ["A", "B", "A", "C"])
    assert convert_files(tmp_path / "s.zarr", str(path)).manifest.modalities["rna"].features == [
        "ENSG0",
        "B",
        "ENSG2",
        "C",
    ]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_what_a_killed_worker_leaves_of_a_matrix_market_is_not_read(
    tmp_path: Path, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies as it is about to name the n-th folder, which is whole; then the task runs again."""
    counts, scratch = make_counts(60, 20), tmp_path / "scratch"
    rename, calls = Path.rename, iter(range(1, 99))

    def die_at_rename(self: Path, target: Path) -> Path:
        if next(calls) == n:
            raise SystemExit
        return rename(self, target)

    source = MatrixMarketSource(write_mtx(tmp_path / "folder", counts, ["-"] * 20), "rna")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die_at_rename)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # the dead do not clean up
        with pytest.raises(SystemExit):
            source.prepare_part(0, scratch)
    assert any(scratch.iterdir())
    source.prepare_part(0, scratch)
    np.testing.assert_array_equal(source.read_rows(0, 60, scratch).toarray(), counts)


def test_old_genes_tsv(tmp_path: Path) -> None:
    counts = make_counts(30, 8)
    folder = write_mtx(tmp_path / "folder", counts, ["-"] * 8, zipped=False)
    lines = (folder / "features.tsv").read_text().splitlines()
    (folder / "genes.tsv").write_text(
        "".join("\t".join(line.split("\t")[:2]) + "\n" for line in lines)
    )
    (folder / "features.tsv").unlink()
    assert_same_counts(
        read_counts(convert_files(tmp_path / "s.zarr", f"rna={folder}"), "rna"), counts
    )
    with pytest.raises(DataError, match="write it as `rna=folder`"):
        convert_files(tmp_path / "x.zarr", str(folder))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "matrix coordinate integer general",
            "matrix array integer general",
            "not a Matrix Market header",
        ),
        (
            "matrix coordinate integer general",
            "matrix coordinate integer symmetric",
            "not a Matrix Market header",
        ),
        ("8 30 ", "30 8 ", "lies outside the matrix"),
        ("8 30 ", "8 31 ", "does not fit its features and barcodes"),
        ("8 30 ", "eight 30 ", "sizes line is wrong"),
        ("\n1 1 ", "\n0 1 ", "row 0, column 1"),
        ("\n1 1 ", "\n9 1 ", "row 9, column 1"),
        ("\n1 1 ", "\n1 31 ", "row 1, column 31"),
        ("\n1 1 5", "\n1 1 five", "not `row column count`"),
        ("\n1 1 5", "\n1 \x0b1 5", "control character"),
        ("\n1 1 5", "\n1 1 5 5", "cannot be read to its end|not `row column count`"),
        ("\n1 1 5", "", "ends early or late"),
        ("\n1 1 5", "\n1 1 -5", "counts must be raw"),
    ],
)
def test_wrong_matrix_market(tmp_path: Path, old: str, new: str, message: str) -> None:
    counts = make_counts(30, 8, density=1)
    counts.iloc[0, 0] = 5
    folder = write_mtx(tmp_path / "folder", counts, ["-"] * 8, zipped=False)
    text = (folder / "matrix.mtx").read_text()
    assert old in text
    (folder / "matrix.mtx").write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        convert_files(tmp_path / "s.zarr", f"rna={folder}")


@pytest.mark.parametrize("name", ["matrix.mtx.gz", "barcodes.tsv.gz", "features.tsv.gz"])
@pytest.mark.parametrize("kept", [0, 10_000])
def test_damaged_gzip(tmp_path: Path, name: str, kept: int) -> None:
    """Damage at the start of a file or behind its first lines."""
    path = write_mtx(tmp_path / "folder", make_counts(30, 8), ["-"] * 8) / name
    no_such_block = b"\x07"  # of the types that gzip knows
    path.write_bytes(path.read_bytes()[:kept] + gzip.compress(b"")[:10] + no_such_block)
    with pytest.raises(DataError, match="cannot be read"):
        convert_files(tmp_path / "s.zarr", f"rna={path.parent}")
