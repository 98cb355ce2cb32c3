"""Where the time goes on this machine: data alone, the model alone, both together. Nothing is written."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch

from clue_dist.data.batch import Batch, SparseCounts
from clue_dist.data.loader import READ_AHEAD, STRETCH_BATCHES
from clue_dist.data.timing import record_phases
from clue_dist.ranks import Ranks
from clue_dist.train.engine import build_engine, join_process_group
from clue_dist.train.loop import open_loader
from clue_dist.train.setup import Setup
from clue_dist.train.step import train_step

WARM_UP = 3  # steps before the clock runs: memory is allocated, kernels are chosen
MAX_SPAN = 64  # micro-batches at most that a repeat of the loader must cover
FINE = 0.05  # share of the time a step may wait for data before data counts as the limit


@dataclass(frozen=True)
class LoaderSpeed:
    """The loader without a model, over all ranks; medians over the repeats. non_zeros_per_s: of sparse modalities.

    phases: share of the loader's time, by phase, over all repeats and ranks; they sum to 1.
    """

    batches_per_s: float
    cells_per_s: float
    non_zeros_per_s: float
    phases: dict[str, float]


@dataclass(frozen=True)
class ModelSpeed:
    """Steps on one real batch that lies on the device, over all ranks; medians.

    The three parts are each timed to their end on the device, `step_ms` without such waiting between them.
    """

    step_ms: float
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    cells_per_s: float


@dataclass(frozen=True)
class TrainingSpeed:
    """Training as it is. waited: share of the time in which a step waited for its batch, of the rank that did most."""

    step_ms: float
    cells_per_s: float
    waited: float


@dataclass(frozen=True)
class SpeedReport:
    about: dict[str, Any]
    data: LoaderSpeed
    model: ModelSpeed
    both: TrainingSpeed

    @property
    def feeds(self) -> float:
        """How many models of this speed the loader could feed."""
        return self.data.cells_per_s / self.model.cells_per_s

    @property
    def verdict(self) -> str:
        return judge_speed(self.data, self.model, self.both, self.about["device"])

    def as_dict(self) -> dict[str, Any]:
        """What `--json` writes."""
        return {**asdict(self), "feeds": self.feeds, "verdict": self.verdict}

    def text(self) -> str:
        """The report for people; the last line is the verdict."""
        a, d, m, b = self.about, self.data, self.model, self.both
        shares = sorted(d.phases.items(), key=lambda item: -item[1])
        return "\n".join(
            [
                f"{a['store']}: batches of {a['batch_size']:,} cells, {a['ranks']} x {a['name']}, {a['precision']}",
                f"data alone    {d.cells_per_s:>12,.0f} cells/s  {d.batches_per_s:,.1f} batches/s, "
                f"{d.non_zeros_per_s / 1e6:,.1f} M non-zeros/s",
                f"              {', '.join(f'{name} {share:.0%}' for name, share in shares)}",
                f"model alone   {m.cells_per_s:>12,.0f} cells/s  step {m.step_ms:.1f} ms",
                f"              forward {m.forward_ms:.1f} ms, backward {m.backward_ms:.1f} ms, "
                f"optimizer {m.optimizer_ms:.1f} ms",
                f"both          {b.cells_per_s:>12,.0f} cells/s  step {b.step_ms:.1f} ms, "
                f"waited for data {b.waited:.1%} of the time",
                self.verdict,
            ]
        )


def judge_speed(data: LoaderSpeed, model: ModelSpeed, both: TrainingSpeed, device: str) -> str:
    """One line in plain words: what limits training here, and by how much. device: "cuda" or "cpu"."""
    feeds, unit = data.cells_per_s / model.cells_per_s, "GPUs" if device == "cuda" else "models"
    if both.waited <= FINE:
        could = (
            f"the loader could feed {_count(feeds)} such {unit}"
            if feeds >= 1
            else "the loader just keeps up"
        )
        return f"the model is the limit: {could}"
    slowest, share = max(data.phases.items(), key=lambda item: item[1])
    where = f"most of the loader's time goes to: {slowest} ({share:.0%})"
    if feeds < 1:
        return f"data is the limit: the model could take {_count(1 / feeds)} times what the loader gives; {where}"
    return (
        f"data is the limit, but only beside the model: alone, the loader could feed {_count(feeds)} such {unit}; "
        f"give each rank more CPU cores; {where}"
    )


def _count(times: float) -> str:
    """14.7 -> 14, 1.47 -> 1.4: never more than there is."""
    return f"{int(times):,}" if times >= 10 else f"{math.floor(times * 10) / 10:.1f}"


def measure_speed(
    setup: Setup, ranks: Ranks, seconds: float = 2.0, repeats: int = 5
) -> SpeedReport:
    """Measure all three, `repeats` times about `seconds` each; all ranks call this and get the same report.

    Raises:
        StoreError: a damaged chunk.
    """
    device = join_process_group(ranks)
    clock = RankClock(ranks, device, seconds, repeats)
    data = _data_alone(setup, ranks, device, clock)
    engine = build_engine(_untrained(setup), ranks, device)
    model = _model_alone(engine, setup, ranks, device, clock)
    both = _both(engine, setup, ranks, device, clock)
    engine.destroy()
    return SpeedReport(_about(setup, ranks, device), data, model, both)


class RankClock:
    """Times repeats of the same work on all ranks: they begin together, and the slowest one counts."""

    def __init__(self, ranks: Ranks, device: torch.device, seconds: float, repeats: int) -> None:
        self.ranks, self.device, self.seconds, self.repeats = ranks, device, seconds, repeats

    def sync(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def times(self, work: Callable[[], None], calls: int) -> float:
        """Seconds of `calls` calls of `work`, of the slowest rank."""
        self.ranks.barrier()
        self.sync()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        self.sync()
        return max(self.ranks.all_gather_object(time.perf_counter() - started))

    def calls(self, work: Callable[[], None], at_least: int) -> int:
        """How many calls take about `seconds`, the same on every rank. `at_least` calls warm up, as many are timed."""
        self.times(work, at_least)
        return max(at_least, math.ceil(self.seconds / (self.times(work, at_least) / at_least)))


def _data_alone(setup: Setup, ranks: Ranks, device: torch.device, clock: RankClock) -> LoaderSpeed:
    non_zeros = 0

    def work() -> None:
        nonlocal non_zeros
        non_zeros += _non_zeros(next(loader))

    rates, found = [], []
    with open_loader(setup, ranks, 0, device) as loader:
        calls = clock.calls(work, _span(setup))
        phases: dict[str, float] = defaultdict(float)
        spent = 0.0
        for _ in range(clock.repeats):
            non_zeros = 0
            with record_phases() as watched:
                seconds = clock.times(work, calls)
            rates.append(calls / seconds)
            found.append(sum(ranks.all_gather_object(non_zeros)) / seconds)
            spent += seconds
            for name, s in watched.items():
                phases[name] += s
    return LoaderSpeed(
        median(rates),
        median(rates) * setup.plan.batch_size,
        median(found),
        share_time(_summed(ranks, phases), spent),
    )


def _summed(ranks: Ranks, phases: dict[str, float]) -> dict[str, float]:
    """Mean over ranks of the seconds in each phase."""
    everyone = ranks.all_gather_object(dict(phases))
    names = sorted({name for one in everyone for name in one})
    return {name: sum(one.get(name, 0.0) for one in everyone) / len(everyone) for name in names}


def share_time(phases: dict[str, float], spent: float) -> dict[str, float]:
    """Seconds by phase, out of `spent` by the clock -> shares that sum to 1, what is in no phase being "other".

    Phases may sum to more than the clock's time where threads work side by side.
    """
    other = max(spent - sum(phases.values()), 0.0)
    return {
        name: s / (sum(phases.values()) + other) for name, s in {**phases, "other": other}.items()
    }


def _span(setup: Setup) -> int:
    """Micro-batches in which the loader opens new blocks once: it reads them in bursts, a window of every lane, and
    plans ahead, so that fewer could all be there already."""
    plan = setup.plan
    cells = plan.lanes * plan.window_blocks * plan.block_cells
    return max(
        READ_AHEAD + STRETCH_BATCHES, min(MAX_SPAN, -(-cells // max(plan.stratum_shares.values())))
    )


def _non_zeros(batch: Batch) -> int:
    counts = (observed.counts for observed in batch.modalities.values())
    return sum(len(c.indices) for c in counts if isinstance(c, SparseCounts))


def _untrained(setup: Setup) -> Setup:
    """Weights do not change the speed: spare the pass over the cells that would initialise them."""
    c = setup.config
    trunk = c.model.trunk.model_copy(update={"projection_init": "random"})
    return replace(
        setup, config=c.model_copy(update={"model": c.model.model_copy(update={"trunk": trunk})})
    )


def _model_alone(
    engine: Any, setup: Setup, ranks: Ranks, device: torch.device, clock: RankClock
) -> ModelSpeed:
    with open_loader(setup, ranks, 0, device) as loader:
        batches = itertools.repeat(next(loader).to(device))
    calls = clock.calls(_steps(engine, setup, ranks, batches, device), WARM_UP)
    whole = [
        clock.times(_steps(engine, setup, ranks, batches, device), calls) / calls
        for _ in range(clock.repeats)
    ]
    watched = TimedEngine(engine, clock)
    clock.times(_steps(watched, setup, ranks, batches, device), calls)
    forward, backward, optimizer = watched.ms_per_step(setup.config.train.grad_accum)
    step = median(whole)
    return ModelSpeed(1e3 * step, forward, backward, optimizer, _batch_size(setup) / step)


def _both(
    engine: Any, setup: Setup, ranks: Ranks, device: torch.device, clock: RankClock
) -> TrainingSpeed:
    with open_loader(setup, ranks, 0, device) as loader:
        work = _steps(engine, setup, ranks, loader, device)
        calls = clock.calls(work, WARM_UP)
        before = loader.waited_seconds
        times = [clock.times(work, calls) for _ in range(clock.repeats)]
        waited = (loader.waited_seconds - before) / sum(times)
    step = median(times) / calls
    return TrainingSpeed(
        1e3 * step, _batch_size(setup) / step, max(ranks.all_gather_object(waited))
    )


class TimedEngine:
    """An engine whose parts of a step are timed, each to its end on the device."""

    def __init__(self, engine: Any, clock: RankClock) -> None:
        self._engine, self._clock = engine, clock
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *args: Any) -> Any:
        return self._timed("forward", self._engine, *args)

    def backward(self, loss: torch.Tensor) -> None:
        self._timed("backward", self._engine.backward, loss)

    def step(self) -> None:
        self._timed("optimizer", self._engine.step)

    def ms_per_step(self, grad_accum: int) -> list[float]:
        """Milliseconds of forward, backward and optimizer in one step of `grad_accum` micro-batches, medians."""
        parts = (self._seconds[name] for name in ("forward", "backward", "optimizer"))
        return [1e3 * median(map(sum, zip(*[iter(s)] * grad_accum, strict=True))) for s in parts]

    def _timed(self, name: str, work: Callable[..., Any], *args: Any) -> Any:
        self._clock.sync()
        started = time.perf_counter()
        got = work(*args)
        self._clock.sync()
        self._seconds[name].append(time.perf_counter() - started)
        return got


def _steps(
    engine: Any, setup: Setup, ranks: Ranks, batches: Iterator[Batch], device: torch.device
) -> Callable[[], None]:
    """A function that does the next optimizer step."""
    numbers = itertools.cycle(range(setup.total_steps))

    def work() -> None:
        train_step(engine, setup, ranks, batches, next(numbers), device)

    return work


def _batch_size(setup: Setup) -> int:
    return int(setup.config.data.batch_size)


def _about(setup: Setup, ranks: Ranks, device: torch.device) -> dict[str, Any]:
    c = setup.config
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU ({torch.get_num_threads()} threads)"
    )
    return {
        "store": c.store,
        "fingerprint": setup.store.fingerprint,
        "batch_size": c.data.batch_size,
        "precision": c.train.precision,
        "ranks": ranks.world,
        "device": device.type,
        "name": name,
        "cpus": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }
