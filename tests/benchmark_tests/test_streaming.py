"""The benchmarks of stores: cells have the stated shape, measures are true, bars are judged."""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import anndata as ad
import boto3
import numcodecs.blosc
import numpy as np
import psutil
import pytest

from clue_dist.data.plan import CellPlan
from clue_dist.store.reader import Store
from clue_dist.store.rows import CsrRows
from tests.benchmarks import cells, commands, kept, runner, stores
from tests.benchmarks.cells import SHAPES, Shape
from tests.benchmarks.commands import BenchmarkError
from tests.benchmarks.conversion import Conversion
from tests.benchmarks.peers import measure
from tests.benchmarks.report import Result
from tests.benchmarks.runner import Run
from tests.benchmarks.streaming import __main__ as streaming
from tests.benchmarks.streaming import gets, probe
from tests.benchmarks.streaming.__main__ import Streaming
from tests.s3 import serve
from tests.stores import make_store

MEASURES = (
    "cells_per_s",
    "cells_per_cpu_s",
    "plain_cells_per_s",
    "nonzeros_per_s",
    "anon_mib",
    "bytes_per_nonzero",
)
SMALL = Shape("rna", 600, 300, 40, binary=False)

# --- the cells ---


@pytest.mark.parametrize(
    "shape", [SMALL, replace(SMALL, name="atac", binary=True)], ids=lambda shape: shape.name
)
def test_cells_have_the_stated_shape_whatever_the_piece(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "PIECE", 256)
    path = tmp_path / "cells.h5ad"
    cells.write_cells(shape, path)
    table = ad.read_h5ad(path)
    assert table.shape == (shape.cells, shape.features)
    assert cells.count_nonzeros(path) == table.X.nnz == (table.X.toarray() > 0).sum()
    assert table.X.nnz / shape.cells == pytest.approx(shape.nonzeros, rel=0.1)
    assert table.X.has_canonical_format
    assert (table.X.data == table.X.data.round()).all()
    assert (table.X.data.max() == 1) == shape.binary
    assert table.obs["plate"].is_monotonic_increasing
    assert table.obs["cell_type"].nunique() > 2
    assert table.obs_names.is_unique


def test_counts_vary_as_the_negative_binomial_does() -> None:
    n, mean, one = 40_000, 3.0, np.ones((1, 1))
    rates = cells.compute_rates(mean * one, binary=False).sum(1)
    model = cells.CellModel(one, rates, mean / (cells.DISPERSION + mean) * one)
    depth = np.random.default_rng(0).normal(0, cells.DEPTH, n)  # the first that is drawn
    drawn = cells.draw_cells(model, np.zeros(n, int), np.random.default_rng(0))
    counts, scale = drawn.toarray()[:, 0], np.exp(depth).mean()
    assert counts.mean() == pytest.approx(mean * scale, rel=0.02)
    variance = scale * (mean + mean**2 / cells.DISPERSION) + mean**2 * np.exp(depth).var()
    assert counts.var() == pytest.approx(variance, rel=0.05)


def test_a_quick_look_has_fewer_cells_of_the_same_kind() -> None:
    for name, shape in SHAPES.items():
        assert cells.choose_shape(name, quick=True) == replace(shape, cells=cells.QUICK_CELLS[name])
        assert cells.choose_shape(name, quick=False) == shape


# --- the environment of the peer ---


def write_program(path: Path, exit_code: int) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\nexit {exit_code}\n")
    path.chmod(0o755)
    return path


def test_another_python_is_found_where_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = write_program(tmp_path / "shims/python3.77", 127)
    monkeypatch.setenv("PATH", str(shim.parent))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    with pytest.raises(BenchmarkError, match=r"no Python 3\.77") as error:
        commands.find_python("3.77")
    assert f"{shim}, which does not start" in str(error.value)
    assert "uv python install 3.77" in str(error.value)
    real = write_program(tmp_path / "pyenv/versions/3.77.1/bin/python3.77", 0)
    assert commands.find_python("3.77") == real


def test_a_probes_last_line_of_json_is_its_result(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('{"cells": 1}\nprogress\n{"cells": 2}\na warning\n')
    assert commands.read_last_json(log) == {"cells": 2}
    log.write_text("Killed\n")
    with pytest.raises(BenchmarkError, match=r"no result[\s\S]*Killed"):
        commands.read_last_json(log)


# --- what is measured ---


def parse_limits(**more: float) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    measure.add_arguments(parser)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in more.items()]
    return parser.parse_args(["--seconds=0.05", "--warm=0", *words])


def test_the_stopwatch_counts_batches_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))

    def count_batches() -> measure.Batches:
        while True:
            now[0] += 0.003
            yield 512, 1024

    found = measure.measure_stream(count_batches(), parse_limits(step_ms=1.0))
    assert found["batches"] == 13  # of 4 ms each: the last begins before 50 ms are over
    assert found["waiting"] == pytest.approx(0.75)
    assert found["p99_ms"] == pytest.approx(3)
    assert found["cells_per_s"] == pytest.approx(512 / 0.004)
    assert found["nonzeros_per_s"] == pytest.approx(1024 / 0.004)


@pytest.mark.slow
def test_workers_count_for_memory_and_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.time, "process_time", lambda: 0.0)  # of this process
    alone, cpu = measure.read_memory_of_all()[0], measure.read_cpu_seconds()
    script = "b = bytearray(2**26); sum(range(10**7)); print(1, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        assert str(worker.pid) in measure.list_workers()
        assert measure.read_memory_of_all()[0] > alone + 60
        assert measure.read_cpu_seconds() > cpu
        worker.communicate(b"\n")
    assert str(worker.pid) not in measure.list_workers()


def test_the_peak_of_memory_is_seen_and_files_do_not_count() -> None:
    gc.collect()  # what other tests left may be given back meanwhile
    with measure.watch_peak(measure.read_memory, every_s=0.01) as peak:
        before, *_ = measure.read_memory()
        held = np.ones(128 * 2**20, np.uint8)
        wait_until(lambda: peak[0] > before + 64)
    assert held.sum() > 0


def test_memory_of_what_was_started_is_seen(tmp_path: Path) -> None:
    mark = tmp_path / "go"
    wait = f"while not pathlib.Path({str(mark)!r}).exists(): time.sleep(0.01)"
    code = f"import pathlib, time; x = b'1' * 2**26\n{wait}"
    with stores.watch_children() as peak:
        process = psutil.Popen([sys.executable, "-c", code])
        wait_until(lambda: peak[0] > 64)
        mark.touch()
        assert process.wait(20) == 0
    anon, rss = peak
    assert rss > anon


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


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


def test_a_thread_that_ends_meanwhile_has_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Path("/proc/self/task")
    ended = threads / "1" / "children"  # no thread of this process has that number
    listed = [ended, *threads.glob("*/children")]
    monkeypatch.setattr(measure.Path, "glob", lambda path, pattern: listed)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as worker:
        found = measure.list_workers()
        worker.communicate(b"\n")
    assert str(worker.pid) in found


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


# --- what is told ---


def plan_streaming(*words: str) -> Streaming:
    return Streaming(["--json", "out.json", *words])


def make_records(plan: Streaming) -> list[Result]:
    """Ours twice as fast as annbatch, whose chunks of 256 are best."""
    records = []
    for method, name, number, seed in plan.list_cases():
        speed = 2000.0 if method.startswith("ours") else 1000.0 + number
        run = {"method": method, "data_set": name, "fold": number, "seed": seed}
        values = dict.fromkeys(MEASURES, speed) | {"bytes_per_s": 16000.0, "kept": 0.5}
        waits = {"waiting": 0.01 * (number + 1), "p99_ms": 3.0, "chunk": 256, "preload": 32}
        records.append(run | values | waits)
    return records


def test_ours_and_the_peer_take_turns() -> None:
    words = ("--sets", "rna", "--repeats", "2")
    methods = [method for method, *_ in plan_streaming(*words).list_cases()]
    turn = [f"{method}-csr" for method in (*stores.METHODS, *streaming.OTHERS)]
    turn += [f"{method}-dense" for method in (*stores.METHODS, *streaming.OTHERS)]
    turn += [f"{method}-step" for method in stores.METHODS]
    turn += [f"ours-{kind}" for kind in ("windows", "s3", "decode", "memcpy", "memset")]
    assert methods[-len(turn) * 2 :] == turn * 2
    runs = Conversion(["--json", "out.json", *words]).list_cases()
    assert [method for method, *_ in runs] == ["convert-ours", "convert-annbatch"] * 2


def test_eight_times_the_cells_are_that_many_data_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "find_file", lambda shape, work: Path("x.h5ad"))
    plan = plan_streaming("--sets", "atac", "--repeats", "1")
    words = map(str, plan.list_command("ours", SHAPES["atac"], tmp_path, copies=3))
    lanes = [word for word in words if word.endswith("x.h5ad")]
    assert lanes == [f"lane{i}:atac=x.h5ad" for i in range(3)]
    methods = [method for method, *_ in plan.list_cases()]
    assert "ours-large" in methods
    assert "annbatch-large" not in methods


def test_every_setting_of_the_peer_mixes_as_much_as_we_do() -> None:
    plan = plan_streaming()
    settings = [(s["chunk"], s["preload"]) for s in plan.list_settings("annbatch").values()]
    assert streaming.DEFAULT in settings
    assert len(settings) > 3
    assert all(chunk * preload >= plan.args.window for chunk, preload in settings)
    assert all(chunk * preload % streaming.BATCH == 0 for chunk, preload in settings)
    fetched = [s["fetch"] * streaming.BATCH for s in plan.list_settings("scdataset").values()]
    assert set(fetched) == {plan.args.window}


def test_the_peer_runs_with_the_fastest_setting_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_streaming("--sets", "rna", "--work", str(tmp_path))
    fastest = {"annbatch": "try-256x32", "scdl": "try-2"}
    for peer, best in fastest.items():
        for name in plan.list_settings(peer):
            run = Run(f"{peer}-{name}", "rna", 0, 0, "f00d")
            record = vars(run) | {"cells_per_s": 2.0 if name == best else 1.0}
            kept.write_json(run.folder(tmp_path) / runner.RESULT, record)
    run = Run("annbatch-csr", "rna", 0, 0, "f00d")
    assert plan.choose_setting(run, "csr") == {"chunk": 256, "preload": 32}
    assert plan.choose_setting(run, "try-64x128") == {"chunk": 64, "preload": 128}
    assert plan.choose_setting(Run("scdl-csr", "rna", 0, 0, "f00d"), "csr") == {"workers": 2}


def test_bars_are_ratios_of_medians_and_wait_for_every_repeat() -> None:
    plan = plan_streaming()
    bars = {bar["name"]: bar for bar in plan.judge(make_records(plan))}
    csr = bars["rna: cells/s of CSR batches, times annbatch's"]
    assert csr["value"] == pytest.approx(2000 / 1001)
    windows = bars["rna: cells/s of decoded windows, times annbatch's CSR batches"]
    assert windows["holds"] is False
    assert bars["rna: share of time waiting with a 2 ms step"]["value"] == pytest.approx(0.02)
    assert bars["atac: bytes per non-zero on disk, times annbatch's"]["value"] == 2
    some = [r for r in make_records(plan) if r["fold"] == 0]
    judged = [bar["name"] for bar in plan.judge(some) if bar["holds"] is not None]
    assert judged == [name for name in bars if "on disk" in name]


def test_the_table_tells_ratios_settings_and_limits() -> None:
    plan = plan_streaming("--sets", "rna")
    text = plan.tabulate(make_records(plan))
    assert "annbatch-try-256x32" in text
    assert "csr, ours to scdl, by CPU time: 2.00" in text
    for line in ("csr, ours to annbatch: 2.00", "csr, share of decode: 1.00", "memcpy: 1.00"):
        assert line in text
    assert "atac" not in text


def test_conversion_is_judged_on_both_sets_and_its_memory_on_the_larger() -> None:
    plan = Conversion(["--json", "out.json", "--repeats", "1"])
    records = []
    for name, mib, theirs in (("rna", 500.0, 2.0), ("atac", 1000.0, 4.0)):
        for method, speed in (("ours", 10.0), ("annbatch", theirs)):
            run = {"method": f"convert-{method}", "data_set": name, "bytes_per_nonzero": 1.0}
            records.append(run | {"cells_per_s": speed, "anon_mib": mib, "rss_mib": mib})
    *speeds, peak = plan.judge(records)
    assert [(bar["value"], bar["holds"]) for bar in speeds] == [(5.0, True), (2.5, False)]
    assert (peak["value"], peak["holds"]) == (pytest.approx(1000 * 2**20 / 1e9), False)
    *_, peak = plan.judge(records[:2])
    assert peak["holds"] is None
    assert "ratio" in plan.tabulate(records)
    assert "cells per s 10, anon mib 500" in plan.describe(records[0])


def test_a_change_of_our_code_has_both_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_streaming("--sets", "rna")
    before = {plan.digest(f"{method}-csr", "rna") for method in stores.METHODS}
    assert len(before) == 1
    monkeypatch.setattr(stores, "SOURCES", stores.SOURCES[1:])
    assert {plan.digest(f"{method}-csr", "rna") for method in stores.METHODS}.isdisjoint(before)
