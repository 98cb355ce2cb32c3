"""Several covariates of batches: from files over a store and a model to counterfactual values."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from clue_dist.inference.cells import open_cells
from clue_dist.inference.imputation_question import ImputationChoices
from clue_dist.inference.impute import impute_cells
from clue_dist.inference.load_model import TrainedModel
from clue_dist.store.reader import Store
from data_prep.cli.commands import run_command
from tests.unit.impute_helpers import make_trained
from tests.unit.prep_helpers import make_counts, write_h5ad

N = 40
DONORS = np.array([f"d{i % 3}" for i in range(N)], object)
# No cell of d2 was measured with v3.
CHEMISTRIES = np.array(["v3" if i % 6 in (3, 4) else "v2" for i in range(N)], object)
COLUMNS = ["donor", "chemistry"]


def write_files(folder: Path, **obs: object) -> list[str]:
    """The two modalities of cells; only the file of RNA says what the chemistry was."""
    columns = {"donor": DONORS, "chemistry": CHEMISTRIES} | obs
    rna = write_h5ad(folder / "rna.h5ad", make_counts(N, 12), **columns)
    adt = write_h5ad(folder / "adt.h5ad", make_counts(N, 5, 1, "p"), donor=columns["donor"])
    return [f"rna={rna}", f"adt={adt}"]


def convert(folder: Path, *words: str, name: str = "s.zarr", **obs: object) -> Store:
    run_command(["convert", *write_files(folder, **obs), *words, "--out", str(folder / name)])
    return Store(folder / name)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return convert(tmp_path_factory.mktemp("covariates"), "--batch-key", *COLUMNS)


@pytest.fixture(scope="module")
def trained(store: Store) -> TrainedModel:
    return make_trained(store)


def impute(trained: TrainedModel, source: Store | ad.AnnData, **choices: object) -> ad.AnnData:
    cells = open_cells(source, trained)
    return impute_cells(trained, cells, ImputationChoices("rna", **choices))


def test_a_batch_is_a_combination_of_levels(store: Store) -> None:
    manifest = store.manifest
    assert manifest.batches == ["d0 | v2", "d0 | v3", "d1 | v2", "d1 | v3", "d2 | v2"]
    assert manifest.batch_covariates == {
        "donor": ["d0", "d0", "d1", "d1", "d2"],
        "chemistry": ["v2", "v3", "v2", "v3", "v2"],
    }


def test_a_counterfactual_needs_no_cell_of_the_combination(
    store: Store, trained: TrainedModel
) -> None:
    decoder = trained.model.get_decoder("rna")
    assert decoder.batch.num_embeddings == 5  # three donors and two chemistries
    seen = impute(trained, store, batch={"donor": "d2", "chemistry": "v2"})
    np.testing.assert_array_equal(seen.X, impute(trained, store, batch="d2 | v2").X)
    unseen = impute(trained, store, batch=["donor=d2", "chemistry=v3"])
    assert np.abs(unseen.X - seen.X).max() > 1


def test_a_covariate_that_is_not_named_is_each_cells_own(
    store: Store, trained: TrainedModel
) -> None:
    partial = impute(trained, store, batch={"chemistry": "v3"})
    by_donor = {
        d: impute(trained, store, batch=f"donor={d} chemistry=v3".split()) for d in set(DONORS)
    }
    for donor, expected in by_donor.items():
        chosen = (partial.obs["donor"] == donor).to_numpy()
        np.testing.assert_allclose(partial.X[chosen], expected.X[chosen], rtol=1e-5)
    average = impute(trained, store, batch={"donor": "average", "chemistry": "v3"})
    # Over the batches of training, two of which are of d0, two of d1 and one of d2.
    mean = np.average([by_donor[f"d{i}"].X for i in range(3)], 0, weights=[2, 2, 1])
    np.testing.assert_allclose(average.X, mean, rtol=1e-5)
