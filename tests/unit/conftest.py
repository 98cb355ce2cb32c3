"""Fixtures of several modules."""

from __future__ import annotations

import pytest


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions of a few hundred cells have many tasks, too."""
    from tests.unit.prep_helpers import shrink_tasks  # its imports are slow, and few tests use it

    shrink_tasks(monkeypatch)
