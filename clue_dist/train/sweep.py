"""A search of hyperparameters on one machine, without a server: trials, one after the other.

The search goes on where it was stopped when it is started again, and ends with one table.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clue_dist.checkpoint.metrics_lines import read_metrics_lines
from clue_dist.errors import ConfigError
from clue_dist.files import translate_disk_errors, write_file
from clue_dist.process import print_line
from clue_dist.resilience.stop_signals import StopFlag
from clue_dist.train.log_lines import format_duration, format_value
from clue_dist.train.sweep_plan import (
    SweepPlan,
    SweepTrial,
    expand_command,
    list_trials,
    read_sweep_plan,
)

RESULTS_FILE, TABLE_FILE = "trials.jsonl", "table.tsv"
_POLL_SECONDS = 0.2
_FINISHED = "finished"


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended."""

    name: str  # of the trial, and of its run folder; it is the id of the trial, or ends with it
    parameters: dict[str, Any]
    status: str  # "finished", "stopped", or the exit code of a failure
    metric: float | None  # what the search compares; None where nothing was validated
    step: int | None  # the step that it was logged at
    seconds: float

    @property
    def run_id(self) -> str:
        """The id of the trial: the same in every version, where names were the id alone once."""
        return self.name.rpartition("_")[2]


def run_sweep(
    path: Path,
    out: Path,
    n_trials: int | None = None,
    seed: int = 0,
    overrides: Sequence[str] = (),
    announce: Callable[[str], None] = print_line,
) -> list[TrialResult]:
    """Train one run for each trial of a search, and write a table of all.

    Trials that finished in an earlier call are not repeated; one that was stopped goes on from its
    last checkpoint. One that fails does not end the search; it is tried again by the next call.

    Args:
        path: the search, as `read_sweep_plan` takes it.
        out: folder of the runs, of their output (`NAME.log`) and of the table.
        n_trials: the most trials, in place of `run_cap`.
        seed: seed of a random search.
        overrides: settings that all trials share, as `read_sweep_plan` takes them.
        announce: takes a line for each trial, and the table.

    Returns:
        The results, the best first.

    Raises:
        ConfigError: a search that cannot be made.
        StoreError: the folder cannot be written.
    """
    plan = read_sweep_plan(path, overrides)
    trials = list_trials(plan, n_trials, seed)
    with translate_disk_errors(out, "make room, or choose another --out", every=True):
        out.mkdir(parents=True, exist_ok=True)
        results = _read_results(out / RESULTS_FILE)
    waiting = [_keep_name(t, out) for t in trials if not _is_finished(results.get(t.run_id))]
    if len(waiting) < len(trials):
        announce(f"{len(trials) - len(waiting)} of {len(trials)} trials have finished before")
    with StopFlag() as stop:
        for number, trial in enumerate(waiting, start=1 + len(trials) - len(waiting)):
            announce(f"trial {number} of {len(trials)}: {_list_varied(plan, trial)}")
            announce(f"  its output: {out / trial.name}.log")
            result = _run_trial(plan, trial, out, stop)
            results[trial.run_id] = result
            with (out / RESULTS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            announce(f"  {_describe_result(plan, result)}")
            if result.status != _FINISHED:
                for line in _find_error(out / f"{trial.name}.log"):
                    announce(f"  {line}")
            if stop:
                announce("stopped: the same command goes on from here")
                break
    ranked = _rank_results(plan, [results[t.run_id] for t in trials if t.run_id in results])
    write_file(out / TABLE_FILE, format_trial_table(plan, ranked, separator="\t") + "\n")
    announce("\n" + format_trial_table(plan, ranked))
    return ranked


def format_trial_table(
    plan: SweepPlan, results: Sequence[TrialResult], separator: str | None = None
) -> str:
    """Format the results of a search, a line each.

    Args:
        plan: the search.
        results: in the order of the lines.
        separator: what stands between columns; by default spaces, so that they are aligned.
    """
    rows = [[plan.metric.name, "step", "status", "time", *plan.varied, "trial"]]
    for result in results:
        facts = [_format_number(result.metric), _format_number(result.step)]
        facts += [result.status, format_duration(result.seconds)]
        facts += [_format_number(result.parameters.get(name)) for name in plan.varied]
        rows.append([*facts, result.name])  # last, as it is long
    if separator is not None:
        return "\n".join(separator.join(row) for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _keep_name(trial: SweepTrial, out: Path) -> SweepTrial:
    """A trial under the name of the folder that an earlier call began for it, if one did."""
    begun = [path.name for path in out.glob(f"*{trial.run_id}") if path.is_dir()]
    return replace(trial, name=begun[0]) if begun and trial.name not in begun else trial


def _run_trial(plan: SweepPlan, trial: SweepTrial, out: Path, stop: StopFlag) -> TrialResult:
    """Train one run. A signal that comes meanwhile is passed on: the run saves and ends."""
    folder, started = out / trial.name, time.monotonic()
    # What is behind counts: the run folder is this trial's, whatever the command says.
    settings = [f"run={folder}", f"log.group={plan.name or out.name}", "log.wandb=offline"]
    command = [*expand_command(plan, trial.parameters), "--set", *settings]
    environment = os.environ | {"WANDB_RUN_ID": trial.run_id}
    with (out / f"{trial.name}.log").open("ab") as log:
        try:
            # In a session of its own, as the launcher passes on to its ranks what it gets.
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        except OSError as error:
            raise ConfigError(
                "the command of the sweep cannot be started",
                got=error,
                where=command[0],
                fix="start the search where the command can be found, as with .venv activated",
            ) from None
        code = _wait_until_end(process, stop)
    metric, step = _read_metric(folder / "metrics.jsonl", plan.metric.name)
    status = _FINISHED if code == 0 else "stopped" if stop else f"exit code {code}"
    seconds = time.monotonic() - started
    return TrialResult(trial.name, dict(trial.parameters), status, metric, step, seconds)


def _find_error(log: Path) -> list[str]:
    """The lines of the last error of ours that a log holds; none where there is none."""
    found: list[str] = []
    is_error = False
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("error: "):
            found = []
        is_error = line.startswith("error: ") or (is_error and line.startswith("  "))
        found += [line] if is_error else []
    return found


def _wait_until_end(process: subprocess.Popen[bytes], stop: StopFlag) -> int:
    """Wait for a process; returns its exit code."""
    has_passed_on = False
    try:
        while process.poll() is None:
            if stop and not has_passed_on:
                has_passed_on = True
                process.send_signal(signal.SIGTERM)
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:  # Ctrl-C typed again
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode


def _read_results(path: Path) -> dict[str, TrialResult]:
    """Read how trials ended, by id; of one that was tried again the last counts."""
    results = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            result = TrialResult(**json.loads(line))
        except (ValueError, TypeError):  # half a line, of a search that was killed
            continue
        results[result.run_id] = result
    return results


def _read_metric(path: Path, name: str) -> tuple[float | None, int | None]:
    """The last value of a number, which is called "split/name", and its step."""
    split, _, number = name.partition("/")
    for line in reversed(read_metrics_lines(path)):
        row = line.row or {}
        if row.get("split") == split and isinstance(row.get(number), int | float):
            return float(row[number]), int(row["step"])
    return None, None


def _rank_results(plan: SweepPlan, results: Sequence[TrialResult]) -> list[TrialResult]:
    """The best first; those without a number last."""
    sign = 1 if plan.metric.goal == "minimize" else -1

    def order(result: TrialResult) -> tuple[bool, float]:
        return result.metric is None, sign * (result.metric or 0.0)

    return sorted(results, key=order)


def _is_finished(result: TrialResult | None) -> bool:
    return result is not None and result.status == _FINISHED


def _list_varied(plan: SweepPlan, trial: SweepTrial) -> str:
    return ", ".join(f"{name}={trial.parameters[name]}" for name in plan.varied)


def _describe_result(plan: SweepPlan, result: TrialResult) -> str:
    number = f"{plan.metric.name} {_format_number(result.metric)}"
    return f"{result.status} after {format_duration(result.seconds)}: {number}"


def _format_number(value: Any) -> str:
    return "-" if value is None else format_value(value)
