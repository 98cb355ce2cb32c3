"""What changes in the course of training: pure functions of the step."""

from __future__ import annotations

import math

from clue_dist.train.setup import Setup


def compute_learning_rate(setup: Setup, step: int) -> float:
    """Compute the learning rate of a step: a linear warm-up, then a cosine down to `final_lr`."""
    settings = setup.config.train
    warm_up = settings.warmup * setup.total_steps
    if step < warm_up:
        return settings.lr * (step + 1) / (warm_up + 1)  # never 0, not even at the first step
    progress = (step - warm_up) / max(setup.total_steps - warm_up, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * cosine)


def compute_kl_weight(setup: Setup, step: int) -> float:
    """Compute the factor on lambda_kl (eq. 5 and 8), which rises from 0 to 1 over `kl_warmup`."""
    warm_up = setup.config.train.kl_warmup * setup.total_steps
    return min(1.0, (step + 1) / warm_up) if warm_up else 1.0
