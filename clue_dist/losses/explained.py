"""How much of profiles that a model was not trained on its latents explain."""

from __future__ import annotations

import torch
from torch import Tensor

from clue_dist.data.batch import Batch
from clue_dist.model.clue import CLUE
from clue_dist.model.posterior import sample_posterior, select_own_latent
from clue_dist.model.posterior_encoder import Posterior

# Cells, or nothing is said of a modality. Few will do: what a modality explains that is told well
# is several times what it claims; what an encoder explains that learnt by heart is next to nothing.
FEWEST_EXPLAINED = 5
MOST_SCORED_VALUES = 2**23  # of a modality, to bound memory: of many cells fewer features


@torch.no_grad()
def measure_explained(model: CLUE, batch: Batch, posterior: Posterior) -> Tensor:
    """Measure how much likelier z_k makes profiles than their mean profile does.

    E ln p(x_k | z_k) - ln p(x_k | mean), with z_k of q(z_k | x_k): what z_k is worth to a cell. A
    latent cannot tell more of its cell than that. The nats of q against its prior are what the
    encoder claims to tell, and one that knows its training cells by heart claims as much of cells
    that it does not understand. It is an upper bound: private dimensions of z_k help to explain,
    and so does the cell's batch, as the mean profile is of the cells of all batches.

    Args:
        model: the model.
        batch: B cells that it was not trained on.
        posterior: what it infers of them.

    Returns:
        Nats, (K,), means over the cells that have the modality; infinite where these are too few.
    """
    generator = torch.Generator().manual_seed(0)
    mean, log_var = select_own_latent(posterior.mean), select_own_latent(posterior.log_var)
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    z = sample_posterior(mean, log_var, noise)  # (B, K, d)
    explained = mean.new_full((len(model.modalities),), torch.inf)
    for k, name in enumerate(model.modalities):
        observed, decoder = batch.modalities.get(name), model.get_decoder(name)
        if observed is None or len(observed.rows) < FEWEST_EXPLAINED:
            continue
        features, n_scored = None, max(1, MOST_SCORED_VALUES // len(observed.rows))
        if n_scored < decoder.n_features:
            order = torch.randperm(decoder.n_features, generator=generator)
            features = order[:n_scored].sort().values.to(z.device)
        rows = observed.rows
        gain = decoder.compare_with_mean(
            z[rows, k], batch.batch_code[rows], observed.counts, features
        )
        explained[k] = gain.mean()
    return explained
