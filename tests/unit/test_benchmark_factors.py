"""The simulator of known factors and the probe that reads them, without any training."""

from __future__ import annotations

from pathlib import Path

import mudata as md
import numpy as np
import pytest
import torch

from clue_dist.errors import DataError
from tests.benchmarks.factors import common_space, methods
from tests.benchmarks.factors.__main__ import scored
from tests.benchmarks.factors.probes import r2
from tests.benchmarks.factors.simulate import Assay, Design, mosaic, seen, simulate, write
from tests.benchmarks.mosaic import JOINT

DESIGN = Design((Assay("rna", 120, 600, 4), Assay("adt", 40, 600, 10)), cells=600, shared=2, private=1)


def test_equal_seeds_give_equal_cells() -> None:
    first, again, other = simulate(DESIGN, 1), simulate(DESIGN, 1), simulate(DESIGN, 2)
    for name in DESIGN.names:
        assert (first.counts[name] != again.counts[name]).nnz == 0
        assert (first.counts[name] != other.counts[name]).nnz > 0
        np.testing.assert_array_equal(first.factors[name], again.factors[name])


def test_a_mosaic_holds_every_cell_once() -> None:
    parts = mosaic(DESIGN)
    np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(DESIGN.cells))
    assert {part: len(rows) for part, rows in parts.items()} == {"test": 120, "paired": 240, "rna": 120, "adt": 120}
    assert not set(seen(parts, "rna")) & (set(parts["test"]) | set(parts["adt"]))


def test_the_written_files_hold_the_cells_of_the_mosaic(tmp_path: Path) -> None:
    simulation = simulate(DESIGN)
    write(simulation, tmp_path)
    parts = mosaic(DESIGN)
    with md.set_options(pull_on_update=False):
        train, test = md.read(tmp_path / "train.h5mu"), md.read(tmp_path / "test.h5mu")
    for name in DESIGN.names:
        assert list(train[name].obs_names) == list(simulation.barcodes[seen(parts, name)])
        assert (simulation.counts[name][parts["test"]] != test[name].X).nnz == 0
        assert (np.asarray(train[name].X.sum(1)) > 0).all()


def test_a_design_needs_cells_for_every_part() -> None:
    with pytest.raises(DataError):
        Design(DESIGN.assays, cells=2)


def test_the_true_factors_are_read_in_full_and_noise_not_at_all() -> None:
    simulation, rng = simulate(DESIGN), np.random.default_rng(0)
    truth = simulation.factors["shared"]
    mixed = np.hstack([truth, rng.normal(size=(600, 10))]) @ rng.normal(size=(12, 20))
    noise = rng.normal(size=(600, 20))
    assert (r2(mixed[:400], truth[:400], mixed[400:], truth[400:]) > 0.999).all()
    assert (np.abs(r2(noise[:400], truth[:400], noise[400:], truth[400:])) < 0.1).all()


def test_the_probe_does_not_see_test_cells() -> None:
    """A shift of the test cells alone must cost R²: means and penalties come from training cells."""
    z = np.random.default_rng(0).normal(size=(400, 3))
    assert r2(z[:200], z[:200, :1], z[200:] + 2, z[200:, :1])[0] < 0


def test_counts_show_shared_and_own_factors_and_nothing_of_the_other_modality() -> None:
    simulation = simulate(DESIGN)
    z, _ = methods.by_counts(simulation)
    found = scored(simulation, z)
    assert found.keys() == {JOINT, "rna", "adt"}
    assert found["rna"].keys() == {"shared", "rna"}
    assert found[JOINT].keys() == {"shared", "rna", "adt"}
    assert min(min(values) for by_owner in found.values() for values in by_owner.values()) > 0.6
    parts, other = mosaic(simulation.design), simulation.factors["adt"]
    train, test = z["rna"]
    assert r2(train, other[parts["paired"]], test, other[parts["test"]])[0] < 0.1


def test_the_symmetric_kl_is_the_sum_of_both() -> None:
    torch.manual_seed(0)
    mean, log_var = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    zero = common_space.symmetric_kl(mean[0], log_var[0], mean[0], log_var[0])
    torch.testing.assert_close(zero, torch.zeros(5), atol=1e-6, rtol=0)
    q = [torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in zip(mean, log_var, strict=True)]
    kl = torch.distributions.kl_divergence
    expected = (kl(q[0], q[1]) + kl(q[1], q[0])).sum(-1)
    torch.testing.assert_close(common_space.symmetric_kl(mean[0], log_var[0], mean[1], log_var[1]), expected)


def test_the_common_space_infers_one_z_whichever_modality_is_seen() -> None:
    settings = ["model.trunk.hidden=8", "model.latent=4", "data.batch_size=64", "train.epochs=1"]
    z, _ = methods.by_common_space(simulate(DESIGN), settings)
    assert z.keys() == {JOINT, "rna", "adt"}
    for train, test in z.values():
        assert train.shape == (240, 8)
        assert test.shape == (120, 8)
        assert np.isfinite(train).all()
        assert np.isfinite(test).all()
