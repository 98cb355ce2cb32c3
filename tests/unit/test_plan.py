"""The plan is pure, covers a stratum once per pass, and is the same for any number of ranks."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clue_dist.data.plan import CellPlan, share_rounds, weigh_strata
from clue_dist.errors import ConfigError
from clue_dist.store.shuffle import derive_key, permute_positions

plans = st.builds(
    lambda seed, n, lanes, per_lane, window, block: CellPlan(
        seed, {"s": n}, {"s": lanes * per_lane}, lanes, window, block
    ),
    st.integers(0, 2**31),
    st.integers(1, 700),
    st.sampled_from([1, 2, 4, 6]),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([1, 4, 16]),
)


def sequence(plan: CellPlan, first: int, steps: int) -> np.ndarray:
    return np.concatenate([plan.select_cells(t, "s") for t in range(first, first + steps)])


@pytest.mark.slow
@given(plans)
@settings(max_examples=60, deadline=None)
def test_every_pass_covers_every_cell_exactly_once(plan: CellPlan) -> None:
    n = plan.segment_sizes["s"]
    steps = -(-3 * n // plan.stratum_shares["s"])
    order = sequence(plan, 0, steps)
    for number in range(3):
        assert sorted(order[number * n : (number + 1) * n]) == list(range(n))


@given(plans, st.integers(10**9, 10**12))
@settings(max_examples=60, deadline=None)
def test_a_far_pass_covers_every_cell_once_and_needs_no_history(plan: CellPlan, far: int) -> None:
    n, share = plan.segment_sizes["s"], plan.stratum_shares["s"]
    permuted: list[int] = []

    def counting(i: np.ndarray, *args: Any) -> np.ndarray:
        permuted.append(np.size(i))
        return permute_positions(i, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clue_dist.data.plan.permute_positions", counting)
        order = plan.select_cells(far * n, "s", -(-n // share))  # here pass far * share begins
    assert sorted(order[:n]) == list(range(n))
    # For each cell its place in a window or lot and its block in the pass, but no cell before it.
    assert sum(permuted) <= 2 * len(order)


@given(plans, st.integers(0, 200), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_steps_planned_together_are_those_planned_one_by_one(
    plan: CellPlan, first: int, steps: int
) -> None:
    np.testing.assert_array_equal(
        plan.select_cells(first, "s", steps), sequence(plan, first, steps)
    )


def test_the_order_of_cells_is_that_of_earlier_versions() -> None:
    """A run that goes on under another version reads on where it was."""
    plan = CellPlan(3, {"rna+adt": 45, "rna+adt.2": 20}, {"rna+adt": 4}, 2, 3, 4)
    first = [31, 13, 30, 8, 25, 10, 29, 15, 27, 14, 26, 9, 24, 11, 2, 6, 44, 3]
    assert plan.select_cells(7, "rna+adt", 6).tolist() == first
    assert plan.select_cells(7, "rna+adt.2", 6).tolist() == [1, 16, 2, 18, 3, 17]
    plan = CellPlan(3, {"rna": 203}, {"rna": 8}, 2, 10, 4)
    runs = [50, 177, 41, 71, 165, 179, 43, 65, 42, 180, 52, 68, 27, 173, 162, 56]
    rest = [92, 1, 3, 95, 93, 2, 193, 5, 202, 88, 11, 62, 181, 63, 177, 49]
    assert plan.select_cells(6, "rna", 2).tolist() == runs
    assert plan.select_cells(24, "rna", 2).tolist() == rest


def test_passes_and_seeds_differ() -> None:
    plan = CellPlan(0, {"s": 512}, {"s": 64}, 4, 2, 16)
    first, second = sequence(plan, 0, 8), sequence(plan, 8, 8)
    assert (first != second).mean() > 0.9
    assert (sequence(CellPlan(1, {"s": 512}, {"s": 64}, 4, 2, 16), 0, 8) != first).mean() > 0.9


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_decode_separate_blocks_in_full_spans(world: int) -> None:
    plan = CellPlan(0, {"s": 4096}, {"s": 64}, 4, 4, 16)  # a span has 4 x 4 x 16 = 256 cells
    blocks = [
        set((sequence(plan, 0, 4).reshape(-1, 64)[:, r::world] // 16).ravel()) for r in range(world)
    ]
    assert sum(len(b) for b in blocks) == len(set.union(*blocks)) == 16


def test_a_batch_is_as_mixed_as_independent_draws() -> None:
    # Half of the cells are one "plate". Its share of a batch must vary as in draws without
    # replacement, not more.
    n, size = 64 * 512, 256
    plan = CellPlan(3, {"s": n}, {"s": size}, 8, 16, 64)
    rng = np.random.default_rng(0)
    plate = rng.permutation(n) < n // 2  # spread over the blocks, as the store is shuffled
    means = np.array([plate[plan.select_cells(t, "s")].mean() for t in range(n // size)])
    expected = (0.25 / size) ** 0.5
    assert 0.7 * expected < means.std() < 1.3 * expected
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.25


def test_shares_divide_into_lanes_and_leave_no_stratum_out() -> None:
    cells = share_rounds(512, 8, {"a": 5, "b": 1, "c": 0.001})
    assert sum(cells.values()) == 512
    assert all(n % 8 == 0 and n >= 8 for n in cells.values())
    assert cells["a"] > 4 * cells["b"]


def test_too_small_a_batch_shows_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"16 cells / 8 lanes = 2 rounds for 3 strata"):
        share_rounds(16, 8, {"a": 1, "b": 1, "c": 1})
    with pytest.raises(ConfigError, match=r"30 % 4 = 2"):
        CellPlan(0, {"s": 100}, {"s": 30}, 4, 2, 16)


def test_weights_give_paired_cells_their_share() -> None:
    weights = weigh_strata(
        {"p": 100, "q": 300, "u": 600}, {"p": True, "q": True, "u": False}, 0.5, 64
    )
    assert weights["p"] + weights["q"] == pytest.approx(0.5)
    assert weights["q"] == pytest.approx(3 * weights["p"])
    assert weigh_strata({"u": 10, "v": 30}, {"u": False, "v": False}, "auto", 64) == {
        "u": 10.0,
        "v": 30.0,
    }


@pytest.mark.parametrize(
    ("pairs", "single", "share"),
    [
        (4000, 4000, 0.8),
        (3000, 7000, 0.6),
        (1000, 9000, 0.5),
        (200, 9800, 100 / 512),
        (20, 9980, 10 / 512),
    ],
)
def test_auto_favours_pairs_but_takes_half_of_them_at_most(
    pairs: int, single: int, share: float
) -> None:
    weights = weigh_strata({"p": pairs, "u": single}, {"p": True, "u": False}, "auto", 512)
    assert weights == pytest.approx({"p": share, "u": 1 - share})


@given(st.integers(1, 3000), st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_bijection(n: int, key: int) -> None:
    assert sorted(permute_positions(np.arange(n), n, key)) == list(range(n))


def test_permute_spreads_evenly() -> None:
    first = [int(permute_positions(np.array([0]), 7, derive_key("k", i))[0]) for i in range(7000)]
    assert np.bincount(first, minlength=7).min() > 850
