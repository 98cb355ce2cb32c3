"""The campaigns: what is done to a run, what is counted.

Each takes a folder of its own, how much to do, and the folder in which the unbroken run is kept.
"""

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

import numpy as np
import psutil

from clue_dist.checkpoint import resuming
from clue_dist.errors import ResumeError
from clue_dist.ranks import Ranks
from tests.benchmarks.kept import make_once, write_json
from tests.benchmarks.report import Result
from tests.damages import KINDS, harm_bytes, write_or_remove
from tests.distributed.command import largest_difference, metrics, train_args, trained_weights
from tests.faults import jobs
from tests.faults.command import timeless
from tests.faults.jobs import Job, find_committed_step, find_last_step, start_job
from tests.stores import make_store

CELLS = {"rna+adt": 400, "rna": 120, "adt": 80}
TRAINED = 580  # of these 600, as 20 are held out
BATCH = 64
SAVE_EVERY = 5
MOMENTS = ("save", "step", "start")  # of kills, in turns


@dataclass(frozen=True)
class CampaignSize:
    """How much of everything."""

    steps: int  # of the run that is killed, and of the unbroken one
    kills: int
    stops: int
    damages: int
    saves: int  # of the large config
    features: int  # of its RNA


def list_arguments(folder: Path, name: str, size: CampaignSize, *settings: str) -> list[str]:
    """Arguments of launch/train.py for the small run that all but `saving` are about."""
    store, every = folder / "s.zarr", max(size.steps // 20, 5)
    if not store.exists():
        make_store(store, cells=CELLS, features={"rna": 60, "adt": 10})
    lengths = [f"train.epochs={size.steps * BATCH / TRAINED}", f"train.validate_every={every}"]
    saves = ["log.every=1", f"train.checkpoint_every={SAVE_EVERY}"]
    return train_args(folder, store, name, *lengths, *saves, *settings)


def run_whole(folder: Path, size: CampaignSize) -> Path:
    """The run folder of the unbroken run, made once; its processes' sizes lie beside it."""

    def make(made: Path) -> None:
        every = f"train.checkpoint_every={max(size.steps // 40, 5)}"
        sinks = ("log.wandb=offline", "log.tensorboard=true", every)
        with start_job(made / "whole", *list_arguments(made, "whole", size, *sinks)) as job:
            write_json(made / "samples.json", sample_ranks(job))

    return make_once(folder, make) / "whole"


def sample_ranks(job: Job) -> list[Result]:
    """Step, and by rank memory, descriptors and threads, while a job runs to its end."""
    samples = []
    job.await_step()
    ranks = job.find_ranks()
    while job.process.poll() is None:
        with contextlib.suppress(psutil.Error):  # a rank that has just ended
            sizes = [(p.memory_info().rss, p.num_fds(), p.num_threads()) for p in ranks]
            samples.append({"step": find_last_step(job.run), "ranks": sizes})
        time.sleep(1)
    if job.process.returncode != 0:
        raise job.fail("the unbroken run failed")
    return samples


def watch_sizes(folder: Path, size: CampaignSize, shared: Path) -> Result:
    """Memory, descriptors and threads of the unbroken run."""
    samples = json.loads((run_whole(shared, size).parent / "samples.json").read_text())
    steps = np.array([sample["step"] for sample in samples]) / size.steps
    sizes = np.array([sample["ranks"] for sample in samples], float)  # (samples, ranks, 3)
    early, late = (steps >= 0.1) & (steps < 0.2), steps >= 0.9
    first = np.median(sizes[early] if early.any() else sizes[:1], axis=0)
    last = np.median(sizes[late] if late.any() else sizes[-1:], axis=0)
    return {
        "steps": size.steps,
        "memory at the end to after a tenth": float((last[:, 0] / first[:, 0]).max()),
        "leaks": float((last - first)[:, 1:].max()),
        "MiB of a rank": float(last[:, 0].max()) / 2**20,
        "samples": samples[:: max(1, len(samples) // 50)],
    }


def kill_ranks(folder: Path, size: CampaignSize, shared: Path) -> Result:
    """Kill, start again, and at the end compare with the unbroken run."""
    draw, run = random.Random(0), folder / "killed"
    args = list_arguments(folder, "killed", size)
    ended: dict[str, list[float]] = {moment: [0.0] for moment in MOMENTS}
    again: dict[bool, list[float]] = {True: [], False: []}  # whether a checkpoint was half written
    went_on = unproven = 0
    for number in range(size.kills):
        moment = MOMENTS[number % len(MOMENTS)]
        with start_job(run, *args) as job:
            if moment == "start":
                job.find_ranks()
                time.sleep(draw.uniform(0, 8))
            else:
                job.await_step(draw.randrange(1, 10))  # raises where it does not go on
                went_on, unproven = went_on + unproven, 0
                if moment == "save":
                    job.await_save(draw)
                else:
                    time.sleep(draw.uniform(0, 1.5))
            ranks = job.find_ranks()
            for victim in draw.choice([ranks[:1], ranks[1:], ranks]):
                os.kill(victim.pid, signal.SIGKILL)
            code, seconds = job.await_end(60)
            if code == 0:
                raise job.fail("a job whose rank was killed exited with 0")
            unproven += 1
            ended[moment].append(seconds)
            if moment != "start" or "going on from" in job.log.read_text():
                lost = (find_last_step(run) - find_committed_step(run)) / SAVE_EVERY
                again[bool(jobs.list_partials(run) or jobs.list_partials(run, "best"))].append(lost)
    with start_job(run, *args) as job:
        code, _ = job.await_end(3600)
        went_on += unproven if code == 0 else 0
    unbroken, splits = run_whole(shared, size), ("train", "validation", "event")
    same = all(timeless(run, split) == timeless(unbroken, split) for split in splits)
    difference = largest_difference(trained_weights(run), trained_weights(unbroken))
    half, whole = (max(again[saving], default=0.0) for saving in (True, False))
    return {
        "kills": size.kills,
        "with a checkpoint half written": len(again[True]),
        "went on": went_on,
        "seconds until the job ended": max(map(max, ended.values())),
        **{f"in mid-{moment}, s": max(took) for moment, took in ended.items()},
        "save intervals done again, no checkpoint under way": whole,
        "save intervals done again, one half written": half,
        "steps in all": find_last_step(run),
        "all losses the same": float(same),
        "difference of weights": difference if same else float("inf"),
    }


def stop_jobs(folder: Path, size: CampaignSize, shared: Path) -> Result:
    """USR1 to the ranks and SIGTERM to the launcher, in turns."""
    draw, run = random.Random(1), folder / "stopped"
    args = list_arguments(folder, "stopped", size)
    took, lost, codes = [], [], []
    for number in range(size.stops):
        with start_job(run, *args) as job:
            job.await_step(draw.randrange(1, 20))
            asked = time.time()
            if number % 2:
                job.find_ranks()[0].parent().terminate()
            else:
                job.send_signal(signal.SIGUSR1)
            codes.append(job.await_end(60)[0])
        took.append(jobs.find_commit_time(run) - asked)
        lost.append(find_last_step(run) - find_committed_step(run))
    return {
        "stops": size.stops,
        "seconds until saved": max(took),
        "steps lost": sum(lost),
        "USR1 that ended with 75": codes[::2].count(75),
        "SIGTERM that ended with another code than 0": sum(code != 0 for code in codes[1::2]),
    }


def damage_checkpoints(folder: Path, size: CampaignSize, shared: Path) -> Result:
    """Of the newest checkpoint of the unbroken run; which is chosen to go on from?

    One without its marker, as of a copy that was broken off, is refused: the one before is named.
    """
    source = run_whole(shared, size) / "checkpoints"
    before, newest = sorted(path.name for path in source.iterdir() if not path.suffix)[-2:]
    rng, chosen = np.random.default_rng(2), []
    for number in range(size.damages):
        run = folder / "damaged"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(source, run / "checkpoints")
        files = sorted((run / "checkpoints" / newest).iterdir())
        victim = files[rng.integers(len(files))]
        write_or_remove(victim, harm_bytes(victim.read_bytes(), KINDS[number % 3], rng)[0])
        with contextlib.redirect_stdout(io.StringIO()):
            chosen.append(_choose_after_damage(run))
    found = {"used": chosen.count(newest), "the one before used": chosen.count(before)}
    return {"damages": size.damages} | found


def _choose_after_damage(run: Path) -> str:
    """The name of the checkpoint that is gone on from, or that a refusal offers."""
    try:
        found = resuming.choose_checkpoint(run, "auto", Ranks())
    except ResumeError as refused:
        return str(refused.fix).partition("--resume ")[2].partition(";")[0].rpartition("/")[2]
    return found.name if found is not None else "none"


EVERY, LARGE = 4, 128  # steps between two saves of the large config, its batch
WAIT, WAIT_BOTH = (
    f"waiting for a checkpoint{more}, in steps" for more in ("", " and best weights")
)
BESIDE = "a step while a checkpoint is copied and written, in steps"


def time_saving(folder: Path, size: CampaignSize, shared: Path) -> Result:
    """How long steps of the large config take while a checkpoint is saved, and how long they wait.

    On two ranks, which take both cores, and on one. Then it is stopped while it saves.
    """
    cells, features = {"rna+adt": 900, "rna": 300}, {"rna": size.features, "adt": 134}
    make_store(folder / "large.zarr", cells=cells, features=features)
    both, free = (time_steps(folder, f"on-{ranks}", size, ranks) for ranks in (2, 1))
    run = folder / "on-2"
    with start_job(run, *list_large(folder, run, 2 * size.saves * EVERY)) as job:
        if not job.await_save(random.Random(3), within_s=120):
            raise job.fail("no save was seen")
        asked = time.time()
        job.send_signal(signal.SIGUSR1)
        code, _ = job.await_end(120)
        stopped = jobs.find_commit_time(run) - asked
        if code != 75 or find_committed_step(run) != find_last_step(run):
            raise job.fail("the stop lost a step")
    saved = next(run.glob("checkpoints/step-*")).iterdir()
    return {
        "GB of a checkpoint": sum(path.stat().st_size for path in saved) / 1e9,
        **{f"{name}, no core free": value for name, value in both.items()},
        **{f"{name}, a core free": value for name, value in free.items()},
        WAIT: max(both[WAIT], free[WAIT]),
        WAIT_BOTH: max(both[WAIT_BOTH], free[WAIT_BOTH]),
        "longer beside a save, in steps": free[BESIDE] - 1,
        "seconds from a stop amid a save": stopped,
    }


def list_large(folder: Path, run: Path, steps: int) -> list[str]:
    """Arguments of launch/train.py."""
    paths = (f"store={folder / 'large.zarr'}", f"run={run}")
    # Two cores have no bf16 worth the name.
    settings = (
        f"data.batch_size={LARGE} train.precision=fp32 train.validate_every={2 * EVERY} "
        f"train.checkpoint_every={EVERY} train.epochs={steps * LARGE / 1155} "
        "log.every=1 log.wandb=disabled log.tensorboard=false"
    )
    return ["launch/train.py", "--config", "configs/zero3.json", "--set", *paths, *settings.split()]


def time_steps(folder: Path, name: str, size: CampaignSize, ranks: int) -> dict[str, float]:
    """Train with a save every few steps; medians, and the longest wait."""
    run = folder / name
    with start_job(run, *list_large(folder, run, size.saves * EVERY), ranks=ranks) as job:
        if job.await_end(3000)[0] != 0:
            raise job.fail("training failed")
    lines = metrics(run)[2:-1]
    seconds = {line["step"]: LARGE / line["cells_per_s"] for line in lines}
    waits = {line["step"]: line["saving_wait"] * seconds[line["step"]] for line in lines}
    # What is asked for at the end of a step is waited for in the next; every other time it is best
    # weights, too.
    after, after_both = ([n for n in seconds if n % (2 * EVERY) == rest] for rest in (EVERY + 1, 1))
    step = statistics.median(seconds[n] for n in seconds if n % EVERY == 0)
    return {
        "saves": len(after + after_both),
        "a step, s": step,
        WAIT: statistics.median(waits[n] for n in after) / step,
        WAIT_BOTH: statistics.median(waits[n] for n in after_both) / step,
        "waiting at most, in steps": max(waits.values()) / step,
        BESIDE: statistics.median(seconds[n] for n in after) / step,
    }


CAMPAIGNS: dict[str, Callable[[Path, CampaignSize, Path], dict[str, Any]]] = {
    "saving": time_saving,
    "steady": watch_sizes,
    "kills": kill_ranks,
    "stops": stop_jobs,
    "damages": damage_checkpoints,
}
