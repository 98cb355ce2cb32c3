"""What a run folder holds that training would overwrite: no run begins there without a word."""

from __future__ import annotations

from pathlib import Path

from clue_dist import config_file
from clue_dist.checkpoint.metrics_lines import read_metrics_lines
from clue_dist.checkpoint.run_folder import (
    COMMIT,
    list_checkpoints,
    list_uncommitted,
    parse_step,
)
from clue_dist.errors import ConfigError, ResumeError, list_names


def require_whole_copies(run_folder: Path, checkpoint: Path | None) -> None:
    """Check that nothing is half copied which training would set aside and train again.

    A run never leaves such a folder itself: it renames a folder once all files are written.

    Args:
        run_folder: the run folder.
        checkpoint: the checkpoint to go on from; None if the run begins anew.

    Raises:
        ResumeError: the best weights or a later checkpoint are not whole.
    """
    first_step = -1 if checkpoint is None else parse_step(checkpoint)
    checkpoints = list_uncommitted(run_folder / "checkpoints")
    later = [path for path in checkpoints if parse_step(path) > first_step]
    broken = [*later, *list_uncommitted(run_folder / "best")]
    if not broken:
        return
    names = list_names(sorted(path.name for path in broken[0].iterdir()), 5)
    way_on = (
        "begin another run with --set run=ANOTHER_FOLDER"
        if checkpoint is None
        else f"go on without it with --resume {checkpoint}"
    )
    raise ResumeError(
        "the run folder holds a checkpoint that is not whole, as if half copied",
        where=broken[0],
        got=f"no {COMMIT} beside {names or 'nothing'}",
        fix=f"copy it again; or {way_on}; or remove it, if nothing of it is needed",
    )


def require_no_lost_work(run_folder: Path, first_step: int) -> None:
    """Check that a run folder without a checkpoint holds no work that would be lost.

    A run that was killed before its first checkpoint leaves metrics and best weights, too, but a
    run never gets further than two save intervals without one.

    Args:
        run_folder: the run folder, without a committed checkpoint.
        first_step: the step from which training would begin there.

    Raises:
        ResumeError: it does.
    """
    require_whole_copies(run_folder, None)
    lines = read_metrics_lines(run_folder / "metrics.jsonl")
    logged = [line.row["step"] for line in lines if line.row is not None]
    best = list_checkpoints(run_folder / "best")
    # Metrics are begun before any weights are saved: without them, this is a copy.
    allowed = 2 * _read_save_interval(run_folder) + 1 if lines else 0
    if max([*logged, *map(parse_step, best)], default=0) <= first_step + allowed:
        return
    found = [f"best/{path.name}" for path in best[:1]]
    found += [f"metrics.jsonl up to step {max(logged)}"] if logged else []
    raise ResumeError(
        "the run folder holds the work of a run, but no checkpoint to go on from",
        where=run_folder,
        got=" and ".join(found),
        expected=f"{run_folder / 'checkpoints'} with the checkpoints of the run",
        fix="copy the checkpoints, too; or begin another run with --set run=ANOTHER_FOLDER",
    )


def _read_save_interval(run_folder: Path) -> int:
    """Steps between two checkpoints of the run that the folder holds; 0 if it does not say."""
    try:
        interval = config_file.load_config(run_folder / "config.json").train.checkpoint_every
    except ConfigError:
        return 0
    return 0 if interval == "auto" else interval
