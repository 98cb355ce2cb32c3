"""The streamed SVD is that of all cells, on any workers; training starts from it if it fits."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from clue_dist.config import Config
from clue_dist.errors import ConfigError, StoreError
from clue_dist.model.clue import CLUE
from clue_dist.model.initialise import initialise_model
from clue_dist.normalise import normalise_rows
from clue_dist.store import svd as stored
from clue_dist.store.reader import Store
from clue_dist.store.rows import CsrRows
from clue_dist.store.svd import StoredSvd
from clue_dist.train.setup import Setup, prepare_setup
from data_prep import inspect, svd
from data_prep.check import check_store
from data_prep.jobs.workers import ThreadPool, open_pool
from data_prep.simulate import SimulationSpec, draw_measurements
from data_prep.svd import SvdOptions, compute_svd
from tests.distributed.command import KILLED
from tests.stores import make_store
from tests.unit.prep_helpers import convert_files, make_counts, write_h5ad
from tests.unit.prep_victims import count_calls, run_victim
from tests.unit.test_prep_cluster import Cluster

REPO = Path(__file__).parents[2]
CELLS = {"rna+adt": 150, "rna": 90, "rna+atac": 60, "atac": 70, "x": 40}
FEATURES = {"rna": 60, "adt": 7, "atac": 50, "x": 12}
HOW = {"rna": "log_cp10k", "adt": "log", "atac": "tfidf", "x": "none"}
COMPONENTS = 6


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Strata that lack modalities; tasks of three blocks, read two at a time."""
    monkeypatch.setattr(svd, "MANY_TASKS", 8)
    monkeypatch.setattr(svd, "STEP_ENTRIES", 1500)
    return make_store(tmp_path / "s.zarr", cells=CELLS, features=FEATURES)


def run(store: Store, *modalities: str, workers: int = 2, **options: int) -> dict[str, StoredSvd]:
    notes = compute_svd(
        str(store.root),
        modalities,
        SvdOptions(**{"components": COMPONENTS, **options}),
        ThreadPool(workers),
    )
    found = {m: stored.read_svd(store.root, store.manifest, m) for m in notes}
    return {m: s for m, s in found.items() if s is not None}


def standardised(store: Store, modality: str) -> np.ndarray:
    """All cells that carry the modality, as dense as they can be. (n, features)"""
    readers = [r for r in store.segments.values() if modality in r.modalities]
    rows = [r.read_rows(modality, np.arange(r.n_cells)) for r in readers]
    counts = np.concatenate([r.to_scipy().toarray() if isinstance(r, CsrRows) else r for r in rows])
    how = HOW[modality]
    idf = len(counts) / np.maximum((counts > 0).sum(0), 1)
    x = normalise_rows(counts, how, idf)
    return (
        x if how == "tfidf" else (x - x.mean(0)) / x.std(0) ** (0.75 if how == "log_cp10k" else 1)
    )


@pytest.mark.parametrize("modality", list(FEATURES))
def test_it_is_the_exact_svd_of_all_cells(store: Store, modality: str) -> None:
    found = run(store, modality)[modality]
    x = standardised(store, modality)
    _, singular, right = np.linalg.svd(x, full_matrices=False)
    assert (
        found.note.n_cells == len(x) == sum(n for s, n in CELLS.items() if modality in s.split("+"))
    )
    assert found.note.normalise == HOW[modality]
    np.testing.assert_allclose(found.singular, singular[:COMPONENTS], rtol=1e-8)
    np.testing.assert_allclose(
        np.abs(np.sum(found.loadings * right[:COMPONENTS].T, 0)), 1, atol=1e-5
    )
    assert (found.loadings[np.abs(found.loadings).argmax(0), np.arange(COMPONENTS)] > 0).all()


def test_any_number_of_workers_gives_the_same(store: Store, tmp_path: Path) -> None:
    one = run(store, workers=1)
    assert list(one) == list(FEATURES)
    shutil.rmtree(tmp_path / "s.zarr" / "svd")
    two = run(store, workers=2)
    for m in FEATURES:
        np.testing.assert_allclose(one[m].singular, two[m].singular, rtol=1e-10)
        np.testing.assert_allclose(one[m].loadings, two[m].loadings, atol=1e-6)
    assert not (tmp_path / "s.zarr.svd.partial").exists()
    assert Store(store.root).fingerprint == store.fingerprint
    assert check_store(store.root) == []


def test_fewer_cells_than_components(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", cells={"rna": 9}, features={"rna": 200})
    found = run(store, "rna", components=20)["rna"]
    assert (found.singular[:8] > 0).all()  # centred: one less than there are cells
    assert (found.singular[8:] == 0).all()
    assert (found.loadings[:, 8:] == 0).all()


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """About 200 counts a cell; behind the first 20 components the spectrum is flat."""
    spec = SimulationSpec.from_features({"rna": 1500}, {}, cells=3000, shared=12, private=12)
    thinned = np.random.default_rng(0).binomial(
        draw_measurements(spec, 0, spec.list_cells(0)), 0.25
    )
    counts = make_counts(3000, 1500)
    counts[:] = thinned
    folder = tmp_path_factory.mktemp("shallow")
    return convert_files(folder / "s.zarr", f"rna={write_h5ad(folder / 'in.h5ad', counts)}")


def test_the_default_is_nearly_exact_where_the_spectrum_is_flat(shallow: Store) -> None:
    """50 components capture 99.9% of the variance they can; the clear ones turn by no degree."""
    x = standardised(shallow, "rna")
    squares, vectors = np.linalg.eigh(x.T @ x)
    squares, vectors = squares[::-1], vectors[:, ::-1]
    assert squares[20] / squares[49] < 1.4
    found = run(shallow, "rna", components=50, power=SvdOptions().power)["rna"].loadings.astype(
        np.float64
    )
    captured = np.square(x @ found).sum() / squares[:50].sum()
    assert 0.999 < captured < 1 + 1e-6
    cosines = np.linalg.svd(vectors[:, :10].T @ found[:, :10], compute_uv=False)
    assert np.degrees(np.arccos(min(cosines.min(), 1))) < 1


# --- killed and run again ---


def run_svd(store: Store, n: int, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that kills itself at the n-th file of arrays."""
    words = ("svd", str(store.root), "--components", str(COMPONENTS), *more)
    constants = {"data_prep.svd.MANY_TASKS": 8, "data_prep.svd.STEP_ENTRIES": 1500}
    return run_victim(*words, place="data_prep.svd._save_arrays", n=n, constants=constants)


def test_killed_and_run_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = count_calls(monkeypatch, svd, "_multiply_blocks")
    whole = run(store, "rna")["rna"]
    shutil.rmtree(tmp_path / "s.zarr" / "svd")
    assert run_svd(store, 25, "--modality", "rna", "--workers", "2").returncode == KILLED
    partial = tmp_path / "s.zarr.svd.partial"
    assert list(partial.glob("*/rna/pass-1.npz"))  # in the middle of a later pass
    assert len(list(partial.glob("*/rna/pass-2/*.npz"))) > 1
    assert stored.read_svd(store.root, store.manifest, "rna") is None
    with pytest.raises(StoreError, match="an interrupted SVD of other inputs or options"):
        run(store, "rna", components=5)
    again = count_calls(monkeypatch, svd, "_multiply_blocks")
    np.testing.assert_allclose(run(store, "rna")["rna"].loadings, whole.loadings, atol=1e-6)
    assert 0 < again[0] < every[0] - len(list(store.segments)) - 1
    assert not partial.exists()
    assert check_store(store.root) == []
    before = again[0]
    run(store, "rna")  # is there already
    assert again[0] == before


def test_workers_of_a_cluster_are_killed(store: Store, tmp_path: Path) -> None:
    whole = run(store, "rna")["rna"]
    shutil.rmtree(tmp_path / "s.zarr" / "svd")
    cluster = Cluster(tmp_path)
    try:
        cluster.worker()
        victim = cluster.worker("data_prep.svd._save_arrays", 3)
        cluster.wait_for(2)
        with open_pool(scheduler=cluster.address) as workers:
            compute_svd(str(store.root), ["rna"], SvdOptions(COMPONENTS), workers)
        assert victim.wait(30) == -signal.SIGKILL
    finally:
        cluster.close()
    found = stored.read_svd(store.root, store.manifest, "rna")
    assert found is not None
    np.testing.assert_allclose(found.loadings, whole.loadings, atol=1e-6)


# --- damage ---


def test_damage_is_found(store: Store, tmp_path: Path) -> None:
    run(store, "rna", "adt")
    root = tmp_path / "s.zarr"
    note = stored.read_svd_note(root, store.manifest, "rna")
    assert note is not None
    for name in sorted(note.file_names):
        before = (root / name).read_bytes()
        for damaged in (before[:-1], before[:200] + bytes([before[200] ^ 1]) + before[201:], None):
            (root / name).unlink() if damaged is None else (root / name).write_bytes(damaged)
            if damaged is None and name.endswith(".json"):
                assert any("not part of the store" in p for p in check_store(root))
            else:
                with pytest.raises(
                    StoreError, match=r"damaged(.|\n)*svd/rna(.|\n)*compute it again"
                ):
                    stored.read_svd(root, store.manifest, "rna")
                assert any("svd/rna" in p and "damaged" in p for p in check_store(root))
            (root / name).write_bytes(before)
    assert check_store(root) == []
    (root / note.arrays_file).write_bytes(b"")
    run(store, "rna")  # computes what is damaged again
    assert check_store(root) == []


def test_of_other_cells(store: Store, tmp_path: Path) -> None:
    run(store, "rna")
    other = make_store(tmp_path / "o.zarr", cells=CELLS, features=FEATURES, seed=1)
    shutil.copytree(tmp_path / "s.zarr/svd", tmp_path / "o.zarr/svd")
    with pytest.raises(StoreError, match="other cells"):
        stored.read_svd(other.root, other.manifest, "rna")
    assert any("other cells" in p for p in check_store(other.root))


def test_a_pickle_is_not_opened(store: Store, tmp_path: Path) -> None:
    found = run(store, "rna")["rna"]
    evil = StoredSvd(
        found.note, found.loadings, found.singular, np.array([{}], object), found.mean, found.scale
    )
    stored.write_svd(tmp_path / "s.zarr", evil)
    with pytest.raises(StoreError, match="damaged"):
        stored.read_svd(store.root, store.manifest, "rna")


# --- training ---


def setup_of(
    store: Store, tmp_path: Path, init: str = "svd", projection: int = COMPONENTS, **parts: object
) -> Setup:
    model = {"trunk": {"projection": projection, "projection_init": init}}
    return prepare_setup(
        Config(store=str(store.root), run=str(tmp_path / "run"), model=model, **parts), world=1
    )


def model_of(setup: Setup, n_train: dict[str, int]) -> CLUE:
    torch.manual_seed(0)
    model = CLUE(setup.specs, len(setup.store.manifest.batches), setup.config.model)
    initialise_model(model, setup.store, n_train, svd=True, seed=0, stored=setup.stored_svds)
    return model


def test_training_starts_from_it(store: Store, tmp_path: Path) -> None:
    """Projections are those of a sample of all cells, up to signs; more may be stored."""
    sample = model_of(setup_of(store, tmp_path), CELLS)
    run(store, "rna", "atac", "x", components=10)
    setup = setup_of(store, tmp_path)
    assert (
        "rna: 60 features, log_cp10k -> nb, projected by the stored SVD of 300 cells"
        in setup.format_summary()
    )
    assert "adt: 7 features, log -> nb, projected by an SVD of a sample\n" in setup.format_summary()
    model = model_of(setup, dict.fromkeys(CELLS, 20))
    for m in ("rna", "atac", "x"):
        trunk, expected_trunk = model.get_trunk(m), sample.get_trunk(m)
        torch.testing.assert_close(trunk.idf, expected_trunk.idf)
        weight = trunk.projection.weight.detach()
        expected = expected_trunk.projection.weight.detach()
        sign = torch.sign((weight * expected).sum(0))
        torch.testing.assert_close(weight * sign, expected, rtol=1e-3, atol=1e-4)
        bias = expected_trunk.projection.bias.detach()
        turned = trunk.projection.bias.detach() * sign
        torch.testing.assert_close(turned, bias, rtol=1e-3, atol=1e-3)


def test_the_sample_can_be_asked_for(store: Store, tmp_path: Path) -> None:
    run(store)
    for init, start in (("svd_of_sample", "an SVD of a sample"), ("random", "random weights")):
        setup = setup_of(store, tmp_path, init)
        assert setup.stored_svds == {}
        assert (
            f"rna: 60 features, log_cp10k -> nb, projected by {start}\n" in setup.format_summary()
        )
    assert set(setup_of(store, tmp_path, "svd_of_store").stored_svds) == set(FEATURES)


def test_what_does_not_fit_is_refused_or_left(store: Store, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"no SVD that fits(.|\n)*svd_of_store(.|\n)*got: none(.|\n)*data_prep svd",
    ):
        setup_of(store, tmp_path, "svd_of_store")
    run(store)
    cases = (
        ({"projection": 20}, "6 components, not 20", "--components 20"),
        (
            {"modalities": {"adt": {"normalise": "clr"}}},
            "log values, not clr",
            "leave modalities.adt.normalise",
        ),
    )
    for given, reason, fix in cases:
        with pytest.raises(ConfigError, match=rf"no SVD that fits(.|\n)*{reason}(.|\n)*{fix}"):
            setup_of(store, tmp_path, "svd_of_store", **given)
        assert (
            f"an SVD of a sample (the stored one has {reason})"
            in setup_of(store, tmp_path, **given).format_summary()
        )
    note = stored.read_svd_note(store.root, store.manifest, "adt")
    assert note is not None
    (tmp_path / "s.zarr" / note.arrays_file).write_bytes(b"")
    with pytest.raises(StoreError, match="the stored SVD is damaged"):
        setup_of(store, tmp_path)


# --- the command line ---


def test_the_command_line(store: Store) -> None:
    ended = run_svd(store, -1, "--modality", "adt", "x", "--power", "2")
    assert ended.returncode == 0, ended.stderr
    assert (
        "adt: 6 components of 150 cells, log\n  x: 6 components of 40 cells, none" in ended.stdout
    )
    found = inspect.collect_facts(store.root)
    assert found["svd"] == {
        "adt": {"components": 6, "cells": 150, "normalise": "log"},
        "x": {"components": 6, "cells": 40, "normalise": "none"},
    }
    assert "svd          adt: 6 components of 150 cells, log" in inspect.format_facts(found)
    wrong = run_svd(store, -1, "--modality", "rnaa")
    assert wrong.returncode == 2
    assert "no cell carries this modality" in wrong.stderr
    with pytest.raises(StoreError, match="saved in a folder"):
        compute_svd("s3://bucket/s.zarr", [], SvdOptions(), ThreadPool(1))
