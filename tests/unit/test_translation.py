"""z of a modality that is not shown: the regression finds what was simulated, and its error."""

from __future__ import annotations

import torch

from clue_dist.data.batch import Batch, ObservedModality
from clue_dist.model.imputation import infer_target_latent, keep_sources
from clue_dist.model.translation import LatentTranslation, Regression
from clue_dist.train.translation_fit import TranslatedCells, fit_translation
from tests.unit.model_helpers import draw, small_model

K, D = 2, 3


def simulate_cells(
    n_cells: int, noise: float, seed: int = 0, variance: float = 0.0
) -> TranslatedCells:
    """z_1 given everything, of some variance, is linear in what modality 0 says, and noise."""
    mean = draw(n_cells, K, K, D, seed=seed).double()
    weight = draw(K * D, D, seed=99).double()
    error = noise * draw(n_cells, D, seed=seed + 1).double()
    joint = draw(n_cells, K, D, seed=seed + 2).double()
    joint[:, 1] = mean[:, 0].flatten(1) @ weight + 2 + error
    return TranslatedCells(
        mean, joint, torch.full_like(joint, variance), torch.ones(n_cells, K, dtype=torch.bool)
    )


def test_the_regression_is_found_and_so_is_its_error():
    translation = LatentTranslation(K, D)
    fit_translation(translation, simulate_cells(4000, 0.5), simulate_cells(500, 0.5, seed=5))
    assert translation.list_fitted(1) == [0]
    cells = simulate_cells(2000, 0.0, seed=9)
    mean, covariance = translation.predict_latent(cells.mean.float(), [0], 1)
    truth = cells.joint_mean[:, 1].float()
    assert (mean - truth).square().mean() < 0.01
    torch.testing.assert_close(covariance, 0.25 * torch.eye(D), rtol=0, atol=0.04)


def test_the_width_of_what_decoders_read_is_added_to_the_error():
    translation = LatentTranslation(K, D)
    cells = simulate_cells(4000, 0.5, variance=2.0)
    fit_translation(translation, cells, simulate_cells(500, 0.5, seed=5, variance=9.0))
    expected = 2.25 * torch.eye(D)
    torch.testing.assert_close(translation.covariance[0, 1], expected, rtol=0, atol=0.04)


def test_held_out_pairs_say_how_large_the_error_is():
    """Of 30 training cells and 6 inputs, what is left is too small an error."""
    alone, judged = LatentTranslation(K, D), LatentTranslation(K, D)
    cells = simulate_cells(30, 1.0)
    fit_translation(alone, cells, None)
    fit_translation(judged, cells, simulate_cells(400, 1.0, seed=7))
    traces = [t.covariance[0, 1].diagonal().mean() for t in (alone, judged)]
    assert traces[0] < 1 < traces[1] < 2


def test_errors_of_few_cells_can_be_inverted():
    """Fewer cells than dimensions: their covariance alone is singular."""
    translation, n_cells, width = LatentTranslation(2, 40), 25, 40
    mean = draw(n_cells, 2, 2, width).double()
    joint = draw(n_cells, 2, width, seed=1).double()
    observed = torch.ones(n_cells, 2, dtype=torch.bool)
    cells = TranslatedCells(mean, joint, torch.zeros_like(joint), observed)
    fit_translation(translation, cells, None)
    _, covariance = translation.predict_latent(mean.float(), [0], 1)
    assert torch.linalg.cholesky(covariance).isfinite().all()


def test_too_few_pairs_fit_nothing():
    translation = LatentTranslation(K, D)
    fit_translation(translation, simulate_cells(10, 1.0), None)
    assert translation.list_fitted(1) == []


def test_predictions_of_several_sources_are_averaged_by_precision():
    translation = LatentTranslation(3, 1)
    for source, (offset, variance) in enumerate([(1.0, 1.0), (4.0, 0.5)]):
        regression = Regression(
            torch.zeros(3, 1), torch.tensor([offset]), torch.tensor([[variance]])
        )
        translation.set_regression(source, 2, regression)
    mean, covariance = translation.predict_latent(torch.zeros(5, 3, 3, 1), [0, 1], 2)
    torch.testing.assert_close(mean, torch.full((5, 1), 3.0))
    torch.testing.assert_close(covariance, torch.tensor([[2 / 3]]))


def test_the_translation_speaks_only_where_the_modality_is_hidden():
    objective, batch, _ = small_model(k=2, private=0.25)
    model = objective.model.eval()
    rows = torch.tensor([0, 1])  # cells of both modalities
    measured = {
        name: ObservedModality(rows, part.counts[:2], rows)
        for name, part in batch.modalities.items()
    }
    both = Batch(batch.observed[rows], batch.batch_code[rows], measured)
    hidden = keep_sources(both, model.modalities, ["m0"])
    before = infer_target_latent(model, hidden, "m1")
    assert not before.is_factor
    assert (before.mean[:, model.n_aligned :] == 0).all()  # private dimensions: the prior
    regression = Regression(torch.zeros(2 * model.latent, 4), torch.ones(4), 4 * torch.eye(4))
    model.translation.set_regression(0, 1, regression)
    after = infer_target_latent(model, hidden, "m1")
    torch.testing.assert_close(after.mean, torch.ones(2, 4))
    torch.testing.assert_close(after.deviation, 2 * torch.eye(4))
    points = after.place_points()
    torch.testing.assert_close(points.mean(0), after.mean)
    assert (points - after.mean).std(0).eq((points - after.mean).std(0)[0]).all()
    torch.testing.assert_close(points.std(), torch.tensor(2.0), rtol=0.4, atol=0)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([after.draw_sample(generator) for _ in range(2000)])
    torch.testing.assert_close(draws.std(0), torch.full((2, 4), 2.0), rtol=0.1, atol=0)
    assert not infer_target_latent(model, both, "m1").is_factor
