"""The settings that a run folder keeps, as a run that goes on takes them up again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from clue_dist import config_file
from clue_dist.config import Config
from clue_dist.errors import ResumeError

# What training did before a setting existed, by dotted path. The kept config of a run that an
# earlier version began lacks the setting, and today's default would train it otherwise.
VALUES_BEFORE: dict[str, float] = {
    "objective.contrastive_same_modality": 0.0,
    "objective.thinning": 0.0,
    "model.head_rank": 0,
}
# What "auto" found on the machine where a run began; another one may find otherwise.
FOUND_ON_THE_MACHINE = ("train.precision",)


def load_kept_config(run_folder: Path) -> Config:
    """Load the settings of a run, with what its version did where that had no setting yet.

    Args:
        run_folder: the run folder.

    Raises:
        ResumeError: the folder lacks them.
        ConfigError: they are damaged.
    """
    path = run_folder / "config.json"
    if not path.exists():
        raise ResumeError(
            "the run that the checkpoint belongs to lacks its settings",
            where=path,
            got="no such file",
            fix="copy the whole folder of the run",
        )
    return _fill_left_out(config_file.load_config(path), VALUES_BEFORE)


def follow_kept_config(config: Config, kept: Config) -> Config:
    """Leave a run that goes on as it was trained, where the config does not say otherwise.

    Args:
        config: the settings that a person asks for. A recipe may be older than a setting, too.
        kept: the settings of the run.
    """
    earlier = {
        key: value for key, value in VALUES_BEFORE.items() if _read_setting(kept, key) == value
    }
    found = {key: _read_setting(kept, key) for key in FOUND_ON_THE_MACHINE}
    return _fill_left_out(config, earlier | found)


def _fill_left_out(config: Config, values: Mapping[str, object]) -> Config:
    """Set settings by dotted path, of those that the config does not name or leaves at "auto"."""
    for key, value in values.items():
        name, field = key.split(".")
        group = getattr(config, name)
        if field not in group.model_fields_set or getattr(group, field) == "auto":
            config = config.model_copy(update={name: group.model_copy(update={field: value})})
    return config


def _read_setting(config: Config, key: str) -> object:
    name, field = key.split(".")
    return getattr(getattr(config, name), field)
