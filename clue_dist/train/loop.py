"""fit(): fetch, step, log, validate, save, stop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clue_dist.data.batch import Batch
from clue_dist.data.loader import Loader
from clue_dist.errors import TrainingError
from clue_dist.model.noise import Noise
from clue_dist.ranks import Ranks
from clue_dist.train import checkpoint, validate
from clue_dist.train.checkpoint import State
from clue_dist.train.engine import build, join
from clue_dist.train.lock import alone_in
from clue_dist.train.setup import Setup
from clue_dist.train.sinks import Sinks
from clue_dist.train.stop import StopFlag

STOP_EVERY = 5  # steps between looks at the stop flag: each look waits for the device


@dataclass(frozen=True)
class Result:
    """state: where the run ended; finished: False if a signal stopped it before."""

    state: State
    finished: bool


def fit(setup: Setup, ranks: Ranks, resume: str = "auto") -> Result:
    """Train until the last step, until validation stops improving, or until a signal asks to stop.

    Raises:
        ResumeError: nothing that `resume` names can be gone on from, or another job is in the run folder.
        StoreError: a damaged chunk; TrainingError: the loss is not finite.
    """
    device = join(ranks)
    with alone_in(Path(setup.config.run), ranks):
        engine, state = _start(setup, ranks, resume, device)
        result = _train(engine, setup, ranks, state, device)
        engine.destroy()
    return result


def _start(setup: Setup, ranks: Ranks, resume: str, device: torch.device) -> tuple[Any, State]:
    """A fresh engine, or one that goes on from a checkpoint."""
    run = Path(setup.config.run)
    found = checkpoint.find(run, resume, ranks)
    state = State(0, ranks.world, setup.store.fingerprint)
    if found is not None:
        state = checkpoint.check_same_run(run, setup.config, setup.store.fingerprint, ranks.world, found)
    state = checkpoint.set_aside(run, state, ranks)
    if ranks.first and (found is None or not (run / "model.json").exists()):
        checkpoint.describe(run, setup.store, setup.config)
    engine = build(setup, ranks, device)
    if found is not None:
        checkpoint.restore(engine, found)
    return engine, state


def _train(engine: Any, setup: Setup, ranks: Ranks, state: State, device: torch.device) -> Result:
    run, t, every = Path(setup.config.run), setup.config.train, setup.config.log.every
    held_out = setup.held_out()
    held_out = held_out.to(device) if held_out is not None else None
    sinks = Sinks(run, setup.config, setup.total_steps, state.step, ranks.first)
    with sinks, loader_at(setup, ranks, state.step, device) as loader, StopFlag(device) as stop:
        sinks.say(f"{f'going on from step {state.step}' if state.step else 'starting'}: {run}")
        meter = Meter(setup, loader, device)
        done, stopping = state.stopped or state.step >= setup.total_steps, False
        while not done:
            meter.add(train_step(engine, setup, ranks, loader, state.step, device))
            state = replace(state, step=state.step + 1)
            sinks.advance()
            last = state.step == setup.total_steps
            stopping = due(state, STOP_EVERY) and stop.agreed()
            if last or due(state, every):
                sinks.write("train", state.step, meter.read(state.step))
            if last or due(state, t.validate_every):
                meter.check(state.step)
                state = _validate(engine, setup, ranks, held_out, state, sinks)
            done = last or state.stopped or stopping
            if done or due(state, t.checkpoint_every):
                meter.check(state.step)  # a broken state must not become what a run goes on from
                checkpoint.save(run, engine, state, ranks, t.keep)
        if stopping:
            sinks.say(f"asked to stop: saved at step {state.step}, `--resume auto` goes on from there")
    return Result(state, state.stopped or state.step >= setup.total_steps)


def due(state: State, every: int | str) -> bool:
    """Whether something that happens every so many steps happens now. `every` is a number once resolved."""
    return state.step % int(every) == 0


def loader_at(setup: Setup, ranks: Ranks, step: int, device: torch.device) -> Loader:
    """This rank's batches from optimizer step `step` on."""
    d = setup.config.data
    first = step * setup.config.train.grad_accum
    pin = device.type == "cuda"
    return Loader(
        setup.store, setup.plan, rank=ranks.rank, world=ranks.world, first=first, prefetch=d.prefetch, pin=pin
    )


def _validate(engine: Any, setup: Setup, ranks: Ranks, held_out: Batch | None, state: State, sinks: Sinks) -> State:
    """Score the held-out cells, keep the best weights, count the validations without a better score.

    Scores within a standard error of the lowest cannot be told apart; the latest of them wins, as steps have become
    smaller since.
    """
    run = Path(setup.config.run)
    if held_out is None:  # the last weights are the best there are
        state = replace(state, best_step=state.step)
        checkpoint.save_best(run, engine, state, ranks)
        return state
    noise = Noise(setup.config.seed, 0, {"held out": held_out.n_cells}, lanes=1, device=held_out.observed.device)
    values = validate.score(engine, held_out, setup.paired, noise)
    # Rank 0 decides: rounding may differ between ranks.
    score, error = ranks.all_gather_object((values["score"], values["error"]))[0]
    lower = state.best is None or score < state.best
    lowest = score if state.best is None else min(score, state.best)
    state = replace(state, best=lowest, bad=0 if lower else state.bad + 1)
    if score <= lowest + error:
        state = replace(state, best_step=state.step)
        checkpoint.save_best(run, engine, state, ranks)
    sinks.write("validation", state.step, values | {"best": lowest, "best_step": state.best_step})
    patience = setup.config.train.patience
    if patience and state.bad >= patience:
        sinks.say(f"no better validation since step {state.best_step}: stopping early")
        return replace(state, stopped=True)
    return state


def train_step(
    engine: Any, setup: Setup, ranks: Ranks, batches: Iterator[Batch], step: int, device: torch.device
) -> dict[str, Tensor]:
    """One optimizer step: grad_accum micro-batches, each the same global set of cells whatever the ranks."""
    c, plan = setup.config, setup.plan
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(setup, step) * group["lr_scale"]
    sums: dict[str, Tensor] = {}
    for micro in range(c.train.grad_accum):
        batch = next(batches).to(device)
        noise = Noise(
            c.seed, step * c.train.grad_accum + micro, plan.share, plan.lanes, ranks.rank, ranks.world, device
        )
        loss, terms = engine(batch, noise, kl_weight(setup, step))
        engine.backward(loss)
        engine.step()  # DeepSpeed updates at the last micro-batch
        for name, value in {"loss": loss.detach(), **terms}.items():
            sums[name] = sums.get(name, 0.0) + value / c.train.grad_accum
    return sums


def learning_rate(setup: Setup, step: int) -> float:
    """Linear warm-up, then a cosine down to final_lr; a pure function of the step."""
    t = setup.config.train
    warm = t.warmup * setup.total_steps
    if step < warm:
        return t.lr * (step + 1) / (warm + 1)
    progress = (step - warm) / max(setup.total_steps - warm, 1)
    return t.lr * (t.final_lr + (1 - t.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def kl_weight(setup: Setup, step: int) -> float:
    """Factor on lambda_kl: rises from 0 to 1 over the first kl_warmup of the steps."""
    warm = setup.config.train.kl_warmup * setup.total_steps
    return min(1.0, (step + 1) / warm) if warm else 1.0


class Meter:
    """Means over ranks and over the steps since the last reading: loss terms, speed, share of time waiting for data.

    Every rank must read and check at the same step.
    """

    def __init__(self, setup: Setup, loader: Loader, device: torch.device) -> None:
        self._setup, self._loader, self._device = setup, loader, device
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps, self._since, self._waited = 0, time.perf_counter(), self._loader.waited

    def add(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1

    def check(self, step: int) -> dict[str, float]:
        """The mean of each term since the last reading.

        Raises:
            TrainingError: one is not finite; it is named.
        """
        if not self._sums:
            return {}
        means = torch.stack(list(self._sums.values())) / self._steps
        dist.all_reduce(means)
        out = dict(zip(self._sums, (means / dist.get_world_size()).tolist(), strict=True))
        broken = [name for name, v in out.items() if not math.isfinite(v)]
        if broken:
            fix = "lower train.lr, or look for absurd counts in the store; checkpoints before it are sound"
            raise TrainingError("the loss is not finite", where=f"step {step}: {', '.join(broken)}", fix=fix)
        return out

    def read(self, step: int) -> dict[str, float]:
        """What `check` gives, progress and speed up to `step`; begins anew."""
        means = self.check(step)
        seconds = time.perf_counter() - self._since
        means["epoch"] = self._setup.epoch(step)
        means["lr"] = learning_rate(self._setup, step - 1)
        means["cells_per_s"] = self._steps * int(self._setup.config.data.batch_size) / seconds
        means["data_wait"] = (self._loader.waited - self._waited) / seconds
        if self._device.type == "cuda":
            means["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self._restart()
        return means
