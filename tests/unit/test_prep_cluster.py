"""A conversion on a real Dask cluster: scheduler and workers are processes, and some are killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from clue_dist.errors import DataError, StoreError
from clue_dist.store import layout
from clue_dist.store.manifest import Manifest
from clue_dist.store.reader import Store
from data_prep.check import check_store
from data_prep.cli.feature_choices import parse_choices
from data_prep.cli.inputs import parse_inputs
from data_prep.conversion import scatter
from data_prep.convert import convert_inputs
from data_prep.jobs import workers
from data_prep.jobs.workers import open_pool
from data_prep.options import ReadingOptions
from data_prep.planned_cells import ConversionOptions
from tests.ports import find_free_port
from tests.unit.prep_helpers import (
    convert_files,
    make_anndata,
    make_counts,
    read_counts,
    write_h5ad,
    write_h5mu,
    write_mtx,
)

REPO = Path(__file__).parents[2]
BLOCK = 4

# Loaded into a worker. Tasks take a moment, so that all workers get some; a victim ends itself at
# the n-th call of a function.
PRELOAD = """
import importlib, os, signal, time
from clue_dist.store import layout
layout.SHARD_BYTES = 1
def patch(module, name, before):
    module = importlib.import_module(module)
    original = getattr(module, name)
    def patched(*args, **kwargs):
        before(*args)
        return original(*args, **kwargs)
    setattr(module, name, patched)
calls = [0]
def fatal(*args):
    calls[0] += 1
    if calls[0] == {n}:
        if {name!r} == "hash_file":
            args[0].with_name("9.__lock").touch()  # as TensorStore leaves it when it is killed
        os.kill(os.getpid(), signal.SIGKILL)
patch("data_prep.conversion.scatter", "write_spool", lambda *_: time.sleep(0.1))
patch("data_prep.features.selection", "_add_entries", lambda *_: time.sleep(0.1))
patch("data_prep.conversion.gather", "write_shard", lambda *_: time.sleep(0.1))
patch({module!r}, {name!r}, fatal)
"""


class Cluster:
    """Processes on a free port of this machine."""

    def __init__(self, folder: Path) -> None:
        port = find_free_port()
        self.folder, self.address = folder, f"tcp://127.0.0.1:{port}"
        self.processes: list[subprocess.Popen[bytes]] = []
        here = ["--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]
        self.scheduler = self._start("dask_scheduler", *here)

    def worker(self, place: str = "os.getcwd", n: int = -1) -> subprocess.Popen[bytes]:
        """Start a worker; it kills itself at the n-th call of `place`."""
        module, name = place.rsplit(".", 1)
        preload = self.folder / f"preload{len(self.processes)}.py"
        preload.write_text(PRELOAD.format(module=module, name=name, n=n))
        here = [
            "--host",
            "127.0.0.1",
            "--no-nanny",
            "--nthreads",
            "1",
            "--no-dashboard",
            "--preload",
            str(preload),
        ]
        return self._start(
            "dask_worker", self.address, *here, "--local-directory", str(self.folder)
        )

    def wait_for(self, workers: int) -> None:
        import distributed

        with distributed.Client(self.address, timeout="60s", set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=60)

    def _start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.{module}", *arguments]
        with (self.folder / f"{module}{len(self.processes)}.log").open("wb") as log:
            self.processes.append(subprocess.Popen(command, cwd=REPO, stdout=log, stderr=log))
        return self.processes[-1]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def steady(cluster: Cluster) -> None:
    cluster.worker()


@pytest.fixture(autouse=True)
def _small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """About 20 tasks of each pass."""
    monkeypatch.setattr(scatter, "TASK_ENTRIES", 400)
    monkeypatch.setattr(layout, "SHARD_BYTES", 1)


@pytest.fixture
def given(tmp_path: Path) -> str:
    rna, adt = make_counts(500, 40), make_counts(500, 8, 1, "p", density=0.8)
    return str(
        write_h5mu(tmp_path / "in.h5mu", rna=make_anndata(rna[:400]), adt=make_anndata(adt[100:]))
    )


def run(cluster: Cluster, given: list[str], out: Path, top: Sequence[str] = ()) -> Manifest:
    inputs = parse_inputs(given, ReadingOptions())
    choices = parse_choices([source.modality for source in inputs], {}, top=top)
    with open_pool(scheduler=cluster.address) as workers:
        return convert_inputs(
            inputs, out, ConversionOptions(block_cells=BLOCK, feature_choices=choices), workers
        )


def test_workers_killed_in_mid_conversion_lose_nothing(
    tmp_path: Path, cluster: Cluster, steady: None, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One dies while features are chosen, one in the midst of a spool, one of a shard's arrays."""
    places = {
        "numpy.savez": 2,
        "data_prep.conversion.spool.append_array": 14,
        "clue_dist.store.writer.hash_file": 10,
    }
    victims = [cluster.worker(place, n) for place, n in places.items()]
    cluster.wait_for(4)
    stored = run(cluster, [given], tmp_path / "s.zarr", ["rna=20"])
    assert [victim.wait(30) for victim in victims] == [-signal.SIGKILL] * 3
    one = convert_files(tmp_path / "one.zarr", given, block_cells=BLOCK, workers=1, top=["rna=20"])
    assert stored.fingerprint == one.fingerprint
    assert check_store(tmp_path / "s.zarr") == []
    assert not (tmp_path / "s.zarr.partial").exists()
    output = capsys.readouterr().err
    for title in ("select rna (sums)", "select rna (clip)", "read", "write"):
        match = re.search(rf"{re.escape(title)}: (\d+) of (\d+), \d", output)
        assert match is not None
        assert int(match[1]) == int(match[2]) > 5


def test_a_worker_killed_while_it_sorts_a_matrix_market(
    tmp_path: Path, cluster: Cluster, steady: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = make_counts(60, 40)
    kinds = ["Gene Expression"] * 30 + ["Antibody Capture"] * 10
    folders = [
        f"{name}:{write_mtx(tmp_path / name, counts, kinds, seed=i)}"
        for i, name in enumerate("abc")
    ]
    # Two of a part's three files are there.
    victim = cluster.worker("data_prep.readers.sorted_entries.save_array", 3)
    cluster.wait_for(2)
    stored = run(cluster, folders, tmp_path / "s.zarr")
    assert victim.wait(30) == -signal.SIGKILL
    assert (
        stored.fingerprint
        == convert_files(tmp_path / "one.zarr", *folders, block_cells=BLOCK, workers=1).fingerprint
    )


def test_the_command_line_on_a_cluster(
    tmp_path: Path, cluster: Cluster, steady: None, given: str
) -> None:
    cluster.wait_for(1)
    command = [sys.executable, "-m", "data_prep", "convert", given, "--block-cells", str(BLOCK)]
    command += ["--scheduler", cluster.address, "--out", str(tmp_path / "s.zarr")]
    ended = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"read: 2 of 2, \d", ended.stderr)
    one = convert_files(tmp_path / "one.zarr", given, block_cells=BLOCK, workers=1)
    assert Manifest.read(tmp_path / "s.zarr").n_cells == one.manifest.n_cells
    np.testing.assert_array_equal(
        read_counts(Store(tmp_path / "s.zarr"), "rna"), read_counts(one, "rna")
    )


def test_a_mistake_in_the_inputs_is_told_across_processes(
    tmp_path: Path, cluster: Cluster, steady: None
) -> None:
    bad = make_counts(500, 40).astype(float)
    bad.iloc[450, 2] = 0.5
    with pytest.raises(DataError, match="cell 'c450', feature 'g2'"):
        run(cluster, [f"rna={write_h5ad(tmp_path / 'bad.h5ad', bad)}"], tmp_path / "bad.zarr")


def test_a_task_that_kills_every_worker(
    tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that needs more memory than they have."""
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "0")
    cluster = Cluster(tmp_path)
    try:
        cluster.worker("data_prep.conversion.row_lists.save_array", 1)
        with pytest.raises(
            StoreError,
            match=r"a task kills its workers\n.*\n  got: 1 workers died of it\n  fix: give each",
        ):
            run(cluster, [given], tmp_path / "s.zarr")
    finally:
        cluster.close()


def _until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def test_nobody_left_then_somebody_then_no_scheduler(
    tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without workers the pool waits and says so; without a scheduler it ends, and can go on."""
    monkeypatch.setattr(workers, "SECONDS_WITHOUT_RESULT", 0.5)
    cluster, out = Cluster(tmp_path), tmp_path / "s.zarr"
    output: list[str] = []
    try:
        cluster.worker("data_prep.conversion.spool.append_array", 14)

        def disturb() -> None:
            _until(lambda: _heard(capsys, output, "has no workers: waiting"))
            cluster.worker("clue_dist.store.writer.hash_file", 10**6)
            _until(lambda: any((tmp_path / "s.zarr.partial").rglob("shards/*.json")))
            os.kill(cluster.scheduler.pid, signal.SIGKILL)

        thread = threading.Thread(target=disturb)
        thread.start()
        with pytest.raises(StoreError, match="the Dask scheduler is gone"):
            run(cluster, [given], out)
        thread.join()
    finally:
        cluster.close()
    assert not out.exists()
    spools = [p for p in (tmp_path / "s.zarr.partial").rglob("spools/*/*") if p.suffix != ".tmp"]
    assert len(spools) > 10
    capsys.readouterr()
    again = convert_files(out, given, block_cells=BLOCK, workers=1)
    assert f"read: {len(spools)} of " in capsys.readouterr().err  # were done before
    assert (
        again.fingerprint
        == convert_files(tmp_path / "one.zarr", given, block_cells=BLOCK).fingerprint
    )


def _heard(capsys: pytest.CaptureFixture[str], output: list[str], text: str) -> bool:
    output.append(capsys.readouterr().err)
    return text in "".join(output)
