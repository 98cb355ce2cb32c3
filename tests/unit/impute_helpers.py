"""A store, and a model of it without training, whose z and batches matter to what it decodes."""

from __future__ import annotations

import torch

from clue_dist.config import Config
from clue_dist.inference.load_model import TrainedModel
from clue_dist.model.clue import build_model
from clue_dist.model.modality_spec import specify_modalities
from clue_dist.store.reader import Store

SMALL = {
    "latent": 8,
    "trunk": {"hidden": 8, "members": 2, "projection": 4},
    "decoder": {"hidden": 8},
    "discriminator": {"hidden": 8},
}


def make_trained(store: Store, **likelihoods: str) -> TrainedModel:
    settings = {name: {"likelihood": likelihood} for name, likelihood in likelihoods.items()}
    config = Config(model=SMALL, modalities=settings)
    manifest = store.manifest
    torch.manual_seed(0)
    specs = specify_modalities(manifest.modalities, config)
    model = build_model(specs, manifest.batch_vocabulary, config.model).eval()
    with torch.no_grad():
        for name in model.modalities:
            decoder = model.get_decoder(name)
            decoder.rate.weight.mul_(20)
            decoder.rate.bias.fill_(-3)
            model.get_trunk(name).size.copy_(torch.tensor([[4.0, 2.0], [1.0, 1.0]]))
    return TrainedModel(
        model,
        manifest.modalities,
        "step-7",
        config,
        frozenset(),
        manifest.batch_vocabulary,
    )
