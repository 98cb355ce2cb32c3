"""HDF5 files that are damaged, or call for more than they hold, end in an error that says where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from clue_dist.errors import DataError
from data_prep.readers import h5_file
from tests.benchmarks.hostile.hdf5 import share_groups
from tests.unit.prep_helpers import (
    convert_files,
    make_anndata,
    make_counts,
    write_h5ad,
)

pytestmark = pytest.mark.usefixtures("small_tasks")


def _flatten_matrix(file: h5py.File) -> None:
    del file["X"]
    file["X"] = np.ones(20)


def _empty_matrix_group(file: h5py.File) -> None:
    del file["X"]
    file.create_group("X")


def _remove_shape(file: h5py.File) -> None:
    del file["X"].attrs["shape"]


def _point_outside_categories(file: h5py.File) -> None:
    file["obs/batch/codes"][3] = 5


def _store_texts(file: h5py.File) -> None:
    """In chunks, and not compressed: on disk they are addresses."""
    n = len(file["X/data"])
    del file["X/data"]
    file.create_dataset(
        "X/data", data=np.array(["x"] * n, object), dtype=h5py.string_dtype(), chunks=(16,)
    )


def _store_references(file: h5py.File) -> None:
    n = len(file["X/data"])
    del file["X/data"]
    file.create_dataset("X/data", data=[file.ref] * n, dtype=h5py.ref_dtype, chunks=(16,))


def _point_at_next_category(file: h5py.File) -> None:
    file["obs/batch/codes"][3] = 2  # as many as there are categories


@pytest.mark.parametrize(
    ("damage", "message_parts"),
    [
        (
            _flatten_matrix,
            ("not one of cells x features", "a.h5ad: X", r"shape \(20,\)", "two axes"),
        ),
        (_remove_shape, ("not one of cells x features", "a.h5ad: X", "no shape", "two axes")),
        (
            _empty_matrix_group,
            (
                "a form this reader does not know",
                "a.h5ad: X",
                "a group that says no enc.*",
                "array, CSR or CSC",
            ),
        ),
        (
            _point_outside_categories,
            ("outside its categories", "a.h5ad: obs/batch", "codes 0 to 5", r"-1 \(unknown\) to 1"),
        ),
        (_store_texts, ("values that are no numbers", "a.h5ad: X/data", "object", "counts")),
        (_store_references, ("values that are no numbers", "a.h5ad: X/data", "object", "counts")),
        (
            _point_at_next_category,
            ("outside its categories", "a.h5ad: obs/batch", "codes 0 to 2", r"-1 \(unknown\) to 1"),
        ),
    ],
)
def test_damaged_h5ad(
    tmp_path: Path, damage: Callable[[h5py.File], None], message_parts: tuple[str, ...]
) -> None:
    path = write_h5ad(
        tmp_path / "a.h5ad", make_counts(20, 8), batch=pd.Categorical(["a", "b"] * 10)
    )
    with h5py.File(path, "r+") as file:
        damage(file)
    what, where, found, expected = message_parts
    message = f"{what}\n  where: {where}\n  got: {found}\n  expected: {expected}\n  fix: write the"
    with pytest.raises(DataError, match=message):
        convert_files(tmp_path / "s.zarr", f"rna={path}")


def test_groups_that_share_groups_are_refused_at_once(tmp_path: Path) -> None:
    """Ten groups, in so many places that reading them all would never end."""
    path = write_h5ad(
        tmp_path / "a.h5ad", make_counts(20, 8), batch=pd.Categorical(["a", "b"] * 10)
    )
    with h5py.File(path, "r+") as file:
        del file["obs/batch"]
        file["obs/batch"] = share_groups(file)
    with pytest.raises(DataError, match="groups within groups without an end"):
        convert_files(tmp_path / "s.zarr", f"rna={path}")


def test_codes_outside_the_categories_that_modalities_share(tmp_path: Path) -> None:
    import mudata

    whole = mudata.MuData({"rna": make_anndata(make_counts(20, 8))})
    whole.obs["batch"] = pd.Categorical(["a", "b"] * 10)
    whole.write(tmp_path / "m.h5mu")
    with h5py.File(tmp_path / "m.h5mu", "r+") as file:
        _point_outside_categories(file)
    with pytest.raises(DataError, match=r"outside its categories\n  where: m\.h5mu: obs/batch"):
        convert_files(tmp_path / "s.zarr", str(tmp_path / "m.h5mu"))


def test_a_layer_that_is_no_matrix_is_not_proposed_for_counts(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", make_counts(20, 8) + 0.5)
    with h5py.File(path, "r+") as file:
        file["layers/flat"] = np.ones(20)
    with pytest.raises(DataError, match="counts must be raw") as caught:
        convert_files(tmp_path / "s.zarr", f"rna={path}")
    assert "flat" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"chunks": (7,)}, {"chunks": (64,), "compression": "gzip"}, {}, {"dtype": ">i4"}]
)
def test_a_stretch_of_a_dataset_is_what_hdf5_reads(
    tmp_path: Path, options: dict[str, object]
) -> None:
    values = np.arange(1, 101, dtype=np.int32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=values, **options)
        hollow = file.create_dataset("y", (100,), "int32", chunks=(10,))
        hollow[30:] = values[30:]  # the chunks before were never written
    with h5py.File(tmp_path / "a.h5") as file:
        for lo, hi in ((0, 100), (3, 5), (6, 8), (14, 77), (95, 100), (40, 40), (90, 200)):
            np.testing.assert_array_equal(h5_file.read_stretch(file["x"], lo, hi), values[lo:hi])
            np.testing.assert_array_equal(h5_file.read_stretch(file["y"], lo, hi), file["y"][lo:hi])


def test_a_file_that_ends_within_its_data(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", make_counts(4000, 60, density=0.9))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size // 2)
    with pytest.raises(DataError, match=r"a\.h5ad") as caught:
        convert_files(tmp_path / "s.zarr", f"rna={path}")
    assert "damaged" in str(caught.value) or "HDF5" in str(caught.value)


def test_compression_that_needs_a_plugin_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, zstd = write_h5ad(tmp_path / "a.h5ad", make_counts(20, 8)), 32015
    with h5py.File(path, "r+") as file:
        values = file["X/data"][:]
        del file["X/data"]
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk((len(values),))
        creation.set_filter(zstd, h5py.h5z.FLAG_OPTIONAL, (3,))
        space = h5py.h5s.create_simple((len(values),))
        h5py.h5d.create(file["X"].id, b"data", h5py.h5t.NATIVE_FLOAT, space, creation)
    is_known = h5py.h5z.filter_avail
    monkeypatch.setattr(
        h5py.h5z, "filter_avail", lambda code: code != zstd and bool(is_known(code))
    )
    with pytest.raises(DataError, match=r"X/data\n  got: zstd\n  fix: .*hdf5plugin"):
        convert_files(tmp_path / "s.zarr", f"rna={path}")
