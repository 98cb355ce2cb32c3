"""Inputs and options of the command line that cannot be meant are refused."""

from __future__ import annotations

from pathlib import Path

import h5py
import pytest

from clue_dist.errors import DataError
from tests.unit.prep_helpers import (
    convert_files,
    make_anndata,
    make_counts,
    write_10x,
    write_h5ad,
)


def test_inputs_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.h5ad").write_text("no HDF5")
    (tmp_path / "empty").mkdir()
    write_h5ad(tmp_path / "a.h5ad", make_counts(5, 5))
    cut = (tmp_path / "a.h5ad").read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(cut[: len(cut) // 2])
    cases = {
        "rna=nothing.h5ad": "does not exist",
        "": "not an input",
        f"rna={tmp_path / 'text.h5ad'}": "named as an HDF5 file, but no HDF5",
        f"rna={tmp_path / 'cut.h5ad'}": "not a readable HDF5 file",
        f"rna={tmp_path / 'empty'}": "in which no input lies",
        f"{tmp_path / 'a.h5ad'}": "write it as `rna=a.h5ad`",
        f"mystery={tmp_path / 'a.h5ad'}": "--kind mystery=rna",
    }
    for given, message in cases.items():
        with pytest.raises(DataError, match=message):
            convert_files(tmp_path / "s.zarr", given)


def test_layers_and_kinds_of_no_modality_are_refused(tmp_path: Path) -> None:
    adata = make_anndata(make_counts(20, 8))
    adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    given = f"rna={tmp_path / 'a.h5ad'}"
    tenx = write_10x(tmp_path / "b.h5", make_counts(20, 8), ["Gene Expression"] * 8)
    out = tmp_path / "s.zarr"
    with pytest.raises(DataError, match=r"where: --layer\n  got: rnaa\n  expected: rna"):
        convert_files(out, given, layers=("rnaa=counts",))
    with pytest.raises(DataError, match=r"where: --kind\n  got: foo\n  expected: rna"):
        convert_files(out, given, kinds={"foo": "rna"})
    for layers in (("counts", "other"), ("rna=counts", "rna=other")):
        with pytest.raises(DataError, match="two layers"):
            convert_files(out, given, layers=layers)
    with pytest.raises(DataError, match="no input has layers"):
        convert_files(out, str(tenx), layers=("counts",))


@pytest.mark.parametrize(
    ("group", "advice"), [("row_attrs", "loom"), ("assays", "Seurat"), ("barcode_idx", "molecules")]
)
def test_files_of_other_programs_are_recognised(tmp_path: Path, group: str, advice: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group(group)
        file.create_group("layers")  # of every loom file
    with pytest.raises(DataError, match=f"fix: this .*{advice}"):
        convert_files(tmp_path / "s.zarr", f"rna={tmp_path / 'a.h5'}")
