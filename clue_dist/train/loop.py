"""fit(): fetch, step, log, validate, save, stop."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clue_dist.checkpoint import engine_state, run_folder
from clue_dist.checkpoint.model_card import write_model_card
from clue_dist.checkpoint.run_folder import RunState
from clue_dist.checkpoint.saver import Saver
from clue_dist.data.batch import Batch
from clue_dist.data.loader import Loader
from clue_dist.model.noise import Noise
from clue_dist.ranks import Ranks
from clue_dist.resilience.peers import Peers
from clue_dist.resilience.run_lock import JOB, hold_run_lock
from clue_dist.resilience.stop_signals import StopFlag
from clue_dist.train import validate
from clue_dist.train.engine import build_engine, join_process_group
from clue_dist.train.meter import Meter
from clue_dist.train.not_finite import judge_outcome
from clue_dist.train.setup import Setup
from clue_dist.train.sinks import Sinks
from clue_dist.train.step import train_step


@dataclass(frozen=True)
class TrainingResult:
    """state: where the run ended; finished: False if a signal stopped it before."""

    state: RunState
    finished: bool


def fit(setup: Setup, ranks: Ranks, resume: str = "auto") -> TrainingResult:
    """Train until the last step, until validation stops improving, or until a signal asks to stop.

    Raises:
        ResumeError: nothing that `resume` names can be gone on from, or another job is in the run folder.
        LostError: another rank has ended.
        StoreError: a damaged chunk; TrainingError: loss or gradient stay not finite; SavingError: a full disk.
    """
    with StopFlag() as stop, Peers(ranks) as peers:
        device = join_process_group(ranks)
        with hold_run_lock(Path(setup.config.run), ranks):
            with peers.announce_errors():
                engine, state = _start(setup, ranks, resume, device)
            result = _train(engine, setup, ranks, state, device, stop, peers)
            engine.destroy()
    return result


def _start(setup: Setup, ranks: Ranks, resume: str, device: torch.device) -> tuple[Any, RunState]:
    """A fresh engine, or one that goes on from a checkpoint, of however many ranks it was."""
    run = Path(setup.config.run)
    found = run_folder.choose_checkpoint(run, resume, ranks)
    if found is None:
        state = RunState(0, ranks.world, setup.store.fingerprint)
        engine = build_engine(setup, ranks, device)
    else:
        state = run_folder.require_same_run(run, setup.config, setup.store.fingerprint, found)
        engine = engine_state.restore_engine(
            lambda start: build_engine(setup, ranks, device, start), found, state
        )
    # What was refused until here has changed nothing.
    state = run_folder.set_aside_later_work(run, state, ranks)
    ranks.run_on_first(lambda: write_model_card(run, setup.store, setup.config))
    return engine, replace(state, job=JOB)


def _train(
    engine: Any,
    setup: Setup,
    ranks: Ranks,
    state: RunState,
    device: torch.device,
    stop: StopFlag,
    peers: Peers,
) -> TrainingResult:
    run, t, every = Path(setup.config.run), setup.config.train, setup.config.log.every
    held_out = setup.load_held_out_batch()
    held_out = held_out.to(device) if held_out is not None else None
    sinks = Sinks(run, setup.config, setup.total_steps, state.step, ranks)
    loading, saving = (
        open_loader(setup, ranks, state.step, device),
        Saver(run, engine, ranks, t.keep, sinks.sync),
    )
    with sinks, loading as loader, saving as saver, peers.announce_errors():
        sinks.say(_greeting(run, state, ranks))
        state = replace(state, world=ranks.world)
        meter = Meter(setup, loader, saver, device, state.logged)
        done, outcome = _finished(state, setup), None
        while not done:
            outcome = train_step(engine, setup, ranks, loader, state.step, device, saver, stop)
            state = judge_outcome(
                engine, setup, ranks, replace(state, step=state.step + 1), outcome, sinks
            )
            meter.add(outcome.terms, outcome.skipped)
            sinks.advance()
            last = state.step == setup.total_steps
            if last or is_due(state, every):
                sinks.write("train", state.step, meter.read(state.step))
            if last or is_due(state, t.validate_every):
                state = _validate(engine, setup, ranks, held_out, state, sinks, saver)
            done = _finished(state, setup) or outcome.stop
            if outcome.failed:
                saver.finish()  # raises what went wrong
            if done or is_due(state, t.checkpoint_every):
                saver.checkpoint(
                    replace(
                        state, updates=engine_state.count_updates(engine), logged=meter.so_far()
                    )
                )
        saver.finish()
        if not _finished(state, setup):
            sinks.say(
                f"asked to stop: saved at step {state.step}, `--resume auto` goes on from there"
            )
        elif outcome is not None and state.step < setup.total_steps:
            sinks.say(f"no better validation since step {state.best_step}: stopping early")
    return TrainingResult(state, _finished(state, setup))


def _finished(state: RunState, setup: Setup) -> bool:
    """Whether all steps are done, or too many validations have not bettered the score."""
    patience = setup.config.train.patience
    return state.step >= setup.total_steps or (patience > 0 and state.bad >= patience)


def _greeting(run: Path, state: RunState, ranks: Ranks) -> str:
    if not state.step:
        return f"starting: {run}"
    were = f", saved by {state.world} ranks" if state.world != ranks.world else ""
    return f"going on from step {state.step}{were}: {run}"


def is_due(state: RunState, every: int | str) -> bool:
    """Whether something that happens every so many steps happens now. `every` is a number once resolved."""
    return state.step % int(every) == 0


def open_loader(setup: Setup, ranks: Ranks, step: int, device: torch.device) -> Loader:
    """This rank's batches from optimizer step `step` on."""
    d = setup.config.data
    first = step * setup.config.train.grad_accum
    pin = device.type == "cuda"
    return Loader(
        setup.store,
        setup.plan,
        rank=ranks.rank,
        world=ranks.world,
        first=first,
        prefetch=d.prefetch,
        pin=pin,
    )


def _validate(
    engine: Any,
    setup: Setup,
    ranks: Ranks,
    held_out: Batch | None,
    state: RunState,
    sinks: Sinks,
    saver: Saver,
) -> RunState:
    """Score the held-out cells, keep the best weights, count the validations without a better score.

    Scores within a standard error of the lowest cannot be told apart; the latest of them wins, as steps have become
    smaller since.
    """
    if held_out is None:  # the last weights are the best there are
        state = replace(state, best_step=state.step)
        saver.best(state)
        return state
    noise = Noise(
        setup.config.seed,
        0,
        {"held out": held_out.n_cells},
        lanes=1,
        device=held_out.observed.device,
    )
    values = validate.score_held_out_cells(engine, held_out, setup.has_paired_cells, noise)
    # Rank 0 decides: rounding may differ between ranks.
    score, error = ranks.run_on_first(lambda: (values["score"], values["error"]))
    if not math.isfinite(score):
        sinks.event("validation not finite", state.step, {"best_step": state.best_step})
        return replace(state, bad=state.bad + 1)
    lower = state.best is None or score < state.best
    lowest = score if state.best is None else min(score, state.best)
    state = replace(state, best=lowest, bad=0 if lower else state.bad + 1)
    if score <= lowest + error:
        state = replace(state, best_step=state.step)
        saver.best(state)
    sinks.write("validation", state.step, values | {"best": lowest, "best_step": state.best_step})
    return state
