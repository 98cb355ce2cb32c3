"""The wandb run of a run folder: one for all its attempts, for training and for its report."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from clue_dist.config import LogConfig
from clue_dist.process import print_line

WANDB_WAIT = 30  # seconds for its server to answer
WANDB_FINISH_WAIT = 20  # seconds for what is left to be sent at the end
WANDB_UPLOAD_WAIT = 1800  # the same, where weights are among it
_ID_FILE = "wandb-id"


def open_wandb_run(run_folder: Path, log: LogConfig, settings: dict[str, Any] | None = None) -> Any:
    """Open the wandb run of a folder, offline unless the config says online and the server answers.

    Args:
        run_folder: the run folder, which keeps the id of its wandb run. In a sweep the agent
            chooses the id.
        log: what wandb is asked for, and how the run is called there.
        settings: what trains the run, for its page in wandb.

    Raises:
        Exception: whatever keeps wandb from recording.
    """
    import wandb

    def open_run(mode: str) -> Any:
        return wandb.init(
            project=log.project,
            name=log.name or run_folder.resolve().name,
            group=log.group or None,
            dir=str(run_folder),
            mode=mode,
            id=_choose_run_id(run_folder),
            resume="allow" if mode == "online" else None,  # offline it would only warn
            config=settings,
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=WANDB_WAIT,
                finish_timeout=WANDB_UPLOAD_WAIT if log.artifacts else WANDB_FINISH_WAIT,
            ),
        )

    try:
        run = open_run(log.wandb)
    except wandb.Error as error:
        if log.wandb != "online":
            raise
        print_line(
            f"wandb is offline ({error}): "
            f"`wandb sync {run_folder}/wandb/offline-run-*` sends the run later"
        )
        wandb.teardown()  # else wandb takes the run for one that still goes on
        run = open_run("offline")
    (run_folder / _ID_FILE).write_text(run.id)
    return run


def _choose_run_id(run_folder: Path) -> str:
    """One id for each run folder, so that a resumed run continues its curves."""
    path = run_folder / _ID_FILE
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
