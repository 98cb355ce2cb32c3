"""run_training(): fetch, step, log, validate, save, stop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from clue_dist.checkpoint import engine_state
from clue_dist.checkpoint.attempts import TrainingAttempt, record_attempt
from clue_dist.checkpoint.model_card import ModelCard, find_model_card, write_model_card
from clue_dist.checkpoint.resuming import (
    StartingPoint,
    find_starting_point,
    forget_lost_best,
    set_aside_later_work,
)
from clue_dist.checkpoint.run_folder import RunState
from clue_dist.checkpoint.saver import Kind, Saver
from clue_dist.errors import format_count
from clue_dist.process import print_line
from clue_dist.ranks import Ranks
from clue_dist.resilience.peers import Peers
from clue_dist.resilience.run_lock import find_slurm_job, hold_run_lock
from clue_dist.resilience.stop_signals import StopFlag
from clue_dist.train.engine import build_engine, join_process_group
from clue_dist.train.initial_weights import WarmStart
from clue_dist.train.meter import Meter
from clue_dist.train.not_finite import judge_outcome
from clue_dist.train.outcome import OutcomeReader
from clue_dist.train.setup import Setup, is_run_finished
from clue_dist.train.sinks import Sinks
from clue_dist.train.space_fit import explain_missing_space
from clue_dist.train.step import train_step
from clue_dist.train.trainer import Trainer, ValidationCells
from clue_dist.train.validate import format_best_weights, validate_model


@dataclass(frozen=True)
class TrainingResult:
    """How training ended."""

    state: RunState  # state after the last step
    finished: bool  # False if a signal stopped the run before
    interrupted: bool = False  # whether that signal was Ctrl-C, and came to this rank

    def format_ending(self) -> str:
        """Say where a finished run ended, and how good the weights are that it keeps."""
        ending = f"finished at step {self.state.step}"
        if self.state.best_score is None:
            return ending
        return f"{ending}, kept {format_best_weights(self.state)}"


def run_training(
    setup: Setup, ranks: Ranks, resume: str = "auto", warm_start: WarmStart | None = None
) -> TrainingResult:
    """Train to the last step, or until validation stops improving, or until a signal asks to stop.

    Args:
        setup: what to train on what.
        ranks: this rank among all; every rank must call.
        resume: "auto" goes on from the newest sound checkpoint, "never" begins anew, a folder names
            the checkpoint to go on from.
        warm_start: weights of an earlier run to begin with, where there is no checkpoint.

    Raises:
        ResumeError: training cannot go on from what `resume` names, or another job is training in
            the run folder.
        LostError: another rank has ended.
        StoreError: a chunk of the store is damaged.
        TrainingError: loss or gradient stay not finite.
        SavingError: a checkpoint could not be written, as on a full disk.
    """
    # From here on a signal asks for a stop, and the loss of a rank ends the others, even while they
    # wait for each other to join.
    with StopFlag() as stop, Peers(ranks) as peers:
        device = join_process_group(ranks)
        with hold_run_lock(setup.run_folder, ranks):
            with peers.announce_errors():
                start = find_starting_point(
                    setup.run_folder,
                    setup.config,
                    setup.store.fingerprint,
                    resume,
                    ranks,
                    earlier_weights=None if warm_start is None else warm_start.weights,
                )
                start = replace(start, state=forget_lost_best(setup.run_folder, start.state, ranks))
                if is_run_finished(setup, start.state):
                    return _leave_finished_run(setup, ranks, start)
                inherited = start.describe_inherited(setup.config)
                if inherited is not None and ranks.is_first:
                    print_line(inherited)
                setup = replace(setup, config=start.config)
                trainer, state = _start_trainer(setup, ranks, device, start, warm_start)
            result = _train_steps(trainer, state, start, stop, peers)
            trainer.engine.destroy()
    return replace(result, interrupted=stop.was_interrupted and not result.finished)


def _leave_finished_run(setup: Setup, ranks: Ranks, start: StartingPoint) -> TrainingResult:
    """Leave a run as it is: what it says of itself is true of what was trained."""
    if ranks.is_first:
        print_line(f"nothing is left to train, and nothing is written: {setup.run_folder}")
        if start.changes:
            print_line(f"differs from the run: {start.describe_changes()}")
    return TrainingResult(start.state, finished=True)


def _start_trainer(
    setup: Setup,
    ranks: Ranks,
    device: torch.device,
    start: StartingPoint,
    warm_start: WarmStart | None,
) -> tuple[Trainer, RunState]:
    """A fresh engine, or one that goes on from a checkpoint, whatever number of ranks saved it."""
    folder, state = setup.run_folder, start.state
    if start.checkpoint is None and warm_start is not None:
        if ranks.is_first:
            print_line("\n".join(warm_start.describe_weights()))
        engine = build_engine(
            setup, ranks, device, lambda model: warm_start.set_weights(model, setup)
        )
    elif start.checkpoint is None:
        engine = build_engine(setup, ranks, device)
    else:
        engine = engine_state.restore_engine(
            lambda set_weights: build_engine(setup, ranks, device, set_weights),
            start.checkpoint,
            state,
        )
    # A run that was refused so far has left its folder as it was.
    set_aside_later_work(folder, state.step, ranks)
    if not start.is_within(folder):
        earlier = _read_earlier_card(start, warm_start)
        ranks.run_on_first(lambda: write_model_card(folder, setup.store, setup.config, earlier))
    return Trainer(engine, setup, ranks, device), replace(state, job=find_slurm_job())


def _read_earlier_card(start: StartingPoint, warm_start: WarmStart | None) -> ModelCard | None:
    """Read the card of the run whose weights this one begins with, as they have seen its cells."""
    if start.checkpoint is not None:
        return find_model_card(start.checkpoint.parent.parent)
    return None if warm_start is None else warm_start.card


def _train_steps(
    trainer: Trainer, state: RunState, start: StartingPoint, stop: StopFlag, peers: Peers
) -> TrainingResult:
    """The loop, from `state` on until the run is finished or a signal asks to stop."""
    setup, engine, ranks = trainer.setup, trainer.engine, trainer.ranks
    settings, validation_cells = setup.config.train, trainer.load_validation_cells()
    sinks = Sinks(setup.run_folder, setup.config, setup.total_steps, state.step, ranks)
    loader = trainer.open_loader(state.step)
    saver = Saver(setup.run_folder, engine, ranks, settings.keep, _make_record_keeper(setup, sinks))
    # An error is announced first, so that other ranks do not wait while this one closes the rest.
    with sinks, loader, saver, peers.announce_errors():
        _announce_start(trainer, validation_cells, state, start, sinks)
        state = replace(state, world=ranks.world)
        meter, reader = Meter(trainer, loader, saver, state.logged), OutcomeReader()
        done = False
        while not done:
            latest = train_step(trainer, loader, state.step, saver, stop)
            # A skipped step counts, too: its cells have been dealt.
            state = replace(state, step=state.step + 1)
            is_last = state.step == setup.total_steps
            # On a CPU the outcome is there already.
            reads_latest = trainer.device.type == "cpu" or is_last or _is_any_due(setup, state)
            outcomes = reader.read_outcomes(latest, reads_latest)
            for outcome in outcomes:
                state = judge_outcome(trainer, state, outcome, sinks)
                meter.add_step(outcome)
            sinks.count_step()
            if is_last or is_due(state, setup.config.log.every):
                sinks.write_numbers("train", state.step, meter.read_means(state.step))
            if is_last or is_due(state, settings.validate_every):
                state = validate_model(trainer, validation_cells, state, sinks)
                if state.best_step == state.step:
                    saver.save_best_weights(state)
            stop_requested = any(outcome.stop_requested for outcome in outcomes)
            done = is_run_finished(setup, state) or stop_requested
            if any(outcome.save_failed for outcome in outcomes):
                saver.finish()  # which raises, on every rank, what went wrong
            if done or is_due(state, settings.checkpoint_every):
                updates, sums = engine_state.count_updates(engine), meter.collect_sums()
                saver.save_checkpoint(replace(state, updates=updates, logged=sums))
        saver.finish()
        if is_run_finished(setup, state):
            sinks.send_best_weights(state.best_step, state.best_score)
        explanation = _explain_early_end(setup, state)
        if explanation is not None:
            sinks.print_message(explanation)
    return TrainingResult(state, is_run_finished(setup, state))


def _announce_start(
    trainer: Trainer,
    validation_cells: ValidationCells,
    state: RunState,
    start: StartingPoint,
    sinks: Sinks,
) -> None:
    """Say and record where training begins, which settings changed, what the cells do not allow."""
    setup, ranks = trainer.setup, trainer.ranks
    attempt = TrainingAttempt(
        step=state.step,
        total_steps=setup.total_steps,
        ranks=ranks.world,
        device=trainer.describe_device(),
        train_cells=setup.train_cells,
        held_out_cells=setup.held_out_cells,
    )
    ranks.run_on_first(lambda: record_attempt(setup.run_folder, attempt))
    sinks.print_message(_format_greeting(trainer, state))
    explanation = explain_missing_space(trainer.model.modalities, validation_cells.fitting)
    if explanation is not None and state.step:
        sinks.print_message(explanation)
    elif explanation is not None:
        sinks.write_event("no common space", 1, {"why": explanation})
    if start.changes:
        # At the first step that they hold for: that line goes where that step is undone.
        sinks.write_event("settings changed", state.step + 1, start.format_changes())


def _make_record_keeper(setup: Setup, sinks: Sinks) -> Callable[[Kind], None]:
    """Make what rank 0 does before a commit, so that the folder says how the weights came about."""
    folder = setup.run_folder
    describe_once = functools.cache(
        lambda: write_model_card(folder, setup.store, setup.config, find_model_card(folder))
    )

    def keep_records(kind: Kind) -> None:
        sinks.flush_to_disk()
        # Until then an attempt that is killed leaves nothing that was trained with its settings.
        if kind == "checkpoints":
            describe_once()

    return keep_records


def _format_greeting(trainer: Trainer, state: RunState) -> str:
    """The line that says where training begins."""
    folder = trainer.setup.run_folder
    if not state.step:
        return f"starting: {folder}"
    is_other = state.world != trainer.ranks.world
    saved_by = f", saved by {format_count(state.world, 'rank')}" if is_other else ""
    return f"going on from step {state.step}{saved_by}: {folder}"


def _explain_early_end(setup: Setup, state: RunState) -> str | None:
    """Why training ended before its last step; None if it did not."""
    if not is_run_finished(setup, state):
        return f"asked to stop: saved at step {state.step}, `--resume auto` goes on from there"
    if state.step < setup.total_steps:
        return f"no lower validation score since step {state.lowest_step}: stopping early"
    return None


def _is_any_due(setup: Setup, state: RunState) -> bool:
    """Whether the state is logged, judged or saved now, for which all outcomes must be known."""
    settings = setup.config.train
    periods = setup.config.log.every, settings.validate_every, settings.checkpoint_every
    return any(is_due(state, every) for every in periods)


def is_due(state: RunState, every: int | str) -> bool:
    """Whether what happens every so many steps happens now; "auto" is a number by now."""
    return state.step % int(every) == 0
