"""What is no input is named with a way on; inputs below a folder are found."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from clue_dist.errors import DataError
from data_prep.cli.inputs import parse_argument
from data_prep.readers import formats
from data_prep.readers.formats import describe_file, find_format
from tests.unit.prep_helpers import (
    convert_files,
    make_counts,
    read_counts,
    write_10x,
    write_h5ad,
    write_mtx,
)


def _pack_tar(mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("matrix.mtx"))
    return out.getvalue()


def _pack_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("part", "text")
    return out.getvalue()


_OF_R = b"X\n\x00\x00\x00\x03" + bytes(20)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("seurat.rds", gzip.compress(_OF_R), r"an object of R(.|\n)*write10xCounts"),
        ("moved", gzip.compress(b"RDX3\n" + _OF_R), r"R workspace(.|\n)*load\(.moved"),
        ("x.RData", b"\x00\x01\x02", "R workspace"),
        ("GSE1_RAW.tar", _pack_tar("w"), "tar -xf GSE1_RAW.tar"),
        ("a.h5ad", _pack_tar("w:gz"), "a tar archive"),
        ("adt.xlsx", _pack_zip(), "an Excel workbook"),
        ("a.npz", _pack_zip(), "arrays of NumPy"),
        ("a.zip", _pack_zip(), "unzip a.zip"),
        ("a.parquet", b"PAR1" + bytes(20), "read_parquet"),
        ("a.pkl", b"\x80\x04" + bytes(20), "a pickle"),
        ("a.h5ad", b"", "an empty file"),
        ("b.h5ad", b"<!DOCTYPE html><p>404", "a web page"),
        ("c.h5ad", b"no HDF5", "named as an HDF5 file"),
        ("e.txt", b"PK1 and PK2 are kinases\n", "a text that begins 'PK1 and"),
        ("f.txt", b"CRAMP1 PAR1 BZhX\n", "a text that begins 'CRAMP1"),
        ("d.bin", b"\x00\xff\x01", "binary"),
        ("barcodes.tsv.gz", gzip.compress(b"AC-1\nGT-1\n"), "list of names: AC-1, GT-1"),
        ("cells.csv", b"cell,sex\nA,f\nB,m\n", "a text that begins 'cell,sex'"),
        ("ë.txt", ("ë ë " * 600).encode()[:2047], "a text that begins"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,  # gzip and zip write the time
)
def test_files_of_other_formats(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"a format this reader knows(.|\n)*{said}") as error:
        find_format(tmp_path / name)
    assert error.value.fix


@pytest.mark.parametrize(
    ("name", "fix"),
    [("index_data", "BPCells"), ("__tiledb_group.tdb", "to_h5ad"), ("quants_mat.gz", "dumpMtx")],
)
def test_folders_of_other_formats(tmp_path: Path, name: str, fix: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"no input lies(.|\n)*fix: this is .*{fix}"):
        find_format(tmp_path)


def _write_matrices(root: Path, *folders: str) -> pd.DataFrame:
    counts = make_counts(20, 8)
    for folder in folders:
        (root / folder).parent.mkdir(parents=True, exist_ok=True)
        write_mtx(root / folder, counts, ["Gene Expression"] * 8)
    return counts


def test_folder_of_starsolo(tmp_path: Path) -> None:
    folders = ("Gene/raw", "Gene/filtered", "GeneFull/raw", "SJ/raw")
    _write_matrices(tmp_path / "Solo.out", *folders)
    listed = "got: Gene/filtered, Gene/raw, GeneFull/raw, SJ/raw"
    for typed in ("Solo.out", "Solo.out/Gene"):
        with pytest.raises(DataError, match=r"fix: give one of .*Gene/filtered`") as error:
            convert_files(tmp_path / "s.zarr", f"rna={tmp_path / typed}")
        assert typed.endswith("Gene") or listed in str(error.value)


def test_folder_of_cell_ranger(tmp_path: Path) -> None:
    outs = tmp_path / "outs"
    counts = _write_matrices(outs, "raw_feature_bc_matrix", "filtered_feature_bc_matrix")
    write_10x(outs / "filtered_feature_bc_matrix.h5", counts, ["Gene Expression"] * 8)
    (outs / "molecule_info.h5").write_bytes(b"damaged")
    (outs / "metrics.csv").write_text("cell,count\nA,1\n")
    with pytest.raises(DataError) as error:
        find_format(outs)
    assert error.value.got == (
        "filtered_feature_bc_matrix, filtered_feature_bc_matrix.h5, raw_feature_bc_matrix"
    )


@pytest.mark.parametrize(
    "folders", [("counts/umi_count", "counts/read_count"), ("Gene/raw",), ("quant/alevin",)]
)
def test_the_only_input_below_is_taken(
    tmp_path: Path, folders: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = _write_matrices(tmp_path / "in", *folders)
    typed = tmp_path / "in" / ("counts" if len(folders) > 1 else "")
    store = convert_files(tmp_path / "s.zarr", f"rna={typed}")
    assert read_counts(store, "rna").to_numpy().sum() == counts.to_numpy().sum()
    assert len(folders) > 1 or f"{folders[0]} is what is read" in capsys.readouterr().err


def test_a_folder_of_more_than_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its only input may not be the only one, and none may not be none."""
    monkeypatch.setattr(formats, "_MOST_ENTRIES", 3)
    for number in range(4):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(DataError, match=r"no input lies(.|\n)*in its first 3 files and folders"):
        find_format(tmp_path)
    write_h5ad(tmp_path / "0.h5ad", make_counts(20, 8))
    assert parse_argument(f"rna={tmp_path}").path == tmp_path
    with pytest.raises(DataError, match=r"too large(.|\n)*0.h5ad, in its first 3 f(.|\n)*0.h5ad`"):
        find_format(tmp_path)


def test_h5ad_below_a_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_h5ad(tmp_path / "in" / "a.h5ad", make_counts(20, 8))
    argument = parse_argument(f"rna={tmp_path / 'in'}")
    assert describe_file(argument.path).parts[0].n_cells == 20
