"""A model takes over what it knows from one that knows less, or in another order."""

from __future__ import annotations

import pytest
import torch

from clue_dist.config import ModelConfig
from clue_dist.data.batch import Batch, ObservedModality
from clue_dist.model.clue import CLUE
from clue_dist.model.modality_spec import ModalitySpec
from clue_dist.model.noise import Noise
from clue_dist.model.posterior_encoder import FITTED_MODULES
from clue_dist.model.weight_transfer import transfer_weights

SPECS = {
    name: ModalitySpec(size, "none", "normal", None)
    for name, size in (("rna", 9), ("adt", 5), ("atac", 7))
}
CELLS = 6


def make_model(names: list[str], n_batches: int, shared: bool, seed: int, rank: int = 0) -> CLUE:
    torch.manual_seed(seed)
    config = ModelConfig(
        latent=8,
        private=0.25,
        head_rank=rank,
        trunk={"hidden": 6, "projection": 4, "members": 2, "shared": shared},
        decoder={"hidden": 5},
        discriminator={"hidden": 5},
    )
    model = CLUE({name: SPECS[name] for name in names}, n_batches, config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.uniform_(0.1, 1)
    return model.eval()


def make_batch(names: list[str], code: int) -> Batch:
    """Cells with RNA and ADT, for a model that may know more."""
    draw = torch.Generator().manual_seed(0)
    profiles = {name: torch.rand(CELLS, SPECS[name].n_features, generator=draw) for name in SPECS}
    rows = torch.arange(CELLS)
    observed = torch.tensor([[name in ("rna", "adt") for name in names]] * CELLS)
    modalities = {name: ObservedModality(rows, profiles[name], rows) for name in ("rna", "adt")}
    return Batch(observed, torch.full((CELLS,), code), modalities)


@pytest.mark.parametrize(("shared", "rank"), [(True, 0), (True, 3), (False, 0)])
@pytest.mark.parametrize(("n_before", "n_after"), [(3, 4), (1, 2), (2, 1)])
def test_what_both_models_know_is_kept(
    shared: bool, rank: int, n_before: int, n_after: int
) -> None:
    before = make_model(["rna", "adt"], n_before, shared, seed=1, rank=rank)
    names = ["atac", "adt", "rna"]
    after = make_model(names, n_after, shared, seed=2, rank=rank)
    # The last batch of the one is the first of the other.
    codes = {0: n_before - 1} if min(n_before, n_after) > 1 else {}
    transfer_weights(after, before.state_dict(), before.modalities, codes)

    expected = before.encode_batch(make_batch(before.modalities, 0))
    posterior = after.encode_batch(make_batch(names, 0))
    places = torch.tensor([names.index("rna"), names.index("adt")])
    for values, found in zip(expected[:2], posterior[:2], strict=True):
        torch.testing.assert_close(found[:, places][:, :, places], values)
    torch.testing.assert_close(posterior.joint_mean[:, places], expected.joint_mean)
    noise = Noise(0, 0, {"s": CELLS}, 1)
    z = torch.rand(CELLS, before.latent)
    for name in before.modalities:
        scores = []
        for model, code in ((before, n_before - 1), (after, 0)):
            # Where one of the two knows but one batch, an unknown one stands for it.
            cells = make_batch(model.modalities, code if codes else -1)
            counts = cells.modalities[name].counts
            scores.append(model.get_decoder(name)(z, cells.batch_code, counts, noise))
        torch.testing.assert_close(scores[1], scores[0])


def test_equal_models_become_the_same() -> None:
    before, after = (make_model(["rna", "adt"], 2, True, seed) for seed in (1, 2))
    transfer_weights(after, before.state_dict(), before.modalities, {0: 0, 1: 1})
    for name, values in before.state_dict().items():
        if name.split(".")[0] not in FITTED_MODULES:  # validation fits them
            torch.testing.assert_close(after.state_dict()[name], values)


def test_another_size_is_refused() -> None:
    before = make_model(["rna", "adt"], 2, True, 1)
    weights = before.state_dict() | {"trunks.0.idf": torch.ones(3)}
    with pytest.raises(RuntimeError):
        transfer_weights(before, weights, before.modalities, {})
