"""Simulated cells: the same however they are asked for, with a truth that can be found again."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from clue_dist.errors import ConfigError, DataError
from clue_dist.store import layout
from clue_dist.store.reader import Store
from data_prep import simulate
from data_prep.conversion import scatter
from data_prep.convert import convert_inputs
from data_prep.jobs.workers import ThreadPool
from data_prep.planned_cells import ConversionOptions
from data_prep.simulate import SimulationSpec, parse_features
from tests.unit.prep_helpers import (
    assert_same_counts,
    convert_files,
    make_counts,
    read_counts,
    read_field,
    write_h5ad,
)

SPEC = SimulationSpec.from_features(
    {"rna": 300, "adt": 20, "atac": 500, "x": 15},
    {"x": "dense"},
    cells=700,
    paired=0.4,
    batches=3,
    seed=5,
)


@pytest.mark.parametrize("m", range(4))
def test_a_cell_is_the_same_in_any_range(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "CHUNK_VALUES", 100 * SPEC.modalities[m][2])  # several chunks
    cells = SPEC.list_cells(m)
    whole = simulate.draw_measurements(SPEC, m, cells)
    for lo, hi in [(0, 1), (3, 250), (99, 101), (279, 300), (len(cells) - 1, len(cells)), (5, 5)]:
        np.testing.assert_array_equal(
            simulate.draw_measurements(SPEC, m, cells[lo:hi]), whole[lo:hi]
        )
    other = SimulationSpec(SPEC.modalities, cells=700, paired=0.4, batches=3, seed=6)
    assert (simulate.draw_measurements(other, m, cells) != whole).any()


def test_each_kind_looks_like_itself() -> None:
    rna, adt, atac, dense = (
        simulate.draw_measurements(SPEC, m, SPEC.list_cells(m)) for m in range(4)
    )
    assert rna.min() == 0 < 0.2 < (rna > 0).mean() < 0.8
    assert np.var(rna, axis=0).mean() > 1.5 * rna.mean()  # overdispersed
    assert (adt > 0).mean() > 0.8
    assert atac[atac > 0].mean() < 1.6
    assert dense.dtype == np.float32
    assert dense.min() < 0


def test_strata_follow_the_shares(tmp_path: Path) -> None:
    manifest = convert_inputs(
        SPEC.build_sources(),
        tmp_path / "s.zarr",
        ConversionOptions(kinds={"x": "dense"}),
        ThreadPool(2),
    )
    assert {n: s.n_cells for n, s in manifest.strata.items()} == {
        "rna": 105,
        "adt": 105,
        "atac": 105,
        "x": 105,
        "rna+adt+atac+x": 280,
    }
    assert manifest.batches == ["batch0", "batch1", "batch2"]


def test_zarr_and_h5mu_hold_the_same_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mudata

    spec = SimulationSpec.from_features({"rna": 100, "adt": 10}, {}, cells=300, seed=1)
    convert_inputs(spec.build_sources(), tmp_path / "a.zarr", ConversionOptions(), ThreadPool(2))
    simulate.write_h5mu(spec, tmp_path / "b.h5mu")
    monkeypatch.setattr(scatter, "TASK_ENTRIES", 700)
    other = convert_files(tmp_path / "b.zarr", str(tmp_path / "b.h5mu"))
    assert Store(tmp_path / "a.zarr").fingerprint == other.fingerprint
    whole = mudata.read(tmp_path / "b.h5mu")
    assert_same_counts(read_counts(other, "rna"), whole["rna"].to_df())
    assert read_field(other, "batch") == {
        c: b for part in whole.mod.values() for c, b in part.obs["batch"].items()
    }
    cells = np.array([int(name[4:]) for name in whole.obs_names])
    np.testing.assert_array_equal(
        whole.obsm["shared"], simulate.draw_true_factors(spec, cells).shared
    )
    assert whole["adt"].obsm["private"].shape == (len(spec.list_cells(1)), 4)
    with pytest.raises(DataError, match="already there"):
        simulate.write_h5mu(spec, tmp_path / "b.h5mu")


def explained(x: np.ndarray, y: np.ndarray) -> float:
    """R2 of a ridge regression on the half of the cells it has not seen."""
    x = np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))
    x, y = x - x.mean(0), y - y.mean(0)
    half = len(x) // 2
    fit = np.linalg.solve(x[:half].T @ x[:half] + 20 * np.eye(x.shape[1]), x[:half].T @ y[:half])
    return float(1 - ((y[half:] - x[half:] @ fit) ** 2).sum() / (y[half:] ** 2).sum())


def test_shared_factors_are_in_every_modality_and_private_ones_in_their_own() -> None:
    spec = SimulationSpec.from_features(
        {"rna": 300, "adt": 60}, {}, cells=1500, paired=1.0, shared=4, private=3
    )
    cells = np.arange(1500)
    rna, adt = (simulate.draw_measurements(spec, m, cells) for m in (0, 1))
    shared, private = (
        simulate.draw_true_factors(spec, cells).shared,
        simulate.draw_private_factors(spec, 0, cells),
    )
    assert explained(rna, shared) > 0.5
    assert explained(adt, shared) > 0.5
    assert explained(rna, private) > 0.3
    assert explained(adt, private) < 0.05


def test_sizes_that_make_no_sense() -> None:
    assert parse_features(["rna:20", "gene expression:5"]) == {"rna": 20, "gene expression": 5}
    for texts in (["rna"], ["rna:x"], [":5"], ["rna:1", "rna:2"]):
        with pytest.raises(DataError):
            parse_features(texts)
    for name, size in (("cells", 0), ("paired", 1.5), ("batches", 0), ("private", -1)):
        with pytest.raises(ConfigError, match=f"where: --{name}\n"):
            SimulationSpec.from_features({"rna": 10}, {}, **{name: size})
    with pytest.raises(ConfigError, match="where: --modality rna:0"):
        SimulationSpec.from_features({"rna": 0}, {})
    with pytest.raises(DataError, match="--kind foo=rna"):
        SimulationSpec.from_features({"foo": 10}, {})
    with pytest.raises(DataError, match=r"no such modality[\s\S]*got: foo\n  expected: rna"):
        SimulationSpec.from_features({"rna": 10}, {"foo": "rna"})


def test_memory_follows_the_tasks_and_not_the_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scatter, "TASK_ENTRIES", 20_000)
    monkeypatch.setattr(layout, "SHARD_BYTES", 2**16)

    def peak(n: int, form: type) -> float:
        name = f"{n}{form.__name__}"
        path = write_h5ad(tmp_path / f"{name}.h5ad", make_counts(n, 200), form)
        tracemalloc.start()
        convert_files(tmp_path / f"{name}.zarr", f"rna={path}", workers=1)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(200, sp.csr_matrix)  # compiles
    small, large = peak(1500, sp.csr_matrix), peak(9000, sp.csr_matrix)
    assert large < 2.5 * small  # six times the cells; a few bytes of each stay with the driver
    assert peak(9000, np.asarray) < 2.5 * small
