"""The scripts of the other methods, as far as they go without their packages."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from clue_dist.metrics.matching import compute_foscttm
from tests.benchmark_tests.mosaic_helpers import MODS, paired_cells
from tests.benchmarks import commands, mosaic, scores
from tests.benchmarks.matching import PEERS
from tests.benchmarks.split import cut_mosaic, draw_batches
from tests.distributed.command import ROOT

ABSENT = {
    "multivi": ["scvi"],
    "totalvi": ["scvi"],
    "multigrate_peer": ["scvi", "multigrate", "multigrate.model"],
    "midas": ["scmidas", "scmidas.data", "scmidas.model"],
    "reference": ["scglue"],
    "wnn": ["muon", "scanpy"],
}


class AbsentModule(ModuleType):
    """In place of a package that is not here: whatever is imported from it is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a peer's script, with an empty module in place of a package that is not here."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(PEERS))
        for module in ("peer", "joint", name):
            monkeypatch.delitem(sys.modules, module, raising=False)
        for package in ABSENT.get(name, []):
            monkeypatch.setitem(sys.modules, package, AbsentModule(package))
        module = importlib.import_module(name)
        for imported in {"peer", "joint", name} & sys.modules.keys():
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


def make_mosaic() -> dict[str, ad.AnnData]:
    """Cells a and b by RNA alone, c by both, d by proteins alone."""
    rna = make_cells("a b c", 4, batch=["one", "one", "two"])
    return {"rna": rna, "adt": make_cells("c d", 6, seed=1, batch=["two", "three"])}


def test_every_cell_of_a_mosaic_is_listed_once_with_zeros_where_nothing_was_measured(
    script,
) -> None:
    joint, tables = script("joint"), make_mosaic()
    obs = joint.list_cells(tables)
    assert obs["pattern"].to_dict() == {"a": "rna", "b": "rna", "c": "rna+adt", "d": "adt"}
    assert obs["batch"].to_dict() == {"a": "one", "b": "one", "c": "two", "d": "three"}
    counts = joint.fill_counts(tables["adt"], obs.index).toarray()
    np.testing.assert_array_equal(counts[2:], tables["adt"].X.toarray())
    assert counts[:2].sum() == 0
    hidden = joint.list_cells(joint.hide_modalities(tables, ["adt"]))
    assert hidden["pattern"].to_dict() == {"c": "adt", "d": "adt"}


@pytest.mark.filterwarnings("ignore:Cannot join columns", "ignore:var_names are not unique")
def test_multivi_sees_every_cell_in_both_modalities(script) -> None:
    tables = make_mosaic()
    whole = script("multivi").join_mosaic({"rna": tables["rna"], "atac": tables["adt"]})
    assert list(whole["rna"].obs_names) == list(whole["atac"].obs_names) == list("abcd")
    assert list(whole["rna"].obs["pattern"]) == ["rna", "rna", "rna+atac", "atac"]
    assert whole["rna"]["d"].X.sum() == whole["atac"]["a"].X.sum() == 0
    assert list(whole.obs["_indices"]) == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:Cannot join columns", "ignore:var_names are not unique")
def test_totalvi_leaves_out_cells_without_rna_and_has_a_batch_for_those_without_proteins(
    script,
) -> None:
    tables = make_mosaic()
    whole = script("totalvi").join_cells_with_rna(tables)
    assert list(whole["adt"].obs_names) == list("abc")
    batches = whole["rna"].obs["pattern_and_batch"].to_dict()
    assert batches == {"a": "rna|one", "b": "rna|one", "c": "rna+adt|two"}
    np.testing.assert_array_equal(whole["adt"].X[2], tables["adt"].X.toarray()[0])
    assert whole["adt"].X[:2].sum() == 0


@pytest.mark.filterwarnings("ignore:Cannot join columns", "ignore:var_names are not unique")
def test_totalvi_imputes_proteins_in_the_batch_that_has_them(script) -> None:
    totalvi, tables = script("totalvi"), make_mosaic()
    tables["rna"].obs["batch"] = ["one", "three", "one"]
    asked = {}

    def tell_expression(cells: md.MuData, **options) -> tuple[None, np.ndarray]:
        (batch,) = options["transform_batch"]
        asked[batch] = options
        return None, np.full((len(options["indices"]), cells["adt"].n_vars), len(batch))

    model = SimpleNamespace(get_normalized_expression=tell_expression)
    values = totalvi.impute_proteins(model, totalvi.join_cells_with_rna(tables))
    assert asked.keys() == {"rna+adt|one", "rna+adt|three"}
    assert all(options["include_protein_background"] for options in asked.values())
    np.testing.assert_array_equal(values, np.repeat([[11], [13], [11]], 6, 1))


def test_multivi_tells_each_modality_from_the_other_as_if_both_were_measured(script) -> None:
    def answer(name: str) -> Callable[..., tuple[str, str, str]]:
        return lambda cells, **options: (name, cells, options["transform_batch"])

    names = ("get_normalized_accessibility", "get_normalized_expression")
    model = SimpleNamespace(**{name: answer(name) for name in names})
    shown = {m: f"cells of {m} alone" for m in ("joint", "rna", "atac")}
    assert script("multivi").impute_modalities(model, shown) == {
        "rna-atac": (names[0], "cells of rna alone", "rna+atac"),
        "atac-rna": (names[1], "cells of atac alone", "rna+atac"),
    }


def test_multigrate_sees_features_side_by_side_and_nothing_negative(script) -> None:
    multigrate, tables = script("multigrate_peer"), make_mosaic()
    whole = multigrate.join_mosaic(tables)
    assert whole.uns["modality_lengths"] == [4, 6]
    np.testing.assert_array_equal(whole.X.toarray()[:3, :4], tables["rna"].X.toarray())
    proteins = tables["adt"].X.toarray()
    centred = np.log1p(proteins / np.exp(np.log1p(proteins).mean(1, keepdims=True)))
    np.testing.assert_allclose(whole.X.toarray()[2:, 4:], centred, rtol=1e-6)
    assert whole.X[:2, 4:].sum() == whole.X[3, :4].sum() == whole.obs.loc["d", "size"] == 0
    assert whole.obs.loc["a", "size"] == tables["rna"]["a"].X.sum()
    peaks = multigrate.normalise_values("atac", sp.csr_matrix([[1.0, 3.0], [0, 0]]))
    np.testing.assert_allclose(peaks.toarray(), np.log1p([[2500, 7500], [0, 0]]), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:Cannot join columns", "ignore:var_names are not unique")
def test_midas_has_a_batch_for_each_pattern_and_peaks_by_chromosome(script) -> None:
    midas, tables = script("midas"), make_mosaic()
    peaks = ["chr2:5-9", "chr1:1-2", "chrX-3-4", "chr2:1-3", "chr1:7-9", "chr1:3-6"]
    tables = {"rna": tables["rna"], "atac": tables["adt"]}
    tables["atac"].var_names = peaks
    whole = midas.join_mosaic(tables)
    assert list(whole["rna"].obs["batch"]) == ["rna|one", "rna|one", "rna+atac|two"]
    assert list(whole["atac"].obs["batch"]) == ["rna+atac|two", "atac|three"]
    assert [name[:4] for name in whole["atac"].var_names] == ["chr2"] * 2 + ["chr1"] * 3 + ["chrX"]
    assert midas.order_peaks(peaks)[1] == [2, 3, 1]
    assert midas.order_peaks(["a", "b"])[1] == [2]
    layers = {"dims_before_enc_atac": [128, 32], "dims_after_dec_atac": [32, 128]}
    midas.scmidas.load_config = lambda: layers | {"lr_net": 1e-4}
    settings, sizes = midas.choose_settings(tables)
    assert settings.items() >= layers.items()
    assert (settings["lr_net"], sizes) == (midas.RATE, {"atac": [2, 3, 1]})
    tables["atac"].var_names = list("uvwxyz")
    settings, sizes = midas.choose_settings(tables)
    assert sizes == {"atac": [6]}
    assert not settings.keys() & layers.keys()


def test_midas_trains_small_mosaics_for_more_epochs(script) -> None:
    midas = script("midas")
    model = midas.MIDAS()
    model.datalist = [range(100), range(200)]  # four steps an epoch
    assert midas.count_epochs(model) == 500
    model.datalist = [range(200 * midas.BATCH)] * 3
    assert midas.count_epochs(model) == midas.EPOCHS


def test_a_method_without_an_embedding_of_each_modality_has_scores_of_its_joint_one(
    script, tmp_path: Path
) -> None:
    train, test = cut_mosaic(paired_cells(), MODS, 0)
    test["rna"].obs["cell_type"] = np.where(np.arange(test.n_obs) % 2, "B", "T")
    test.write(tmp_path / "test.h5mu")
    joint, rng = script("joint"), np.random.default_rng(0)
    obs = joint.list_cells(train.mod)
    arguments = script("peer").argparse.Namespace(mods=MODS, out=tmp_path / "z.npz")
    embedded = {"joint": rng.normal(size=(test.n_obs, 3)), "rna": rng.normal(size=(test.n_obs, 3))}
    latent, pattern = rng.normal(size=(len(obs), 3)), obs["pattern"].to_numpy()
    joint.save_views(arguments, 1.5, embedded, latent, pattern)
    split = mosaic.Split(tmp_path, MODS)
    found = scores.score_embedding(arguments.out, split)
    assert found.keys() == {"islands", "accuracy", "ilisi", "ilisi_random", "joint", "alone"}
    assert found["alone"] == found["accuracy"]["rna"]
    joint.save_views(arguments, 1.5, embedded | {"adt": embedded["rna"]}, latent, pattern)
    assert scores.score_embedding(arguments.out, split)["scores"]["global"]["foscttm"] == 0


def test_neighbours_by_wnn_are_searched_as_muon_defines_them(script) -> None:
    wnn, rng = script("wnn"), np.random.default_rng(0)
    place = rng.normal(size=(40, 3))
    near, distances, _ = wnn.find_nearest(place, 5, "euclidean", {})
    assert (near.shape, list(near[:, 0])) == ((40, 5), list(range(40)))
    np.testing.assert_allclose(distances[3, 1], np.linalg.norm(place[3] - place[near[3, 1]]))
    listed = {cell: set(near[cell, 1:]) for cell in range(40)}
    stored = {"neighbors_indices": near[:, 1:].ravel(), "neighbors_indptr": np.arange(0, 161, 4)}
    options = stored | {"X": place, "bbox_norm": np.linalg.norm(np.ptp(place, axis=0))}
    chosen, _, _ = wnn.find_nearest(np.arange(40)[:, None], 3, lambda x, y: 0, options)

    def rank(cell: int, other: int) -> tuple[float, float]:
        """Fewest shared neighbours first, but some; of as many, the farthest first."""
        shared = len(listed[cell] & listed[other]) / len(listed[cell] | listed[other])
        apart = float(np.linalg.norm(place[cell] - place[other]))
        return (shared, -apart) if shared and cell != other else (2.0, 0.0)

    for cell in range(40):
        ranked = sorted(range(40), key=lambda other, cell=cell: rank(cell, other))
        assert list(chosen[cell]) == ranked[:3]


def test_a_package_that_asks_for_too_much_is_installed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = tmp_path / "some.txt"
    pins.write_text("torch==2.13.0\nscipy==1.17.1\n# it asks for more:\n# --no-deps lone==1.0\n")
    assert commands.read_pins(pins) == ["torch==2.13.0", "scipy==1.17.1", "lone==1.0"]
    ran: list[str] = []
    monkeypatch.setattr(commands, "run_command", lambda words, *_: ran.append(str(words[-1])))
    commands.install_python(pins, tmp_path)
    assert ran[1:] == ["torch==2.13.0", str(pins), "lone==1.0"]


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


def test_drawn_batches_hold_all_cells_and_capture_features_to_other_shares() -> None:
    names = [f"cell-{i}" for i in range(600)]
    counts = np.random.default_rng(0).poisson(50, (600, 8))
    obs = pd.DataFrame(index=names)
    whole = md.MuData({m: ad.AnnData(sp.csr_matrix(counts), obs=obs) for m in ("rna", "adt")})
    drawn = draw_batches(whole)
    batch = drawn["rna"].obs["batch"]
    assert list(batch) == list(drawn["adt"].obs["batch"])
    assert set(batch.value_counts() > 150) == {True}
    for name in ("rna", "adt"):
        captured = drawn[name].X.toarray()
        assert (captured <= counts).all()
        means = np.stack([captured[batch == b].mean(0) for b in sorted(set(batch))])
        # The batch that captures most of a feature captures all of it; others a share.
        np.testing.assert_allclose(means.max(0), 50, rtol=0.05)
        assert (means.min(0) < 45).all()
    again = draw_batches(whole)
    assert (again["adt"].X != drawn["adt"].X).nnz == 0
