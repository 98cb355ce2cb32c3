"""The benchmarks of stores: their cells have the stated shape, what they measure is told truly, bars are judged."""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numcodecs.blosc
import numpy as np
import pytest

from clue_dist.data.plan import CellPlan
from clue_dist.store.reader import Store
from clue_dist.store.rows import CsrRows
from tests.benchmarks import cells, common
from tests.benchmarks.cells import SHAPES, Shape
from tests.benchmarks.common import BenchmarkError, Result, Run
from tests.benchmarks.conversion import __main__ as conversion
from tests.benchmarks.conversion import memory, stores
from tests.benchmarks.peers import measure
from tests.benchmarks.streaming import __main__ as streaming
from tests.benchmarks.streaming import probe
from tests.stores import make_store

SMALL = Shape("rna", 600, 300, 40, binary=False)

# --- the cells ---


@pytest.mark.parametrize(
    "shape", [SMALL, replace(SMALL, name="atac", binary=True)], ids=lambda shape: shape.name
)
def test_cells_have_the_stated_shape_whatever_the_piece(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "PIECE", 256)
    cells.write(shape, tmp_path / "cells.h5ad")
    got = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert got.shape == (shape.cells, shape.features)
    assert cells.nonzeros_in(tmp_path / "cells.h5ad") == got.X.nnz == (got.X.toarray() > 0).sum()
    assert got.X.nnz / shape.cells == pytest.approx(shape.nonzeros, rel=0.1)
    assert got.X.has_canonical_format
    assert (got.X.data == got.X.data.round()).all()
    assert (got.X.data.max() == 1) == shape.binary
    assert got.obs["plate"].is_monotonic_increasing
    assert got.obs["cell_type"].nunique() > 2
    assert got.obs_names.is_unique


def test_counts_vary_as_the_negative_binomial_does() -> None:
    n, mean = 40_000, 3.0
    size = np.full((1, 1), mean / (cells.DISPERSION + mean))
    model = cells.Model(
        np.ones((1, 1)), cells.rates_of(np.array([[mean]]), binary=False).sum(1), size
    )
    depth = np.random.default_rng(0).normal(0, cells.DEPTH, n)  # the first that `draw` draws
    counts = cells.draw(model, np.zeros(n, int), np.random.default_rng(0)).toarray()[:, 0]
    scale = np.exp(depth).mean()
    assert counts.mean() == pytest.approx(mean * scale, rel=0.02)
    variance = scale * (mean + mean**2 / cells.DISPERSION) + mean**2 * np.exp(depth).var()
    assert counts.var() == pytest.approx(variance, rel=0.05)


def test_a_quick_look_has_fewer_cells_of_the_same_kind() -> None:
    for name, shape in SHAPES.items():
        assert cells.shape_of(name, quick=True) == replace(shape, cells=cells.QUICK_CELLS[name])
        assert cells.shape_of(name, quick=False) == shape


# --- the environment of the peer ---


def executable(path: Path, exit_code: int) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\nexit {exit_code}\n")
    path.chmod(0o755)
    return path


def test_another_python_is_found_where_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = executable(tmp_path / "shims/python3.77", 127)
    monkeypatch.setenv("PATH", str(shim.parent))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    with pytest.raises(BenchmarkError, match=r"no Python 3\.77") as error:
        common.interpreter("3.77")
    assert f"{shim}, which does not start" in str(error.value)
    assert "uv python install 3.77" in str(error.value)
    real = executable(tmp_path / "pyenv/versions/3.77.1/bin/python3.77", 0)
    assert common.interpreter("3.77") == real


def test_a_probes_last_line_of_json_is_its_result(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('{"cells": 1}\nprogress\n{"cells": 2}\na warning\n')
    assert common.last_json(log) == {"cells": 2}
    log.write_text("Killed\n")
    with pytest.raises(BenchmarkError, match=r"no result[\s\S]*Killed"):
        common.last_json(log)


# --- what is measured ---


def limits(**more: float) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    measure.arguments(parser)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in more.items()]
    return parser.parse_args(["--seconds=0.05", "--warm=0", *words])


def test_the_stopwatch_counts_batches_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))

    def take() -> tuple[int, int]:
        now[0] += 0.003
        return 512, 1024

    got = measure.stream(take, limits(step_ms=1.0))
    assert got["batches"] == 13  # of 4 ms each: the last begins before 50 ms are over
    assert got["waiting"] == pytest.approx(0.75)
    assert got["p99_ms"] == pytest.approx(3)
    assert got["cells_per_s"] == pytest.approx(512 / 0.004)
    assert got["nonzeros_per_s"] == pytest.approx(1024 / 0.004)


def test_the_peak_of_memory_is_seen_and_files_do_not_count() -> None:
    gc.collect()  # what other tests left may be given back meanwhile
    with measure.Peak() as peak:
        before = measure.anonymous_mib()
        held = np.ones(512 * 2**20, np.uint8)
        wait_until(lambda: peak.mib > before + 256)
    assert held.sum() > 0


def test_memory_of_what_was_started_is_seen(tmp_path: Path) -> None:
    mark = tmp_path / "go"
    code = f"import pathlib, time; x = b'1' * 2**26\nwhile not pathlib.Path({str(mark)!r}).exists(): time.sleep(0.01)"
    with memory.TreePeak() as peak:
        process = memory.psutil.Popen([sys.executable, "-c", code])
        wait_until(lambda: peak.anon > 64)
        mark.touch()
        assert process.wait(20) == 0
    assert peak.rss > peak.anon
    assert memory.memory_of(2**22 + 1) == (0.0, 0.0)  # no process has this number


def wait_until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "s.zarr", cells={"rna": 203}, features={"rna": 40}, block_cells=8)


def nonzeros(store: Store) -> int:
    ((_, reader),) = store.segments.items()
    return int(reader.read_lengths("rna", np.arange(reader.n_blocks)).sum())


def reader_rows(store: Store, plan: CellPlan, step: int) -> CsrRows:
    ((name, reader),) = store.segments.items()
    rows = reader.read_rows("rna", plan.select_cells(step, name))
    assert isinstance(rows, CsrRows)
    return rows


def test_our_batches_are_counted(store: Store) -> None:
    plan = probe.plan_of(store, batch=16, window=128)
    assert (plan.lanes, plan.window_blocks, plan.batch_size) == (8, 2, 16)
    with probe.Loader(store, plan) as loader:
        got = [probe.batches(loader)() for _ in range(3)]
        assert (
            probe.kept(loader, store) == 1
        )  # room for two lots and a batch of blocks is more than these 26
    wanted = [reader_rows(store, plan, step) for step in range(3)]
    assert got == [(16, len(rows.values)) for rows in wanted]
    with probe.Loader(store, plan, dense=True) as loader:
        assert probe.batches(loader)() == (16, 0)
    with pytest.raises(ValueError, match="no multiple"):
        probe.plan_of(store, batch=16, window=100)


def test_windows_hold_every_cell_once_a_pass(store: Store) -> None:
    take = probe.whole_windows(store, cells=16)  # 2 of 26 blocks
    got = [take() for _ in range(13)]
    assert np.sum(got, 0).tolist() == [203, nonzeros(store)]


def test_decoding_alone_decompresses_the_stores_own_blocks(store: Store) -> None:
    blocks = probe.held(store)
    assert (blocks.cells, blocks.nonzeros) == (203, nonzeros(store))
    ((_, reader),) = store.segments.items()
    want = reader.read_blocks("rna", np.arange(reader.n_blocks))
    for i, parts in enumerate(blocks.parts):
        raw = [numcodecs.blosc.decompress(part) for part in parts]
        assert [len(r) for r in raw] == blocks.sizes
        assert raw == [want.codes[i].tobytes(), want.rest[i].tobytes()]
    assert len(probe.held(store, limit=1).parts) == 1


def test_limits_of_the_machine_are_numbers(store: Store) -> None:
    args = limits()
    got = probe.decode(store, args)
    assert got["nonzeros_per_s"] / got["cells_per_s"] == pytest.approx(nonzeros(store) / 203)


@pytest.mark.parametrize("what", ["memcpy", "memset"])
def test_every_byte_of_memory_is_moved_once_a_round(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    monkeypatch.setattr(probe, "COPIED", 4096)
    monkeypatch.setattr(probe.np, "copyto", lambda target, source: moved.append(len(target)))

    def over_and_over(work: Callable[[int], None], threads: int, seconds: float) -> float:
        for thread in range(threads):
            work(thread)
        return 10.0

    monkeypatch.setattr(probe, "over_and_over", over_and_over)
    got = probe.memory(argparse.Namespace(measure=what, threads=2, warm=0, seconds=0))
    assert got == {"bytes_per_s": 40960.0}
    assert moved == ([2048] * 4 if what == "memcpy" else [])  # two parts to warm up, two that count


def test_how_often_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, done = [0.0], []
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])

    def work(thread: int) -> None:
        done.append(thread)
        now[0] += 0.25

    assert probe.over_and_over(work, threads=2, seconds=1) == pytest.approx(2)
    assert sorted(done) == [0, 0, 1, 1]


def test_eight_times_the_cells_are_that_many_data_sets(tmp_path: Path) -> None:
    words = list(
        map(str, stores.command("ours", Path("x.h5ad"), tmp_path, "atac", 2, tmp_path, copies=3))
    )
    assert [word for word in words if word.endswith("x.h5ad")] == [
        f"lane{i}:atac=x.h5ad" for i in range(3)
    ]
    atac = [run.method for run in streaming.runs_of(arguments("--sets", "atac", "--repeats", "1"))]
    assert "ours-large" in atac
    assert "annbatch-large" not in atac


def test_a_store_on_s3_is_measured_like_one_in_a_folder(store: Store, tmp_path: Path) -> None:
    assert isinstance(store.root, Path)
    with streaming.on_s3(store.root) as url:
        limits = [
            "--window",
            str(probe.LANES * 16),
            "--batch",
            "32",
            "--seconds",
            "0.2",
            "--warm",
            "0",
        ]
        command = [sys.executable, "-m", "tests.benchmarks.streaming.probe", url, "csr", *limits]
        common.call(command, tmp_path / "log.txt", threads=1)
    assert common.last_json(tmp_path / "log.txt")["cells_per_s"] > 0
    assert "AWS_ENDPOINT_URL" not in os.environ


# --- what is told ---


def arguments(*words: str) -> argparse.Namespace:
    args = streaming.arguments(["--json", "out.json", *words])
    return args


def records(args: argparse.Namespace) -> list[Result]:
    """Ours twice as fast as annbatch, whose chunks of 256 are best."""

    def record(run: Run) -> Result:
        speed = 2000.0 if run.method.startswith("ours") else 1000.0 + run.fold
        values = dict.fromkeys(streaming.COLUMNS, speed) | {
            "bytes_per_nonzero": speed,
            "bytes_per_s": 16000.0,
        }
        setting = {"chunk": 256, "preload": 32}
        return (
            vars(run)
            | values
            | {"waiting": 0.01 * (run.fold + 1), "p99_ms": 3.0, "kept": 0.5}
            | setting
        )

    return [record(run) for run in streaming.runs_of(args)]


def test_ours_and_the_peer_take_turns() -> None:
    methods = [
        run.method for run in streaming.runs_of(arguments("--sets", "rna", "--repeats", "2"))
    ]
    turn = [
        "ours-csr",
        "annbatch-csr",
        "ours-dense",
        "annbatch-dense",
        "ours-step",
        "annbatch-step",
    ]
    turn += ["ours-windows", "ours-s3", "ours-decode", "ours-memcpy", "ours-memset"]
    assert methods[-len(turn) * 2 :] == turn * 2
    runs = conversion.runs_of(
        conversion.arguments(["--json", "out.json", "--sets", "rna", "--repeats", "2"])
    )
    assert [run.method for run in runs] == ["convert-ours", "convert-annbatch"] * 2


def test_every_setting_of_the_peer_mixes_as_much_as_we_do() -> None:
    args = arguments()
    settings = streaming.settings_of(args)
    assert streaming.DEFAULT in settings
    assert len(settings) > 3
    assert all(chunk * preload >= args.window for chunk, preload in settings)
    assert all(chunk * preload % streaming.BATCH == 0 for chunk, preload in settings)


def test_the_peer_runs_with_the_fastest_setting_tried(tmp_path: Path) -> None:
    args = arguments("--sets", "rna", "--work", str(tmp_path))
    for run in streaming.runs_of(args):
        if run.method.startswith("annbatch-try"):
            speed = 2.0 if run.method.endswith("256x32") else 1.0
            common.write_json(
                run.folder(tmp_path) / common.RESULT, vars(run) | {"cells_per_s": speed}
            )
    run = next(run for run in streaming.runs_of(args) if run.method == "annbatch-csr")
    assert streaming.setting_of(run, "csr", args) == (256, 32)
    assert streaming.setting_of(run, "try-64x128", args) == (64, 128)


def test_bars_are_ratios_of_medians_and_wait_for_every_repeat() -> None:
    args = arguments()
    bars = {bar["name"]: bar for bar in streaming.bars_of(records(args), args)}
    assert bars["rna: cells/s of CSR batches, times annbatch's"]["value"] == pytest.approx(
        2000 / 1001
    )
    assert bars["rna: cells/s of decoded windows, times annbatch's CSR batches"]["holds"] is False
    assert bars["rna: share of time waiting with a 2 ms step"]["value"] == pytest.approx(0.02)
    assert bars["atac: bytes per non-zero on disk, times annbatch's"]["value"] == 2
    some = [r for r in records(args) if r["fold"] == 0]
    judged = {bar["name"]: bar["holds"] for bar in streaming.bars_of(some, args)}
    assert [name for name, holds in judged.items() if holds is not None] == [
        n for n in judged if "on disk" in n
    ]
    quick = arguments("--quick")
    assert all(bar["holds"] is None for bar in streaming.bars_of(records(quick), quick))


def test_the_table_tells_ratios_settings_and_limits() -> None:
    text = streaming.table(records(arguments("--sets", "rna")))
    assert "2.00" in text
    assert "rna: annbatch's chunk x preload 256x32 of: 256x32 1k" in text
    assert "csr reaches 100%; memcpy 0.0 GB/s, of which its batches reach 100%" in text
    assert "rna: csr: our loader keeps up to 50% of this store's blocks decoded" in text
    assert "atac" not in text


def test_conversion_is_judged_on_both_sets_and_its_memory_on_the_larger() -> None:
    args = conversion.arguments(["--json", "out.json", "--repeats", "1"])
    found = [
        {
            "method": f"convert-{m}",
            "data_set": s,
            "cells_per_s": 10.0 if m == "ours" else theirs,
            "anon_mib": mib,
        }
        | {"rss_mib": mib, "bytes_per_nonzero": 1.0}
        for m in stores.METHODS
        for s, mib, theirs in (("rna", 500.0, 2.0), ("atac", 1000.0, 4.0))
    ]
    *speeds, peak = conversion.bars_of(found, args)
    assert [(bar["value"], bar["holds"]) for bar in speeds] == [(5.0, True), (2.5, False)]
    assert (peak["value"], peak["holds"]) == (pytest.approx(1000 * 2**20 / 1e9), False)
    assert "5.00" in conversion.table(found)
    assert conversion.told(found[0]) == "10 cells/s, 500 MiB"


def test_a_change_of_our_code_has_both_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments("--sets", "rna")
    before = {run.digest for run in streaming.runs_of(args)}
    assert len(before) == 1
    monkeypatch.setattr(stores, "OURS", ("clue_dist/store",))
    assert {run.digest for run in streaming.runs_of(args)}.isdisjoint(before)
