"""configs/sweep.yaml under wandb's own agent, a stand-in for its server behind it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.distributed.command import ROOT, environment
from tests.stores import make_store
from tests.wandb_files import read_recorded_run

RUN_ID = "trial1"
# Of the server, what an agent asks for: the search, a name, and once a trial.
AGENT = """
import json, queue, sys
import wandb.apis
from wandb.wandb_agent import Agent

class Server:
    trials = [json.loads(sys.argv[2])]

    def sweep(self, sweep_id, specs):
        return {"config": open(sys.argv[1]).read()}

    def register_agent(self, host, sweep_id):
        return {"id": "agent1"}

    def agent_heartbeat(self, agent_id, metrics, states):
        return [self.trials.pop()] if self.trials else []

server = Server()
wandb.apis.InternalApi = lambda: server  # the agent asks for a new one after each trial
Agent.POLL_INTERVAL = 0.2
Agent(server, queue.Queue(), sweep_id="search1", count=1).run()
"""


@pytest.mark.slow
def test_wandbs_agent_trains_what_the_sweep_of_the_recipes_asks_for(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr", cells={"rna+adt": 300}, features={"rna": 40, "adt": 8})
    parameters = {
        "store": str(tmp_path / "s.zarr"),
        "model.latent": 16,
        "model.trunk.hidden": 16,
        "model.trunk.dropout": 0.1,
        "objective.lambda_mse": 0.01,
        "train.lr": 0.002,
        "train.epochs": 2,
        "data.batch_size": 64,
        "log.wandb": "offline",  # the recipe says online; what the server sends comes last
    }
    trial = {
        "type": "run",
        "run_id": RUN_ID,
        "program": "train.py",
        "args": {name: {"value": value} for name, value in parameters.items()},
    }
    words = (str(ROOT / "configs/sweep.yaml"), json.dumps(trial))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(AGENT), *words],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(ROOT), "WANDB_SWEEP_ID": "search1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run_folder = tmp_path / "runs" / "sweep" / RUN_ID
    assert run_folder.is_dir(), done.stdout[-3000:] + done.stderr[-3000:]
    settings = json.loads((run_folder / "config.json").read_text())
    assert (settings["model"]["latent"], settings["train"]["lr"]) == (16, 0.002)
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert any("best_score" in line for line in lines)
    recorded = read_recorded_run(run_folder)
    assert recorded.run_id == RUN_ID
    assert recorded.config["train"]["lr"] == 0.002
    assert any("validation/best_score" in row for row in recorded.history)
