"""clue_dist.fit over ranks: one call converts on rank 0 and trains on all, again and again."""

from pathlib import Path

import pytest

from tests.processes import run_ranks
from tests.unit.fit_helpers import SMALL, make_mudata

pytestmark = pytest.mark.slow


def test_ranks_train_twice_and_embed_together(tmp_path: Path) -> None:
    make_mudata(200).write(tmp_path / "cells.h5mu")
    code = """
        import mudata as md
        import numpy as np
        import clue_dist as clue
        mdata = md.read_h5mu(f"{folder}/cells.h5mu")
        clue.fit(mdata, f"{folder}/first", settings=settings)
        run = clue.fit(f"{folder}/first.zarr", f"{folder}/second", settings=settings)
        joint = run.embed(mdata)
        found = md.read_h5mu(run.embed(f"{folder}/first.zarr", out=f"{folder}/z.h5mu"))
        order = mdata.obs_names.get_indexer(found.obs_names)
        np.testing.assert_allclose(joint[order], found.obsm["X_clue"], atol=1e-6)
        print("trained", run.trained_model.name)
    """
    given = f"folder, settings = {str(tmp_path)!r}, {SMALL!r}"
    outputs = run_ranks(2, given, code, timeout_s=300)
    names = [output.split("trained ")[-1].strip() for output in outputs]
    assert names[0] == names[1]
    assert names[0].startswith("step-")
