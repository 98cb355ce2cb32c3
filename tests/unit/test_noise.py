"""A cell gets the same noise on any number of ranks, and the noise is what it should be."""

import pytest
import torch

from clue_dist.model.noise import Noise


@pytest.mark.parametrize("share", [{"a": 16, "b": 8}, {"a": 16, "not its turn": 0, "b": 8}])
def test_noise_is_the_same_for_a_cell_on_any_number_of_ranks(share: dict[str, int]) -> None:
    whole = Noise(3, 11, share, 4)
    first = whole.draw_normal(5)
    kept = whole.apply_dropout(torch.ones(24, 10), 0.5)
    for world in (2, 4):
        for rank in range(world):
            part = Noise(3, 11, share, 4, rank, world)
            rows = torch.cat([torch.arange(0, 16)[rank::world], torch.arange(16, 24)[rank::world]])
            torch.testing.assert_close(part.draw_normal(5), first[rows])
            torch.testing.assert_close(
                part.apply_dropout(torch.ones(len(rows), 10), 0.5), kept[rows]
            )
    assert (Noise(3, 12, share, 4).draw_normal(5) != first).all()


@pytest.mark.parametrize("share", [{"a": 16, "b": 8}, {"a": 16, "not its turn": 0, "b": 8}])
def test_partners_of_mixing_share_stratum_and_lane_on_any_number_of_ranks(
    share: dict[str, int],
) -> None:
    partner, kept = Noise(3, 11, share, 4).draw_mixing()
    assert sorted(partner.tolist()) == list(range(24))  # everyone is somebody's partner
    assert ((partner < 16) == (torch.arange(24) < 16)).all()
    assert (partner % 4 == torch.arange(24) % 4).all()  # row r of a stratum lies in lane r mod 4
    assert (partner != torch.arange(24)).any()
    alone_in_lane, _ = Noise(3, 11, {"a": 4}, 4).draw_mixing()
    assert alone_in_lane.tolist() == [0, 1, 2, 3]
    assert ((kept >= 0) & (kept < 1)).all()
    for world in (2, 4):
        for rank in range(world):
            rows = torch.cat([torch.arange(0, 16)[rank::world], torch.arange(16, 24)[rank::world]])
            its_partner, its_kept = Noise(3, 11, share, 4, rank, world).draw_mixing()
            torch.testing.assert_close(rows[its_partner], partner[rows])
            torch.testing.assert_close(its_kept, kept[rows])


def test_dropout_keeps_its_rate_and_its_mean() -> None:
    x = Noise(0, 0, {"s": 4096}, 1).apply_dropout(torch.ones(4096, 30), 0.3)
    assert float((x == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(x.mean()) == pytest.approx(1.0, abs=0.02)
