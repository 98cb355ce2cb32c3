"""Which entries training hides from the encoders, and that nothing else hides any."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from clue_dist.config import Config
from clue_dist.data.batch import SparseCounts, compute_library_size
from clue_dist.model.modality_spec import specify_modalities
from clue_dist.model.noise import Noise
from clue_dist.model.thinning import DENSE, _drop_entries, _zero_entries, hide_entries
from clue_dist.model.trunk import compute_size_inputs, normalise_counts
from clue_dist.store.manifest_parts import Modality
from tests.unit.model_helpers import small_model

CELLS, FEATURES = 400, 300


def make_counts(n_cells: int = CELLS, n_features: int = FEATURES) -> SparseCounts:
    dense = np.random.default_rng(0).poisson(0.7, (n_cells, n_features)).astype(np.float32)
    matrix = sp.csr_matrix(dense)
    return SparseCounts(
        torch.tensor(matrix.indptr), torch.tensor(matrix.indices), torch.tensor(matrix.data), 300
    )


def draw_keys(n_cells: int = CELLS, seed: int = 0) -> torch.Tensor:
    return Noise(seed, 0, {"s": n_cells}, 1).draw_keys()


def make_dense(counts: SparseCounts) -> torch.Tensor:
    shape = len(counts.indptr) - 1, counts.n_features
    matrix = sp.csr_matrix((counts.values, counts.indices, counts.indptr), shape)
    return torch.from_numpy(matrix.toarray())


def test_the_share_that_is_hidden_is_uniform_and_the_rest_is_as_it_was() -> None:
    counts = make_counts()
    shown = hide_entries(counts, 0.8, draw_keys())
    left, all_values = make_dense(shown), make_dense(counts)
    torch.testing.assert_close(left, all_values * (left > 0))
    share = 1 - shown.indptr.diff() / counts.indptr.diff()
    quantiles = torch.quantile(share, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    torch.testing.assert_close(
        quantiles, torch.tensor([0.04, 0.2, 0.4, 0.6, 0.76]), atol=0.06, rtol=0
    )


def test_entries_are_hidden_independently_of_feature_cell_and_step() -> None:
    dense = torch.ones(CELLS, FEATURES)
    hidden = hide_entries(dense, 0.8, draw_keys()) == 0
    assert hidden.float().mean(0).sub(0.4).abs().max() < 0.12  # of every feature alike
    again = hide_entries(dense, 0.8, draw_keys(seed=1)) == 0
    assert float((hidden == again).float().mean()) < 0.6
    # Neighbouring features and cells are not hidden together more often than chance has it.
    centred = hidden.float() - hidden.float().mean(1, keepdim=True)
    for first, second in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
        assert float((first * second).mean()) == pytest.approx(0, abs=0.01)


def test_a_gpu_would_set_to_zero_what_a_cpu_leaves_out() -> None:
    counts, key, share = make_counts(), draw_keys(), torch.rand(CELLS)
    zeroed, left = _zero_entries(counts, key, share), _drop_entries(counts, key, share)
    assert zeroed.has_zeros
    assert not left.has_zeros
    shown = zeroed.values > 0
    assert torch.equal(left.indices, counts.indices[shown])
    assert torch.equal(left.values, counts.values[shown])
    assert torch.equal(left.indptr.diff(), counts.sum_rows(shown.float()).int())
    # Rows of entries are worked out once for what is shown and scored.
    assert zeroed.entry_rows is counts.entry_rows
    assert normalise_counts(zeroed, "log_cp10k").entry_rows is counts.entry_rows


def test_a_dense_profile_hides_what_a_sparse_one_hides() -> None:
    counts, key = make_counts(), draw_keys()
    expected = make_dense(hide_entries(counts, 0.5, key))
    torch.testing.assert_close(hide_entries(make_dense(counts), 0.5, key), expected)


def test_keys_are_those_of_the_cell_on_any_number_of_ranks() -> None:
    whole = Noise(3, 11, {"a": 16, "b": 8}, 4).draw_keys()
    assert len(set(whole.tolist())) == 24
    assert whole.min() >= 0
    for rank in range(2):
        rows = torch.cat([torch.arange(0, 16)[rank::2], torch.arange(16, 24)[rank::2]])
        part = Noise(3, 11, {"a": 16, "b": 8}, 4, rank, 2).draw_keys()
        assert part.tolist() == whole[rows].tolist()


@pytest.mark.parametrize("hide", [_zero_entries, _drop_entries])
def test_the_size_that_the_encoder_sees_is_that_of_what_is_shown(hide: Any) -> None:
    shown = hide(make_counts(), draw_keys(), torch.rand(CELLS))
    dense = make_dense(shown)
    torch.testing.assert_close(compute_size_inputs(shown), compute_size_inputs(dense))
    torch.testing.assert_close(compute_library_size(shown), dense.sum(1).clamp_min(1))


def test_training_alone_hides_and_decoders_score_whole_profiles() -> None:
    objective, batch, _ = small_model(2)
    model = objective.model
    model.thinning = {"m0": 0.9}
    trunk = model.get_trunk("m0")
    trunk.size[0, 1] = math.log(0.9 * DENSE * trunk.projection.weight.shape[0])
    encoded: dict[str, torch.Tensor] = {}
    decoded: dict[str, torch.Tensor] = {}
    for name in model.modalities:
        trunk, decoder = model.get_trunk(name), model.get_decoder(name)

        def watch(counts: torch.Tensor, name: str = name, then: Any = trunk.compute_components):
            encoded[name] = counts
            return then(counts)

        trunk.compute_components = watch
        decoder.register_forward_pre_hook(
            lambda _, arguments, name=name: decoded.update({name: arguments[2]})
        )
    whole = {name: observed.counts for name, observed in batch.modalities.items()}
    model(batch, Noise(0, 0, {"s": batch.n_cells}, 1))
    key = Noise(0, 0, {"s": batch.n_cells}, 1).draw_keys()[batch.modalities["m0"].rows]
    torch.testing.assert_close(encoded["m0"], hide_entries(whole["m0"], 0.9, key))
    assert (encoded["m0"] == 0).any()
    assert torch.equal(encoded["m1"], whole["m1"])
    assert all(torch.equal(decoded[name], counts) for name, counts in whole.items())
    model.get_trunk("m0").size[0, 1] += 0.2  # more than DENSE: no sparse sample
    model(batch, Noise(0, 0, {"s": batch.n_cells}, 1))
    assert torch.equal(encoded["m0"], whole["m0"])
    model.get_trunk("m0").size[0, 1] -= 0.2
    model.eval()
    model(batch, Noise(0, 1, {"s": batch.n_cells}, 1))
    assert torch.equal(encoded["m0"], whole["m0"])


def test_sparse_samples_are_thinned_unless_the_config_says_no() -> None:
    modalities = {
        kind: Modality(kind=kind, storage="sparse", features=["a", "b"]) for kind in ("rna", "atac")
    }
    specs = specify_modalities(modalities, Config())
    assert (specs["rna"].thinning, specs["atac"].thinning) == (0.0, 0.8)
    off = Config(objective={"thinning": 0.0})
    assert specify_modalities(modalities, off)["atac"].thinning == 0
