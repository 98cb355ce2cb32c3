"""The benchmarks of stores: who is measured when, and how bars are judged."""

from pathlib import Path

import pytest

from tests.benchmarks import cells, kept, runner, stores
from tests.benchmarks.cells import SHAPES
from tests.benchmarks.conversion import Conversion
from tests.benchmarks.report import Result
from tests.benchmarks.runner import Run
from tests.benchmarks.streaming import __main__ as streaming
from tests.benchmarks.streaming.__main__ import Streaming

MEASURES = (
    "cells_per_s",
    "cells_per_cpu_s",
    "plain_cells_per_s",
    "nonzeros_per_s",
    "anon_mib",
    "bytes_per_nonzero",
)


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
