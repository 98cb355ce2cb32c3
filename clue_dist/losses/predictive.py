"""How far counts scatter that are told from another modality, as cells say that are held out."""

from __future__ import annotations

import torch
from torch import Tensor

from clue_dist.data.batch import Batch, Counts, compute_library_size
from clue_dist.model.clue import CLUE
from clue_dist.model.common_space import FEWEST_CHOOSING
from clue_dist.model.decoders import select_features
from clue_dist.model.imputation import infer_from_sources
from clue_dist.model.posterior_encoder import Posterior

# What may be added to theta, but for nothing. Negative binomials scatter less by it.
THETA_SHIFTS = 0.25, 0.5, 0.75, 1.0, -0.25, -0.5
N_DRAWS = 32  # of z, over which the likelihood of a count is averaged
MOST_FEATURES, MOST_VALUES = 64, 2**13  # that are scored


@torch.no_grad()
def choose_theta_shifts(model: CLUE, batch: Batch, posterior: Posterior) -> Tensor:
    """Choose what is added to theta of a modality where it is told from another.

    Training fits theta to counts around samples of q(z_k | x), which vary more than the z that
    explain x would: so theta takes scatter of z for that of counts. Where z_k is told from
    another modality it is drawn, too, and the same scatter would count twice. So the shift is that
    under which held-out counts are likeliest: ln of the mean of p(x | z) over z, feature by
    feature. It is 0 unless another is better by more than a standard error.

    Args:
        model: the model, whose translation is fitted.
        batch: B cells that it was not trained on.
        posterior: what it infers of them.

    Returns:
        By source, then by target, (K, K); 0 where cells with both are too few to choose.
    """
    shifts = torch.zeros_like(model.translation.theta_shift)
    for target in range(len(model.modalities)):
        for source in model.translation.list_fitted(target):
            both = batch.observed[:, source] & batch.observed[:, target]
            if both.sum() >= FEWEST_CHOOSING:
                shifts[source, target] = _choose_theta_shift(
                    model, batch, posterior, source, target
                )
    return shifts


def _choose_theta_shift(
    model: CLUE, batch: Batch, posterior: Posterior, source: int, target: int
) -> float:
    """The best shift for one source and one target, which enough cells have together."""
    name = model.modalities[target]
    observed, decoder = batch.modalities[name], model.get_decoder(name)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(decoder.n_features, generator=generator)[:MOST_FEATURES]
    features = order.sort().values.to(observed.rows.device)
    paired = batch.observed[observed.rows, source].nonzero()[:, 0]
    paired = paired[:: -(-len(paired) * len(features) // MOST_VALUES)]
    values = _list_values(observed.counts, features)[paired]
    library = compute_library_size(observed.counts)[paired, None]
    rows = observed.rows[paired]
    levels = decoder.find_levels(batch.batch_code[rows])
    latent = infer_from_sources(model, posterior.mean[rows].float(), [source], target)
    draws = torch.Generator(rows.device).manual_seed(0)
    z = torch.stack([latent.draw_sample(draws) for _ in range(N_DRAWS)])
    # All draws at once: under ZeRO-3 each call would gather the decoder.
    parameters = decoder.compute_parameters(z, levels, library, features=features)
    likelihood = torch.stack(
        [
            decoder.likelihood.score_values(values, parameters.shift_theta(shift)).logsumexp(0)
            for shift in (0.0, *THETA_SHIFTS)
        ]
    )  # (shifts, n, F)
    gain = (likelihood[1:] - likelihood[0]).mean(2)
    best = int(gain.mean(1).argmax())
    error = gain[best].std() / len(paired) ** 0.5
    return THETA_SHIFTS[best] if gain[best].mean() > error else 0.0


def _list_values(counts: Counts, features: Tensor) -> Tensor:
    """The values of some features, (n, F), zeros among them."""
    counts = select_features(counts, features)
    if isinstance(counts, Tensor):
        return counts
    values = counts.values.new_zeros(len(counts.indptr) - 1, counts.n_features)
    values[counts.entry_rows, counts.indices.long()] = counts.values
    return values
