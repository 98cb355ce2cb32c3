"""Two ranks against one process on real cells, where these are at hand.

There are three modalities, all of which no cell has.
"""

from pathlib import Path

import pytest

from tests.distributed.command import (
    ROOT,
    alone,
    largest_difference,
    launched,
    metrics,
    python,
    run,
    train_args,
    trained_weights,
)

MOSAIC = ROOT.parent / "shared" / "data" / "bmmc_3mod_mosaic.h5mu"


@pytest.mark.skipif(
    not MOSAIC.exists(), reason=f"needs {MOSAIC.name} beside the repository, in shared/data"
)
def test_three_modalities_on_two_ranks_equal_one_process(tmp_path: Path) -> None:
    store = tmp_path / "bmmc.zarr"
    python("-m", "data_prep", "convert", str(MOSAIC), "--out", str(store))
    # 20 steps of 64 of the 1,045 cells.
    settings = ("train.epochs=1.225", "log.every=20", "train.zero_stage=2")
    alone(*train_args(tmp_path, store, "one", *settings))
    run(*launched(2, *train_args(tmp_path, store, "two", *settings)))
    assert metrics(tmp_path / "one")[-1]["step"] == 20
    assert (
        largest_difference(trained_weights(tmp_path / "one"), trained_weights(tmp_path / "two"))
        < 1e-5
    )
    pairs = {k for k in metrics(tmp_path / "two", "validation")[-1] if k.startswith("foscttm")}
    assert pairs == {"foscttm/rna-adt", "foscttm/rna-atac"}
