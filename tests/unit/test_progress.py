"""Progress of long work: who is shown it, when, and that every cell is counted once."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from clue_dist import progress
from clue_dist.inference.cells import CellSlice
from clue_dist.inference.stream import read_slices_ahead
from clue_dist.metrics.integration import measure_mixing
from clue_dist.metrics.matching import compute_foscttm, score_directions
from clue_dist.neighbours.label_transfer import fit_label_transfer
from clue_dist.neighbours.nearest import find_neighbours
from clue_dist.neighbours.pair_confidence import PairConfidence
from clue_dist.neighbours.partner_settings import PartnerSettings
from clue_dist.neighbours.partners import find_partners
from clue_dist.progress import Progress
from clue_dist.ranks import Ranks


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks on, whatever the tests run in."""
    monkeypatch.setattr(progress, "has_spectator", lambda: False)


@pytest.fixture
def clock(log: None, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock of the lines that stands still until a test moves it."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


@pytest.fixture
def impatient(log: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress of the shortest work is shown, too."""
    monkeypatch.setattr(progress, "PATIENCE", 0.0)


def work(clock: SimpleNamespace, seconds: list[float], **options: float | bool) -> None:
    with Progress("embedding", 4_000, **options) as shown:
        for each in seconds:
            clock.seconds += each
            shown.mark_done(1_000)


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(clock, capsys) -> None:
    work(clock, [9, 2, 2, 9])
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["embedding: 2,000 of 4,000", "embedding: 4,000 of 4,000, 22.0 s"]


def test_short_work_says_nothing(clock, capsys) -> None:
    work(clock, [1, 1, 1, 1], patience=5)
    assert capsys.readouterr().err == ""
    work(clock, [1, 1, 1, 3], patience=5)
    assert capsys.readouterr().err == "embedding: 4,000 of 4,000, 6.0 s\n"


def test_what_broke_off_claims_no_end(clock, capsys) -> None:
    work(clock, [9, 9])
    assert capsys.readouterr().err == "embedding: 2,000 of 4,000\n"


def test_one_rank_speaks_for_all(clock, capsys) -> None:
    work(clock, [20, 20, 20, 20], is_shown=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_notebook", [False, True])
def test_a_person_sees_a_bar(is_notebook, monkeypatch) -> None:
    screen = io.StringIO() if is_notebook else Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    if is_notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    with Progress("embedding", 4, unit="cell") as shown:
        shown.mark_done(4)
    assert "embedding: 100%" in screen.getvalue()
    assert "4/4" in screen.getvalue()


def test_every_cell_that_is_read_is_counted(impatient, capsys) -> None:
    slices = [CellSlice(("rna",), np.arange(start, start + 5)) for start in (0, 5, 10)]
    cells = SimpleNamespace(read_slice=lambda cell_slice: cell_slice.rows)
    found = list(read_slices_ahead(cells, slices, "embedding", Ranks()))
    assert [len(rows) for _, rows in found] == [5, 5, 5]
    assert capsys.readouterr().err.startswith("embedding: 15 of 15, ")


@pytest.mark.parametrize("is_approximate", [False, True])
def test_searches_of_partners_are_shown(is_approximate, impatient, capsys) -> None:
    if is_approximate:
        pytest.importorskip("faiss")
    first, second = np.random.default_rng(0).normal(size=(2, 70, 8))
    settings = PartnerSettings("nearest", approximate=is_approximate)
    found = find_partners(first, second, settings).tocoo()
    assert capsys.readouterr().err.startswith("searching neighbours: 70 of 70, ")
    PairConfidence().compute_confidence(first, second, found.row, found.col)
    assert capsys.readouterr().err.count("comparing partners: ") == 2  # in both directions


def test_searches_of_scores_are_shown(impatient, capsys) -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 70, 8))
    score_directions(first, second, np.zeros(70))
    assert capsys.readouterr().err.startswith("ranking partners: 70 of 70, ")
    measure_mixing(first, second)
    assert capsys.readouterr().err.startswith("searching neighbours: 140 of 140, ")


def test_one_rank_shows_its_slice_of_a_search(impatient, capsys, monkeypatch) -> None:
    points = np.random.default_rng(0).normal(size=(70, 8))
    monkeypatch.setattr(Ranks, "gather_values", lambda ranks, value: [value])
    find_neighbours(points, 5, ranks=Ranks(0, 2))
    assert capsys.readouterr().err.startswith("searching neighbours: 35 of 35, ")
    find_neighbours(points, 5, ranks=Ranks(1, 2))
    compute_foscttm(points, points, Ranks(1, 2))
    assert capsys.readouterr().err == ""


def test_labelling_is_shown(impatient, capsys) -> None:
    points = np.random.default_rng(0).normal(size=(60, 3))
    fitted = fit_label_transfer(points, np.repeat(["a", "b"], 30))
    assert "calibrating confidence: 60 of 60, " in capsys.readouterr().err
    fitted.assign_labels(points[:40])
    assert "labelling: 40 of 40, " in capsys.readouterr().err
