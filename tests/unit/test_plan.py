"""The plan is pure, covers a stratum once per pass, and is the same for any number of ranks."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clue_dist.data.plan import CellPlan
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


def test_a_share_that_does_not_divide_shows_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"30 % 4 = 2"):
        CellPlan(0, {"s": 100}, {"s": 30}, 4, 2, 16)
    with pytest.raises(ConfigError, match=r"whole rounds[^§]*0.7 rounds"):
        CellPlan(0, {"s": 100}, {"s": 0}, 4, 2, 16, {"s": 0.7})


# Six patterns, three of which take turns in two shared rounds; "c" has two segments.
TURNS = CellPlan(
    5,
    {"a": 90, "b": 40, "c": 7, "c.2": 4, "d": 1, "e": 30},
    {"a": 16, "b": 4, "c": 0, "d": 0, "e": 0},
    4,
    2,
    4,
    {"c": 0.75, "b": 0.5, "d": 0.05, "e": 0.7},
)


def test_turns_are_as_frequent_as_shares_ask_and_evenly_spread() -> None:
    steps = 400
    for first in (0, 10**9 + 7, 2**32 - 200):
        composed = [TURNS.compose_batch(first + t) for t in range(steps)]
        assert {sum(composition.values()) for composition in composed} == {TURNS.batch_size}
        assert len({tuple(composition.values()) for composition in composed}) <= 5
        for stratum, share in TURNS.mean_shares.items():
            dealt = np.cumsum([composition[stratum] for composition in composed])
            apart = dealt - share * np.arange(1, steps + 1)
            assert np.ptp(apart) < 3 * TURNS.lanes


@pytest.mark.parametrize("first", [0, 3, 10**9 + 7, 2**32 - 20])
def test_strata_that_take_turns_are_dealt_as_composed_once_per_pass(first: int) -> None:
    steps = 120
    for stratum in TURNS.stratum_shares:
        names = [name for name in TURNS.segments if name.partition(".")[0] == stratum]
        shares = [TURNS.compose_batch(first + t)[stratum] for t in range(steps)]
        dealt = [[len(TURNS.select_cells(first + t, name)) for name in names] for t in range(steps)]
        assert [sum(counts) for counts in dealt] == shares
        for name in names:
            size, before = TURNS.segment_sizes[name], TURNS.count_dealt_cells(first, name)
            cells = TURNS.select_cells(first, name, steps)[-before % size :]
            passes = cells[: len(cells) // size * size].reshape(-1, size)
            assert (np.sort(passes) == np.arange(size)).all()


@given(st.sampled_from(list(TURNS.segment_sizes)), st.integers(0, 2**33), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_no_stretch_holds_more_turns_than_its_bound(segment: str, first: int, steps: int) -> None:
    before = TURNS.count_dealt_cells(first, segment)
    dealt = TURNS.count_dealt_cells(first + steps, segment) - before
    assert dealt <= TURNS.bound_dealt_cells(segment, steps)


@given(st.integers(1, 3000), st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_bijection(n: int, key: int) -> None:
    assert sorted(permute_positions(np.arange(n), n, key)) == list(range(n))


def test_permute_spreads_evenly() -> None:
    first = [int(permute_positions(np.array([0]), 7, derive_key("k", i))[0]) for i in range(7000)]
    assert np.bincount(first, minlength=7).min() > 850
