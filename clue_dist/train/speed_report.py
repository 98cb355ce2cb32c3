"""What launch/bench.py reports: the speed of data, of the model and of both, and the limit."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

TOLERATED_WAIT = 0.05  # share of the time that may go to waiting before data count as the limit


@dataclass(frozen=True)
class LoaderSpeed:
    """The loader without a model, over all ranks; medians over the repeats."""

    batches_per_s: float
    cells_per_s: float
    non_zeros_per_s: float  # values of sparse modalities
    # Shares of the loader's time, over all repeats and ranks; they sum to 1.
    phases: dict[str, float]


@dataclass(frozen=True)
class ModelSpeed:
    """Steps on one real batch that lies on the device, over all ranks; medians."""

    step_ms: float  # without waiting for the device between the parts, so less than their sum
    forward_ms: float  # this and the next two are each timed to their end on the device
    backward_ms: float
    optimizer_ms: float
    cells_per_s: float


@dataclass(frozen=True)
class TrainingSpeed:
    """Training as it is."""

    step_ms: float
    cells_per_s: float
    waited: (
        float  # share of the time that steps waited for a batch, of the rank that waited longest
    )


@dataclass(frozen=True)
class SpeedReport:
    """All that was measured."""

    about: dict[str, Any]  # store, settings and machine
    data: LoaderSpeed
    model: ModelSpeed
    both: TrainingSpeed

    @property
    def feeds(self) -> float:
        """How many models of this speed the loader could feed."""
        return self.data.cells_per_s / self.model.cells_per_s

    @property
    def verdict(self) -> str:
        """What limits training, in one line."""
        return judge_speed(self.data, self.model, self.both, self.about["device"])

    def as_dict(self) -> dict[str, Any]:
        """What `--json` writes."""
        return {**asdict(self), "feeds": self.feeds, "verdict": self.verdict}

    def format_text(self) -> str:
        """Format the report for people; its last line is the verdict."""
        about, data, model, both = self.about, self.data, self.model, self.both
        phases = sorted(data.phases.items(), key=lambda phase: -phase[1])
        lines = [
            f"{about['store']}: batches of {about['batch_size']:,} cells, "
            f"{about['ranks']} x {about['name']}, {about['precision']}",
            f"data alone    {data.cells_per_s:>12,.0f} cells/s  "
            f"{data.batches_per_s:,.1f} batches/s, {data.non_zeros_per_s / 1e6:,.1f} M non-zeros/s",
            f"              {', '.join(f'{name} {share:.0%}' for name, share in phases)}",
            f"model alone   {model.cells_per_s:>12,.0f} cells/s  step {model.step_ms:.1f} ms",
            f"              forward {model.forward_ms:.1f} ms, "
            f"backward {model.backward_ms:.1f} ms, optimizer {model.optimizer_ms:.1f} ms",
            f"both          {both.cells_per_s:>12,.0f} cells/s  step {both.step_ms:.1f} ms, "
            f"waited for data {both.waited:.1%} of the time",
            self.verdict,
        ]
        return "\n".join(lines)


def judge_speed(data: LoaderSpeed, model: ModelSpeed, both: TrainingSpeed, device: str) -> str:
    """Say in one line what limits training, and by how much. `device` is "cuda" or "cpu"."""
    ratio, unit = data.cells_per_s / model.cells_per_s, "GPUs" if device == "cuda" else "models"
    if both.waited <= TOLERATED_WAIT:
        if ratio < 1:
            return "the model is the limit: the loader just keeps up"
        return f"the model is the limit: the loader could feed {_round_down(ratio)} such {unit}"
    slowest, share = max(data.phases.items(), key=lambda phase: phase[1])
    advice = f"most of the loader's time goes to: {slowest} ({share:.0%})"
    if ratio < 1:
        return (
            f"data is the limit: the model could take {_round_down(1 / ratio)} times what the "
            f"loader gives; {advice}"
        )
    return (
        "data is the limit, but only beside the model: alone, the loader could feed "
        f"{_round_down(ratio)} such {unit}; give each rank more CPU cores; {advice}"
    )


def _round_down(times: float) -> str:
    """14.7 becomes 14 and 1.47 becomes 1.4: never more than was measured."""
    return f"{int(times):,}" if times >= 10 else f"{math.floor(times * 10) / 10:.1f}"
