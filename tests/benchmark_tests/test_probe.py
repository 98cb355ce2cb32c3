"""What our loader is asked to do while it is measured: every cell and byte once."""

import argparse
import json
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import boto3
import numcodecs.blosc
import numpy as np
import pytest

from clue_dist.data.plan import CellPlan
from clue_dist.store.reader import Store
from clue_dist.store.rows import CsrRows
from tests.benchmark_tests.measure_helpers import parse_limits
from tests.benchmarks.streaming import gets, probe
from tests.s3 import serve
from tests.stores import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("streaming") / "s.zarr"
    return make_store(path, cells={"rna": 203}, features={"rna": 40}, block_cells=8)


def count_entries(store: Store) -> int:
    ((_, reader),) = store.segments.items()
    return int(reader.read_lengths("rna", np.arange(reader.n_blocks))[..., 0].sum())


def read_step(store: Store, plan: CellPlan, step: int) -> CsrRows:
    ((name, reader),) = store.segments.items()
    rows = reader.read_rows("rna", plan.select_cells(step, name))
    assert isinstance(rows, CsrRows)
    return rows


def test_our_batches_are_counted(store: Store) -> None:
    plan = probe.plan_windows(store, batch=16, window=128)
    assert (plan.lanes, plan.window_blocks, plan.batch_size) == (8, 2, 16)
    with probe.Loader(store, plan) as loader:
        found = list(islice(probe.count_batches(loader), 3))
        # Room for two lots and a batch of blocks is more than these 26.
        assert probe.measure_kept(loader, store) == 1
    assert found == [(16, len(read_step(store, plan, step).values)) for step in range(3)]
    with probe.Loader(store, plan, form="coded") as loader:
        assert list(islice(probe.count_batches(loader), 3)) == found
    with probe.Loader(store, plan, form="dense") as loader:
        assert next(probe.count_batches(loader)) == (16, 0)
    with pytest.raises(ValueError, match="no multiple"):
        probe.plan_windows(store, batch=16, window=100)


def test_windows_hold_every_cell_once_a_pass(store: Store) -> None:
    found = list(islice(probe.count_windows(store, cells=16), 13))  # 2 of 26 blocks each
    assert np.sum(found, 0).tolist() == [203, count_entries(store)]


def test_decoding_alone_decompresses_the_stores_own_blocks(store: Store) -> None:
    blocks = probe.hold_blocks(store)
    assert (blocks.cells, blocks.nonzeros) == (203, count_entries(store))
    ((_, reader),) = store.segments.items()
    want = reader.read_blocks("rna", np.arange(reader.n_blocks))
    for i, parts in enumerate(blocks.parts):
        raw = [numcodecs.blosc.decompress(part) for part in parts]
        assert [len(r) for r in raw] == blocks.sizes
        assert raw == [want.codes[i].tobytes(), want.rest[i].tobytes()]
    assert len(probe.hold_blocks(store, limit=1).parts) == 1
    found = probe.measure_decoding(store, parse_limits())
    assert found["nonzeros_per_s"] / found["cells_per_s"] == pytest.approx(blocks.nonzeros / 203)


@pytest.mark.parametrize("kind", ["memcpy", "memset"])
def test_every_byte_of_memory_is_moved_once_a_round(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    monkeypatch.setattr(probe, "COPIED", 4096)
    monkeypatch.setattr(probe.np, "copyto", lambda target, source: moved.append(len(target)))

    def repeat_work(work: Callable[[int], None], threads: int, seconds: float) -> float:
        for thread in range(threads):
            work(thread)
        return 10.0

    monkeypatch.setattr(probe, "repeat_work", repeat_work)
    args = argparse.Namespace(kind=kind, threads=2, warm=0, seconds=0)
    assert probe.measure_memory(args) == {"bytes_per_s": 40960.0}
    assert moved == ([2048] * 4 if kind == "memcpy" else [])  # two to warm up, two that count


def test_how_often_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, done = [0.0], []
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])

    def work(thread: int) -> None:
        done.append(thread)
        now[0] += 0.25

    assert probe.repeat_work(work, threads=2, seconds=1) == pytest.approx(2)
    assert sorted(done) == [0, 0, 1, 1]


def test_a_store_on_s3_is_measured_beside_plain_gets(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert isinstance(store.root, Path)
    limits = ["--batch", "32", "--seconds", "0.1", "--warm", "0"]
    with serve() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        url = server.upload(store.root, "store")
        words = ["probe", url, "csr", "--window", str(probe.LANES * 16), *limits]
        monkeypatch.setattr(sys, "argv", words)
        probe.main()
        monkeypatch.setattr(sys, "argv", ["gets", url, *limits])
        gets.main()
        asked: list[gets.ByteRange] = []
        ranges = list(gets.list_ranges(Store(url), boto3.client("s3")))
        monkeypatch.setattr(gets, "get_bytes", lambda wanted, thread: asked.append(wanted) or 8)
        list(islice(gets.count_cells(store, ranges), len(ranges)))
    ours, plain = capsys.readouterr().out.splitlines()
    assert json.loads(ours)["cells_per_s"] > 0 < json.loads(plain)["cells_per_s"]
    files = [store.root / spec.path for spec in store.manifest.specify_arrays(*store.segments)]
    stored = [f for path in files if path.name in ("codes", "rest") for f in path.rglob("c/*/*")]
    wanted = sum(last + 1 - first for _, first, last in ranges)
    assert 0 < wanted < sum(file.stat().st_size for file in stored)
    assert sorted(asked) == sorted(ranges)
