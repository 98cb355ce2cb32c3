"""Imputation: which modalities are looked at, which batch is decoded, means, intervals, errors."""

from __future__ import annotations

import copy
from dataclasses import replace

import anndata as ad
import mudata as md
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from clue_dist.api.trained_run import Run
from clue_dist.errors import ConfigError, DataError, StoreError
from clue_dist.inference.cells import StoreCells
from clue_dist.inference.imputation_question import (
    LARGEST_INTERVAL,
    ImputationChoices,
    plan_interval,
)
from clue_dist.inference.impute import impute_cells, write_imputation
from clue_dist.inference.load_model import TrainedModel
from clue_dist.inference.matrix_files import MatrixFolder
from clue_dist.model.imputation import ValueDecoder
from clue_dist.model.translation import Regression
from clue_dist.store.batch_vocabulary import BatchVocabulary
from clue_dist.store.reader import Store
from tests.processes import run_ranks
from tests.stores import make_store
from tests.unit.impute_helpers import make_trained

CELLS = {"rna+adt": 40, "rna": 20}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    return make_store(folder / "s.zarr", cells=CELLS, features={"rna": 12, "adt": 5})


@pytest.fixture(scope="module")
def trained(store) -> TrainedModel:
    return make_trained(store)


def impute(trained, store, modality="adt", **choices):
    return impute_cells(trained, StoreCells(store, trained), ImputationChoices(modality, **choices))


def test_sources_alone_are_looked_at(trained, store):
    shown = impute(trained, store, from_=["rna"])
    paired = impute(trained, store)
    assert list(shown.obs["clue_from"].unique()) == ["rna"]
    assert list(paired.obs["clue_from"].unique()) == ["rna+adt", "rna"]
    assert shown.shape == (60, 5)
    assert list(shown.var_names) == store.manifest.modalities["adt"].features
    # What cells of RNA alone show is the same in both; of the others proteins were hidden.
    np.testing.assert_array_equal(shown.X[40:], paired.X[40:])
    assert np.abs(shown.X[:40] - paired.X[:40]).max() > 1


def test_average_is_the_mean_over_batches(trained, store):
    names = store.manifest.batches
    each = [impute(trained, store, batch=name).X for name in names]
    assert np.abs(each[0] - each[1]).max() > 1
    average = impute(trained, store, batch="average").X
    np.testing.assert_allclose(average, np.mean(each, 0), rtol=1e-5)
    own = impute(trained, store, batch="own")
    codes = own.obs["batch"].cat.codes.to_numpy()
    expected = np.stack(each)[codes, np.arange(60)]
    np.testing.assert_allclose(own.X, expected, rtol=1e-5)


def test_an_unknown_batch_is_averaged(trained, store):
    other = BatchVocabulary.from_lists(["elsewhere", "nowhere"])
    stranger = replace(trained, batch_vocabulary=other)
    own = impute(stranger, store, batch="own").X
    np.testing.assert_allclose(own, impute(trained, store, batch="average").X, rtol=1e-5)


@pytest.mark.parametrize("kind", [np.float32, np.int64])
def test_a_library_size_may_be_a_number_of_numpy(trained, store, kind):
    found, expected = (impute(trained, store, "rna", library_size=n) for n in (kind(900), 900))
    np.testing.assert_array_equal(found.X, expected.X)


def test_one_feature_needs_no_list(trained, store):
    assert list(impute(trained, store, "rna", features="rna-3").var_names) == ["rna-3"]


def test_batches_that_are_all_unknown_are_a_warning(trained, store):
    class Unknown(StoreCells):
        def read_obs(self):
            return super().read_obs().drop(columns="batch")

    with pytest.warns(UserWarning, match="knows the batch of no cell"):
        impute_cells(trained, Unknown(store, trained), ImputationChoices("rna"))


def test_units_are_shares_or_counts(trained, store):
    shares = impute(trained, store).X
    np.testing.assert_allclose(impute(trained, store, library_size=500.0).X, shares / 20, rtol=1e-5)
    own = impute(trained, store, library_size="own")
    reader = store.segments["rna+adt"]
    total = reader.read_rows("adt", np.arange(40)).sum(1)
    np.testing.assert_allclose(own.X[:40], shares[:40] * total[:, None] / 1e4, rtol=1e-4)
    np.testing.assert_allclose(own.X[40:], shares[40:] * np.exp(4.0) / 1e4, rtol=1e-4)


def test_features_are_chosen_in_the_order_of_the_list(trained, store):
    whole = impute(trained, store)
    some = impute(trained, store, features=["adt-3", "adt-0"])
    assert list(some.var_names) == ["adt-3", "adt-0"]
    np.testing.assert_allclose(some.X, whole[:, ["adt-3", "adt-0"]].X, rtol=1e-5)


def test_small_values_become_zero(trained, store):
    dense = impute(trained, store, "rna", interval=0.5)
    sparse = impute(trained, store, "rna", interval=0.5, threshold=300.0)
    assert sp.issparse(sparse.X)
    np.testing.assert_array_equal(sparse.X.toarray(), np.where(dense.X < 300, 0, dense.X))
    assert sp.issparse(sparse.layers["upper"])
    assert 0 < sparse.X.nnz < dense.X.size


def test_intervals_cover_what_the_model_draws(trained, store):
    """Another draw of the same model falls into its 90% intervals nine times out of ten."""
    answer = impute(trained, store, "rna", interval=0.9, samples=2, library_size=1e6)
    lower, upper, draw = (answer.layers[name] for name in ("lower", "upper", "sample-0"))
    other = impute(trained, store, "rna", samples=2, library_size=1e6, seed=1).layers["sample-1"]
    assert (lower <= upper).all()
    assert not np.array_equal(draw, other)
    covered = ((other >= lower) & (other <= upper)).mean()
    assert 0.86 < covered < 0.94
    mean = np.mean([answer.layers["sample-0"], answer.layers["sample-1"]])
    assert mean == pytest.approx(answer.X.mean(), rel=0.2)


@pytest.mark.parametrize("share", [0.95, 0.99])
def test_intervals_hold_their_share_of_continuous_draws(tmp_path, share):
    features = {"rna": 9, "image": 20}
    store = make_store(tmp_path / "s.zarr", cells={"rna+image": 200}, features=features)
    trained = make_trained(store)
    answer = impute(trained, store, "image", interval=share)
    others = impute(trained, store, "image", samples=10, seed=1).layers
    draws = np.stack([others[f"sample-{i}"] for i in range(10)])
    covered = (draws >= answer.layers["lower"]) & (draws <= answer.layers["upper"])
    assert share - 0.003 < covered.mean() < share + 0.015


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.95, 0.97, 0.98, 0.99, LARGEST_INTERVAL])
def test_intervals_are_planned_to_hold_their_share(share):
    n_draws, rank = plan_interval(share)
    assert 1 <= rank <= n_draws / 2
    held = 1 - 2 * rank / (n_draws + 1)
    assert share - 1e-9 <= held < share + 0.02
    assert (n_draws == 99) == (share <= 0.98)


def test_an_answer_repeats_itself_and_says_what_made_it(trained, store):
    first, second = (impute(trained, store, interval=0.9) for _ in range(2))
    np.testing.assert_array_equal(first.layers["lower"], second.layers["lower"])
    about = first.uns["clue_dist"]
    assert (about["checkpoint"], about["unit"]) == ("step-7", "counts per 10,000")
    assert about["from"] == ["rna", "adt"]


def test_expected_logarithms_are_means_of_logarithms(trained, store):
    expected = impute(trained, store, log1p=True, library_size=2000.0).X
    answer = impute(trained, store, samples=30, library_size=2000.0)
    draws = np.mean([np.log1p(5 * answer.layers[f"sample-{i}"]) for i in range(30)], 0)
    # What is expected is averaged over a few z's alone.
    assert np.corrcoef(expected.ravel(), draws.ravel())[0, 1] > 0.9


def test_what_is_expected_is_averaged_over_what_z_may_be(trained, store):
    """Draws of a wide z are far from what its mean decodes to: their mean is what is expected."""
    wide = replace(trained, model=copy.deepcopy(trained.model))
    k, latent = 1, wide.model.latent
    regression = Regression(
        torch.zeros(2 * latent, latent), torch.zeros(latent), 4 * torch.eye(latent)
    )
    wide.model.translation.set_regression(0, k, regression)
    answer = impute(wide, store, from_="rna", batch="batch-0", samples=200)
    draws = np.concatenate([answer.layers[f"sample-{i}"] for i in range(200)]).mean(0)
    decoder, code = wide.model.get_decoder("adt"), torch.zeros(1, dtype=torch.int64)
    parameters = decoder.compute_parameters(
        torch.zeros(1, latent), decoder.find_levels(code), torch.full((1, 1), 1e4)
    )
    of_mean = decoder.likelihood.compute_mean(parameters).detach().numpy()[0]
    errors = [np.abs(found - draws).sum() for found in (answer.X[0], of_mean)]
    assert errors[0] < 0.6 * errors[1]


def test_several_z_of_a_cell_are_averaged_be_its_batch_known_or_not(trained):
    decoder, latent = ValueDecoder(trained.model, "adt"), trained.model.latent
    z = torch.randn(3, 4, latent, generator=torch.Generator().manual_seed(0))
    levels, library = torch.tensor([[0], [-1], [1], [-1]]), torch.full((4, 1), 100.0)
    found = decoder.compute_mean(z, levels, library)
    each = torch.stack([decoder.compute_mean(point, levels, library) for point in z])
    torch.testing.assert_close(found, each.mean(0))
    assert each.std(0).max() > 1
    alone = decoder.compute_mean(z[:, :1], levels[:1], library[:1])
    torch.testing.assert_close(found[:1], alone)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"modality": "rnaa"}, "did you mean rna"),
        ({"modality": "adt", "from_": ["atac"]}, "no such modality"),
        ({"modality": "adt", "features": ["adt-33"]}, "did you mean adt-3"),
        ({"modality": "adt", "batch": "batch-9"}, "own, average, or one of batch-0, batch-1"),
        ({"modality": "adt", "interval": 90}, "above 0, 0.999 at most"),
        ({"modality": "adt", "interval": 0.9995}, "above 0, 0.999 at most"),
        ({"modality": "adt", "library_size": -1}, "above 0"),
        ({"modality": "adt", "library_size": "all"}, "above 0"),
        ({"modality": "adt", "interval": "0.9"}, "above 0, 0.999 at most"),
        ({"modality": "adt", "samples": 2.5}, "a whole number, 0 or more"),
        ({"modality": "adt", "seed": -1}, "a whole number, 0 or more"),
        ({"modality": "adt", "seed": 10**400}, "a whole number, 0 or more"),
        ({"modality": "adt", "threshold": "low"}, "a number, 0 or more"),
        ({"modality": "adt", "features": []}, "no feature"),
        ({"modality": "adt", "features": ["adt-1", "adt-1"]}, "twice"),
        ({"modality": "adt", "from_": []}, "no modality to impute from"),
    ],
)
def test_choices_that_the_model_does_not_know_are_refused(trained, store, choices, message):
    with pytest.raises(ConfigError, match=message):
        impute(trained, store, **choices)


def test_cells_without_a_source_are_refused(trained, store):
    with pytest.raises(DataError, match="20 of 60 cells, such as rna-0"):
        impute(trained, store, "rna", from_=["adt"])


@pytest.mark.filterwarnings("error:Consolidated metadata")  # which a person cannot change
@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
@pytest.mark.parametrize("threshold", [None, 300.0])
def test_a_file_holds_what_memory_holds(trained, store, tmp_path, ending, threshold):
    choices = ImputationChoices("rna", interval=0.9, samples=1, threshold=threshold)
    cells, out = StoreCells(store, trained), tmp_path / f"o.{ending}"
    expected = impute_cells(trained, cells, choices, batch_size=16)
    for _ in range(2):  # the second time over the first
        assert write_imputation(trained, cells, out, choices, batch_size=16) == 60
    answer = ad.read_h5ad(out) if ending == "h5ad" else ad.read_zarr(out)
    assert list(answer.obs_names) == list(expected.obs_names)
    for name in (None, "lower", "upper", "sample-0"):
        found, wanted = (a.X if name is None else a.layers[name] for a in (answer, expected))
        assert sp.issparse(found) == (threshold is not None)
        if threshold is not None:
            found, wanted = found.toarray(), wanted.toarray()
        np.testing.assert_array_equal(found, wanted)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("is_sparse", [False, True])
def test_shares_of_ranks_make_one_matrix(tmp_path, is_sparse):
    """Rank 1 has no value that is not zero."""
    rows = np.array([[0, 2, 0], [1, 0, 3], [0, 0, 0]], np.float32)
    folder = MatrixFolder(tmp_path, ["X", "lower"], 3, is_sparse)
    pieces = [{"X": part, "lower": -part} for part in np.split(rows, 3)]
    folder.write_share(iter(pieces[:2]), 0)
    folder.write_share(iter(pieces[2:]), 1)
    folder.arrays.join_shares(2)
    for name, expected in {"X": rows, "lower": -rows}.items():
        found = folder.map_matrix(name, 3)
        np.testing.assert_array_equal(found.toarray() if is_sparse else found, expected)
    with pytest.raises(StoreError, match="rows of some rank are missing"):
        folder.map_matrix("X", 4)


def test_ranks_write_what_one_writes(trained, store, tmp_path):
    code = """
        from pathlib import Path
        from clue_dist.inference.cells import StoreCells
        from clue_dist.inference.imputation_question import ImputationChoices
        from clue_dist.inference.impute import write_imputation
        from clue_dist.ranks import Ranks
        from clue_dist.store.reader import Store
        from tests.unit.impute_helpers import make_trained
        ranks, store = Ranks.from_environment().join_group(), Store(root)
        trained = make_trained(store)
        choices = ImputationChoices("rna", interval=0.9, threshold=300.0)
        write_imputation(
            trained, StoreCells(store, trained), Path(out), choices, batch_size=16, ranks=ranks
        )
        ranks.leave_group()
    """
    out = tmp_path / "two.h5ad"
    run_ranks(2, f"root, out = {str(store.root)!r}, {str(out)!r}", code)
    choices = ImputationChoices("rna", interval=0.9, threshold=300.0)
    one = impute_cells(trained, StoreCells(store, trained), choices, batch_size=16)
    two = ad.read_h5ad(out)
    for found, expected in ((two.X, one.X), (two.layers["upper"], one.layers["upper"])):
        np.testing.assert_array_equal(found.toarray(), expected.toarray())


def test_cells_in_memory_are_imputed_in_their_order(trained, store, tmp_path):
    """Every second cell lacks proteins, so that rows are read in another order than theirs."""
    reader = store.segments["rna+adt"]
    counts = {m: reader.read_rows(m, np.arange(40)) for m in ("rna", "adt")}
    barcodes = [f"c{i}" for i in range(40)]
    rna = ad.AnnData(counts["rna"].to_scipy().astype(np.float32))
    adt = ad.AnnData(counts["adt"].astype(np.float32))
    for name, table in (("rna", rna), ("adt", adt)):
        table.obs_names, table.var_names = barcodes, store.manifest.modalities[name].features
    mdata = md.MuData({"rna": rna, "adt": adt[::2].copy()})
    run = Run(tmp_path, trained)
    answer = run.impute(mdata, "rna", threshold=0.0)
    assert list(answer.obs_names) == list(mdata.obs_names)
    assert list(answer.obs["clue_from"])[:2] == ["rna+adt", "rna"]
    alone = run.impute(mdata, "rna", from_=["rna"])
    np.testing.assert_allclose(answer.X.toarray()[1::2], alone.X[1::2], rtol=1e-5)
    assert np.abs(answer.X.toarray()[::2] - alone.X[::2]).max() > 1
    path = run.impute(mdata, "rna", out=tmp_path / "o.h5ad")
    np.testing.assert_allclose(ad.read_h5ad(path).X, answer.X.toarray(), rtol=1e-6)
