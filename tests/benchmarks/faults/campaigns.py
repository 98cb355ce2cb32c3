"""The campaigns: what is done to a run, what is counted."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from clue_dist.checkpoint import resuming
from clue_dist.ranks import Ranks
from tests.benchmarks import common
from tests.benchmarks.faults.jobs import (
    Job,
    committed_at,
    job,
    last_step,
    partials,
    resumes_at,
    signalled,
)
from tests.distributed.command import best_weights, largest_difference, metrics, train_args
from tests.faults.command import timeless
from tests.stores import make_store

CELLS = {"rna+adt": 400, "rna": 120, "adt": 80}
TRAINED = 580  # of these 600, as 20 are held out
BATCH = 64
SAVE_EVERY = 5
MOMENTS = ("save", "step", "start")  # of kills, in turns


@dataclass(frozen=True)
class Size:
    """How much of everything. steps: of the run that is killed, and of the unbroken one; saves: of the large config;
    features: of its RNA."""

    steps: int
    kills: int
    stops: int
    damages: int
    saves: int
    features: int


def args_of(folder: Path, name: str, size: Size, *settings: str) -> list[str]:
    """Arguments of launch/train.py for the small run that all but `saving` are about."""
    store = folder / "s.zarr"
    if not store.exists():
        make_store(store, cells=CELLS, features={"rna": 60, "adt": 10})
    lengths = (
        f"train.epochs={size.steps * BATCH / TRAINED}",
        f"train.validate_every={max(size.steps // 20, 5)}",
    )
    return train_args(
        folder,
        store,
        name,
        *lengths,
        "log.every=1",
        f"train.checkpoint_every={SAVE_EVERY}",
        *settings,
    )


def whole(folder: Path, size: Size) -> Path:
    """The run folder of the unbroken run, made once; its processes' sizes lie beside it."""

    def make(folder: Path) -> None:
        sinks = (
            "log.wandb=offline",
            "log.tensorboard=true",
            f"train.checkpoint_every={max(size.steps // 40, 5)}",
        )
        with job(folder / "whole", *args_of(folder, "whole", size, *sinks)) as one:
            samples = sampled(one)
        common.write_json(folder / "samples.json", samples)

    return common.once(folder, make) / "whole"


def sampled(one: Job) -> list[dict[str, Any]]:
    """Step, and by rank memory, descriptors and threads, while a job runs to its end."""
    samples = []
    one.await_step()
    ranks = one.ranks()
    while one.process.poll() is None:
        with contextlib.suppress(psutil.Error):  # a rank that has just ended
            sizes = [(p.memory_info().rss, p.num_fds(), p.num_threads()) for p in ranks]
            samples.append({"step": last_step(one.run), "ranks": sizes})
        time.sleep(1)
    if one.process.returncode != 0:
        raise common.BenchmarkError(
            "the unbroken run failed", where=one.run, got=one.out.read_text()[-2000:]
        )
    return samples


def steady(folder: Path, size: Size, shared: Path) -> common.Result:
    """Memory, descriptors and threads of the unbroken run."""
    samples = json.loads((whole(shared, size).parent / "samples.json").read_text())
    early = [s for s in samples if size.steps / 10 <= s["step"] < size.steps / 5] or samples[:1]
    late = [s for s in samples if s["step"] >= 0.9 * size.steps] or samples[-1:]

    def mean(of: list[dict[str, Any]], rank: int, what: int) -> float:
        return statistics.median(s["ranks"][rank][what] for s in of)

    ranks = range(len(samples[0]["ranks"]))
    memory = max(mean(late, r, 0) / mean(early, r, 0) for r in ranks)
    leaks = max(mean(late, r, what) - mean(early, r, what) for r in ranks for what in (1, 2))
    mib = max(mean(late, r, 0) for r in ranks) / 2**20
    numbers = {
        "steps": size.steps,
        "memory at the end to after a tenth": memory,
        "MiB of a rank": mib,
        "leaks": leaks,
    }
    return {
        "numbers": numbers,
        "bars": [memory, leaks],
        "samples": samples[:: max(1, len(samples) // 50)],
    }


def kills(folder: Path, size: Size, shared: Path) -> common.Result:
    """Kill, start again, and at the end compare with the unbroken run."""
    draw, run, args = random.Random(0), folder / "killed", args_of(folder, "killed", size)
    ended: dict[str, list[float]] = {moment: [] for moment in MOMENTS}
    again: dict[bool, list[float]] = {
        False: [],
        True: [],
    }  # by whether a checkpoint was half written
    went_on = unproven = 0
    for number in range(size.kills):
        moment = MOMENTS[number % len(MOMENTS)]
        with job(run, *args) as one:
            if moment == "start":
                one.ranks()
                time.sleep(draw.uniform(0, 8))
            else:
                one.await_step(draw.randrange(1, 10))  # raises where it does not go on
                went_on, unproven = went_on + unproven, 0
                if moment == "save":
                    one.await_save(draw)
                else:
                    time.sleep(draw.uniform(0, 1.5))
            victims = one.ranks()
            for victim in draw.choice([victims[:1], victims[1:], victims]):
                os.kill(victim.pid, signal.SIGKILL)
            code, seconds = one.end(60)
            if code == 0:
                raise common.BenchmarkError("a job whose rank was killed exited with 0", where=run)
            unproven += 1
            ended[moment].append(seconds)
            if moment != "start" or "going on from" in one.out.read_text():
                again[bool(partials(run) or partials(run, "best"))].append(
                    (last_step(run) - resumes_at(run)) / SAVE_EVERY
                )
    with job(run, *args) as one:
        code, _ = one.end(3600)
        went_on += unproven if code == 0 else 0
    same = timeless(run) == timeless(whole(shared, size)) and all(
        timeless(run, split) == timeless(whole(shared, size), split)
        for split in ("validation", "event")
    )
    difference = largest_difference(best_weights(run), best_weights(whole(shared, size)))
    numbers = {
        "kills": size.kills,
        "of them with a checkpoint half written": len(again[True]),
        "went on": went_on,
        **{
            f"longest until the job ended, in mid-{m}, s": max(of, default=0.0)
            for m, of in ended.items()
        },
        "most steps done again, save intervals, no checkpoint under way": max(
            again[False], default=0.0
        ),
        "most steps done again, save intervals, one half written": max(again[True], default=0.0),
        "steps in all": last_step(run),
        "difference of weights": difference,
        "all losses the same": float(same),
    }
    slowest = max(max(of, default=0.0) for of in ended.values())
    lost = [max(again[saving], default=0.0) for saving in (False, True)]
    return {
        "numbers": numbers,
        "bars": [went_on, slowest, *lost, difference if same else float("inf")],
    }


def stops(folder: Path, size: Size, shared: Path) -> common.Result:
    """USR1 to the ranks and SIGTERM to the launcher, in turns."""
    draw, run, args = random.Random(1), folder / "stopped", args_of(folder, "stopped", size)
    took, lost, codes = [], [], []
    for number in range(size.stops):
        with job(run, *args) as one:
            one.await_step(draw.randrange(1, 20))
            asked = time.time()
            if number % 2:
                launcher = next(p for p in one.ranks())
                launcher.parent().terminate()
            else:
                signalled(one, signal.SIGUSR1)
            codes.append(one.end(60)[0])
        took.append(committed_at(run) - asked)
        lost.append(last_step(run) - resumes_at(run))
    numbers = {
        "stops": size.stops,
        "longest until saved, s": max(took),
        "steps lost": sum(lost),
        "USR1 that ended with 75": codes[::2].count(75),
        "SIGTERM that ended with another code than 0": sum(code != 0 for code in codes[1::2]),
    }
    return {"numbers": numbers, "bars": [max(took), sum(lost)]}


def damages(folder: Path, size: Size, shared: Path) -> common.Result:
    """Of the newest checkpoint of the unbroken run; which is chosen to go on from?"""
    source = whole(shared, size) / "checkpoints"
    before, newest = sorted(p for p in source.iterdir() if not p.suffix)[-2:]
    draw, used, found = random.Random(2), 0, 0
    for number in range(3 * size.damages):
        there = folder / "damaged"
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(source, there / "checkpoints")
        victim = draw.choice(sorted((there / "checkpoints" / newest.name).iterdir()))
        HARMS[number % 3](victim, draw)
        with contextlib.redirect_stdout(io.StringIO()):
            chosen = resuming.choose_checkpoint(there, "auto", Ranks())
        used += chosen is not None and chosen.name == newest.name
        found += chosen is not None and chosen.name == before.name
    return {
        "numbers": {"damages": 3 * size.damages, "used": used, "the one before used": found},
        "bars": [used, found],
    }


def _flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


HARMS: list[Callable[[Path, random.Random], None]] = [
    _flip,
    lambda path, draw: os.truncate(path, draw.randrange(path.stat().st_size)),
    lambda path, draw: path.unlink(),
]


EVERY, LARGE = 4, 128  # steps between two saves of the large config, its batch


def saving(folder: Path, size: Size, shared: Path) -> common.Result:
    """How long steps of the large config take while a checkpoint is saved, and how much of that they only wait, next to
    its other steps; on two ranks, which take both cores, and on one, which leaves one to what saves. Then it is stopped
    while it saves."""
    make_store(
        folder / "large.zarr",
        cells={"rna+adt": 900, "rna": 300},
        features={"rna": size.features, "adt": 134},
    )
    steps = size.saves * EVERY
    both, free = (_timed(folder, f"on-{ranks}", size, ranks) for ranks in (2, 1))
    run = folder / "on-2"
    with job(run, *_large(folder, run, 2 * steps)) as one:
        if not one.await_save(random.Random(3), within_s=120):
            raise common.BenchmarkError(
                "no save was seen", where=run, got=one.out.read_text()[-2000:]
            )
        asked = time.time()
        signalled(one, signal.SIGUSR1)
        code, _ = one.end(120)
        stopped = committed_at(run) - asked
        if code != 75 or resumes_at(run) != last_step(run):
            raise common.BenchmarkError(
                "the stop lost a step", where=run, got=one.out.read_text()[-2000:]
            )
    numbers = {
        "GB of a checkpoint": sum(
            p.stat().st_size for p in next(run.glob("checkpoints/step-*")).iterdir()
        )
        / 1e9,
        **{f"{name}, no core free": value for name, value in both.items()},
        **{f"{name}, a core free": value for name, value in free.items()},
        "stopped as it began to save: until all was saved, s": stopped,
    }
    waits = (
        "waiting for a checkpoint, in steps",
        "waiting for a checkpoint and best weights, in steps",
    )
    bars = [*(max(both[name], free[name]) for name in waits), free[BESIDE] - 1, stopped]
    return {"numbers": numbers, "bars": bars}


BESIDE = "a step while a checkpoint is copied and written, in steps"


def _large(folder: Path, run: Path, steps: int) -> list[str]:
    """Arguments of launch/train.py."""
    settings = [
        f"store={folder / 'large.zarr'}",
        f"run={run}",
        f"data.batch_size={LARGE}",
        "train.precision=fp32",  # two cores have no bf16 worth the name
        f"train.validate_every={2 * EVERY}",
        f"train.checkpoint_every={EVERY}",
        "log.every=1",
        "log.wandb=disabled",
        "log.tensorboard=false",
        f"train.epochs={steps * LARGE / 1155}",
    ]
    return ["launch/train.py", "--config", "configs/zero3.json", "--set", *settings]


def _timed(folder: Path, name: str, size: Size, ranks: int) -> dict[str, float]:
    """Train with a save every few steps; medians, and what was waited at most."""
    run = folder / name
    with job(run, *_large(folder, run, size.saves * EVERY), ranks=ranks) as one:
        code, _ = one.end(3000)
        if code != 0:
            raise common.BenchmarkError(
                "training failed", where=run, got=one.out.read_text()[-2000:]
            )
    lines = metrics(run)[2:-1]
    seconds = {line["step"]: LARGE / line["cells_per_s"] for line in lines}
    held = {line["step"]: line["saving_wait"] * seconds[line["step"]] for line in lines}
    # What is asked for at the end of a step is waited for in the next; every other time it is best weights, too.
    after = [n for n in seconds if n % (2 * EVERY) == EVERY + 1]
    after_both = [n for n in seconds if n % (2 * EVERY) == 1]
    step = statistics.median(seconds[n] for n in seconds if n % EVERY == 0)
    return {
        "saves": len(after + after_both),
        "a step, s": step,
        "waiting for a checkpoint, in steps": statistics.median(held[n] for n in after) / step,
        "waiting for a checkpoint and best weights, in steps": statistics.median(
            held[n] for n in after_both
        )
        / step,
        "waiting at most, in steps": max(held.values()) / step,
        BESIDE: statistics.median(seconds[n] for n in after) / step,
    }


CAMPAIGNS: dict[str, Callable[[Path, Size, Path], common.Result]] = {
    "saving": saving,
    "steady": steady,
    "kills": kills,
    "stops": stops,
    "damages": damages,
}
