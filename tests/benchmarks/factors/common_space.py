"""The peer: one latent space that every modality's encoder infers and every decoder reads.

Cobolt's ELBOs (of the product of experts over what is observed, and of each modality by itself),
with or without MultiVI's penalty on paired cells, the symmetric KL between what their modalities
infer. All else is ours: inputs, encoders, as many latent numbers as our full z has, weights of the
ELBOs, batches, optimizer, schedule and clipping.
"""

from itertools import combinations

import torch
from torch import Tensor, nn

from clue_dist.config import Config
from clue_dist.data.batch import Batch
from clue_dist.data.loader import Loader
from clue_dist.model.clue import CLUE
from clue_dist.model.decoders import Decoder
from clue_dist.model.initialise import initialise_model
from clue_dist.model.modality_spec import ModalitySpec
from clue_dist.model.noise import Noise
from clue_dist.model.posterior import compute_kl_to_prior, product_of_experts, sample_posterior
from clue_dist.train.engine import EPSILON, OPTIMIZERS, group_parameters
from clue_dist.train.schedule import compute_learning_rate
from clue_dist.train.setup import Setup

ALIGNMENT = 1.0  # weight of the symmetric KL next to the ELBO of everything observed, as MultiVI's


class CommonSpace(CLUE):
    """CLUE's encoders, whose K sections are one z of K * d numbers, which each decoder reads."""

    def __init__(self, specs: dict[str, ModalitySpec], n_batches: int, config: Config) -> None:
        super().__init__(specs, n_batches, config.model.model_copy(update={"private": 0.0}))
        del self.discriminator, self.scale
        self.objective = config.objective
        width = config.model.latent * len(specs)
        self.decoders = nn.ModuleList(
            Decoder(s.likelihood, s.n_features, n_batches, width, config.model.decoder)
            for s in specs.values()
        )

    def infer(self, batch: Batch, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """Means and log-variances of q(z | all observed), then of q(z | x_k): (B, 1 + K, K * d)."""
        experts = self.encode_batch(batch, noise)
        alone = torch.eye(len(self.modalities), dtype=torch.bool).expand(batch.n_cells, -1, -1)
        sources = torch.cat([batch.observed[:, None], alone], 1)  # (B, 1 + K, K)
        parts = [add_prior(experts.mean, experts.log_var, source) for source in sources.unbind(1)]
        mean, log_var = (torch.stack(values, 1).flatten(2) for values in zip(*parts, strict=True))
        return mean, log_var

    def compute_loss(self, batch: Batch, noise: Noise, alignment: float) -> Tensor:
        weights, k = self.objective, len(self.modalities)
        mean, log_var = self.infer(batch, noise)
        z = sample_posterior(mean, log_var, noise.draw_normal(*mean.shape[1:]))
        shared = z[:, :1].expand(-1, k, -1)  # (B, K, K * d): every decoder reads the same z
        ln_alone, ln_joint = self._score_profiles(batch, [z[:, 1:], shared], noise)  # (B, K)
        kl = weights.lambda_kl * compute_kl_to_prior(mean, log_var)  # (B, 1 + K)
        joint = kl[:, 0] - ln_joint.sum(1)
        alone = ((kl[:, 1:] - ln_alone) * batch.observed).sum(1)
        for a, b in combinations(range(k), 2):
            first, second = ((mean[:, 1 + i], log_var[:, 1 + i]) for i in (a, b))
            both = batch.observed[:, a] & batch.observed[:, b]
            joint = joint + alignment * both * compute_symmetric_kl(*first, *second)
        return (weights.lambda_cross * joint + weights.lambda_self * alone).mean()

    @torch.no_grad()
    def embed_batch(
        self, batch: Batch, per_modality: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Posterior means of z, as `CLUE.embed_batch` gives them."""
        mean, _ = self.infer(batch)
        alone = dict(zip(self.modalities, mean[:, 1:].unbind(1), strict=True))
        return mean[:, 0], {m: alone[m][seen.rows] for m, seen in batch.modalities.items()}


def add_prior(mean: Tensor, log_var: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """The product of the observed sources' Gaussians and of the prior, as `product_of_experts`."""
    prior = mean.new_zeros(len(mean), 1, *mean.shape[2:])
    power = torch.cat([torch.ones_like(observed[:, :1]), observed], 1)
    return product_of_experts(torch.cat([prior, mean], 1), torch.cat([prior, log_var], 1), power)


def compute_symmetric_kl(m1: Tensor, v1: Tensor, m2: Tensor, v2: Tensor) -> Tensor:
    """KL(q1 || q2) + KL(q2 || q1) of Gaussians of means m, log-variances v, over the last axis."""
    apart = (m1 - m2) ** 2
    return 0.5 * ((v1.exp() + apart) * (-v2).exp() + (v2.exp() + apart) * (-v1).exp() - 2).sum(-1)


def train_model(setup: Setup, alignment: float) -> CommonSpace:
    """Fit on the batches that our run on the same store sees; the weights of the last step."""
    config, plan, store = setup.config, setup.plan, setup.store
    torch.manual_seed(config.seed)
    model = CommonSpace(setup.specs, len(store.manifest.batches), config)
    trunk = config.model.trunk
    svd, shrinkage = trunk.projection_init != "random", trunk.batch_shrinkage
    stored = setup.stored_svds
    initialise_model(model, store, setup.train_cells, svd, config.seed, stored, shrinkage)
    groups = group_parameters(model, config)
    optimizer = OPTIMIZERS[config.train.optimizer](groups, lr=config.train.lr, eps=EPSILON)
    with Loader(store, plan, prefetch=config.data.prefetch) as loader:
        for step in range(setup.total_steps):
            for group in optimizer.param_groups:
                group["lr"] = compute_learning_rate(setup, step) * group["lr_scale"]
            noise = Noise(config.seed, step, plan.compose_batch(step), plan.lanes)
            optimizer.zero_grad()
            model.compute_loss(next(loader), noise, alignment).backward()
            if config.train.clip:
                nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
            optimizer.step()
    return model.eval()
