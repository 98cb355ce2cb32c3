"""The simulator of known factors and the probe that reads them, without any training."""

from pathlib import Path
from typing import Any

import mudata as md
import numpy as np
import pytest
import torch

from clue_dist.config_file import load_config
from clue_dist.data.assembly import read_batch
from clue_dist.errors import DataError
from clue_dist.model.clue import CLUE
from clue_dist.model.noise import Noise
from clue_dist.store.reader import Store
from clue_dist.train.setup import Setup, prepare_setup
from tests.benchmarks import mosaic
from tests.benchmarks.factors import __main__ as factors
from tests.benchmarks.factors import common_space, methods
from tests.benchmarks.factors.__main__ import Factors, measure_r2
from tests.benchmarks.factors.simulate import (
    Assay,
    Design,
    cut_parts,
    list_barcodes,
    list_seen,
    simulate_cells,
    write_files,
)
from tests.benchmarks.mosaic import JOINT, RECIPE
from tests.distributed.command import ROOT
from tests.stores import make_store

SIZES = {"cells": 600, "shared": 2, "private": 1, "shared_strength": 0.3, "private_strength": 0.3}
DESIGN = Design((Assay("rna", 120, 600, 4), Assay("adt", 40, 600, 10)), **SIZES)
THREE = Design((*DESIGN.assays, Assay("atac", 60, 600, 10)), **SIZES)


def test_equal_seeds_give_equal_cells() -> None:
    first, again, other = (simulate_cells(DESIGN, seed) for seed in (1, 1, 2))
    for name in DESIGN.names:
        assert (first.counts[name] != again.counts[name]).nnz == 0
        assert (first.counts[name] != other.counts[name]).nnz > 0
        np.testing.assert_array_equal(first.factors[name], again.factors[name])


def test_a_mosaic_holds_every_cell_once() -> None:
    parts = cut_parts(DESIGN)
    every = np.sort(np.concatenate(list(parts.values())))
    np.testing.assert_array_equal(every, np.arange(DESIGN.cells))
    sizes = {part: len(rows) for part, rows in parts.items()}
    assert sizes == {"test": 120, "paired": 240, "rna": 120, "adt": 120}
    assert not set(list_seen(parts, "rna")) & (set(parts["test"]) | set(parts["adt"]))


def test_the_written_files_hold_the_cells_of_the_mosaic(tmp_path: Path) -> None:
    simulation, parts = simulate_cells(DESIGN), cut_parts(DESIGN)
    write_files(simulation, tmp_path)
    probed = np.concatenate([parts["paired"], parts["test"]])
    with md.set_options(pull_on_update=False):
        train, test = md.read(tmp_path / "train.h5mu"), md.read(tmp_path / "test.h5mu")
    for name in DESIGN.names:
        assert list(train[name].obs_names) == list_barcodes(list_seen(parts, name))
        assert not set(train[name].obs_names) & set(list_barcodes(parts["test"]))
        assert list(test[name].obs_names) == list_barcodes(probed)
        assert (simulation.counts[name][probed] != test[name].X).nnz == 0
        assert (np.asarray(train[name].X.sum(1)) > 0).all()


def test_of_three_modalities_every_two_are_embedded_as_if_the_third_had_not_been_measured(
    tmp_path: Path,
) -> None:
    assert DESIGN.subsets == {}
    pairs = [("rna", "adt"), ("rna", "atac"), ("adt", "atac")]
    assert THREE.subsets == {"+".join(pair): pair for pair in pairs}
    simulation, rows = simulate_cells(THREE), cut_parts(THREE)["test"]
    write_files(simulation, tmp_path)
    with md.set_options(pull_on_update=False):
        test = md.read(tmp_path / "test.h5mu")
    for name in THREE.names:
        for subset, some in THREE.subsets.items():
            here = set(list_barcodes(rows, subset)) & set(test[name].obs_names)
            assert len(here) == (len(rows) if name in some else 0)
    same = test["rna"][list_barcodes(rows, "rna+atac")].X
    assert (same != simulation.counts["rna"][rows]).nnz == 0


def test_a_design_needs_cells_for_every_part() -> None:
    with pytest.raises(DataError):
        Design(DESIGN.assays, cells=2)


def test_the_true_factors_are_read_in_full_and_noise_not_at_all() -> None:
    simulation, rng = simulate_cells(DESIGN), np.random.default_rng(0)
    truth, noise = simulation.factors["shared"], rng.normal(size=(600, 20))
    mixed = np.hstack([truth, rng.normal(size=(600, 10))]) @ rng.normal(size=(12, 20))
    assert (measure_r2(mixed[:400], truth[:400], mixed[400:], truth[400:]) > 0.999).all()
    assert (np.abs(measure_r2(noise[:400], truth[:400], noise[400:], truth[400:])) < 0.1).all()


def test_the_probe_does_not_see_test_cells() -> None:
    """A shift of the test cells alone costs R²: means and penalties come from training cells."""
    z = np.random.default_rng(0).normal(size=(400, 3))
    assert measure_r2(z[:200], z[:200, :1], z[200:] + 2, z[200:, :1])[0] < 0


def test_counts_show_shared_and_own_factors_and_nothing_of_the_other_modality() -> None:
    simulation = simulate_cells(DESIGN)
    z, _ = methods.reduce_counts(simulation)
    found = factors.probe_factors(simulation, z)
    assert found.keys() == {JOINT, "rna", "adt"}
    assert found["rna"].keys() == {"shared", "rna"}
    assert found[JOINT].keys() == {"shared", "rna", "adt"}
    assert min(min(values) for by_owner in found.values() for values in by_owner.values()) > 0.6
    parts, other = cut_parts(simulation.design), simulation.factors["adt"]
    train, test = z["rna"]
    assert measure_r2(train, other[parts["paired"]], test, other[parts["test"]])[0] < 0.1


def test_foscttm_is_the_mean_over_pairs_of_modalities() -> None:
    rng = np.random.default_rng(0)
    z, apart = rng.normal(size=(200, 8)), rng.normal(size=(200, 8))
    assert factors.compare_spaces({"a": z, "b": z + 1e-6}, ["a", "b"]) == 0
    found = factors.compare_spaces({"a": z, "b": z, "c": apart}, ["a", "b", "c"])
    assert found == pytest.approx(2 / 3 * 0.5, abs=0.04)


# --- the common space ---

SMALL = ("model.trunk.hidden=8", "model.latent=4", "data.batch_size=64", "train.epochs=1")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder, cells = tmp_path_factory.mktemp("common"), {"rna+adt": 200, "rna": 60, "adt": 60}
    make_store(folder / "s.zarr", cells=cells, features={"rna": 30, "adt": 8})
    paths = (f"store={folder / 's.zarr'}", f"run={folder / 'r'}")
    return prepare_setup(load_config(ROOT / RECIPE, [*paths, *SMALL]), 1)


def make_model(setup: Setup) -> common_space.CommonSpace:
    torch.manual_seed(0)
    return common_space.CommonSpace(setup.specs, 1, setup.config)


def test_the_symmetric_kl_is_the_sum_of_both() -> None:
    torch.manual_seed(0)
    mean, log_var = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    q = [torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in zip(mean, log_var, strict=True)]
    kl = torch.distributions.kl_divergence
    expected = (kl(q[0], q[1]) + kl(q[1], q[0])).sum(-1)
    found = common_space.compute_symmetric_kl(mean[0], log_var[0], mean[1], log_var[1])
    torch.testing.assert_close(found, expected)


def test_the_common_space_has_the_encoders_of_ours_and_decoders_that_read_all_of_z(
    setup: Setup,
) -> None:
    theirs, ours = make_model(setup), CLUE(setup.specs, 1, setup.config.model)
    for part in ("trunks", "heads"):
        models = [getattr(model, part) for model in (theirs, ours)]
        first, second = ({n: p.shape for n, p in m.named_parameters()} for m in models)
        assert first == second
    widths = [m.decoders[0].mlp.linear[0].in_features for m in (theirs, ours)]
    assert widths[0] == 2 * widths[1]


def test_the_common_space_infers_one_z_whichever_modality_is_seen(setup: Setup) -> None:
    model, store = make_model(setup).eval(), Store(setup.config.store)
    joint, alone = model.embed_batch(read_batch(store, "rna+adt", np.arange(50)))
    assert joint.shape == alone["rna"].shape == alone["adt"].shape == (50, 8)
    joint, alone = model.embed_batch(read_batch(store, "rna", np.arange(50)))
    torch.testing.assert_close(joint, alone["rna"])  # one source is all there is


def test_the_product_with_the_prior_adds_its_precision() -> None:
    mean, log_var = torch.full((1, 2, 1, 1), 3.0), torch.zeros(1, 2, 1, 1)
    for observed, expected in (([True, False], 1.5), ([True, True], 2.0)):
        found, variance = common_space.add_prior(mean, log_var, torch.tensor([observed]))
        assert found.item() == pytest.approx(expected)
        assert variance.exp().item() == pytest.approx(1 / (1 + sum(observed)))


def test_the_penalty_makes_modalities_infer_alike_and_reaches_paired_cells_alone(
    setup: Setup,
) -> None:
    model, store = make_model(setup).eval(), Store(setup.config.store)
    for stratum, grows in (("rna+adt", True), ("rna", False)):
        batch, shares = read_batch(store, stratum, np.arange(48)), {stratum: 48}
        free, aligned = (
            model.compute_loss(batch, Noise(0, 0, shares, 8), weight) for weight in (0.0, 1.0)
        )
        assert (aligned > free) if grows else (aligned == free)


def test_the_common_space_learns(setup: Setup) -> None:
    model = common_space.train_model(setup, 1.0)
    assert not model.training
    batch = read_batch(Store(setup.config.store), "rna+adt", np.arange(48))
    before, after = (
        m.compute_loss(batch, Noise(0, 0, {"rna+adt": 48}, 8), 1.0).item()
        for m in (make_model(setup).eval(), model)
    )
    assert after < before


# --- bars and the table ---


def make_record(method: str, seed: int, r2: float) -> dict[str, Any]:
    found = {whose: [r2 + 0.01 * seed] * 2 for whose in ("shared", "rna", "adt")}
    by_source = {JOINT: found} | {m: {w: found[w] for w in ("shared", m)} for m in ("rna", "adt")}
    run = {"method": method, "data_set": "cite", "seed": seed}
    return run | {"r2": by_source, "foscttm": 0.3 + 0.01 * seed}


def judge(records: list[dict[str, Any]], *words: str) -> dict[str, dict[str, Any]]:
    plan = Factors(["--json", "out.json", "--designs", "cite", *words])
    return {bar["name"]: bar for bar in plan.judge(records)}


def test_ours_is_judged_modality_by_modality_against_the_better_common_space() -> None:
    values = {"ours": 0.8, "aligned": 0.5, "common": 0.85, "counts": 0.9}
    records = [make_record(m, seed, r2) for m, r2 in values.items() for seed in range(3)]
    judged = judge(records)
    for name in ("rna", "adt"):
        for z_from in ("everything", f"{name} alone"):
            title = f"cite: R² of private {name} factors, z from {z_from}, ours"
            lead = judged[f"{title} minus common space"]
            assert (lead["value"], lead["holds"]) == (pytest.approx(-0.05), False)
            assert lead["deviation"] == pytest.approx(0, abs=1e-9)
        title = f"cite: R² of private {name} factors, z from everything, ours"
        share = np.mean([(0.8 + s) / (0.9 + s) for s in (0, 0.01, 0.02)])
        assert judged[f"{title} as a share of counts"]["value"] == pytest.approx(share)
    assert {bar["holds"] for bar in judge(records[:-1]).values()} == {None}
    assert {bar["holds"] for bar in judge(records, "--seeds", "0", "1").values()} == {None}


def test_the_table_tells_the_spread_over_seeds() -> None:
    plan = Factors(["--json", "out.json"])
    lines = plan.tabulate([make_record("ours", seed, 0.8) for seed in range(3)]).splitlines()
    assert lines[0].split() == ["design", "z", "from", "factors", "ours"]
    assert len(lines) == 1 + 3 + 4 + 1
    assert "0.81 ± 0.01" in lines[1]
    assert "0.31 ± 0.01" in lines[-1]


def test_designs_of_three_are_asked_about_every_two() -> None:
    asked = {(q.factors, q.z_from): q.sources for q in factors.list_questions(THREE)}
    assert asked["private adt", "any two"] == ("rna+adt", "adt+atac")
    assert asked["shared", "any two"] == tuple(THREE.subsets)
    assert not any("any two" in q.z_from for q in factors.list_questions(DESIGN))


def test_every_trained_method_follows_from_our_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, digests = Factors(["--json", "out.json"]), []
    for sources in ("some", "others"):
        monkeypatch.setattr(mosaic, "digest_sources", lambda sources=sources: sources)
        digests.append({method: plan.digest(method, "cite") for method in factors.METHODS})
    before, after = digests
    assert {m for m in before if before[m] != after[m]} == {"ours", "aligned", "common"}
