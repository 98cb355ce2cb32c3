"""The scripts of the other methods, as far as they go without the packages of their own environments."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from tests.benchmarks import common, mosaic, scores
from tests.benchmarks.matching import PEERS
from tests.benchmarks.split import cut
from tests.distributed.command import ROOT
from tests.unit.mosaic_helpers import MODS, paired_cells

ABSENT = {"multivi": "scvi", "reference": "scglue"}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Imports a peer's script, with an empty module in place of the package that is not here."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(PEERS))
        for module in ("peer", name):
            monkeypatch.delitem(sys.modules, module, raising=False)
        if name in ABSENT:
            monkeypatch.setitem(sys.modules, ABSENT[name], ModuleType(ABSENT[name]))
        module = importlib.import_module(name)
        for imported in ("peer", name):
            monkeypatch.setitem(sys.modules, imported, sys.modules[imported])
        return module

    return load


def table(names: list[str], width: int, seed: int = 0, **obs: list[str]) -> ad.AnnData:
    counts = np.random.default_rng(seed).poisson(2, (len(names), width))
    return ad.AnnData(sp.csr_matrix(counts), obs=pd.DataFrame(obs, index=names))


def test_reductions_are_fitted_on_training_cells_alone(script) -> None:
    peer = script("peer")
    train, test = (
        table([f"a{i}" for i in range(60)], 30),
        table([f"b{i}" for i in range(20)], 30, seed=1),
    )
    for modality in ("rna", "adt", "atac"):
        a, b = peer.reduced(modality, train, test)
        assert a.shape == (60, 29)
        assert b.shape == (20, 29)
        some, _ = peer.reduced(modality, train, test[:5])
        np.testing.assert_allclose(some, a, rtol=1e-4, atol=1e-4)
    lsi, _ = peer.reduced("atac", train, test)
    np.testing.assert_allclose([lsi.mean(1), lsi.std(1)], [np.zeros(60), np.ones(60)], atol=1e-5)


def test_the_contrastive_baseline_leaves_four_looks_at_the_test_cells(tmp_path: Path) -> None:
    for part, cells in zip(("train", "test"), cut(paired_cells(), MODS, 0), strict=True):
        cells.write(tmp_path / f"{part}.h5mu")
    out = ["--out", tmp_path / "z.npz", "--epochs", "4"]
    common.call(
        [sys.executable, PEERS / "contrastive.py", tmp_path, *MODS, *out],
        tmp_path / "log",
        threads=1,
    )
    arrays = np.load(tmp_path / "z.npz")
    n = len(mosaic.pairs_of(mosaic.Split(tmp_path, MODS), "test"))
    assert arrays["u1"].shape == arrays["u2"].shape == (4, n, 64)
    assert arrays["fit_s"] > 0
    assert len(scores.of(tmp_path / "z.npz", mosaic.Split(tmp_path, MODS))["candidates"]) == 4


@pytest.mark.filterwarnings("ignore:Cannot join columns")
def test_multivi_sees_every_cell_once_with_zeros_where_nothing_was_measured(script) -> None:
    multivi = script("multivi")
    rna = table(["a", "b", "c"], 4, batch=["one", "one", "two"])
    atac = table(["c", "d"], 6, seed=1, batch=["two", "three"])
    whole = multivi.mosaic(rna, atac)
    assert list(whole["rna"].obs_names) == list(whole["atac"].obs_names)
    kinds = whole["rna"].obs["modality"].to_dict()
    assert kinds == {"a": "expression", "b": "expression", "c": "paired", "d": "accessibility"}
    assert whole["rna"].obs["batch"].to_dict() == {"a": "one", "b": "one", "c": "two", "d": "three"}
    np.testing.assert_array_equal(whole["rna"]["c"].X.toarray(), rna["c"].X.toarray())
    np.testing.assert_array_equal(whole["atac"]["c"].X.toarray(), atac["c"].X.toarray())
    assert whole["rna"]["d"].X.sum() == whole["atac"]["a"].X.sum() == 0
    alone = multivi.mosaic(rna, atac[:0])
    assert set(alone["rna"].obs["modality"]) == {"expression"}
    assert alone["atac"].X.sum() == 0


def test_the_reference_decodes_the_strongest_peaks_and_every_gene(script) -> None:
    reference = script("reference")
    reference.PEAKS = 3
    cells = ad.AnnData(sp.csr_matrix(np.array([[1, 9, 0, 5, 7]])))
    assert set(reference.decoded("atac", cells)) == {1, 3, 4}
    assert list(reference.decoded("rna", cells)) == list(range(5))


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
    model, shape = ours["model"], theirs["shape"]
    assert (shape["latent_dim"], shape["u2x_h_dim"]) == (
        model["latent"],
        model["decoder"]["hidden"],
    )
    assert (shape["du_h_depth"], shape["du_h_dim"]) == (
        model["discriminator"]["depth"],
        model["discriminator"]["hidden"],
    )
