"""What a training step asks of a GPU, counted on a CPU: a sync that comes back fails here."""

from __future__ import annotations

import pytest
import torch

from clue_dist.config import ModelConfig
from tests.benchmarks.gpu.counting import WorkCounts, count_work
from tests.benchmarks.gpu.workload import Shape, make_batch, make_noise, make_objective

TINY = Shape("tiny", 32, 60, 90, 8, genes_per_cell=20, peaks_per_cell=30, features_per_step=40)
TINY_MODEL = ModelConfig(
    latent=8,
    trunk={"projection": 6, "hidden": 8, "members": 2},
    decoder={"hidden": 8},
    discriminator={"hidden": 8},
)


@pytest.fixture(scope="module")
def step_counts() -> WorkCounts:
    """Count the second step of a tiny model: the first copies what stays on the device."""
    objective, batch = make_objective(TINY, TINY_MODEL), make_batch(TINY)
    objective(batch, make_noise(TINY, 0))[0].backward()
    with count_work() as counts:
        objective(batch.to("cpu"), make_noise(TINY, 1))[0].backward()
    return counts


def test_a_step_copies_nothing_to_the_device_but_its_batch(step_counts: WorkCounts) -> None:
    assert not step_counts.blocking_copies, step_counts.format_places()
    # Three modalities, two of them sparse, the cells, and the rows of three pairs.
    assert step_counts.copies == 18


def test_a_step_waits_for_the_device_only_where_scored_features_are_picked(
    step_counts: WorkCounts,
) -> None:
    elsewhere = [place for place in step_counts.syncs if "model/decoders.py" not in place]
    assert not elsewhere, step_counts.format_places()
    assert step_counts.syncs.total() <= 2


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
    assert all("test_benchmark_gpu.py" in place for place in counts.syncs)


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
