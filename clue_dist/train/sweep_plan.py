"""What a search of hyperparameters tries: `sweep.yaml`, as `wandb sweep` reads it, and its trials.

wandb's server draws the trials of a sweep itself. Here they are drawn alike without one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clue_dist.config_file import RECIPES, find_recipe, parse_override
from clue_dist.errors import ConfigError
from clue_dist.number_checks import require_number

EXAMPLE_PLAN = RECIPES / "sweep.yaml"  # which is installed, too
_ENVIRONMENT_VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
_LONGEST_NAME = 120  # characters of a trial's name before its id; file systems take 255
_DEFAULT_COMMAND = ["${env}", "${interpreter}", "${program}", "${args}"]
_RANGES = ("uniform", "int_uniform", "log_uniform_values", "q_uniform", "q_log_uniform_values")
Parameters = Mapping[str, Any]  # values by dotted path of a setting


class SweepParameter(BaseModel):
    """The values that one setting takes, in wandb's words."""

    model_config = ConfigDict(extra="forbid")

    value: Any = None
    values: list[Any] = []
    probabilities: list[float] = []  # of `values`; equal where none are given
    distribution: Literal[
        "constant",
        "categorical",
        "uniform",
        "int_uniform",
        "log_uniform_values",
        "q_uniform",
        "q_log_uniform_values",
        "normal",
    ]
    min: float = math.nan
    max: float = math.nan
    q: float = Field(1.0, gt=0)  # values of the `q_` distributions are multiples of it
    mu: float = 0.0
    sigma: float = Field(1.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _choose_distribution(cls, tree: Any) -> Any:
        """Choose what wandb takes where no distribution is named."""
        if not isinstance(tree, dict) or "distribution" in tree:
            return tree
        if "values" in tree:
            return tree | {"distribution": "categorical"}
        if {"min", "max"} <= tree.keys():
            is_whole = all(type(tree[key]) is int for key in ("min", "max"))
            return tree | {"distribution": "int_uniform" if is_whole else "uniform"}
        return tree | {"distribution": "constant"}

    @model_validator(mode="after")
    def _require_values(self) -> SweepParameter:
        if self.distribution == "constant" and self.value is None:
            raise ValueError("a parameter has `value`, `values`, or `min` and `max`")
        if self.distribution == "categorical" and not self.values:
            raise ValueError("`values` lists no value")
        if self.probabilities and len(self.probabilities) != len(self.values):
            raise ValueError("`probabilities` has another length than `values`")
        if self.distribution in _RANGES and not self.min < self.max:
            raise ValueError("`min` must be less than `max`")
        if "log" in self.distribution and not self.min > 0:
            raise ValueError("`min` of a logarithmic distribution must be above 0")
        return self

    def list_values(self) -> list[Any] | None:
        """List the values that a grid tries; None where there is no end of them."""
        if self.distribution == "int_uniform":
            return list(range(int(self.min), int(self.max) + 1))
        return {"constant": [self.value], "categorical": self.values}.get(self.distribution)

    def draw_value(self, draws: np.random.Generator) -> Any:
        """Draw a value of a random search."""
        if self.distribution == "constant":
            return self.value
        if self.distribution == "categorical":
            shares = np.array(self.probabilities or [1.0] * len(self.values))
            return self.values[draws.choice(len(self.values), p=shares / shares.sum())]
        if self.distribution == "int_uniform":
            return int(draws.integers(int(self.min), int(self.max), endpoint=True))
        if self.distribution == "normal":
            value = draws.normal(self.mu, self.sigma)
        elif "log" in self.distribution:
            value = math.exp(draws.uniform(math.log(self.min), math.log(self.max)))
        else:
            value = draws.uniform(self.min, self.max)
        if self.distribution.startswith("q_"):
            value = round(value / self.q) * self.q
        return float(f"{value:.6g}")  # more digits tell trials apart no better


class SweepMetric(BaseModel):
    """What tells a good trial from a bad one."""

    model_config = ConfigDict(extra="ignore")

    name: str = "validation/best_score"  # the split and the name of a number in metrics.jsonl
    goal: Literal["minimize", "maximize"] = "minimize"


class SweepPlan(BaseModel):
    """The content of sweep.yaml; what only wandb's server needs is ignored."""

    model_config = ConfigDict(extra="ignore")

    name: str = ""
    program: str = "launch/train.py"
    method: Literal["grid", "random"]
    metric: SweepMetric = SweepMetric()
    parameters: dict[str, SweepParameter] = Field(min_length=1)
    command: list[str] = _DEFAULT_COMMAND
    run_cap: int | None = Field(None, ge=1)  # the most trials

    @property
    def varied(self) -> list[str]:
        """Settings that differ from trial to trial."""
        return [
            name
            for name, parameter in self.parameters.items()
            if parameter.distribution != "constant"
        ]


@dataclass(frozen=True)
class SweepTrial:
    """One choice of hyperparameters."""

    parameters: Parameters
    name: str  # what was set, and the id: "latent=32_lr=0.00123_1f0c9a3e"
    run_id: str  # follows from command and parameters alone: the same trial has the same id


def read_sweep_plan(path: Path, overrides: Sequence[str] = ()) -> SweepPlan:
    """Read what a search tries.

    Args:
        path: a file as `wandb sweep` takes it, see configs/sweep.yaml; or `sweep`, which is that
            file.
        overrides: `dotted.path=value` each, as `--set` takes them: settings that all trials share,
            in place of what the file says of them.

    Raises:
        ConfigError: the file cannot be read, is no such file, or needs wandb's server.
    """
    path = path if path.is_file() else find_recipe(path, EXAMPLE_PLAN.suffix)
    try:
        plan = SweepPlan.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        shared = {
            name: SweepParameter.model_validate({"value": value})
            for name, value in map(parse_override, overrides)
        }
        return plan.model_copy(update={"parameters": plan.parameters | shared})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        is_method = first["loc"] == ("method",)
        fix = "take grid or random here; wandb's server knows more: `wandb sweep`"
        raise ConfigError(
            "the sweep cannot be understood",
            where=f"{path}: {place}" if place else path,
            got=None if first["type"] == "missing" else repr(first["input"])[:200],
            expected=first["msg"].removeprefix("Value error, "),
            fix=fix if is_method else f"see {EXAMPLE_PLAN}",
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            "the sweep cannot be read", where=path, got=error, fix=f"see {EXAMPLE_PLAN}"
        ) from None


def list_trials(plan: SweepPlan, n_trials: int | None = None, seed: int = 0) -> list[SweepTrial]:
    """List what a search tries, each trial once, and the same at every call.

    Args:
        plan: the search.
        n_trials: the most trials; by default `run_cap`, and all of a grid.
        seed: seed of a random search. A larger number of trials begins with those of a smaller.

    Raises:
        ConfigError: a grid over a range without steps, or a random search without an end; no
            number of trials, or no seed.
    """
    most = plan.run_cap if n_trials is None else n_trials
    if most is not None:
        require_number("--trials", most, 1, whole=True)
    require_number("--seed", seed, whole=True)
    choices = _list_grid(plan) if plan.method == "grid" else _draw_choices(plan, most, seed)
    # Two draws may be alike, as of few values.
    trials = {trial.run_id: trial for trial in (_name_trial(plan, choice) for choice in choices)}
    return list(trials.values())[:most]


def _list_grid(plan: SweepPlan) -> list[Parameters]:
    """Every combination; the last parameter changes fastest."""
    columns = {name: parameter.list_values() for name, parameter in plan.parameters.items()}
    endless = [name for name, values in columns.items() if values is None]
    if endless:
        raise ConfigError(
            "a grid needs values",
            where=f"parameters.{endless[0]}",
            got=plan.parameters[endless[0]].distribution,
            fix="list its `values`, or set `method: random`",
        )
    lists = [values or [] for values in columns.values()]
    return [dict(zip(columns, choice, strict=True)) for choice in itertools.product(*lists)]


def _draw_choices(plan: SweepPlan, most: int | None, seed: int) -> list[Parameters]:
    """Random choices; each has a seed of its own, so that more of them change none."""
    if most is None:
        raise ConfigError(
            "a random search has no end of its own", fix="set run_cap in the file, or give --trials"
        )
    generators = (np.random.default_rng([seed, number]) for number in range(most))
    return [
        {name: parameter.draw_value(draws) for name, parameter in plan.parameters.items()}
        for draws in generators
    ]


def _name_trial(plan: SweepPlan, parameters: Parameters) -> SweepTrial:
    text = json.dumps([plan.program, plan.command, parameters], sort_keys=True, default=str)
    run_id = hashlib.sha256(text.encode()).hexdigest()[:8]
    titles = _shorten_paths(plan.varied)
    words = [f"{title}={_format_setting(parameters[path])}" for path, title in titles.items()]
    # The name becomes that of a folder, and wandb's of the run.
    description = re.sub(r"[^A-Za-z0-9=._+-]+", "-", "_".join(words))[:_LONGEST_NAME]
    return SweepTrial(parameters, f"{description}_{run_id}".lstrip("_"), run_id)


def _shorten_paths(paths: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted path, or the whole where several end alike."""
    ends = [path.rpartition(".")[2] for path in paths]
    return {
        path: path if ends.count(end) > 1 else end for path, end in zip(paths, ends, strict=True)
    }


def _format_setting(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def expand_command(plan: SweepPlan, parameters: Parameters) -> list[str]:
    """Put a trial's parameters into the command of a sweep, as wandb's agent does.

    Args:
        plan: the search, whose command holds macros such as `${args_no_hyphens}`.
        parameters: of one trial.

    Raises:
        ConfigError: a macro that is not known here.
    """
    plain = [f"{name}={value}" for name, value in parameters.items()]
    flags = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in parameters.items()
        if value is not False
    ]
    # The names and what they become are those of wandb's agent, which a test compares.
    macros: dict[str, Sequence[str]] = {
        "env": ["/usr/bin/env"],
        "interpreter": ["python"],
        "program": [plan.program],
        "args": [f"--{text}" for text in plain],
        "args_no_hyphens": plain,
        "args_no_boolean_flags": flags,
        "args_json": [json.dumps(dict(parameters))],
    }
    words: list[str] = []
    for word in plan.command:
        filled = _ENVIRONMENT_VARIABLE.sub(lambda found: os.environ.get(found[1], found[1]), word)
        is_macro = filled.startswith("${") and filled.endswith("}")
        if is_macro and filled[2:-1] not in macros:
            raise ConfigError(
                "the command of the sweep has an unknown macro",
                got=filled,
                expected=", ".join(f"${{{name}}}" for name in macros),
            )
        words += macros[filled[2:-1]] if is_macro else [filled]
    return words
