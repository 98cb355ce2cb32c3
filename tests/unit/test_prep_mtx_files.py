"""Matrix Market files as other programs, and uploads to GEO, call them and lay them out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from clue_dist.errors import DataError
from data_prep.options import InputArgument, ReadingOptions
from data_prep.readers.formats import find_format
from data_prep.readers.source import Source
from tests.unit.prep_helpers import make_counts


def _write_files(
    folder: Path,
    counts: pd.DataFrame,
    names: tuple[str, str, str],
    cells_in_rows: bool = False,
    number: str = "integer",
) -> Path:
    """Write matrix, barcodes and features under these names."""
    folder.mkdir(exist_ok=True)
    matrix = sp.coo_matrix(counts.to_numpy() if cells_in_rows else counts.to_numpy().T)
    values = ["" if number == "pattern" else f" {value}" for value in matrix.data]
    entries = "".join(
        f"{row + 1} {column + 1}{value}\n"
        for row, column, value in zip(matrix.row, matrix.col, values, strict=True)
    )
    sizes = f"{matrix.shape[0]} {matrix.shape[1]} {matrix.nnz}"
    (folder / names[0]).write_text(
        f"%%MatrixMarket matrix coordinate {number} general\n%\n{sizes}\n{entries}"
    )
    (folder / names[1]).write_text("\n".join(counts.index) + "\n")
    (folder / names[2]).write_text("\n".join(counts.columns) + "\n")
    return folder


def _read_table(path: Path, scratch: Path, modality: str = "rna") -> pd.DataFrame:
    input_format = find_format(path)
    (part,) = input_format.list_parts(path)
    argument = InputArgument(str(path), path)
    source = input_format.open_part(argument, modality, part, ReadingOptions())
    assert not isinstance(source, str)
    return _read_source(source, scratch)  # type: ignore[arg-type]


def _read_source(source: Source, scratch: Path) -> pd.DataFrame:
    assert source.probe_counts()
    source.prepare_part(0, scratch)
    head = source.read_head()
    rows = source.read_rows(0, head.n_rows, scratch)
    assert not isinstance(rows, np.ndarray)
    return pd.DataFrame(rows.toarray(), np.char.decode(head.barcodes[:]), head.features)


@pytest.mark.parametrize(
    ("names", "header", "form"),
    [
        (("barcodes.csv", "genes.csv"), '"","x"', '"{number}","{name}"'),  # write.csv
        (("barcodes.csv", "gene_names.csv"), "x", "{name}"),
        (("cell_metadata.csv", "genes.csv"), "barcode,type", "{name},T"),
        (("barcodes.txt", "features.txt"), '"x"', '"{number}" "{name}"'),  # write.table
        (("barcodes.tsv", "features.tsv"), '"x"', '"{number}"\t"{name}"'),  # with sep="\t"
        (("barcodes.csv", "genes.csv"), "0", "{name}"),  # pandas, without an index
        (("barcodes.tsv", "genes.tsv"), None, '"{name}"'),
        (("barcodes.txt", "genes.txt"), None, "{number}\t{name}"),
    ],
)
def test_lists_that_were_written_in_r(
    tmp_path: Path, names: tuple[str, str], header: str | None, form: str
) -> None:
    counts = make_counts(30, 8)
    folder = _write_files(tmp_path / "in", counts, ("matrix.mtx", *names))
    for file, axis in zip(names, (counts.index, counts.columns), strict=True):
        lines = [form.format(number=i + 1, name=name) for i, name in enumerate(axis)]
        (folder / file).write_text("\n".join([header, *lines] if header else lines))
    table = _read_table(folder, tmp_path / "out")
    pd.testing.assert_frame_equal(table, counts, check_dtype=False)


def test_a_name_too_many_is_no_header(tmp_path: Path) -> None:
    folder = _write_files(
        tmp_path / "in", make_counts(30, 8), ("matrix.mtx", "barcodes.tsv", "genes.tsv")
    )
    barcodes = folder / "barcodes.tsv"
    barcodes.write_text(barcodes.read_text() + "c30\n")
    with pytest.raises(DataError, match="does not fit its features and barcodes"):
        _read_table(folder, tmp_path / "out")


@pytest.mark.parametrize("n_cells", [30, 8])
@pytest.mark.parametrize(
    ("names", "cells_in_rows"),
    [
        (("matrix.mtx", "barcodes.tsv", "features.tsv"), False),
        (("GSM1_s1_matrix.mtx", "GSM1_s1_barcodes.tsv", "GSM1_s1_genes.tsv"), False),
        (("cells_x_genes.mtx", "cells_x_genes.barcodes.txt", "cells_x_genes.genes.txt"), True),
        (("quants_mat.mtx", "quants_mat_rows.txt", "quants_mat_cols.txt"), True),
        (("GSM1_matrix_s1.mtx", "GSM1_barcodes_s1.tsv", "GSM1_genes_s1.tsv"), False),
    ],
)
def test_names_and_orientations(
    tmp_path: Path, names: tuple[str, str, str], cells_in_rows: bool, n_cells: int
) -> None:
    counts = make_counts(n_cells, 8)
    folder = _write_files(tmp_path / "in", counts, names, cells_in_rows)
    (folder / "cells_x_genes.genes.names.txt").write_text("other\n" * 8)
    (folder / "all_cells.txt").write_text("other\n")
    table = _read_table(folder, tmp_path / "out")
    pd.testing.assert_frame_equal(table, counts, check_dtype=False)


def test_size_tells_where_the_cells_are(tmp_path: Path) -> None:
    counts = make_counts(30, 8)
    names = ("matrix.mtx", "barcodes.tsv", "features.tsv")
    folder = _write_files(tmp_path / "in", counts, names, cells_in_rows=True)
    table = _read_table(folder, tmp_path / "out")
    pd.testing.assert_frame_equal(table, counts, check_dtype=False)


def test_peaks_of_cell_ranger_atac(tmp_path: Path) -> None:
    counts = make_counts(20, 5)
    counts.columns = pd.Index([f"chr1\t{100 * i}\t{100 * i + 50}" for i in range(5)])
    folder = _write_files(tmp_path / "in", counts, ("matrix.mtx", "barcodes.tsv", "peaks.bed"))
    (part,) = find_format(folder).list_parts(folder)
    assert part.modality == "atac"
    table = _read_table(folder, tmp_path / "out")
    assert list(table.columns) == [f"chr1:{100 * i}-{100 * i + 50}" for i in range(5)]
    np.testing.assert_array_equal(table, counts)


def test_samples_of_one_folder_are_given_by_their_matrix(tmp_path: Path) -> None:
    tables = {name: make_counts(20, 5, seed=i) for i, name in enumerate(("s1", "s11", "s2"))}
    for name, counts in tables.items():
        names = (f"{name}_matrix.mtx", f"{name}_barcodes.tsv", f"{name}_features.tsv")
        counts.index = pd.Index([f"{name}-{i}" for i in range(20)])
        _write_files(tmp_path / "in", counts, names)
    with pytest.raises(DataError, match="several matrices"):
        _read_table(tmp_path / "in", tmp_path / "out")
    for name, counts in tables.items():
        table = _read_table(tmp_path / "in" / f"{name}_matrix.mtx", tmp_path / name)
        pd.testing.assert_frame_equal(table, counts, check_dtype=False)


def test_what_is_seldom_meant_is_not_proposed(tmp_path: Path) -> None:
    names = ("cells_x_genes.barcodes.txt", "cells_x_genes.genes.txt")
    for what in ("ambiguous", "mature", "nascent"):
        _write_files(tmp_path, make_counts(20, 5), (f"cells_x_genes.{what}.mtx", *names))
    with pytest.raises(DataError, match=r"fix: give one of .*cells_x_genes.mature.mtx`"):
        _read_table(tmp_path, tmp_path / "out")


def test_pattern_has_ones(tmp_path: Path) -> None:
    counts = make_counts(20, 5).clip(upper=1)
    names = ("matrix.mtx", "barcodes.tsv", "features.tsv")
    folder = _write_files(tmp_path / "in", counts, names, number="pattern")
    table = _read_table(folder, tmp_path / "out")
    pd.testing.assert_frame_equal(table, counts, check_dtype=False)


def test_matrix_in_the_only_folder_below(tmp_path: Path) -> None:
    counts = make_counts(20, 5)
    (tmp_path / "in").mkdir()
    names = ("matrix.mtx", "barcodes.tsv", "genes.tsv")
    _write_files(tmp_path / "in" / "GRCh38", counts, names)
    table = _read_table(tmp_path / "in", tmp_path / "out")
    pd.testing.assert_frame_equal(table, counts, check_dtype=False)
    _write_files(tmp_path / "in" / "mm10", counts, names)
    with pytest.raises(DataError, match="GRCh38, mm10"):
        _read_table(tmp_path / "in", tmp_path / "out")
