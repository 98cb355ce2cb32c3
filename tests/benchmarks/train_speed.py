"""How fast a run trained, by what it logged."""

import json
import statistics
from pathlib import Path

from tests.benchmarks.report import Result


def read_training(run: Path) -> Result:
    """Read `steps` and `cells_per_s` of a run's folder.

    The median of the logged speeds leaves out starting and validating.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if line["split"] == "train"]
    speed = statistics.median(line["cells_per_s"] for line in training)
    return {"steps": training[-1]["step"], "cells_per_s": speed}
