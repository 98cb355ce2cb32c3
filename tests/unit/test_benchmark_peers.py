"""The scripts of the other methods, as far as they go without their packages."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from clue_dist.matching import compute_foscttm
from tests.benchmarks import mosaic, scores
from tests.benchmarks.matching import PEERS
from tests.benchmarks.split import cut_mosaic
from tests.distributed.command import ROOT
from tests.unit.mosaic_helpers import MODS, paired_cells

ABSENT = {"multivi": ["scvi"], "reference": ["scglue"], "wnn": ["muon", "scanpy"]}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a peer's script, with an empty module in place of a package that is not here."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(PEERS))
        for module in ("peer", name):
            monkeypatch.delitem(sys.modules, module, raising=False)
        for package in ABSENT.get(name, []):
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
        module = importlib.import_module(name)
        for imported in {"peer", name} & sys.modules.keys():
            monkeypatch.setitem(sys.modules, imported, sys.modules[imported])
        return module

    return load


def make_cells(names: str, width: int, seed: int = 0, **obs: list[str]) -> ad.AnnData:
    index = names.split()
    counts = np.random.default_rng(seed).poisson(2, (len(index), width))
    return ad.AnnData(sp.csr_matrix(counts), obs=pd.DataFrame(obs, index=index))


def test_reductions_are_fitted_on_training_cells_alone(script) -> None:
    peer = script("peer")
    train = make_cells(" ".join(f"a{i}" for i in range(60)), 30)
    test = make_cells(" ".join(f"b{i}" for i in range(20)), 30, seed=1)
    for modality in ("rna", "adt", "atac"):
        a, b = peer.reduce_cells(modality, train, test)
        assert a.shape == (60, 29)
        assert b.shape == (20, 29)
        some, _ = peer.reduce_cells(modality, train, test[:5])
        np.testing.assert_allclose(some, a, rtol=1e-4, atol=1e-4)
    lsi, _ = peer.reduce_cells("atac", train, test)
    np.testing.assert_allclose([lsi.mean(1), lsi.std(1)], [np.zeros(60), np.ones(60)], atol=1e-5)


def test_the_contrastive_baseline_leaves_four_looks_at_the_test_cells(
    script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part, cells in zip(("train", "test"), cut_mosaic(paired_cells(), MODS, 0), strict=True):
        cells.write(tmp_path / f"{part}.h5mu")
    out = ["--out", str(tmp_path / "z.npz"), "--epochs", "4"]
    contrastive = script("contrastive")
    monkeypatch.setattr(sys, "argv", ["contrastive.py", str(tmp_path), *MODS, *out])
    contrastive.main()
    arrays, split = np.load(tmp_path / "z.npz"), mosaic.Split(tmp_path, MODS)
    n = len(mosaic.list_tested(split))
    assert arrays["u1"].shape == arrays["u2"].shape == (4, n, 64)
    assert arrays["fit_s"] > 0
    assert len(scores.score_embedding(tmp_path / "z.npz", split)["candidates"]) == 4


def test_the_linear_baseline_finds_what_both_modalities_tell(
    script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, rng = script("linear"), np.random.default_rng(0)
    shared = rng.normal(size=(500, 3))
    views = [
        np.hstack([shared @ rng.normal(size=(3, 8)), 4 * rng.normal(size=(500, 8))])
        for _ in range(2)
    ]
    u1, u2 = linear.correlate([x[:400] for x in views], [x[400:] for x in views])
    assert u1.shape == u2.shape == (100, 16)
    assert compute_foscttm(*(x[400:] for x in views)) > 0.4
    assert compute_foscttm(u1, u2) < 0.05
    for part, cells in zip(("train", "test"), cut_mosaic(paired_cells(), MODS, 0), strict=True):
        cells.write(tmp_path / f"{part}.h5mu")
    out = ["--out", str(tmp_path / "z.npz")]
    monkeypatch.setattr(sys, "argv", ["linear.py", str(tmp_path), *MODS, *out])
    linear.main()
    found = scores.score_embedding(tmp_path / "z.npz", mosaic.Split(tmp_path, MODS))
    assert 0 < found["scores"]["global"]["foscttm"] < 1
    assert 0 < found["without_depth"]["foscttm"] < 1


def test_the_linear_baseline_takes_real_values_as_they_are(script) -> None:
    linear, rng = script("linear"), np.random.default_rng(0)
    train, test = (ad.AnnData(rng.normal(size=(n, 5)) - 3) for n in (60, 20))
    seen, unseen = linear.reduce_values("fou", train, test)
    assert (seen.shape, unseen.shape) == ((60, 5), (20, 5))
    np.testing.assert_allclose(seen.mean(0), np.zeros(5), atol=1e-9)


def test_neighbours_by_wnn_come_the_nearest_first_without_the_cell_itself(script) -> None:
    distances = np.array([[0, 0.3, 0.2, 0.9], [0.3, 0, 0.1, 0], [0.2, 0.1, 0, 0.4], [1, 2, 3, 0]])
    stored = sp.csr_matrix(distances)
    stored[0, 0] = 0.05  # a cell may be stored among its own neighbours
    near = script("wnn").list_neighbours(sp.csr_matrix(stored), 2)
    np.testing.assert_array_equal(near, [[2, 1], [2, 0], [1, 0], [0, 1]])


@pytest.mark.filterwarnings("ignore:Cannot join columns", "ignore:var_names are not unique")
def test_multivi_sees_every_cell_once_with_zeros_where_nothing_was_measured(script) -> None:
    multivi = script("multivi")
    rna = make_cells("a b c", 4, batch=["one", "one", "two"])
    atac = make_cells("c d", 6, seed=1, batch=["two", "three"])
    whole = multivi.join_mosaic(rna, atac)
    assert list(whole["rna"].obs_names) == list(whole["atac"].obs_names)
    kinds = whole["rna"].obs["modality"].to_dict()
    assert kinds == {"a": "expression", "b": "expression", "c": "paired", "d": "accessibility"}
    assert whole["rna"].obs["batch"].to_dict() == {"a": "one", "b": "one", "c": "two", "d": "three"}
    np.testing.assert_array_equal(whole["rna"]["c"].X.toarray(), rna["c"].X.toarray())
    np.testing.assert_array_equal(whole["atac"]["c"].X.toarray(), atac["c"].X.toarray())
    assert whole["rna"]["d"].X.sum() == whole["atac"]["a"].X.sum() == 0
    alone = multivi.join_mosaic(rna, atac[:0])
    assert set(alone["rna"].obs["modality"]) == {"expression"}
    assert alone["atac"].X.sum() == 0


def test_the_reference_decodes_the_strongest_peaks_and_every_gene(script) -> None:
    reference = script("reference")
    reference.PEAKS = 3
    cells = ad.AnnData(sp.csr_matrix(np.array([[1, 9, 0, 5, 7]])))
    assert set(reference.choose_decoded("atac", cells)) == {1, 3, 4}
    assert list(reference.choose_decoded("rna", cells)) == list(range(5))


@pytest.mark.parametrize(
    ("settings", "recipe"), [("CITE", "neurips2021_cite"), ("MULTIOME", "neurips2021_multiome")]
)
def test_the_reference_has_the_settings_of_the_recipe_named_after_it(
    script, settings: str, recipe: str
) -> None:
    theirs = getattr(script("reference"), settings)
    ours = json.loads((ROOT / "configs" / f"{recipe}.json").read_text())
    weights = {"lam_kl": "kl", "lam_align": "d", "lam_joint_cross": "cross", "lam_cos": "mse"}
    for name, term in weights.items():
        assert theirs["weights"][name] == ours["objective"][f"lambda_{term}"]
    model = ours["model"]
    assert theirs["shape"] == {
        "latent_dim": model["latent"],
        "u2x_h_dim": model["decoder"]["hidden"],
        "du_h_depth": model["discriminator"]["depth"],
        "du_h_dim": model["discriminator"]["hidden"],
    }
