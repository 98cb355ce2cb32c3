"""Noise of a counter-based generator: Philox as published, the same on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.benchmarks.gpu.philox import compute_philox, draw_plainly

pytest.importorskip("triton", reason="Triton, which comes with torch for CUDA, is not installed")

from clue_dist.model.counter_noise import CounterNoise, choose_noise
from clue_dist.model.fused.counter_draws import draw_for_cells
from clue_dist.model.noise import Noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARES = {"a": 16, "not its turn": 0, "b": 8}


def make_noise(rank: int = 0, world: int = 1, micro_batch: int = 11) -> CounterNoise:
    return CounterNoise(3, micro_batch, SHARES, 4, rank, world, DEVICE)


def list_rows(rank: int, world: int) -> torch.Tensor:
    """The rows of a batch of one rank that a rank among several has."""
    return torch.cat([torch.arange(0, 16)[rank::world], torch.arange(16, 24)[rank::world]])


def test_the_twin_gives_the_published_words() -> None:
    """Known answers of Random123, of counters and keys of zeros and of ones."""
    zeros = compute_philox(np.zeros((1, 4)), (0, 0))
    assert [f"{word:08x}" for word in zeros[0]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    full = compute_philox(np.full((1, 4), 2**32 - 1), (2**32 - 1, 2**32 - 1))
    assert [f"{word:08x}" for word in full[0]] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


def test_the_kernel_draws_the_words_of_its_twin() -> None:
    cells = torch.tensor([0, 5, -1], dtype=torch.int32, device=DEVICE)
    drawn = draw_for_cells("integers", cells, 7, 0x123456789ABCDEF, 2)
    wanted = draw_plainly(cells.tolist(), 7, 0x123456789ABCDEF, 2)
    np.testing.assert_array_equal(drawn.cpu().numpy(), wanted)


@pytest.mark.parametrize("world", [2, 4])
def test_a_cell_gets_the_same_draws_on_any_number_of_ranks(world: int) -> None:
    whole = make_noise()
    normal, keys, (partner, share) = whole.draw_normal(2, 3), whole.draw_keys(), whole.draw_mixing()
    kept, subset = whole.apply_dropout(torch.ones(24, 5), 0.5), whole.draw_subset(5, 30)
    assert sorted(partner.tolist()) == list(range(24))
    assert ((partner < 16).cpu() == (torch.arange(24) < 16)).all()
    assert (partner.cpu() % 4 == torch.arange(24) % 4).all()
    rank = world - 1
    part, rows = make_noise(rank, world), list_rows(rank, world)
    assert torch.equal(part.draw_normal(2, 3), normal[rows])
    assert torch.equal(part.draw_keys(), keys[rows])
    its_partner, its_share = part.draw_mixing()
    assert torch.equal(rows[its_partner.cpu()], partner.cpu()[rows])
    assert torch.equal(its_share, share[rows])
    assert torch.equal(part.apply_dropout(torch.ones(len(rows), 5), 0.5), kept[rows])
    assert torch.equal(part.draw_subset(5, 30), subset)
    assert len(set(subset.tolist())) == 5


def test_draws_are_spread_as_they_should_be_and_differ_from_each_other() -> None:
    cells = torch.arange(20, dtype=torch.int32, device=DEVICE)
    normal = draw_for_cells("normal", cells, 256, 1, 1)
    assert float(normal.mean()) == pytest.approx(0.0, abs=0.05)
    assert float(normal.std()) == pytest.approx(1.0, abs=0.05)
    uniform = draw_for_cells("uniform", cells, 256, 1, 1)
    assert 0 <= float(uniform.min()) < 0.01 < 0.99 < float(uniform.max()) < 1
    noise = make_noise()
    assert not torch.equal(noise.draw_normal(2), noise.draw_normal(2))
    assert not torch.equal(make_noise().draw_normal(2), make_noise(micro_batch=12).draw_normal(2))


def test_a_cpu_keeps_its_noise() -> None:
    assert choose_noise(torch.ones(1)) is Noise
