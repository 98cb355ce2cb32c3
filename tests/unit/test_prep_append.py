"""More cells for a store: nothing that was there changes, all cells are dealt, and a killed addition goes on."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clue_dist.config import Config
from clue_dist.data.loader import Loader
from clue_dist.data.plan import Plan
from clue_dist.errors import DataError, StoreError
from clue_dist.store.reader import Store
from clue_dist.store.writer import hash_file
from clue_dist.train.setup import prepare
from data_prep import svd
from data_prep.append import append
from data_prep.check import check
from data_prep.choices import parse_choices
from data_prep.convert import Options
from data_prep.inputs import Asked, parse_inputs
from data_prep.sources import FIELDS, Keys
from data_prep.tasks import Threads
from tests.unit.prep_helpers import anndata_of, build, codes_of, frame, held, write_h5ad, write_h5mu
from tests.unit.test_prep_resume import REPO

RNA, ADT = frame(300, 40), frame(300, 8, 1, "p", density=0.8)


def given(folder: Path, cells: slice, name: str, **obs: str) -> str:
    """RNA of some cells, and proteins of the later half of them."""
    rna, adt = RNA[cells], ADT[cells]
    half = len(rna) // 2
    tables = {"rna": anndata_of(rna, **obs), "adt": anndata_of(adt[half:], **obs)}
    return str(write_h5mu(folder / f"{name}.h5mu", **tables))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    build(tmp_path / "s.zarr", given(tmp_path, slice(0, 200), "first", batch="a", cell_type="x"), block_cells=4)
    return tmp_path / "s.zarr"


def add(store: Path, *inputs: str) -> Store:
    found = parse_inputs(list(inputs), Asked(Keys(dict(FIELDS))))
    choices = parse_choices([i.modality for i in found], {}, (), (), (), None)
    append(found, store, Options(choices=choices), Threads(2))
    return Store(store)


def files_of(store: Path) -> dict[str, object]:
    return {str(p.relative_to(store)): hash_file(p) for p in store.rglob("*") if p.is_file()}


def test_all_cells_are_there_and_nothing_else_has_changed(tmp_path: Path, store: Path) -> None:
    before, files = Store(store), files_of(store)
    after = add(store, given(tmp_path, slice(200, 300), "more", batch="b", cell_type="x"))
    assert {n: s.n_cells for n, s in after.manifest.strata.items()} == {
        "rna": 100,
        "rna+adt": 100,
        "rna.2": 50,
        "rna+adt.2": 50,
    }
    pd.testing.assert_frame_equal(held(after, "rna").loc[RNA.index], RNA, check_dtype=False)
    has = [c for i, c in enumerate(ADT.index) if 100 <= i < 200 or i >= 250]
    pd.testing.assert_frame_equal(held(after, "adt").loc[has], ADT.loc[has], check_dtype=False)
    assert codes_of(after, "batch") == {c: "a" if i < 200 else "b" for i, c in enumerate(RNA.index)}
    assert set(codes_of(after, "label").values()) == {"x"}
    assert after.fingerprint != before.fingerprint
    assert check(store) == []
    now = files_of(store)
    assert {name for name in files if now[name] != files[name]} == {"manifest.json"}
    assert not list(store.parent.glob("*.addition*"))


def test_a_third_addition_is_a_third_segment(tmp_path: Path, store: Path) -> None:
    add(store, given(tmp_path, slice(200, 240), "b"))
    after = add(store, given(tmp_path, slice(240, 300), "c"))
    assert [n for n in after.strata if n.startswith("rna+adt")] == ["rna+adt", "rna+adt.2", "rna+adt.3"]
    assert len(after.manifest.provenance["appended"]) == 2
    pd.testing.assert_frame_equal(held(after, "rna").loc[RNA.index], RNA, check_dtype=False)


def test_a_modality_alone_starts_a_stratum(tmp_path: Path, store: Path) -> None:
    after = add(store, f"adt={write_h5ad(tmp_path / 'p.h5ad', ADT[200:])}")
    assert after.strata["adt"].n_cells == 100


@pytest.mark.parametrize("world", [1, 2, 4])
def test_segments_take_turns_and_every_pass_deals_each_cell_once(tmp_path: Path, store: Path, world: int) -> None:
    after = add(store, given(tmp_path, slice(200, 300), "more"))
    sizes = {name: reader.n_cells for name, reader in after.strata.items()}
    plan = Plan(0, sizes, {"rna": 8, "rna+adt": 16}, 4, 2, 4)
    assert plan.segments == ["rna", "rna.2", "rna+adt", "rna+adt.2"]
    dealt: dict[str, list[int]] = {name: [] for name in sizes}
    loaders = [Loader(after, plan, rank=rank, world=world) for rank in range(world)]
    try:
        for step in range(60):
            batches = [next(loader) for loader in loaders]
            assert [b.n_cells for b in batches] == [24 // world] * world
            for name in sizes:
                dealt[name] += plan.cells(step, name).tolist()
            for rank, batch in enumerate(batches):  # proteins are dense: rows in the order of the batch
                want = [after.strata[s].rows("adt", plan.cells(step, s)[rank::world]) for s in ("rna+adt", "rna+adt.2")]
                np.testing.assert_array_equal(batch.modalities["adt"].counts.numpy(), np.concatenate(want))
    finally:
        for loader in loaders:
            loader.close()
    for name, n in sizes.items():
        whole = len(dealt[name]) // n * n
        assert whole > 0
        assert (np.bincount(dealt[name][:whole], minlength=n) == whole // n).all()
    assert abs(len(dealt["rna+adt.2"]) - 60 * 16 / 3) <= 4  # a third of the cells, a third of the turns


@pytest.mark.parametrize("sizes", [(1, 10**7), (10**7, 1), (3, 5, 7), (10**9, 10**8, 10**3)])
def test_turns_add_up_at_any_step(sizes: tuple[int, ...]) -> None:
    names = ["s", *(f"s.{i}" for i in range(2, len(sizes) + 1))]
    plan = Plan(0, dict(zip(names, sizes, strict=True)), {"s": 64}, 8, 2, 4)
    for step in (0, 1, 2, 10, 999, 10**6, 10**9, 10**12):
        counts = [plan.dealt(step + 1, name) - plan.dealt(step, name) for name in names]
        assert sum(counts) == 64
        assert all(n >= 0 and n % 8 == 0 for n in counts)
        for name, n in zip(names, sizes, strict=True):
            assert abs(plan.dealt(step, name) - step * 64 * n / sum(sizes)) <= 8 * len(sizes)


def test_training_treats_segments_as_one_stratum(tmp_path: Path, store: Path) -> None:
    add(store, given(tmp_path, slice(200, 300), "more"))
    data = {"batch_size": 32, "lanes": 4, "weights": {"rna": 1.0, "rna+adt": 3.0}}
    setup = prepare(Config(store=str(store), run=str(tmp_path / "run"), data=data), 1)
    assert setup.plan.share == {"rna": 8, "rna+adt": 24}
    assert all(setup.holdout[name] for name in ("rna+adt", "rna+adt.2"))
    assert "stratum rna+adt: " in setup.summary()
    assert "in 2 segments" in setup.summary()
    assert setup.held_out().n_cells == sum(setup.holdout.values())


def test_cells_that_are_there_already_are_refused(tmp_path: Path, store: Path) -> None:
    files = files_of(store)
    again = given(tmp_path, slice(190, 230), "again")
    with pytest.raises(DataError, match=r"10 cells are in the store already(.|\n)*c190"):
        add(store, again)
    assert files_of(store) == files
    after = add(store, f"lane2:{again}")
    assert after.manifest.n_cells == 240


def test_unknown_modalities_and_no_store_are_refused(tmp_path: Path, store: Path) -> None:
    with pytest.raises(DataError):
        add(store, f"atac={write_h5ad(tmp_path / 'p.h5ad', frame(9, 5, 2, 'peak', 'z'))}")
    with pytest.raises(StoreError, match="no store here"):
        add(tmp_path / "nowhere.zarr", given(tmp_path, slice(200, 210), "x"))


VICTIM = """
import importlib, os, signal, sys
from clue_dist.errors import run_main
from data_prep import __main__
place, n = sys.argv.pop(1), int(sys.argv.pop(1))
module, name = place.rsplit(".", 1)
module = importlib.import_module(module)
real, calls = getattr(module, name), [0]
def fatal(*args, **kwargs):
    calls[0] += 1
    if calls[0] == n:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(module, name, fatal)
run_main(__main__.main)
"""


@pytest.mark.parametrize(
    ("place", "n"),
    [
        ("data_prep.strata.settle", 1),  # in the conversion
        ("data_prep.append._move", 1),
        ("data_prep.append._move", 2),  # one stratum of two has its place
        ("data_prep.append.metadata", 2),
        ("os.fsync", 1),  # the manifest is written, but not in its place
    ],
)
def test_killed_and_typed_again(tmp_path: Path, store: Path, place: str, n: int) -> None:
    more = given(tmp_path, slice(200, 300), "more")
    shutil.copytree(store, tmp_path / "whole.zarr")
    want = add(tmp_path / "whole.zarr", more)
    before = Store(store).fingerprint
    command = [sys.executable, "-c", VICTIM, place, str(n), "append", more, "--to", str(store), "--workers", "1"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert Store(store).fingerprint == before
    again = add(store, more)
    assert again.fingerprint == want.fingerprint
    assert check(store) == []
    assert not list(tmp_path.glob("*.addition*"))
    pd.testing.assert_frame_equal(held(again, "rna").loc[RNA.index], RNA, check_dtype=False)


def test_killed_after_the_commit_and_typed_again(tmp_path: Path, store: Path) -> None:
    more = given(tmp_path, slice(200, 300), "more")
    want = add(store, more)
    left = tmp_path / "s.zarr.addition.partial"
    (left / "work").mkdir(parents=True)
    (left / "becomes").write_text(want.fingerprint)
    assert add(store, more).fingerprint == want.fingerprint
    assert not left.exists()


def test_an_svd_of_the_cells_before_is_removed(tmp_path: Path, store: Path) -> None:
    svd.compute(str(store), [], svd.Options(5, 2, 0), Threads(1))
    assert check(store) == []
    add(store, given(tmp_path, slice(200, 300), "more"))
    assert not (store / "svd").exists()
    assert check(store) == []
