"""A small sample of tests/benchmarks/faults.

Runs are killed at any time; hundreds of steps, saves and validations leave nothing in memory.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.faults import campaigns

SMALL = campaigns.Size(steps=400, kills=3, stops=0, damages=0, saves=0, features=0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("campaigns") / "whole"


def test_nothing_grows(shared: Path, tmp_path: Path) -> None:
    memory, leaks = campaigns.steady(tmp_path, SMALL, shared)["bars"]
    # The allocator has not come to rest so early; ten thousand steps must keep to 1.05.
    assert memory < 1.1
    # One for each save or validation would come to more; one may be open by chance.
    assert leaks < 5


def test_killed_at_any_time_it_ends_like_the_unbroken_run(shared: Path, tmp_path: Path) -> None:
    went_on, ended, *done_again, difference = campaigns.kills(tmp_path, SMALL, shared)["bars"]
    assert went_on == SMALL.kills
    assert ended <= 30
    assert done_again[0] <= 1
    assert done_again[1] <= 2
    assert difference == 0.0
