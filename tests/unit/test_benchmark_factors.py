"""The simulator of known factors and the probe that reads them, without any training."""

from __future__ import annotations

from pathlib import Path

import mudata as md
import numpy as np
import pytest
import torch

from clue_dist.config import load_config
from clue_dist.data.batch import read_batch
from clue_dist.errors import DataError
from clue_dist.model.clue import CLUE
from clue_dist.model.noise import Noise
from clue_dist.store.reader import Store
from clue_dist.train.setup import Setup, prepare_setup
from tests.benchmarks.factors import __main__ as factors
from tests.benchmarks.factors import common_space, methods
from tests.benchmarks.factors.probes import foscttm, r2, scored
from tests.benchmarks.factors.simulate import Assay, Design, barcodes, mosaic, seen, simulate, write
from tests.benchmarks.mosaic import JOINT, RECIPE
from tests.distributed.command import ROOT
from tests.stores import make_store

STRONG = {"shared_strength": 0.3, "private_strength": 0.3}
DESIGN = Design(
    (Assay("rna", 120, 600, 4), Assay("adt", 40, 600, 10)), cells=600, shared=2, private=1, **STRONG
)
THREE = Design(
    (*DESIGN.assays, Assay("atac", 60, 600, 10)), cells=600, shared=2, private=1, **STRONG
)


def test_equal_seeds_give_equal_cells() -> None:
    first, again, other = simulate(DESIGN, 1), simulate(DESIGN, 1), simulate(DESIGN, 2)
    for name in DESIGN.names:
        assert (first.counts[name] != again.counts[name]).nnz == 0
        assert (first.counts[name] != other.counts[name]).nnz > 0
        np.testing.assert_array_equal(first.factors[name], again.factors[name])


def test_a_mosaic_holds_every_cell_once() -> None:
    parts = mosaic(DESIGN)
    np.testing.assert_array_equal(
        np.sort(np.concatenate(list(parts.values()))), np.arange(DESIGN.cells)
    )
    assert {part: len(rows) for part, rows in parts.items()} == {
        "test": 120,
        "paired": 240,
        "rna": 120,
        "adt": 120,
    }
    assert not set(seen(parts, "rna")) & (set(parts["test"]) | set(parts["adt"]))


def test_the_written_files_hold_the_cells_of_the_mosaic(tmp_path: Path) -> None:
    simulation = simulate(DESIGN)
    write(simulation, tmp_path)
    parts = mosaic(DESIGN)
    probed = np.concatenate([parts["paired"], parts["test"]])
    with md.set_options(pull_on_update=False):
        train, test = md.read(tmp_path / "train.h5mu"), md.read(tmp_path / "test.h5mu")
    for name in DESIGN.names:
        assert list(train[name].obs_names) == barcodes(seen(parts, name))
        assert not set(train[name].obs_names) & set(barcodes(parts["test"]))
        assert list(test[name].obs_names) == barcodes(probed)
        assert (simulation.counts[name][probed] != test[name].X).nnz == 0
        assert (np.asarray(train[name].X.sum(1)) > 0).all()


def test_of_three_modalities_every_two_are_embedded_as_if_the_third_had_not_been_measured(
    tmp_path: Path,
) -> None:
    assert DESIGN.subsets == {}
    assert THREE.subsets == {
        "rna+adt": ("rna", "adt"),
        "rna+atac": ("rna", "atac"),
        "adt+atac": ("adt", "atac"),
    }
    simulation, rows = simulate(THREE), mosaic(THREE)["test"]
    write(simulation, tmp_path)
    with md.set_options(pull_on_update=False):
        test = md.read(tmp_path / "test.h5mu")
    for name in THREE.names:
        for subset, some in THREE.subsets.items():
            here = set(barcodes(rows, subset)) & set(test[name].obs_names)
            assert len(here) == (len(rows) if name in some else 0)
    same = test["rna"][barcodes(rows, "rna+atac")].X
    assert (same != simulation.counts["rna"][rows]).nnz == 0


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
    torch.testing.assert_close(
        common_space.symmetric_kl(mean[0], log_var[0], mean[1], log_var[1]), expected
    )


# --- the common space ---

SMALL = ("model.trunk.hidden=8", "model.latent=4", "data.batch_size=64", "train.epochs=3")


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    cells = {"rna+adt": 200, "rna": 60, "adt": 60}
    make_store(tmp_path / "s.zarr", cells=cells, features={"rna": 30, "adt": 8})
    return prepare_setup(
        load_config(
            ROOT / RECIPE, [f"store={tmp_path / 's.zarr'}", f"run={tmp_path / 'r'}", *SMALL]
        ),
        1,
    )


def model_of(setup: Setup) -> common_space.CommonSpace:
    torch.manual_seed(0)
    return common_space.CommonSpace(setup.specs, 1, setup.config)


def test_the_common_space_has_the_encoders_of_ours_and_decoders_that_read_all_of_z(
    setup: Setup,
) -> None:
    theirs, ours = model_of(setup), CLUE(setup.specs, 1, setup.config.model)
    for part in ("trunks", "heads"):
        shapes = [
            {n: p.shape for n, p in getattr(m, part).named_parameters()} for m in (theirs, ours)
        ]
        assert shapes[0] == shapes[1]
    assert (
        theirs.get_decoder("rna").mlp.linear[0].in_features
        == 2 * ours.get_decoder("rna").mlp.linear[0].in_features
    )


def test_the_common_space_infers_one_z_whichever_modality_is_seen(setup: Setup) -> None:
    model = model_of(setup).eval()
    store = Store(setup.config.store)
    joint, alone = model.embed_batch(read_batch(store, "rna+adt", np.arange(50)))
    assert joint.shape == alone["rna"].shape == alone["adt"].shape == (50, 8)
    joint, alone = model.embed_batch(read_batch(store, "rna", np.arange(50)))
    torch.testing.assert_close(joint, alone["rna"])  # one source is all there is


def test_the_product_with_the_prior_adds_its_precision() -> None:
    mean, log_var = torch.full((1, 2, 1, 1), 3.0), torch.zeros(1, 2, 1, 1)
    for observed, expected in (([True, False], 1.5), ([True, True], 2.0)):
        got, got_log_var = common_space.with_prior(mean, log_var, torch.tensor([observed]))
        assert got.item() == pytest.approx(expected)
        assert got_log_var.exp().item() == pytest.approx(1 / (1 + sum(observed)))


def test_the_penalty_makes_modalities_infer_alike_and_reaches_paired_cells_alone(
    setup: Setup,
) -> None:
    model, store = model_of(setup).eval(), Store(setup.config.store)
    for stratum, grows in (("rna+adt", True), ("rna", False)):
        batch = read_batch(store, stratum, np.arange(48))
        free, aligned = (model.loss(batch, Noise(0, 0, {stratum: 48}, 8), a) for a in (0.0, 1.0))
        assert (aligned > free) if grows else (aligned == free)


def test_the_common_space_learns(setup: Setup) -> None:
    model, batch = (
        common_space.train(setup, 1.0),
        read_batch(Store(setup.config.store), "rna+adt", np.arange(48)),
    )
    assert not model.training
    before = model_of(setup).eval()
    losses = [m.loss(batch, Noise(0, 0, {"rna+adt": 48}, 8), 1.0).item() for m in (before, model)]
    assert losses[1] < losses[0]


# --- bars and the table ---


def record(method: str, seed: int, r2: float) -> dict:
    found = {whose: [r2 + 0.01 * seed] * 2 for whose in ("shared", "rna", "adt")}
    by_source = {JOINT: found} | {m: {w: found[w] for w in ("shared", m)} for m in ("rna", "adt")}
    return {
        "method": method,
        "data_set": "cite",
        "seed": seed,
        "r2": by_source,
        "foscttm": 0.3 + 0.01 * seed,
    }


def bars(records: list[dict], *words: str) -> list[dict]:
    return list(
        factors.bars_of(
            records, factors.arguments(["--json", "out.json", "--designs", "cite", *words])
        )
    )


def test_ours_is_judged_modality_by_modality_against_the_better_common_space() -> None:
    values = {"ours": 0.8, "aligned": 0.5, "common": 0.85, "counts": 0.9}
    records = [record(m, seed, r2) for m, r2 in values.items() for seed in range(3)]
    judged = {b["name"]: b for b in bars(records)}
    for name in ("rna", "adt"):
        for z_from in ("everything", f"{name} alone"):
            private = judged[
                f"cite: R² of private {name} factors, z from {z_from}, ours minus common space"
            ]
            assert (private["value"], private["holds"]) == (pytest.approx(-0.05), False)
            assert private["deviation"] == pytest.approx(0, abs=1e-9)
        share = judged[
            f"cite: R² of private {name} factors, z from everything, ours as a share of counts"
        ]
        assert share["value"] == pytest.approx(
            np.mean([(0.8 + s) / (0.9 + s) for s in (0, 0.01, 0.02)])
        )
    assert {b["holds"] for b in bars(records[:-1])} == {None}
    assert {b["holds"] for b in bars(records, "--quick")} == {None}
    assert {b["holds"] for b in bars(records, "--seeds", "0", "1")} == {None}


def test_the_table_tells_the_spread_over_seeds() -> None:
    lines = factors.table([record("ours", seed, 0.8) for seed in range(3)]).splitlines()
    assert lines[0].split("  ")[0] == "design"
    assert len(lines) == 2 + 3 + 4 + 1
    assert "0.810 ± 0.010" in lines[2]
    assert "0.310 ± 0.010" in lines[-1]


def test_foscttm_is_the_mean_over_pairs_of_modalities() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(200, 8))
    apart = rng.normal(size=(200, 8))
    assert foscttm({"a": z, "b": z + 1e-6}, ["a", "b"]) == 0
    assert foscttm({"a": z, "b": z, "c": apart}, ["a", "b", "c"]) == pytest.approx(
        2 / 3 * 0.5, abs=0.04
    )


def test_designs_of_three_are_asked_about_every_two() -> None:
    asked = {q.name: q.sources for q in factors.questions(THREE)}
    assert asked["private adt factors, z from any two"] == ("rna+adt", "adt+atac")
    assert asked["shared factors, z from any two"] == tuple(THREE.subsets)
    assert not any("any two" in q.name for q in factors.questions(DESIGN))


def test_every_trained_method_follows_from_our_sources(monkeypatch) -> None:
    args = factors.arguments(["--json", "out.json"])
    before = {m: factors.digest_of(m, "cite", args) for m in factors.METHODS}
    monkeypatch.setattr(factors.mosaic, "sources", lambda: "other sources")
    after = {m: factors.digest_of(m, "cite", args) for m in factors.METHODS}
    assert {m for m in before if before[m] != after[m]} == {"ours", "aligned", "common"}
