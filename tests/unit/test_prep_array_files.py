"""Arrays in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.jobs.array_files import append_array, load_appended, load_array, save_array


@pytest.mark.parametrize("shape", [(0,), (5,), (1,), (0, 3), (4, 3), (2, 1, 7)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int64", "float32"])
def test_what_was_saved_is_read_like_numpy_does(
    tmp_path: Path, shape: tuple[int, ...], dtype: str
) -> None:
    values = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    save_array(tmp_path / "x.npy", values)
    for loaded in (load_array(tmp_path / "x.npy"), np.load(tmp_path / "x.npy")):
        np.testing.assert_array_equal(loaded, values)
        assert (loaded.dtype, loaded.shape) == (values.dtype, values.shape)
    with pytest.raises(ValueError, match="read-only"):
        load_array(tmp_path / "x.npy")[...] = 1


def test_arrays_lie_behind_each_other(tmp_path: Path) -> None:
    arrays = [np.arange(5, dtype=dtype) for dtype in (np.uint8, np.float32, np.int64)]
    arrays += [np.zeros((0, 3), np.uint32), np.full((3, 7), 9, np.uint8)]
    with (tmp_path / "x").open("wb") as file:
        for values in arrays:
            append_array(file, values)
    loaded = load_appended(tmp_path / "x")
    assert len(loaded) == len(arrays)
    for values, found in zip(arrays, loaded, strict=True):
        np.testing.assert_array_equal(found, values)
        assert found.dtype == values.dtype
        assert found.flags.aligned


def test_another_file_is_not_taken_for_an_array(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"x" * 200)
    with pytest.raises(ValueError, match=r"x\.npy is not as"):
        load_array(tmp_path / "x.npy")
    save_array(tmp_path / "x.npy", np.arange(100))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:500])
    with pytest.raises((ValueError, TypeError)):
        load_array(tmp_path / "x.npy")
