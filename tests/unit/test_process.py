"""The garbage collector waits while much is imported, and passes over it afterwards."""

from __future__ import annotations

import gc

from clue_dist.process import postpone_collections


def test_no_collection_runs_meanwhile_and_none_looks_at_what_was_made() -> None:
    frozen = gc.get_freeze_count()
    with postpone_collections():
        assert not gc.isenabled()
        made: list[list[int]] = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(made)


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with postpone_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
