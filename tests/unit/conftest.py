"""Fixtures of several modules."""

from __future__ import annotations

from pathlib import Path

import pytest

# Imports of fixtures are slow, and few tests use them.


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions of a few hundred cells have many tasks, too."""
    from tests.unit.prep_helpers import shrink_tasks

    shrink_tasks(monkeypatch)


@pytest.fixture
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """UMAP takes half a minute to compile, and a picture a tenth of a second to draw."""
    from clue_dist.inference.report import layouts, page

    monkeypatch.setattr(layouts, "compute_umap", lambda latent: latent[:, :2])
    monkeypatch.setattr(page, "render_png", lambda figure: b"\x89PNG")


@pytest.fixture
def logged_run(tmp_path: Path) -> Path:
    """The folder of a run that a report can be made of."""
    from tests.unit.report_helpers import write_logged_run

    return write_logged_run(tmp_path / "runs" / "demo")


@pytest.fixture
def embedding_file(tmp_path: Path) -> Path:
    """The embedding of two modalities."""
    from tests.unit.report_helpers import write_embedding

    return write_embedding(tmp_path / "o.h5mu")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The folder of a run that was stopped after 30 steps."""
    from tests.unit.run_helpers import write_stopped_run

    return write_stopped_run(tmp_path / "run")
