"""InfoNCE equals a slow float64 transcription of its equation, and is finite wherever z lies."""

import itertools
import math
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clue_dist.data.batch import find_pair_rows
from clue_dist.losses import info_nce
from clue_dist.losses.info_nce import compute_info_nce
from tests.unit.model_helpers import OBSERVED, B, D, K, draw


@pytest.mark.parametrize("same_modality", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("fewest", [0, 3, 32])
@pytest.mark.parametrize("told", [None, [2.0, 1.0, 5.0], [0.7, 0.2, 0.0]])
def test_info_nce_over_pairs_both_directions(
    told: list[float] | None, fewest: int, same_modality: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info_nce, "FEWEST_CANDIDATES", fewest)
    z, code, log_scale = draw(2, B, K, K * D), torch.arange(B) % 2, torch.tensor(1.3)
    code[::4] = -1  # of an unknown batch, which may be any

    def may_be_alike(c: int, e: int) -> bool:
        return bool(code[e] == code[c] or min(code[e], code[c]) < 0)

    losses = []
    for member in z.double().numpy():
        unit = member / np.linalg.norm(member, axis=-1, keepdims=True)
        for a, b in permutations(range(K), 2):
            both = [c for c in range(B) if OBSERVED[c, a] and OBSERVED[c, b]]
            for c in both:
                n_alike = sum(may_be_alike(c, e) for e in both)
                n_others = len(both) - n_alike
                rest = 1.0
                if told is not None:
                    rest = max(0, fewest - n_alike) / max(n_others, 1)
                    rest = min(1.0, max(rest, 1 - min(told[a], told[b])))
                odds = {e: 1.0 if may_be_alike(c, e) else rest for e in both}
                logits = {e: math.exp(1.3) * unit[c, a] @ unit[e, b] for e in both}
                own = {e: math.exp(1.3) * unit[c, a] @ unit[e, a] for e in both if e != c}
                total = sum(odds[e] * math.exp(v) for e, v in logits.items())
                total += same_modality * sum(odds[e] * math.exp(v) for e, v in own.items())
                losses.append(math.log(total) - logits[c])
    batch_separation = None if told is None else torch.tensor(told)
    found = compute_info_nce(
        z, find_pair_rows(OBSERVED), code, log_scale, batch_separation, same_modality
    )
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("told", [None, [0.7, 0.2, 0.0]])
def test_gradients_of_info_nce_are_those_of_its_value(told: list[float] | None) -> None:
    z, log_scale = draw(2, B, K, K * D).double().requires_grad_(), torch.tensor(1.3).double()
    code, batch_separation = torch.arange(B) % 2, None if told is None else torch.tensor(told)

    def compute(z: Tensor, log_scale: Tensor) -> Tensor:
        return compute_info_nce(z, find_pair_rows(OBSERVED), code, log_scale, batch_separation, 0.5)

    assert torch.autograd.gradcheck(
        compute, (z, log_scale.requires_grad_()), check_undefined_grad=False
    )


def test_info_nce_is_finite_where_no_odds_are_left() -> None:
    """At the highest scale, of cells that are opposite to all candidates."""
    z = torch.ones(1, 4, 2, 3)
    z[:, 0, 0] = -1
    z.requires_grad_()
    pair_rows = {(0, 1): torch.arange(4)}
    loss = compute_info_nce(z, pair_rows, torch.zeros(4).long(), torch.tensor(4.6), None, 1.0)
    loss.backward()
    assert 20 < float(loss.detach()) < 40
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("cosine", [-0.24, -0.25, -0.26])
def test_gradients_of_info_nce_are_finite_where_hardly_any_odds_are_left(cosine: float) -> None:
    """At the highest scale, of the only pair of a batch."""
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([cosine, math.sqrt(1 - cosine**2)])
    z = torch.stack([first, second])[None, None].requires_grad_()
    log_scale = torch.tensor(100.0).log()
    pair_rows = {(0, 1): torch.zeros(1, dtype=torch.long)}
    compute_info_nce(z, pair_rows, torch.zeros(1).long(), log_scale, None, 0.0).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_info_nce_finds_partners_among_the_cells_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    z, code, log_scale = draw(2, 2 * B, K, K * D), torch.arange(2 * B) % 2, torch.tensor(1.3)
    # The last cell of each rank lacks a modality. Values there are those of no rank.
    observed = torch.ones(B, K, dtype=torch.bool)
    observed[-1, 0] = False
    pair_rows = find_pair_rows(observed)
    ranks = [slice(B), slice(B, None)]

    def all_gather(of_ranks: list[Tensor], part: Tensor) -> None:
        whole = code if part.dtype == torch.int64 else z.transpose(0, 1)
        for tensor, rank in zip(of_ranks, ranks, strict=True):
            tensor.copy_(whole[rank])

    odds: dict[tuple[int, int], Tensor] = {}  # of keys, by call and rank

    def become_rank(number: int) -> None:
        calls = itertools.count()

        def add_up_odds(part: Tensor) -> Tensor:
            call = next(calls)
            odds[call, number] = part
            return sum((part for (of, _), part in odds.items() if of == call), torch.zeros(()))

        job: Any = SimpleNamespace(
            is_initialized=lambda: True,
            get_world_size=lambda: 2,
            get_rank=lambda: number,
            all_gather=all_gather,
        )
        monkeypatch.setattr(info_nce, "dist", job)
        monkeypatch.setattr(info_nce, "_add_up", add_up_odds)

    for _ in range(2):  # the second time the odds of all ranks are known
        losses = []
        for number, rank in enumerate(ranks):
            become_rank(number)
            losses.append(
                compute_info_nce(z[:, rank], pair_rows, code[rank], log_scale, torch.ones(K), 0.5)
            )
            part, weight = z.transpose(0, 1)[rank].clone(), draw(2 * B, 2, K, K * D)
            part.requires_grad_()
            # Every rank adds the same gradient.
            monkeypatch.setattr(info_nce, "_add_up", lambda gradient: 2 * gradient)
            (info_nce._GatherWithGradient.apply(part) * weight).sum().backward()
            assert part.grad is not None
            torch.testing.assert_close(part.grad, 2 * weight[rank])
    monkeypatch.undo()
    every_pair = find_pair_rows(observed.repeat(2, 1))
    whole = compute_info_nce(z, every_pair, code, log_scale, torch.ones(K), 0.5)
    assert float(sum(losses) / 2) == pytest.approx(float(whole), rel=1e-5)
