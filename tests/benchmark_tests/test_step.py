"""The benchmark of a step: its cells, its stopwatch, and the bars on ratios."""

import time
from dataclasses import replace
from pathlib import Path

import mudata as md
import numpy as np
import pytest
import torch

from tests.benchmarks.step import cells, probe
from tests.benchmarks.step.__main__ import Step
from tests.benchmarks.step.parts import PARTS, REST, OperationClock, mark_parts

RATES = "encode_0", "encode_1", "ready_0", "ready_1"


def test_half_of_the_cells_carry_both_modalities(tmp_path: Path) -> None:
    sizes = (replace(cells.LARGE.modalities[0], features=300, depth=500),)
    sizes += (replace(cells.LARGE.modalities[1], features=900, depth=200),)
    shape = replace(cells.LARGE, cells=80, modalities=sizes)
    cells.write_mosaic(shape, tmp_path / "m.h5mu")
    md.set_options(pull_on_update=False)
    rna, atac = md.read(tmp_path / "m.h5mu").mod.values()
    both = set(rna.obs_names) & set(atac.obs_names)
    assert (rna.n_obs, atac.n_obs, len(both)) == (60, 60, 40)
    assert rna.X.sum(1).mean() == pytest.approx(500, rel=0.05)
    assert set(atac.X.data) == {1.0}
    of_rna, of_atac = (table.obs["cell_type"].astype(str) for table in (rna, atac))
    assert all(of_rna[name] == of_atac[name] for name in both)


def test_the_stopwatch_tells_cpu_seconds_and_seconds() -> None:
    def work() -> None:
        time.sleep(0.01)
        np.linalg.svd(np.ones((60, 60)))

    cpu, wall = probe.time_calls(work, 0.02)
    assert 0 < cpu < wall
    assert wall > 0.01


def test_the_backward_pass_counts_to_the_part_that_asked_for_it() -> None:
    x, weight = torch.ones(5, 4), torch.ones(4, 3, requires_grad=True)
    clock = OperationClock()
    with clock:
        with clock.open_part("outer"):
            with clock.open_part("inner"):
                y = x @ weight
            y = y.exp()
        y.sum().backward()
    inner, outer = clock.times["inner"], clock.times["outer"]
    assert inner.multiplied == 2 * (2 * 5 * 4 * 3)  # forward, and the gradient of the weight
    assert inner.forward[True] > 0
    assert inner.backward[True] > 0
    assert outer.multiplied == clock.times[REST].multiplied == 0
    assert outer.forward[False] > 0
    assert outer.backward[False] > 0


def test_bars_are_ratios_of_medians_at_512_cells() -> None:
    benchmark = Step(["--json", "out.json", "--repeats", "3"])
    assert ("reference-512", "small", 2, 0) in benchmark.list_cases()
    assert not any(m.startswith("ref") and s == "large" for m, s, *_ in benchmark.list_cases())
    rates = {"ours-512": (30, 50, 41), "reference-512": (10, 10, 9), "ours-128": (1, 1, 1)}
    records = [
        {"method": method, "data_set": "small", "fold": repeat, "seed": 0}
        | dict.fromkeys(("train", *RATES), value)
        for method, values in rates.items()
        for repeat, value in enumerate(values)
    ]
    training, *_ = benchmark.judge(records)
    assert (training["value"], training["holds"]) == (pytest.approx(4.1), True)
    assert all(bar["holds"] is None for bar in benchmark.judge(records[1:]))


def test_each_part_of_a_step_is_marked_while_it_is_timed() -> None:
    before = [getattr(owner, name) for owner, name in PARTS]
    with mark_parts(OperationClock()):
        marked = [getattr(owner, name) for owner, name in PARTS]
    assert all(now is not then for now, then in zip(marked, before, strict=True))
    assert [getattr(owner, name) for owner, name in PARTS] == before
