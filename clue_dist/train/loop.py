"""fit(): fetch, step, log, validate, save, stop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clue_dist.config import Config
from clue_dist.data.batch import Batch
from clue_dist.data.loader import Loader
from clue_dist.errors import TrainingError
from clue_dist.model.noise import Noise
from clue_dist.ranks import Ranks
from clue_dist.train import checkpoint, validate
from clue_dist.train.checkpoint import State
from clue_dist.train.engine import build, join
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
    """Train until the last step, until validation stops improving, or until a signal asks to stop."""
    run, t = Path(setup.config.run), setup.config.train
    device = join(ranks)
    found = checkpoint.find(run, resume, ranks)
    state = State(0, ranks.world, setup.store.fingerprint)
    if found is not None:
        state = checkpoint.check_same_run(run, setup.config, setup.store.fingerprint, ranks.world, found)
    elif ranks.first:
        checkpoint.describe(run, setup.store, setup.config)
    engine = build(setup, ranks, device)
    if found is not None:
        checkpoint.restore(engine, found)

    held_out = setup.held_out().to(device)
    sinks = Sinks(run, setup.config, setup.total_steps, state.step, ranks.first)
    sinks.say(f"{'going on from step ' + str(state.step) if found else 'starting'}: {run}")
    meter = Meter(setup.config, device)
    done = state.stopped or state.step >= setup.total_steps
    with _loader(setup, ranks, state, device) as loader, StopFlag(device) as stop:
        while not done:
            step = state.step
            terms = train_step(engine, setup, ranks, loader, step, device)
            meter.add(terms, loader)
            state = replace(state, step=step + 1)
            sinks.advance()
            last = state.step == setup.total_steps
            if state.step % setup.config.log.every == 0 or last:
                sinks.write(
                    "train",
                    state.step,
                    meter.read() | {"epoch": setup.epoch(state.step), "lr": learning_rate(setup, step)},
                )
            if state.step % t.validate_every == 0 or last:  # type: ignore[operator]
                state = _validate(engine, setup, ranks, held_out, state, sinks)
            stopping = state.step % STOP_EVERY == 0 and stop.agreed()
            done = last or state.stopped or stopping
            if done or state.step % t.checkpoint_every == 0:  # type: ignore[operator]
                checkpoint.save(run, engine, state, ranks, t.keep)
            if stopping:
                sinks.say(f"asked to stop: saved at step {state.step}, `--resume auto` goes on from there")
    sinks.close()
    engine.destroy()
    return Result(state, state.stopped or state.step >= setup.total_steps)


def _loader(setup: Setup, ranks: Ranks, state: State, device: torch.device) -> Loader:
    d = setup.config.data
    first = state.step * setup.config.train.grad_accum
    pin = device.type == "cuda"
    return Loader(
        setup.store, setup.plan, rank=ranks.rank, world=ranks.world, first=first, prefetch=d.prefetch, pin=pin
    )


def _validate(engine: Any, setup: Setup, ranks: Ranks, held_out: Batch, state: State, sinks: Sinks) -> State:
    """Score the held-out cells, keep the best weights, count the validations without a better score."""
    if not held_out.n_cells:
        checkpoint.save_best(Path(setup.config.run), engine, state, ranks)
        return state
    noise = Noise(setup.config.seed, 0, {"held out": held_out.n_cells}, lanes=1, device=held_out.observed.device)
    values = validate.score(engine, held_out, setup.paired, noise)
    score = ranks.all_gather_object(values["score"])[0]  # rank 0 decides: rounding may differ between ranks
    if state.best is None or score < state.best:
        state = replace(state, best=score, best_step=state.step, bad=0)
        checkpoint.save_best(Path(setup.config.run), engine, state, ranks)
    else:
        state = replace(state, bad=state.bad + 1)
    sinks.write("validation", state.step, values | {"best": state.best or score, "best_step": state.best_step})
    patience = setup.config.train.patience
    if patience and state.bad >= patience:  # type: ignore[operator]
        sinks.say(f"no better validation since step {state.best_step}: stopping early")
        return replace(state, stopped=True)
    return state


def train_step(
    engine: Any, setup: Setup, ranks: Ranks, loader: Loader, step: int, device: torch.device
) -> dict[str, Tensor]:
    """One optimizer step: grad_accum micro-batches, each the same global set of cells whatever the ranks."""
    c, plan = setup.config, setup.plan
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(setup, step) * group["lr_scale"]
    sums: dict[str, Tensor] = {}
    for micro in range(c.train.grad_accum):
        batch = next(loader).to(device)
        noise = Noise(
            c.seed, step * c.train.grad_accum + micro, plan.share, plan.lanes, ranks.rank, ranks.world, device
        )
        loss, terms = engine(batch, noise, kl_weight(setup, step))
        engine.backward(loss)
        engine.step()  # DeepSpeed updates at the last micro-batch
        for name, value in {"loss": loss.detach(), **terms}.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value / c.train.grad_accum
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
    """Means over the steps since the last look: loss terms, speed, share of time spent waiting for data."""

    def __init__(self, config: Config, device: torch.device) -> None:
        assert config.data.batch_size != "auto"
        self._cells, self._device = config.data.batch_size, device
        self._sums: dict[str, Tensor] = {}
        self._steps, self._since, self._waited = 0, time.perf_counter(), 0.0

    def add(self, terms: dict[str, Tensor], loader: Loader) -> None:
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=self._device)) + value
        self._steps += 1
        self._loader = loader

    def read(self) -> dict[str, float]:
        """Rank-0 means; raises if the loss is not finite, naming the terms that are not."""
        means = {name: float(v) / self._steps for name, v in self._sums.items()}
        seconds = time.perf_counter() - self._since
        waited = self._loader.waited - self._waited
        out = {
            **means,
            "cells_per_s": self._steps * self._cells / seconds,
            "data_wait": waited / seconds,
        }
        if self._device.type == "cuda":
            out["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self._sums, self._steps, self._since, self._waited = {}, 0, time.perf_counter(), self._loader.waited
        broken = [name for name, v in means.items() if not math.isfinite(v)]
        if broken:
            raise TrainingError(
                "the loss is not finite", where=", ".join(broken), fix="lower train.lr, or look for broken counts"
            )
        return out
