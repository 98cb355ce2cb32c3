"""Fetching the demo's cells: without a network here, from a wheel made for the test."""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from pathlib import Path

import mudata
import numpy as np
import pytest

from clue_dist.errors import DataError
from data_prep import fetch as fetching
from data_prep import simulate
from data_prep.fetch import fetch_cells, split_mosaic
from tests.unit.prep_helpers import assert_same_counts, convert_files, read_counts


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of one wheel, with simulated cells under the name of the real ones."""
    spec = simulate.SimulationSpec.from_features({"rna": 30, "adt": 8}, {}, cells=200)
    whole = simulate.build_mudata(spec)
    for part in whole.mod.values():
        part.obs = part.obs.rename(columns={"cell_type": "celltype"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole.write(tmp_path / "cells.h5mu")
    (tmp_path / "index").mkdir()
    path = tmp_path / "index" / "scmidas-0.3.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.write(tmp_path / "cells.h5mu", fetching.MEMBER)
        info = "scmidas-0.3.0.dist-info"
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: scmidas\nVersion: 0.3.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


def test_fetch_cuts_and_skips(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetching, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    out = tmp_path / "pbmc"
    fetch_cells(out)
    assert sorted(p.name for p in out.iterdir()) == ["test.h5mu", "train.h5mu"]
    whole, train, test = (
        mudata.read(p) for p in (tmp_path / "cells.h5mu", out / "train.h5mu", out / "test.h5mu")
    )
    assert test["rna"].obs_names.equals(test["adt"].obs_names)
    for name, part in whole.mod.items():
        assert set(train[name].obs_names) | set(test[name].obs_names) == set(part.obs_names)
        assert not set(train[name].obs_names) & set(test[name].obs_names)
        np.testing.assert_array_equal(test[name].to_df(), part[test[name].obs_names].to_df())
    assert "cell_type" in train["rna"].obs
    assert_same_counts(
        read_counts(convert_files(tmp_path / "s.zarr", str(out / "test.h5mu")), "rna"),
        test["rna"].to_df(),
    )
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    wheel.unlink()
    fetch_cells(out)
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    assert "already there" in capsys.readouterr().out


def test_another_wheel_is_refused(tmp_path: Path, wheel: Path) -> None:
    with pytest.raises(DataError, match="not the expected wheel"):
        fetch_cells(tmp_path / "pbmc")
    assert list((tmp_path / "pbmc").iterdir()) == []


def test_offline_is_one_line(tmp_path: Path, wheel: Path) -> None:
    wheel.unlink()
    with pytest.raises(DataError, match=r"offline.*`--simulate`") as caught:
        fetch_cells(tmp_path / "pbmc")
    assert "\n" not in str(caught.value)


def test_the_test_set_is_a_fifth_of_the_paired_cells_and_simulated_ones_work_too(
    tmp_path: Path,
) -> None:
    fetch_cells(tmp_path / "sim", simulated=True)
    train, test = (mudata.read(tmp_path / "sim" / f"{n}.h5mu") for n in ("train", "test"))
    assert test.n_obs == test["rna"].n_obs == test["adt"].n_obs
    assert 120 < test.n_obs < 200
    assert train.n_obs == 1600 - test.n_obs
    again = split_mosaic(simulate.build_mudata(fetching.SIMULATED))[1]
    assert again["rna"].obs_names.equals(test["rna"].obs_names)
