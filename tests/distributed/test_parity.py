"""Two ranks compute what one process computes, under every ZeRO stage.

They train on a mosaic of three modalities, all of which no cell has.
"""

from itertools import combinations
from pathlib import Path

import pytest

from tests.distributed.command import (
    alone,
    largest_difference,
    python,
    run,
    spawned,
    train_args,
    trained_weights,
)
from tests.stores import make_store

# 20 steps of 64 cells; 350 cells less 14 held out. A step scores all proteins, but not all genes.
STEPS_20 = ("train.epochs=3.81", "log.every=20", "model.decoder.features_per_step=20")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    cells, features = (
        {"rna+adt": 150, "rna+atac": 130, "adt": 70},
        {"rna": 60, "adt": 10, "atac": 90},
    )
    make_store(folder / "s.zarr", cells=cells, features=features)
    python(*train_args(folder, folder / "s.zarr", "one", *STEPS_20, "train.zero_stage=0"))
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one_process(folder: Path, stage: int) -> None:
    args = train_args(
        folder, folder / "s.zarr", f"zero{stage}", *STEPS_20, f"train.zero_stage={stage}"
    )
    run(*spawned(2, *args))
    one, two = trained_weights(folder / "one"), trained_weights(folder / f"zero{stage}")
    assert [p.name for p in (folder / f"zero{stage}" / "best").iterdir()] == ["step-00000020"]
    assert largest_difference(one, two) < 1e-5


def test_two_ranks_equal_one_process_where_gates_are_averaged_and_clipped(folder: Path) -> None:
    # Of rna and atac a step scores few features; rna has gates; of adt it scores all.
    settings = (
        "train.epochs=1.91",  # 10 steps
        "train.optimizer=rmsprop",
        "train.clip=0.05",
        "modalities.rna.likelihood=zinb",
        "model.decoder.features_per_step=12",
    )
    alone(*train_args(folder, folder / "s.zarr", "gates-one", *settings))
    one = trained_weights(folder / "gates-one")
    for stage in (0, 1):
        name, zero = f"gates-two-{stage}", f"train.zero_stage={stage}"
        run(*spawned(2, *train_args(folder, folder / "s.zarr", name, *settings, zero)))
        assert largest_difference(one, trained_weights(folder / name)) < 1e-5


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_two_ranks_nearly_equal_one_process_in_mixed_precision(folder: Path, stage: int) -> None:
    settings = (*STEPS_20, "train.precision=mixed", f"train.zero_stage={stage}")
    run(*spawned(2, *train_args(folder, folder / "s.zarr", f"mixed{stage}", *settings)))
    one, mixed = trained_weights(folder / "one"), trained_weights(folder / f"mixed{stage}")
    assert 1e-5 < largest_difference(one, mixed) < 0.01  # 20 steps moved weights by more


def test_the_weights_did_move(folder: Path) -> None:
    # Guards the test above: had nothing been trained, everything would be equal.
    alone(*train_args(folder, folder / "s.zarr", "short", "train.epochs=0.2"))
    assert (
        largest_difference(trained_weights(folder / "one"), trained_weights(folder / "short"))
        > 1e-3
    )


def test_accumulated_micro_batches_equal_on_two_ranks(folder: Path) -> None:
    settings = (*STEPS_20, "train.grad_accum=2", "data.batch_size=128")
    alone(*train_args(folder, folder / "s.zarr", "accum-one", *settings))
    one = trained_weights(folder / "accum-one")
    for stage in (1, 2):
        name, zero = f"accum-two-{stage}", f"train.zero_stage={stage}"
        run(*spawned(2, *train_args(folder, folder / "s.zarr", name, *settings, zero)))
        assert largest_difference(one, trained_weights(folder / name)) < 1e-5


def test_two_ranks_equal_one_process_where_rare_patterns_take_turns(tmp_path: Path) -> None:
    # 16 rounds of four cells; each pattern of one modality or two is owed less than half a one.
    names = ("rna", "adt", "atac")
    rare = [*names, *("+".join(pair) for pair in combinations(names, 2))]
    cells = {"+".join(names): 340} | dict.fromkeys(rare, 10)
    features = {"rna": 60, "adt": 10, "atac": 90}
    make_store(tmp_path / "s.zarr", cells=cells, features=features)
    settings = ("train.epochs=3.33", "log.every=20", "train.zero_stage=3", "data.paired_share=0.92")
    alone(*train_args(tmp_path, tmp_path / "s.zarr", "one", *settings))
    run(*spawned(2, *train_args(tmp_path, tmp_path / "s.zarr", "two", *settings)))
    assert (
        largest_difference(trained_weights(tmp_path / "one"), trained_weights(tmp_path / "two"))
        < 1e-5
    )
