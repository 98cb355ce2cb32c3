"""A conversion gives the same bytes on any workers, however often it was killed."""

from __future__ import annotations

import fcntl
import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from clue_dist.errors import DataError, StoreError
from clue_dist.store import layout
from clue_dist.store.reader import Store
from data_prep.check import check_store
from data_prep.conversion import gather, scatter
from data_prep.jobs.workers import Progress, ThreadPool, open_pool
from tests.distributed.command import KILLED
from tests.unit.prep_helpers import convert_files, make_anndata, make_counts, write_h5ad, write_h5mu
from tests.unit.prep_victims import count_calls, run_victim

TASK_ENTRIES, SHARD_BYTES, BLOCK = 400, 1, 4  # about 20 spools and 10 shards


def convert_fatally(
    out: Path, given: str, place: str = "os.getcwd", n: int = -1, file_bytes: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Convert in a process that kills itself at the n-th call of a function."""
    options = ("--out", str(out), "--block-cells", str(BLOCK), "--workers", "2")
    constants = {
        "data_prep.conversion.scatter.TASK_ENTRIES": TASK_ENTRIES,
        "clue_dist.store.layout.SHARD_BYTES": SHARD_BYTES,
    }
    return run_victim(
        *("convert", given, *options), place=place, n=n, file_bytes=file_bytes, constants=constants
    )


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(scatter, "TASK_ENTRIES", TASK_ENTRIES)
    monkeypatch.setattr(layout, "SHARD_BYTES", SHARD_BYTES)
    rna, adt = make_counts(500, 40), make_counts(500, 8, 1, "p", density=0.8)
    return str(
        write_h5mu(tmp_path / "in.h5mu", rna=make_anndata(rna[:400]), adt=make_anndata(adt[100:]))
    )


@pytest.mark.parametrize(
    ("place", "n"),
    [
        ("data_prep.conversion.spool.append_array", 40),  # in the middle of a spool
        ("data_prep.convert.settle_strata", 1),  # between the passes
        ("clue_dist.store.writer.hash_file", 33),  # in the middle of a shard's arrays
        ("data_prep.convert.commit_store", 1),  # all done but the commit
    ],
)
def test_killed_and_run_again(
    tmp_path: Path, given: str, place: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = (
        count_calls(monkeypatch, scatter, "_scatter_rows"),
        count_calls(monkeypatch, gather, "_gather_shard"),
    )
    whole = convert_files(tmp_path / "whole.zarr", given, block_cells=BLOCK)
    n_spools, n_shards = every[0][0], every[1][0]
    assert n_spools > 10
    assert n_shards > 5
    out, partial = tmp_path / "s.zarr", tmp_path / "s.zarr.partial"
    assert convert_fatally(out, given, place, n).returncode == KILLED
    assert not out.exists()
    with pytest.raises(StoreError, match="run the same `python -m data_prep convert` again"):
        Store(out)
    spooled = [p for p in partial.rglob("spools/*/*") if p.suffix != ".tmp"]
    written = list(partial.rglob("shards/*.json"))
    assert spooled
    redone = (
        count_calls(monkeypatch, scatter, "_scatter_rows"),
        count_calls(monkeypatch, gather, "_gather_shard"),
    )
    again = convert_files(out, given, block_cells=BLOCK, workers=1)
    assert again.fingerprint == whole.fingerprint
    assert redone[1][0] == n_shards - len(written)
    assert redone[0][0] == n_spools - len(spooled)
    assert check_store(out) == []
    assert not partial.exists()


@pytest.mark.parametrize(
    ("place", "n"),
    [
        ("data_prep.conversion.row_lists.save_array", 7),  # while rows are listed
        ("data_prep.conversion.join_cells.save_array", 3),  # while a range of hashes is joined
        ("data_prep.conversion.join_cells._write_row_keys", 1),
        ("data_prep.conversion.join_cells.flush_arrays", 1),  # once rows know their places
    ],
)
def test_killed_while_cells_are_joined(tmp_path: Path, given: str, place: str, n: int) -> None:
    whole, out = (
        convert_files(tmp_path / "whole.zarr", given, block_cells=BLOCK),
        tmp_path / "s.zarr",
    )
    assert convert_fatally(out, given, place, n).returncode == KILLED
    assert convert_files(out, given, block_cells=BLOCK, workers=1).fingerprint == whole.fingerprint


def test_spools_that_are_there_are_not_made_again(
    tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        convert_fatally(tmp_path / "s.zarr", given, "data_prep.convert.settle_strata", 1).returncode
        == KILLED
    )
    calls = count_calls(monkeypatch, scatter, "_scatter_rows")
    convert_files(tmp_path / "s.zarr", given, block_cells=BLOCK)
    assert calls == [0]


def test_killed_after_the_commit(tmp_path: Path, given: str) -> None:
    out = tmp_path / "s.zarr"
    assert convert_fatally(out, given, "shutil.rmtree", 10**6).returncode == 0
    # What is left if the run was killed while it cleaned up.
    (tmp_path / "s.zarr.partial" / "0123" / "work").mkdir(parents=True)
    with pytest.raises(StoreError, match="something is already there"):
        convert_files(out, given, block_cells=BLOCK)
    assert not (tmp_path / "s.zarr.partial").exists()
    assert check_store(out) == []


def test_a_full_disk_is_loud_and_can_be_mended(tmp_path: Path, given: str) -> None:
    out = tmp_path / "s.zarr"
    for file_bytes in (500, 5000):  # too little for the job's description; for a spool
        failed = convert_fatally(out, given, file_bytes=file_bytes)
        assert failed.returncode == 2, failed.stderr
        assert "disk" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert not out.exists()
    again = convert_files(out, given, block_cells=BLOCK)
    assert (
        again.fingerprint
        == convert_files(tmp_path / "whole.zarr", given, block_cells=BLOCK).fingerprint
    )


def test_another_job_is_refused(tmp_path: Path, given: str) -> None:
    out = tmp_path / "s.zarr"
    convert_fatally(out, given, "data_prep.convert.settle_strata", 1)
    with pytest.raises(StoreError, match="a change of options") as caught:
        convert_files(out, given, block_cells=BLOCK, seed=1)
    assert "remove s.zarr.partial" in str(caught.value)
    write_h5mu(tmp_path / "in.h5mu", rna=make_anndata(make_counts(30, 40)))
    with pytest.raises(StoreError, match="a change of inputs"):
        convert_files(out, given, block_cells=BLOCK)


def test_a_mistake_in_the_inputs_leaves_nothing_behind(tmp_path: Path) -> None:
    counts = make_counts(20, 10).astype(float)
    for broken in (True, False):
        counts.iloc[4, 2] = 0.5 if broken else 1
        path = write_h5ad(tmp_path / "a.h5ad", counts)
        if broken:
            with pytest.raises(DataError, match="counts must be raw"):
                convert_files(tmp_path / "s.zarr", f"rna={path}")
            assert [p.name for p in tmp_path.iterdir()] == ["a.h5ad"]
        else:
            convert_files(tmp_path / "s.zarr", f"rna={path}")


def test_what_a_worker_still_writes_after_a_mistake_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file has a bad value; a worker of a cluster still reads the other one."""
    good, bad = make_counts(30, 10, 1, cells="d"), make_counts(20, 10).astype(float)
    bad.iloc[4, 2] = 0.5
    files = [
        f"rna={write_h5ad(tmp_path / name, x)}"
        for name, x in (("bad.h5ad", bad), ("good.h5ad", good))
    ]
    real, failed, threads = scatter.write_spool, threading.Event(), []

    def late(*args: Any) -> None:
        def write() -> None:
            failed.wait(10)
            real(*args)

        threads.append(threading.Thread(target=write))
        threads[-1].start()

    monkeypatch.setattr(scatter, "write_spool", late)
    with pytest.raises(DataError, match="counts must be raw"):
        convert_files(tmp_path / "s.zarr", *files)
    assert not (tmp_path / "s.zarr.partial").exists()
    failed.set()
    for thread in threads:
        thread.join()
    assert threads
    monkeypatch.undo()
    write_h5ad(tmp_path / "bad.h5ad", bad.round() + 1)
    other = write_h5ad(tmp_path / "good.h5ad", good.iloc[:, :7])
    stored = convert_files(tmp_path / "s.zarr", files[0], f"rna={other}", features=["intersection"])
    assert (
        stored.fingerprint
        == convert_files(tmp_path / "one.zarr", *files, features=["intersection"]).fingerprint
    )
    assert stored.manifest.modalities["rna"].n_features == 7


def test_an_error_waits_for_the_tasks_that_run() -> None:
    begun, failed, ended = threading.Event(), threading.Event(), []

    def work(number: int) -> None:
        if number:
            begun.set()
            failed.wait(10)
            time.sleep(0.2)
            ended.append(number)
            return
        begun.wait(10)
        failed.set()
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        ThreadPool(2).run_tasks(work, [0, 1], Progress("", 2))
    assert ended == [1]


def test_what_killed_writers_leave_is_swept(tmp_path: Path, given: str) -> None:
    out = tmp_path / "s.zarr"
    convert_fatally(out, given, "data_prep.convert.commit_store", 1)
    (store,) = (tmp_path / "s.zarr.partial").glob("*/store")
    (store / "zarr.0123.partial").write_text("{")
    (next(store.rglob("c")) / "0.__lock").write_text("")
    convert_files(out, given, block_cells=BLOCK)
    assert check_store(out) == []


def test_two_at_once_are_refused(tmp_path: Path, given: str) -> None:
    (tmp_path / "s.zarr.partial").mkdir()
    with (tmp_path / "s.zarr.partial" / "lock").open("w") as job:
        fcntl.flock(job, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another conversion is writing here"):
            convert_files(tmp_path / "s.zarr", given)


def test_any_number_of_workers(tmp_path: Path, given: str) -> None:
    one, three = (
        convert_files(tmp_path / f"{n}.zarr", given, block_cells=BLOCK, workers=n).fingerprint
        for n in (1, 3)
    )
    assert one == three


@pytest.mark.parametrize("address", ["foo", "127.0.0.1:8786", "tcp://host", "foo://host:8786"])
def test_no_address_of_a_scheduler(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import distributed

    monkeypatch.setattr(
        distributed, "Client", lambda *_, **__: pytest.fail("a Client of it does not end")
    )
    with (
        pytest.raises(DataError, match=f"where: --scheduler {address}\n"),
        open_pool(scheduler=address),
    ):
        pass


def test_no_scheduler_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep.jobs import workers

    monkeypatch.setattr(workers, "CONNECT", "1s")
    with (
        pytest.raises(DataError, match="no Dask scheduler answers"),
        open_pool(scheduler="tcp://127.0.0.1:9"),
    ):
        pass


def test_provenance_has_base_names_only(tmp_path: Path, given: str) -> None:
    provenance = convert_files(tmp_path / "s.zarr", given).manifest.provenance
    assert [item["file"] for item in provenance["inputs"]] == ["in.h5mu/mod/rna", "in.h5mu/mod/adt"]
    assert str(tmp_path) not in json.dumps(provenance)


def test_what_is_very_large_is_cut_into_a_bounded_number_of_spools() -> None:
    """Each shard looks into every spool; a spool's memory is bounded too."""
    for nnz in (10**k for k in range(12)):
        entries = scatter.choose_task_entries(nnz)
        assert 2**20 <= entries <= 2**25
        assert nnz / entries <= 1001 or entries == 2**25
    assert scatter.choose_task_entries(15 * 10**8) == 6 * 2**20
