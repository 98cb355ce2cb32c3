"""How far imputed counts scatter: held-out counts say it, draws follow it, means do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clue_dist.checkpoint.run_folder import WEIGHTS, load_weights
from clue_dist.data.batch import Batch
from clue_dist.inference.cells import StoreCells
from clue_dist.inference.imputation_question import ImputationChoices
from clue_dist.inference.impute import impute_cells
from clue_dist.inference.load_model import TrainedModel
from clue_dist.losses import predictive
from clue_dist.losses.predictive import THETA_SHIFTS, choose_theta_shifts
from clue_dist.model.common_space import FEWEST_CHOOSING
from clue_dist.model.imputation import ValueDecoder, infer_from_sources
from clue_dist.model.translation import Regression
from clue_dist.ranks import Ranks
from clue_dist.store.reader import Store
from clue_dist.train.trainer import Trainer
from clue_dist.train.translation_fit import fit_theta_shifts
from tests.stores import make_store
from tests.unit.impute_helpers import make_trained
from tests.unit.model_helpers import DirectEngine, small_model

RNA, ADT = 0, 1
LIBRARY = 5e3


@pytest.fixture(autouse=True)
def known_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of a model without training do not sum to 1, so that totals are not the library."""
    monkeypatch.setattr(
        predictive, "compute_library_size", lambda counts: torch.full((len(counts),), LIBRARY)
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    cells = {"rna+adt": 500}
    return make_store(tmp_path / "s.zarr", cells=cells, features={"rna": 12, "adt": 8})


@pytest.fixture
def trained(store: Store) -> TrainedModel:
    """A model whose proteins follow from its z of RNA."""
    trained = make_trained(store)
    d, generator = trained.model.latent, torch.Generator().manual_seed(0)
    weight = torch.randn(2 * d, d, generator=generator)
    regression = Regression(weight, torch.zeros(d), 0.002 * torch.eye(d))
    trained.model.translation.set_regression(RNA, ADT, regression)
    return trained


def draw_proteins(trained: TrainedModel, store: Store, theta_shift: float) -> Batch:
    """The cells of a store with proteins that scatter as the model says, or otherwise."""
    cells, model = StoreCells(store, trained), trained.model
    batch = cells.read_slice(cells.slice_cells(4096)[0])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        mean = model.encode_batch(batch).mean
        z = infer_from_sources(model, mean, [RNA], ADT).draw_sample(generator)
        decoder = ValueDecoder(model, "adt", theta_shift=theta_shift)
        levels = model.get_decoder("adt").find_levels(batch.batch_code)
        counts = decoder.draw_values(z, levels, torch.full((len(z), 1), LIBRARY), generator)
    proteins = replace(batch.modalities["adt"], profiles=counts)
    return replace(batch, modalities=batch.modalities | {"adt": proteins})


@pytest.mark.parametrize("theta_shift", [0.0, 0.75, -0.5])
def test_held_out_counts_say_how_far_they_scatter(
    trained: TrainedModel, store: Store, theta_shift: float
) -> None:
    batch = draw_proteins(trained, store, theta_shift)
    with torch.no_grad():
        posterior = trained.model.encode_batch(batch)
    shifts = choose_theta_shifts(trained.model, batch, posterior)
    assert shifts.tolist() == [[0, theta_shift], [0, 0]]


def test_parameters_in_bf16_choose_too(trained: TrainedModel, store: Store) -> None:
    batch = draw_proteins(trained, store, 0.75)
    for parameter in trained.model.parameters():  # buffers stay in float32
        parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        posterior = trained.model.encode_batch(batch)
    shifts = choose_theta_shifts(trained.model, batch, posterior)
    assert shifts[RNA, ADT] == pytest.approx(0.75, abs=0.25)


def test_few_pairs_choose_nothing(trained: TrainedModel, store: Store) -> None:
    batch = draw_proteins(trained, store, 0.75)
    observed = batch.observed.clone()
    observed[FEWEST_CHOOSING - 1 :, RNA] = False
    with torch.no_grad():
        posterior = trained.model.encode_batch(batch)
    shifts = choose_theta_shifts(trained.model, replace(batch, observed=observed), posterior)
    assert not shifts.any()


def test_a_validation_fits_the_shift(trained: TrainedModel, store: Store) -> None:
    batch, (objective, _, setup) = draw_proteins(trained, store, 0.75), small_model()
    objective.model = trained.model
    trainer = Trainer(DirectEngine(objective), setup, Ranks(), torch.device("cpu"))
    fit_theta_shifts(trainer, batch, trainer.encode_batch(batch))
    assert trained.model.translation.theta_shift[RNA, ADT] == 0.75


def test_weights_of_earlier_versions_have_no_shift(
    trained: TrainedModel, store: Store, tmp_path: Path
) -> None:
    weights = trained.model.state_dict()
    trained.model.translation.theta_shift.fill_(0.5)
    kept = {name: v.clone() for name, v in weights.items() if not name.endswith(".theta_shift")}
    save_file(kept, tmp_path / WEIGHTS)
    again = make_trained(store).model
    load_weights(again, tmp_path, "fix")
    assert again.translation.list_fitted(ADT) == [RNA]
    assert not again.translation.theta_shift.any()


def test_draws_of_an_imputed_modality_follow_the_shift(trained: TrainedModel, store: Store) -> None:
    def impute(modality: str) -> tuple[np.ndarray, float]:
        choices = ImputationChoices(modality, from_="rna", interval=0.9)
        answer = impute_cells(trained, StoreCells(store, trained), choices)
        return answer.X, float((answer.layers["upper"] - answer.layers["lower"]).mean())

    before = {name: impute(name) for name in ("adt", "rna")}
    trained.model.translation.theta_shift[RNA, ADT] = max(THETA_SHIFTS)
    after = {name: impute(name) for name in ("adt", "rna")}
    np.testing.assert_array_equal(after["adt"][0], before["adt"][0])
    assert after["adt"][1] < 0.85 * before["adt"][1]
    assert after["rna"][1] == before["rna"][1]  # which was seen
