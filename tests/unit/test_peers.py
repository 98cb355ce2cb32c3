"""What the ranks read at the store, and what state that brings them to; without processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from clue_dist.errors import LOST, StoreError
from clue_dist.ranks import Ranks
from clue_dist.resilience import bulletin
from clue_dist.resilience.bulletin import LATE_AFTER, Bulletin, Failure, Signs
from clue_dist.resilience.peers import LEAVING_LIMIT, LOSS_LIMIT, SILENCE_LIMIT, Peers, PeerState

WORLD = 3


@pytest.fixture
def bulletins() -> list[Bulletin]:
    """One for each rank, at one store."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    return [Bulletin(Ranks(rank, WORLD), store) for rank in range(WORLD)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the bulletins take for the time."""
    now = [0.0]
    monkeypatch.setattr(bulletin, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_rank_whose_sign_does_not_change_is_late_to_all(
    bulletins: list[Bulletin], clock: list[float]
) -> None:
    first, second, third = bulletins
    for _ in range(4):
        assert first.exchange_signs() == Signs(True, None)
        assert second.exchange_signs() == Signs(True, None)
        third.exchange_signs()
        clock[0] += LATE_AFTER / 2
    for _ in range(4):  # the third is silent
        first.exchange_signs()
        signs = second.exchange_signs()
        clock[0] += LATE_AFTER / 2
    assert signs == Signs(False, "rank 2")
    third.exchange_signs()
    assert first.exchange_signs() == Signs(True, None)
    assert second.exchange_signs() == Signs(True, None)


def test_of_two_failures_the_first_counts(bulletins: list[Bulletin]) -> None:
    first, second, third = bulletins
    failure = Failure(2, 2, "a chunk is damaged\n  where: rna/3")
    assert first.read_failure() is None
    assert third.announce_failure(failure) == failure
    assert second.announce_failure(Failure(1, 1, "loss is NaN")) == failure
    assert not first.have_all_heard()
    assert first.read_failure() == failure
    assert first.have_all_heard()


def test_of_two_losses_the_first_counts(bulletins: list[Bulletin]) -> None:
    first, second, third = bulletins
    assert first.read_loss() is None
    second.announce_loss("rank 2 has ended")
    third.announce_loss("rank 0 has ended")
    assert first.read_loss() == "rank 2 has ended"


def test_a_state_is_never_left_for_an_earlier_one() -> None:
    peers = Peers(Ranks(0, WORLD))
    for state in (PeerState.TOLD, PeerState.LOST, PeerState.LEAVING, PeerState.TOLD):
        peers._enter(state)
    assert peers._state is PeerState.LEAVING


@pytest.mark.parametrize(
    ("state", "is_announced", "spent", "silent", "ends"),
    [
        (PeerState.ALIVE, False, 1e6, SILENCE_LIMIT - 1, False),
        (PeerState.ALIVE, False, 1e6, SILENCE_LIMIT + 1, True),
        (PeerState.LOST, False, LOSS_LIMIT - 1, 0, False),
        (PeerState.LOST, False, LOSS_LIMIT + 1, 0, True),
        (PeerState.TOLD, True, SILENCE_LIMIT + 1, 0, False),  # it hears of the others yet
        (PeerState.TOLD, True, SILENCE_LIMIT + 1, SILENCE_LIMIT + 1, True),
        (PeerState.LEAVING, False, LOSS_LIMIT + 1, 0, False),
        (PeerState.LEAVING, False, LOSS_LIMIT + 1, SILENCE_LIMIT + 1, True),
        (PeerState.LEAVING, True, LEAVING_LIMIT - 1, SILENCE_LIMIT + 1, False),
        (PeerState.LEAVING, True, LEAVING_LIMIT + 1, 0, True),
    ],
)
def test_how_long_a_process_may_take(
    state: PeerState, is_announced: bool, spent: float, silent: float, ends: bool
) -> None:
    peers = Peers(Ranks(0, WORLD))
    if is_announced:
        peers._enter(PeerState.TOLD, StoreError("a chunk is damaged"))
    peers._enter(state)
    assert peers._must_end(state, spent, silent) is ends


class ProcessEnd(Exception):
    """In place of the end of this process."""


@pytest.mark.parametrize(
    ("states", "exit_code", "message"),
    [
        ([], LOST, "another rank is lost: nothing heard of rank 0 for"),
        ([PeerState.LOST], 2, "error: LOST"),
        ([PeerState.TOLD, PeerState.LOST], 2, "error: TOLD"),
        ([PeerState.LOST, PeerState.TOLD, PeerState.LEAVING], 2, "error: LEAVING"),
    ],
)
def test_a_process_ends_with_its_own_error_before_that_of_another_rank_before_a_loss(
    states: list[PeerState],
    exit_code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end(code: int) -> None:
        raise ProcessEnd(code)

    peers = Peers(Ranks(1, WORLD))
    for state in states:
        peers._enter(state, StoreError(state.name))
    monkeypatch.setattr("os._exit", end)
    with pytest.raises(ProcessEnd, match=f"^{exit_code}$"):
        peers._end_process()
    assert message in capsys.readouterr().err
