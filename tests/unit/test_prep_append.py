"""More cells for a store: nothing that was there changes, all cells are dealt, and a killed addition goes on."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from clue_dist.config import Config
from clue_dist.data.loader import Loader
from clue_dist.data.plan import CellPlan
from clue_dist.errors import DataError, StoreError
from clue_dist.store.manifest import Manifest
from clue_dist.store.reader import Store
from clue_dist.store.writer import hash_file
from clue_dist.train.setup import prepare_setup
from data_prep import append as additions
from data_prep import svd
from data_prep.append import append_cells, format_addition
from data_prep.check import check_store
from data_prep.cli.commands import _build_parser, main
from data_prep.cli.feature_choices import parse_choices
from data_prep.cli.inputs import parse_inputs
from data_prep.convert import ConversionOptions
from data_prep.jobs.workers import ThreadPool
from data_prep.options import FIELDS, FeatureChoice, ObsColumns, ReadingOptions
from tests.unit.prep_helpers import (
    convert_files,
    make_anndata,
    make_counts,
    read_counts,
    read_field,
    write_h5ad,
    write_h5mu,
)
from tests.unit.test_prep_resume import REPO

RNA, ADT = make_counts(300, 40), make_counts(300, 8, 1, "p", density=0.8)


def given(folder: Path, cells: slice, name: str, **obs: str) -> str:
    """RNA of some cells, and proteins of the later half of them."""
    rna, adt = RNA[cells], ADT[cells]
    half = len(rna) // 2
    tables = {"rna": make_anndata(rna, **obs), "adt": make_anndata(adt[half:], **obs)}
    return str(write_h5mu(folder / f"{name}.h5mu", **tables))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    convert_files(
        tmp_path / "s.zarr",
        given(tmp_path, slice(0, 200), "first", batch="a", cell_type="x"),
        block_cells=4,
    )
    return tmp_path / "s.zarr"


def add(store: Path, *inputs: str) -> Store:
    found = parse_inputs(list(inputs), ReadingOptions(ObsColumns(dict(FIELDS))))
    choices = parse_choices([i.modality for i in found], {}, (), (), (), None)
    append_cells(found, store, ConversionOptions(feature_choices=choices), ThreadPool(2))
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
    pd.testing.assert_frame_equal(read_counts(after, "rna").loc[RNA.index], RNA, check_dtype=False)
    has = [c for i, c in enumerate(ADT.index) if 100 <= i < 200 or i >= 250]
    pd.testing.assert_frame_equal(
        read_counts(after, "adt").loc[has], ADT.loc[has], check_dtype=False
    )
    assert read_field(after, "batch") == {
        c: "a" if i < 200 else "b" for i, c in enumerate(RNA.index)
    }
    assert set(read_field(after, "label").values()) == {"x"}
    assert after.fingerprint != before.fingerprint
    assert check_store(store) == []
    now = files_of(store)
    assert {name for name in files if now[name] != files[name]} == {"manifest.json"}
    assert not list(store.parent.glob("*.addition*"))


def test_a_third_addition_is_a_third_segment(tmp_path: Path, store: Path) -> None:
    add(store, given(tmp_path, slice(200, 240), "b"))
    after = add(store, given(tmp_path, slice(240, 300), "c"))
    assert [n for n in after.segments if n.startswith("rna+adt")] == [
        "rna+adt",
        "rna+adt.2",
        "rna+adt.3",
    ]
    assert len(after.manifest.provenance["appended"]) == 2
    pd.testing.assert_frame_equal(read_counts(after, "rna").loc[RNA.index], RNA, check_dtype=False)


def test_a_modality_alone_starts_a_stratum(tmp_path: Path, store: Path) -> None:
    after = add(store, f"adt={write_h5ad(tmp_path / 'p.h5ad', ADT[200:])}")
    assert after.segments["adt"].n_cells == 100


@pytest.mark.parametrize("world", [1, 2, 4])
def test_segments_take_turns_and_every_pass_deals_each_cell_once(
    tmp_path: Path, store: Path, world: int
) -> None:
    after = add(store, given(tmp_path, slice(200, 300), "more"))
    sizes = {name: reader.n_cells for name, reader in after.segments.items()}
    plan = CellPlan(0, sizes, {"rna": 8, "rna+adt": 16}, 4, 2, 4)
    assert plan.segments == ["rna", "rna.2", "rna+adt", "rna+adt.2"]
    dealt: dict[str, list[int]] = {name: [] for name in sizes}
    loaders = [Loader(after, plan, rank=rank, world=world) for rank in range(world)]
    try:
        for step in range(60):
            batches = [next(loader) for loader in loaders]
            assert [b.n_cells for b in batches] == [24 // world] * world
            for name in sizes:
                dealt[name] += plan.select_cells(step, name).tolist()
            for rank, batch in enumerate(
                batches
            ):  # proteins are dense: rows in the order of the batch
                want = [
                    after.segments[s].read_rows("adt", plan.select_cells(step, s)[rank::world])
                    for s in ("rna+adt", "rna+adt.2")
                ]
                np.testing.assert_array_equal(
                    batch.modalities["adt"].counts.numpy(), np.concatenate(want)
                )
    finally:
        for loader in loaders:
            loader.close()
    for name, n in sizes.items():
        whole = len(dealt[name]) // n * n
        assert whole > 0
        assert (np.bincount(dealt[name][:whole], minlength=n) == whole // n).all()
    assert (
        abs(len(dealt["rna+adt.2"]) - 60 * 16 / 3) <= 4
    )  # a third of the cells, a third of the turns


@pytest.mark.parametrize("sizes", [(1, 10**7), (10**7, 1), (3, 5, 7), (10**9, 10**8, 10**3)])
def test_turns_add_up_at_any_step(sizes: tuple[int, ...]) -> None:
    names = ["s", *(f"s.{i}" for i in range(2, len(sizes) + 1))]
    plan = CellPlan(0, dict(zip(names, sizes, strict=True)), {"s": 64}, 8, 2, 4)
    for step in (0, 1, 2, 10, 999, 10**6, 10**9, 10**12):
        counts = [
            plan.count_dealt_cells(step + 1, name) - plan.count_dealt_cells(step, name)
            for name in names
        ]
        assert sum(counts) == 64
        assert all(n >= 0 and n % 8 == 0 for n in counts)
        for name, n in zip(names, sizes, strict=True):
            assert abs(plan.count_dealt_cells(step, name) - step * 64 * n / sum(sizes)) <= 8 * len(
                sizes
            )


def test_training_treats_segments_as_one_stratum(tmp_path: Path, store: Path) -> None:
    add(store, given(tmp_path, slice(200, 300), "more"))
    data = {"batch_size": 32, "lanes": 4, "weights": {"rna": 1.0, "rna+adt": 3.0}}
    setup = prepare_setup(Config(store=str(store), run=str(tmp_path / "run"), data=data), 1)
    assert setup.plan.stratum_shares == {"rna": 8, "rna+adt": 24}
    assert all(setup.held_out_cells[name] for name in ("rna+adt", "rna+adt.2"))
    assert "stratum rna+adt: " in setup.format_summary()
    assert "in 2 segments" in setup.format_summary()
    assert setup.load_held_out_batch().n_cells == sum(setup.held_out_cells.values())


def test_cells_that_are_there_already_are_refused(tmp_path: Path, store: Path) -> None:
    files = files_of(store)
    again = given(tmp_path, slice(190, 230), "again")
    with pytest.raises(DataError, match=r"10 cells are in the store already(.|\n)*c190"):
        add(store, again)
    assert files_of(store) == files
    after = add(store, f"lane2:{again}")
    assert after.manifest.n_cells == 240


def test_unknown_modalities_and_no_store_are_refused(tmp_path: Path, store: Path) -> None:
    with pytest.raises(DataError, match=r"modalities that the store(.|\n)*got: atac"):
        add(store, f"atac={write_h5ad(tmp_path / 'p.h5ad', make_counts(9, 5, 2, 'peak', 'z'))}")
    with pytest.raises(StoreError, match="added to a folder"):
        append_cells([], "s3://bucket/s.zarr", ConversionOptions(), ThreadPool(1))
    with pytest.raises(StoreError, match="no store here"):
        add(tmp_path / "nowhere.zarr", given(tmp_path, slice(200, 210), "x"))


VICTIM = """
import importlib, os, signal, sys
from clue_dist.process import run_main
from data_prep.cli import commands
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
run_main(commands.main)
"""


@pytest.mark.parametrize(
    ("place", "n"),
    [
        ("data_prep.convert.settle_strata", 1),  # in the conversion
        ("data_prep.append._move_stratum", 1),
        ("data_prep.append._move_stratum", 2),  # one stratum of two has its place
        ("data_prep.append.hash_metadata", 2),
        ("os.fsync", 1),  # the manifest is written, but not in its place
    ],
)
def test_killed_and_typed_again(tmp_path: Path, store: Path, place: str, n: int) -> None:
    more = given(tmp_path, slice(200, 300), "more")
    shutil.copytree(store, tmp_path / "whole.zarr")
    want = add(tmp_path / "whole.zarr", more)
    before = Store(store).fingerprint
    killed(store, more, place, n)
    assert Store(store).fingerprint == before
    again = add(store, more)
    assert again.fingerprint == want.fingerprint
    assert check_store(store) == []
    assert not list(tmp_path.glob("*.addition*"))
    pd.testing.assert_frame_equal(read_counts(again, "rna").loc[RNA.index], RNA, check_dtype=False)


def killed(store: Path, more: str, place: str, n: int) -> None:
    command = [
        sys.executable,
        "-c",
        VICTIM,
        place,
        str(n),
        "append",
        more,
        "--to",
        str(store),
        "--workers",
        "1",
    ]
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(
    "place", ["data_prep.append._remove_outdated_svd", "data_prep.jobs.job_folder.discard_job"]
)
def test_killed_after_the_commit(tmp_path: Path, store: Path, place: str) -> None:
    """The same command adds nothing twice, another one is not taken for it."""
    svd.compute_svd(str(store), [], svd.SvdOptions(5, 2, 0), ThreadPool(1))
    one, two = given(tmp_path, slice(200, 260), "one"), given(tmp_path, slice(260, 300), "two")
    killed(store, one, place, 2 if place.endswith("svd") else 1)
    assert Store(store).manifest.n_cells == 260
    assert list(tmp_path.glob("*.addition.partial"))
    shutil.copytree(tmp_path, tmp_path.with_name("again"))
    assert add(store, one).manifest.n_cells == 260
    again = tmp_path.with_name("again") / "s.zarr"
    assert add(again, two).manifest.n_cells == 300
    for path in (store, again):
        assert check_store(path) == []
        assert not (path / "svd").exists()
        assert not list(path.parent.glob("*.addition*"))
    shutil.rmtree(again.parent)


def test_cells_that_another_addition_commits_meanwhile_stay(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = given(tmp_path, slice(200, 260), "one"), given(tmp_path, slice(260, 300), "two")
    real = additions.claim_job

    def late(*args: Any) -> Any:
        monkeypatch.setattr(additions, "claim_job", real)
        add(store, one)
        return real(*args)

    monkeypatch.setattr(additions, "claim_job", late)
    with pytest.raises(
        DataError, match=r"other cells were added meanwhile(.|\n)*run the same command again"
    ):
        add(store, two)
    assert Store(store).manifest.n_cells == 260
    assert add(store, two).manifest.n_cells == 300
    assert check_store(store) == []


def test_an_svd_of_the_cells_before_is_removed_once_there_are_others(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    svd.compute_svd(str(store), [], svd.SvdOptions(5, 2, 0), ThreadPool(1))
    more = given(tmp_path, slice(200, 300), "more")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Manifest, "write", full)
        with pytest.raises(StoreError, match="the disk is full"):
            add(store, more)
    assert (store / "svd").exists()
    problems = check_store(store)
    assert [p.split(":")[0] for p in problems] == ["strata/rna+adt.2", "strata/rna.2"]
    assert all("of an addition that was broken off" in p for p in problems)
    add(store, more)
    assert not (store / "svd").exists()
    assert check_store(store) == []


def test_what_an_addition_left_that_was_given_up_goes_with_the_next(
    tmp_path: Path, store: Path
) -> None:
    killed(store, given(tmp_path, slice(200, 300), "more"), "data_prep.append.hash_metadata", 2)
    shutil.rmtree(tmp_path / "s.zarr.addition.partial")
    assert (store / "strata/rna+adt.2").exists()
    add(store, f"rna={write_h5ad(tmp_path / 'rna.h5ad', RNA[250:])}")
    assert {p.name for p in (store / "strata").iterdir() if p.is_dir()} == {
        "rna",
        "rna+adt",
        "rna.2",
    }
    assert check_store(store) == []


def test_an_svd_is_not_saved_across_an_addition(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = svd.find_leading_vectors

    def meanwhile(*args: Any) -> Any:
        monkeypatch.setattr(svd, "find_leading_vectors", real)
        add(store, given(tmp_path, slice(200, 300), "more"))
        return real(*args)

    monkeypatch.setattr(svd, "find_leading_vectors", meanwhile)
    with pytest.raises((DataError, StoreError), match="cells were added meanwhile"):
        svd.compute_svd(str(store), ["rna"], svd.SvdOptions(5, 0, 0), ThreadPool(1))
    assert not (store / "svd").exists()
    assert (
        svd.compute_svd(str(store), ["rna"], svd.SvdOptions(5, 0, 0), ThreadPool(1))["rna"].n_cells
        == 300
    )


def test_the_store_decides_features(tmp_path: Path, store: Path) -> None:
    with pytest.raises(SystemExit):
        _build_parser().parse_args(["append", "rna=x.h5ad", "--to", str(store), "--top", "rna=10"])
    found = parse_inputs(
        [given(tmp_path, slice(200, 300), "more")], ReadingOptions(ObsColumns(dict(FIELDS)))
    )
    with pytest.raises(ValueError, match="another store decide"):
        append_cells(
            found,
            store,
            ConversionOptions(feature_choices={"rna": FeatureChoice(top_features=10)}),
            ThreadPool(1),
        )


def test_batches_come_from_the_column_that_the_store_was_made_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def typed(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["data_prep", *words])
        main()
        return capsys.readouterr().out

    store = str(tmp_path / "s.zarr")
    parts = {"a": RNA[:100], "b": RNA[100:200], "none": RNA[200:]}
    files = {
        n: write_h5ad(tmp_path / f"{n}.h5ad", x, **({"donor": n} if n != "none" else {}))
        for n, x in parts.items()
    }
    typed("convert", f"rna={files['a']}", "--out", store, "--batch-key", "donor")
    assert "no batch" not in typed("append", f"rna={files['b']}", "--to", store)
    told = typed("append", f"rna={files['none']}", "--to", store)
    assert "100 cells have no batch: their files have nothing in column 'donor'" in told
    assert read_field(Store(store), "batch") == {
        c: "ab"[i // 100] if i < 200 else None for i, c in enumerate(RNA.index)
    }
    shown = typed("inspect", store)
    assert shown.count("100 cells in, 0 dropped") == 3
    assert "b.h5ad -> rna" in shown


def test_what_did_not_fit_is_told(tmp_path: Path, store: Path) -> None:
    found = parse_inputs(
        [f"rna={write_h5ad(tmp_path / 'x.h5ad', RNA[200:].rename(columns={'g3': 'x'}))}"],
        ReadingOptions(),
    )
    manifest = append_cells(found, store, ConversionOptions(), ThreadPool(1))
    assert "x.h5ad: 1 features missing, become zero (g3)" in format_addition(manifest)
    assert "x.h5ad: 1 features extra, are dropped (x)" in format_addition(manifest)


def test_segments_may_be_packed_in_other_ways(tmp_path: Path) -> None:
    """Peaks that were binary and are counted later, proteins that need two bytes later."""
    atac, adt = make_counts(200, 30, 3, "peak").clip(upper=1), make_counts(200, 8, 4, "p")
    atac[100:] *= 3
    adt[100:] *= 200
    for name, cells in (("one", slice(0, 100)), ("two", slice(100, 200))):
        write_h5mu(
            tmp_path / f"{name}.h5mu", atac=make_anndata(atac[cells]), adt=make_anndata(adt[cells])
        )
    convert_files(tmp_path / "s.zarr", str(tmp_path / "one.h5mu"))
    after = add(tmp_path / "s.zarr", str(tmp_path / "two.h5mu"))
    packed = [s.packed for s in after.manifest.strata.values()]
    assert [p["atac"].bits for p in packed] == [0, 2]
    assert [p["adt"].values for p in packed] == ["uint8", "uint16"]
    pd.testing.assert_frame_equal(
        read_counts(after, "atac").loc[atac.index], atac, check_dtype=False
    )
    pd.testing.assert_frame_equal(read_counts(after, "adt").loc[adt.index], adt, check_dtype=False)
    stratum = "atac+adt"
    plan = CellPlan(0, {n: r.n_cells for n, r in after.segments.items()}, {stratum: 16}, 4, 1, 64)
    with Loader(after, plan) as loader:
        for step in range(10):
            got = next(loader).modalities["adt"].counts
            rows = [
                after.segments[s].read_rows("adt", plan.select_cells(step, s))
                for s in plan.segments
            ]
            np.testing.assert_array_equal(got, np.concatenate(rows))  # type: ignore[arg-type]


def test_a_link_to_a_store(tmp_path: Path, store: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link.zarr").symlink_to(store)
    more = given(tmp_path, slice(200, 300), "more")
    killed(tmp_path / "elsewhere/link.zarr", more, "data_prep.append._move_stratum", 1)
    assert (tmp_path / "s.zarr.addition.partial").exists()  # on the store's own disk
    assert add(store, more).manifest.n_cells == 300
