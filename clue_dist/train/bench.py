"""Where the time goes on this machine: data alone, the model alone, both together.

Nothing is written.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from clue_dist.data.batch import Batch, SparseCounts
from clue_dist.data.loader import READ_AHEAD, STRETCH_BATCHES
from clue_dist.data.timing import record_phases
from clue_dist.ranks import Ranks
from clue_dist.train.engine import build_engine, join_process_group
from clue_dist.train.setup import Setup
from clue_dist.train.speed_report import LoaderSpeed, ModelSpeed, SpeedReport, TrainingSpeed
from clue_dist.train.step import train_step
from clue_dist.train.trainer import Trainer

WARM_UP_STEPS = 3  # before the clock runs: memory is allocated, kernels are chosen
LONGEST_SPAN = 64  # micro-batches at most that a repeat of the loader must cover


def measure_speed(
    setup: Setup, ranks: Ranks, seconds: float = 2.0, repeats: int = 5
) -> SpeedReport:
    """Measure all three. All ranks call this and get the same report.

    Args:
        setup: what would be trained on what.
        ranks: this rank among all.
        seconds: about how long a repeat takes.
        repeats: how often each is measured; medians are reported.

    Raises:
        StoreError: a chunk of the store is damaged.
    """
    device = join_process_group(ranks)
    clock = RankClock(ranks, device, seconds, repeats)
    engine = build_engine(_leave_untrained(setup), ranks, device)
    trainer = Trainer(engine, setup, ranks, device)
    data = _measure_loader(trainer, clock)
    model = _measure_model(trainer, clock)
    both = _measure_training(trainer, clock)
    engine.destroy()
    return SpeedReport(_describe_machine(trainer), data, model, both)


class RankClock:
    """Times repeats of the same work on all ranks: they begin together, and the slowest counts."""

    def __init__(self, ranks: Ranks, device: torch.device, seconds: float, repeats: int) -> None:
        self.ranks, self.device, self.seconds, self.repeats = ranks, device, seconds, repeats

    def wait_for_device(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time_calls(self, work: Callable[[], None], calls: int) -> float:
        """Time `calls` calls of `work`: seconds of the slowest rank."""
        self.ranks.barrier()
        self.wait_for_device()  # with what was given to it before
        started = time.perf_counter()
        for _ in range(calls):
            work()
        self.wait_for_device()
        return max(self.ranks.gather_values(time.perf_counter() - started))

    def count_calls(self, work: Callable[[], None], fewest: int) -> int:
        """Count the calls that take about `seconds`, the same on every rank.

        `fewest` calls warm up, another `fewest` are timed. The result is at least `fewest`.
        """
        self.time_calls(work, fewest)  # the first calls are slow, and do not count
        return max(fewest, math.ceil(self.seconds / (self.time_calls(work, fewest) / fewest)))


# --- the loader ---------------------------------------------------------------------------------


def _measure_loader(trainer: Trainer, clock: RankClock) -> LoaderSpeed:
    """The loader without a model."""
    n_non_zeros = 0

    def take_batch() -> None:
        nonlocal n_non_zeros
        n_non_zeros += _count_non_zeros(next(loader))

    batch_rates, non_zero_rates = [], []
    with trainer.open_loader(0) as loader:
        calls = clock.count_calls(take_batch, _choose_span(trainer.setup))
        phases: dict[str, float] = defaultdict(float)
        total_seconds = 0.0
        for _ in range(clock.repeats):
            n_non_zeros = 0
            with record_phases() as recorded:
                seconds = clock.time_calls(take_batch, calls)
            batch_rates.append(calls / seconds)
            non_zero_rates.append(sum(trainer.ranks.gather_values(n_non_zeros)) / seconds)
            total_seconds += seconds
            for name, phase_seconds in recorded.items():
                phases[name] += phase_seconds
    return LoaderSpeed(
        median(batch_rates),
        median(batch_rates) * trainer.setup.plan.batch_size,
        median(non_zero_rates),
        share_time(_average_phases(trainer.ranks, phases), total_seconds),
    )


def _choose_span(setup: Setup) -> int:
    """Micro-batches over which the loader opens new blocks at least once.

    It reads blocks in bursts, a window of every lane at a time, and plans ahead: a shorter span may
    find all that it asks for in memory.
    """
    plan = setup.plan
    window_cells = plan.lanes * plan.window_blocks * plan.block_cells
    batches = math.ceil(window_cells / max(plan.mean_shares.values()))
    return max(READ_AHEAD + STRETCH_BATCHES, min(LONGEST_SPAN, batches))


def _count_non_zeros(batch: Batch) -> int:
    counts = (observed.counts for observed in batch.modalities.values())
    return sum(len(sparse.indices) for sparse in counts if isinstance(sparse, SparseCounts))


def _average_phases(ranks: Ranks, phases: dict[str, float]) -> dict[str, float]:
    """Mean over ranks of the seconds in each phase."""
    all_phases = ranks.gather_values(dict(phases))
    names = sorted({name for rank_phases in all_phases for name in rank_phases})
    return {
        name: sum(rank_phases.get(name, 0.0) for rank_phases in all_phases) / len(all_phases)
        for name in names
    }


def share_time(phases: dict[str, float], seconds: float) -> dict[str, float]:
    """Turn the seconds of each phase into shares that sum to 1.

    Args:
        phases: seconds by phase; where threads work side by side they may sum to more than
            `seconds`.
        seconds: by the clock; what no phase accounts for is called "other".
    """
    phases = {**phases, "other": max(seconds - sum(phases.values()), 0.0)}
    total = sum(phases.values())
    return {name: phase_seconds / total for name, phase_seconds in phases.items()}


# --- the model, and both ------------------------------------------------------------------------


def _leave_untrained(setup: Setup) -> Setup:
    """Skip the initialisation from cells: the values of weights do not change the speed."""
    config = setup.config
    trunk = config.model.trunk.model_copy(update={"projection_init": "random"})
    model = config.model.model_copy(update={"trunk": trunk})
    return replace(setup, config=config.model_copy(update={"model": model}))


def _measure_model(trainer: Trainer, clock: RankClock) -> ModelSpeed:
    """Steps on one batch that lies on the device."""
    with trainer.open_loader(0) as loader:
        # On the device already, so that nothing is copied there while steps are timed.
        batches = itertools.repeat(next(loader).to(trainer.device))
    calls = clock.count_calls(_make_stepper(trainer, batches), WARM_UP_STEPS)
    step_seconds = median(
        clock.time_calls(_make_stepper(trainer, batches), calls) / calls
        for _ in range(clock.repeats)
    )
    # The parts are timed in extra steps: waiting for the device after each part slows a step down.
    timed_engine = TimedEngine(trainer.engine, clock)
    clock.time_calls(_make_stepper(replace(trainer, engine=timed_engine), batches), calls)
    parts_ms = timed_engine.average_parts(trainer.setup.config.train.grad_accum)
    cells_per_s = _get_batch_size(trainer) / step_seconds
    return ModelSpeed(1e3 * step_seconds, *parts_ms, cells_per_s)


def _measure_training(trainer: Trainer, clock: RankClock) -> TrainingSpeed:
    """Steps on batches as the loader gives them."""
    with trainer.open_loader(0) as loader:
        take_step = _make_stepper(trainer, loader)
        calls = clock.count_calls(take_step, WARM_UP_STEPS)
        waited_before = loader.waited_seconds
        times = [clock.time_calls(take_step, calls) for _ in range(clock.repeats)]
        waited = (loader.waited_seconds - waited_before) / sum(times)
    step_seconds = median(times) / calls
    # All ranks wait for the one that waits longest.
    longest_wait = max(trainer.ranks.gather_values(waited))
    return TrainingSpeed(1e3 * step_seconds, _get_batch_size(trainer) / step_seconds, longest_wait)


class TimedEngine:
    """An engine whose parts of a step are timed, each to its end on the device."""

    def __init__(self, engine: Any, clock: RankClock) -> None:
        self._engine, self._clock = engine, clock
        self._seconds: dict[str, list[float]] = defaultdict(list)

    # All else is that of the engine itself.
    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *arguments: Any) -> Any:
        return self._time_part("forward", self._engine, *arguments)

    def backward(self, loss: torch.Tensor) -> None:
        """As the engine's."""
        self._time_part("backward", self._engine.backward, loss)

    def step(self) -> None:
        """As the engine's."""
        self._time_part("optimizer", self._engine.step)

    def average_parts(self, grad_accum: int) -> tuple[float, float, float]:
        """Average forward, backward and optimizer: medians over steps, in milliseconds.

        Args:
            grad_accum: micro-batches of a step, over which each part sums up.
        """
        forward, backward, optimizer = (
            1e3 * median(map(sum, zip(*[iter(self._seconds[name])] * grad_accum, strict=True)))
            for name in ("forward", "backward", "optimizer")
        )
        return forward, backward, optimizer

    def _time_part(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        self._clock.wait_for_device()
        started = time.perf_counter()
        result = work(*arguments)
        self._clock.wait_for_device()
        self._seconds[name].append(time.perf_counter() - started)
        return result


def _make_stepper(trainer: Trainer, batches: Iterator[Batch]) -> Callable[[], None]:
    """Make a function that takes the next optimizer step."""
    steps = itertools.cycle(range(trainer.setup.total_steps))

    def take_step() -> None:
        train_step(trainer, batches, next(steps))

    return take_step


def _get_batch_size(trainer: Trainer) -> int:
    return int(trainer.setup.config.data.batch_size)


def _describe_machine(trainer: Trainer) -> dict[str, Any]:
    """What the figures depend on."""
    config, device = trainer.setup.config, trainer.device
    on_gpu = device.type == "cuda"
    cpu_name = f"CPU ({torch.get_num_threads()} threads)"
    return {
        "store": config.store,
        "fingerprint": trainer.setup.store.fingerprint,
        "batch_size": config.data.batch_size,
        "precision": config.train.precision,
        "ranks": trainer.ranks.world,
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if on_gpu else cpu_name,
        "cpus": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }
