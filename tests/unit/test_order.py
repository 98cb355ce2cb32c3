"""For any plan, the ranks serve the cells that the plan says, after a resume too."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clue_dist.data.batch import Batch
from clue_dist.data.loader import Loader
from clue_dist.data.plan import CellPlan
from clue_dist.store.reader import Store
from tests.stores import make_store

BLOCK = 4
CELLS = {"rna+place": 61, "place": 37}
# Lanes -> numbers of ranks that divide them.
WORLDS = {1: (1,), 2: (1, 2), 3: (1, 3), 4: (1, 2, 4), 6: (2, 3, 6)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Make a store whose cells can be told apart by a modality of real numbers."""
    path = tmp_path_factory.mktemp("order") / "s.zarr"
    return make_store(path, cells=CELLS, features={"rna": 9, "place": 1}, block_cells=BLOCK)


@st.composite
def plans(draw: st.DrawFn) -> tuple[CellPlan, int]:
    """Draw a plan over some or all cells of each stratum, and a number of ranks."""
    lanes = draw(st.sampled_from(sorted(WORLDS)))
    sizes = {s: draw(st.integers(1, n)) for s, n in CELLS.items()}
    share = {s: lanes * draw(st.integers(1, 4)) for s in CELLS}
    plan = CellPlan(
        draw(st.integers(0, 2**63)), sizes, share, lanes, draw(st.integers(1, 4)), BLOCK
    )
    return plan, draw(st.sampled_from(WORLDS[lanes]))


def places(store: Store, batch: Batch, rank_share: dict[str, int]) -> dict[str, np.ndarray]:
    """Find the position of each cell of a batch, by stratum."""
    served, out, first = batch.modalities["place"].counts, {}, 0
    assert isinstance(served, torch.Tensor)
    for stratum, n in rank_share.items():
        known = store.segments[stratum].read_rows("place", np.arange(CELLS[stratum]))
        assert isinstance(known, np.ndarray)
        known, values = known[:, 0], served[first : first + n, 0].numpy()
        order = np.argsort(known)
        out[stratum] = order[np.searchsorted(known[order], values).clip(max=len(known) - 1)]
        np.testing.assert_array_equal(known[out[stratum]], values)
        first += n
    return out


def served(
    store: Store, plan: CellPlan, first: int, steps: int, rank: int, world: int
) -> Iterator[dict[str, np.ndarray]]:
    with Loader(store, plan, rank=rank, world=world, first=first, prefetch=1) as loader:
        for batch in islice(loader, steps):
            yield places(store, batch, {s: n // world for s, n in plan.stratum_shares.items()})


def global_batches(
    store: Store, plan: CellPlan, first: int, steps: int, world: int
) -> dict[str, np.ndarray]:
    """Put the cells of all ranks together: (steps, N_s) by stratum, from batch `first` on."""
    out = {s: np.full((steps, n), -1) for s, n in plan.stratum_shares.items()}
    for rank in range(world):
        for t, cells in enumerate(served(store, plan, first, steps, rank, world)):
            for stratum, positions in cells.items():
                out[stratum][t, rank::world] = positions
    return out


def equal(found: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert found.keys() == want.keys()
    for stratum, cells in found.items():
        np.testing.assert_array_equal(cells, want[stratum])


@given(plans(), st.integers(0, 10**9), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_ranks_together_serve_the_plans_batches_from_any_step(
    store: Store, chosen: tuple[CellPlan, int], first: int, steps: int
) -> None:
    plan, world = chosen
    want = {
        s: np.stack([plan.select_cells(t, s) for t in range(first, first + steps)])
        for s in plan.stratum_shares
    }
    equal(global_batches(store, plan, first, steps, world), want)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_serve_the_same_composition_where_strata_take_turns(store: Store, world: int) -> None:
    turns = {"rna+place": 0.375, "place": 0.625}
    plan = CellPlan(3, CELLS, {"rna+place": 4, "place": 0}, 4, 2, BLOCK, turns)
    first, steps = 10**6 + 1, 8  # resumed far from the start
    compositions = [plan.compose_batch(first + step) for step in range(steps)]
    assert {composition["place"] for composition in compositions} == {0, 4}
    for rank in range(world):
        with Loader(store, plan, rank=rank, world=world, first=first, prefetch=1) as loader:
            for step, composition in enumerate(compositions):
                shares = {stratum: n // world for stratum, n in composition.items()}
                served_cells = places(store, next(loader), shares)
                for stratum, cells in served_cells.items():
                    want = plan.select_cells(first + step, stratum)[rank::world]
                    np.testing.assert_array_equal(cells, want)


@given(plans(), st.data())
@settings(max_examples=40, deadline=None)
def test_a_run_resumed_on_other_ranks_serves_what_one_run_through_does(
    store: Store, chosen: tuple[CellPlan, int], data: st.DataObject
) -> None:
    """The run through also serves every cell once in each pass of its stratum."""
    plan, world = chosen
    steps = max(-(-2 * plan.segment_sizes[s] // n) for s, n in plan.stratum_shares.items())
    resume_step = data.draw(st.integers(0, steps - 1), "resumed at")
    through = global_batches(store, plan, 0, steps, 1)
    resumed = global_batches(store, plan, resume_step, min(steps - resume_step, 6), world)
    equal(resumed, {s: cells[resume_step : resume_step + 6] for s, cells in through.items()})
    for stratum, cells in through.items():
        n = plan.segment_sizes[stratum]
        for one in cells.reshape(-1)[: cells.size // n * n].reshape(-1, n):
            assert sorted(one.tolist()) == list(range(n))
