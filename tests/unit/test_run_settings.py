"""The settings that a run goes on with, and which of them may differ from those it began with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from clue_dist.checkpoint.kept_config import VALUES_BEFORE
from clue_dist.checkpoint.resuming import CHANGEABLE, find_starting_point
from clue_dist.config import Config, ObjectiveConfig
from clue_dist.errors import ResumeError
from clue_dist.ranks import Ranks
from clue_dist.train.setup import prepare_setup
from tests.stores import make_store
from tests.unit.run_helpers import SETTINGS


def test_settings_that_may_differ_are_listed_with_what_they_were(run_folder: Path) -> None:
    settings = SETTINGS.train.model_copy(update={"lr": 0.01, "epochs": 3.0})
    config = SETTINGS.model_copy(update={"train": settings})
    start = find_starting_point(run_folder, config, "f", "auto", Ranks())
    assert start.state.step == 30
    assert start.describe_changes() == "train.epochs auto -> 3.0, train.lr 0.001 -> 0.01"
    assert not find_starting_point(run_folder, SETTINGS, "f", "auto", Ranks()).changes
    changed = config.model_copy(update={"seed": 5})
    with pytest.raises(ResumeError, match=r"changed: seed\n.*no other changes than of store, run"):
        find_starting_point(run_folder, changed, "f", "auto", Ranks())


SAME = "contrastive_same_modality"


def keep_config(run_folder: Path, **objective: float) -> None:
    """Write the config of a run; of one that an earlier version began without the setting."""
    tree = json.loads(SETTINGS.to_json())
    del tree["objective"][SAME]
    tree["objective"] |= objective
    (run_folder / "config.json").write_text(json.dumps(tree))


@pytest.mark.parametrize("setting", VALUES_BEFORE)
def test_every_later_setting_is_as_it_was_before_it_existed(run_folder: Path, setting: str) -> None:
    group, field = setting.split(".")
    tree = json.loads(SETTINGS.to_json())
    del tree[group][field]
    (run_folder / "config.json").write_text(json.dumps(tree))
    start = find_starting_point(run_folder, SETTINGS, "f", "auto", Ranks())
    assert getattr(getattr(start.config, group), field) == VALUES_BEFORE[setting]
    assert getattr(getattr(SETTINGS, group), field) != VALUES_BEFORE[setting]
    assert not start.changes


def test_training_knows_the_settings_that_a_run_goes_on_with(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr", {"rna+atac": 300}, {"rna": 12, "atac": 12})
    config = Config(store=str(tmp_path / "s.zarr"), run=str(tmp_path / "run"))
    setup = prepare_setup(config, 1)
    assert {name: spec.thinning for name, spec in setup.specs.items() if spec.thinning} == {
        "atac": 0.8
    }
    objective = ObjectiveConfig(thinning=0.0)
    kept = replace(setup, config=setup.config.model_copy(update={"objective": objective}))
    assert not any(spec.thinning for spec in kept.specs.values())


@pytest.mark.parametrize("kept", [{}, {SAME: 0.0}])  # begun by an earlier version; gone on since
def test_a_run_goes_on_without_what_did_not_exist_when_it_began(
    run_folder: Path, kept: dict[str, float]
) -> None:
    keep_config(run_folder, **kept)
    start = find_starting_point(run_folder, SETTINGS, "f", "auto", Ranks())
    assert start.config.objective.contrastive_same_modality == 0.0
    assert not start.changes
    assert start.describe_inherited(SETTINGS) == (
        f"goes on as the run began, with objective.{SAME}=0.0"
    )
    same = find_starting_point(run_folder, start.config, "f", "auto", Ranks())
    assert same.describe_inherited(start.config) is None
    asked = SETTINGS.model_copy(update={"objective": ObjectiveConfig(**{SAME: 1.0})})
    with pytest.raises(ResumeError, match=f"changed: objective.{SAME}"):
        find_starting_point(run_folder, asked, "f", "auto", Ranks())


def test_a_run_of_this_version_goes_on_with_all_its_settings(run_folder: Path) -> None:
    start = find_starting_point(run_folder, SETTINGS, "f", "auto", Ranks())
    assert start.config == SETTINGS
    assert start.describe_inherited(SETTINGS) is None
    keep_config(run_folder, **{SAME: 0.5})
    with pytest.raises(ResumeError, match=f"changed: objective.{SAME}"):
        find_starting_point(run_folder, SETTINGS, "f", "auto", Ranks())


def test_a_folder_without_the_settings_of_its_run_is_refused(run_folder: Path) -> None:
    (run_folder / "config.json").unlink()
    with pytest.raises(ResumeError, match="copy the whole folder"):
        find_starting_point(run_folder, SETTINGS, "f", "auto", Ranks())


def test_the_page_lists_the_settings_that_may_change() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    listed = page.partition("These settings may change")[2].partition("Other changes")[0]
    names = {key.removeprefix("train.") for key in CHANGEABLE}
    assert {name for name in names if f"`{name.replace('log.', 'log.*')}`" not in listed} == set()
