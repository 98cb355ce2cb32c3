"""What a training step asks of a GPU, counted on a CPU: a sync that comes back fails here."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clue_dist.data.batch import Counts, compute_library_size
from clue_dist.model import decoders, thinning, trunk
from clue_dist.model.counter_noise import CounterNoise
from clue_dist.model.fused import FUSED_LIKELIHOODS
from clue_dist.model.likelihoods import LikelihoodParameters
from tests.benchmarks.gpu import __main__ as benchmark
from tests.benchmarks.gpu import parity
from tests.benchmarks.gpu.counting import WorkCounts, count_work
from tests.benchmarks.gpu.parity import compare_steps
from tests.benchmarks.gpu.training import measure_embedding, measure_training
from tests.benchmarks.gpu.whole_runs import measure_runs
from tests.benchmarks.gpu.workload import TINY, TINY_MODEL, make_batch, make_noise, make_objective


@pytest.fixture(scope="module")
def step_counts() -> WorkCounts:
    """Count the second step of a tiny model: the first copies what stays on the device."""
    objective, batch = make_objective(TINY, TINY_MODEL), make_batch(TINY)
    objective.compute_loss(batch, make_noise(TINY, 0))[0].backward()
    with pytest.MonkeyPatch.context() as patch:
        # A CPU leaves out what a GPU sets to zero, selects features and scales rows by kernels.
        patch.setattr(thinning, "_drop_entries", thinning._zero_entries)
        patch.setattr(decoders, "_copy_selected", decoders._pick_selected)
        patch.setattr(trunk, "_multiply_rows_on_cpu", trunk._multiply_rows)
        with count_work() as counts:
            objective.compute_loss(batch.to("cpu"), make_noise(TINY, 1))[0].backward()
    return counts


def test_a_step_copies_nothing_to_the_device_but_its_batch(step_counts: WorkCounts) -> None:
    assert not step_counts.blocking_copies, step_counts.format_places()
    # Three modalities, two of them sparse, the cells, and three pairs of modalities.
    assert step_counts.copies == 18


def test_a_step_waits_for_the_device_only_where_scored_features_are_picked(
    step_counts: WorkCounts,
) -> None:
    elsewhere = [place for place in step_counts.syncs if "model/decoders.py" not in place]
    assert not elsewhere, step_counts.format_places()
    assert step_counts.syncs.total() <= 2  # once for each sparse modality


def test_a_step_runs_on_a_device_whose_values_nobody_can_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Meta tensors have no values, no shape can depend on them, and none mixes with a CPU's."""

    def draw_nothing(_: CounterNoise, kind: str, cells: Tensor, width: int) -> Tensor:
        dtype = torch.int32 if kind == "integers" else torch.float32
        return torch.empty(len(cells), width, dtype=dtype, device=cells.device)

    def score_nothing(
        _: str, counts: Counts, parameters: LikelihoodParameters, __: Tensor | None
    ) -> Tensor:
        return parameters.rate.sum(-1) + parameters.theta.sum() + compute_library_size(counts)

    # Kernels have no meta device; what stands for them gives tensors of the same shape.
    monkeypatch.setattr(CounterNoise, "_draw", draw_nothing)
    monkeypatch.setattr(decoders, "can_fuse", lambda _: True)
    monkeypatch.setattr(decoders.Decoder, "_score_by_kernels", staticmethod(score_nothing))
    objective = make_objective(TINY, TINY_MODEL).to("meta")
    noise = CounterNoise(0, 0, {"all": TINY.n_cells}, TINY.lanes, device="meta")
    loss, _ = objective.compute_loss(make_batch(TINY).to("meta"), noise)
    loss.backward()
    assert all(weight.grad.is_meta for weight in objective.parameters())
    with pytest.raises(RuntimeError):
        loss.item()


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: torch.arange(2).repeat_interleave(torch.tensor([1, 2])),
        lambda x: (x.requires_grad_() * 1)[x > 0].sum().backward(),
    ],
)
def test_what_needs_a_value_on_the_host_is_a_sync_of_its_line(work: object) -> None:
    with count_work() as counts:
        work(torch.ones(3))  # type: ignore[operator]
    assert counts.syncs
    assert all("test_gpu.py" in place for place in counts.syncs)


def test_copies_that_wait_are_told_from_those_out_of_pinned_memory() -> None:
    x = torch.ones(4)
    with count_work() as counts:
        x.to("cpu", non_blocking=True)
        x.to(torch.float64)
        x.new_zeros(3)
        assert not counts.blocking_copies
        x.to("cpu")
        torch.tensor([1.0], device="cpu")
        x.new_tensor([1.0])
    assert (counts.copies, counts.bytes_copied) == (1, 16)
    assert counts.blocking_copies.total() == 3


def test_views_launch_nothing_and_the_backward_pass_is_counted() -> None:
    x = torch.ones(4, 2, requires_grad=True)
    with count_work() as counts:
        x.view(8).unsqueeze(0)
        assert not counts.launches
        (x * 2).sum().backward()
    assert counts.operators["aten::mul"] == 2  # one forward, one backward
    assert counts.bytes_touched > 0


def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["--json", str(tmp_path / "G.json")]) == benchmark.NO_GPU
    assert "sees no GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_stops_no_other_and_each_is_written_as_it_ends() -> None:
    results: dict[str, Any] = {}
    written: list[list[str]] = []
    parts = [("one", lambda: {"x": 1.0}), ("two", lambda: {"y": 1 / 0}), ("three", dict)]
    benchmark.measure_parts(iter(parts), results, lambda: written.append(list(results)), 100.0)
    assert written[:2] == [["one"], ["one", "two"]]
    assert "division by zero" in results["two"]["failed"]
    assert results["three"] == {}
    table = benchmark.format_table(results)
    assert "ZeroDivisionError" in table
    assert "Traceback" not in table
    assert table.count("open ") == len(benchmark.BARS)  # what was not measured holds no bar


def test_no_part_begins_once_the_time_is_up() -> None:
    results: dict[str, Any] = {}
    benchmark.measure_parts(iter([("one", lambda: {"x": 1.0})]), results, lambda: None, -1.0)
    assert results == {"one": {"left_out": "no time was left"}}


def test_a_cpu_agrees_with_itself_whatever_device_the_noise_is_copied_to() -> None:
    compared = compare_steps(TINY, torch.device("cpu"), steps=3, config=TINY_MODEL)
    assert compared["fp32 loss, relative difference"] == 0
    assert 0 < compared["bf16 loss, relative difference"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "rate"), [("fp32", "fp32_tflops"), ("mixed", "bf16_tflops")])
def test_training_and_embedding_are_measured_by_the_step_that_trains(
    precision: str, rate: str
) -> None:
    cpu = torch.device("cpu")
    measured = measure_training(
        TINY, cpu, precision, {rate: 0.01, "gb_per_s": 1.0}, 0.1, TINY_MODEL
    )
    assert measured["cells_per_s"] > 0
    assert measured["gflop"] > 0
    assert measured["operators"] > 500
    assert measured["share_of_roofline"] > 0
    assert measure_embedding(TINY, cpu, TINY_MODEL)["cells_per_s"] > 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_every_kernel_is_compared_with_its_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "time_calls", lambda work, device: 0.0)
    compared = parity.compare_kernels(replace(TINY, n_cells=4), torch.device("cpu"))
    names = [f"likelihood {name}" for name in FUSED_LIKELIHOODS]
    assert set(names) < set(compared)
    for values in compared.values():
        assert max(values["difference"], values["of gradients"]) < 1e-5


@pytest.mark.slow
def test_whole_runs_are_saved_and_go_on() -> None:
    run = measure_runs((1,), longest_s=500)["ZeRO-1"]
    assert run["gone_on_without_a_gap"], run
    assert run["last_loss"] < run["first_loss"]
