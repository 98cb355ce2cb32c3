"""A model that is passed on: what its folder holds, who may read it, and that it answers alike."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import stat
from pathlib import Path

import pytest

from clue_dist.checkpoint.model_card import read_model_card, write_model_card
from clue_dist.checkpoint.run_folder import read_weights
from clue_dist.errors import ConfigError, ResumeError, StoreError
from clue_dist.inference import export
from clue_dist.inference.export import CardTexts, export_run
from clue_dist.inference.load_model import load_model
from clue_dist.store.feature_reference import read_feature_reference
from clue_dist.store.reader import Store
from clue_dist.train.initial_weights import plan_warm_start
from tests.stores import make_store
from tests.unit.run_helpers import commit_weights, make_model, make_setup

FEATURES = {"rna": 30, "adt": 8}

SCORES = {"split": "validation", "foscttm/rna-adt": 0.125, "accuracy": 0.75, "error": 0.1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a store in a folder that nobody else has."""
    folder = tmp_path_factory.mktemp("export")
    make_store(folder / "old.zarr", features=FEATURES)
    setup = make_setup(folder / "old.zarr")
    write_model_card(folder / "run", setup.store, setup.config)
    commit_weights(folder / "run" / "best" / "step-00000005", make_model(setup).state_dict())
    lines = [SCORES | {"step": 4, "accuracy": 0.1}, SCORES | {"step": 5}]
    (folder / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder / "run"


def test_a_shared_folder_serves_where_a_run_does(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "shared")
    shared, known = load_model(tmp_path / "shared"), load_model(run)
    for name, values in known.model.state_dict().items():
        assert shared.model.state_dict()[name].equal(values)
    assert (shared.name, shared.seen_cells) == ("step-00000005", known.seen_cells)
    reference = read_feature_reference(tmp_path / "shared")
    assert reference.modalities == Store(run.parent / "old.zarr").manifest.modalities
    warm_start = plan_warm_start(tmp_path / "shared", make_setup(run.parent / "old.zarr"))
    assert read_weights(warm_start.weights).keys() == known.model.state_dict().keys()


@pytest.mark.parametrize("room", [100, 1_000_000])
def test_nothing_is_left_where_the_disk_is_full(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "write_file", refuse)  # after the weights
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises(StoreError, match="the disk is full"):
            export.export_run(run, tmp_path / "shared")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


def test_a_shared_folder_holds_no_path_of_this_machine(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "shared")
    files = [path for path in (tmp_path / "shared").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "README.md", "config.json", "model.json", "weights.safetensors", "state.json", "COMMIT.json"
    }  # fmt: skip
    for path in files:
        assert str(run.parent).encode() not in path.read_bytes(), path.name


def test_the_umask_says_who_may_read_a_shared_model(run: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export_run(run, tmp_path / "shared")
    finally:
        os.umask(before)
    modes = {
        stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "shared").rglob("*")
        if path.is_file()
    }
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o750


def test_the_card_says_what_a_stranger_asks(run: Path, tmp_path: Path) -> None:
    texts = CardTexts("Blood", "Blood of two donors, GSE1.", "CC-BY-4.0")
    export_run(run, tmp_path / "shared", texts=texts)
    card = (tmp_path / "shared" / "README.md").read_text()
    for text in (
        'license: "CC-BY-4.0"',
        "# Blood",
        "Blood of two donors, GSE1.",
        "Trained on 150 cells, store `old.zarr`",
        "| rna | rna | 30 | rna-0, rna-1, rna-2 |",
        "Batches (2): batch-0, batch-1.",
        "Labels (3): type-0, type-1, type-2.",
        "On cells held out of training, at step 5:",
        "FOSCTTM of rna-adt (0 is perfect, 0.5 is chance): 0.1250",
        "accuracy of labels in the joint z: 0.7500",
        "clue embed --run FOLDER",
    ):
        assert text in card
    assert read_model_card(run).labels == ["type-0", "type-1", "type-2"]


def test_the_card_lists_the_levels_of_covariates_as_a_list(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    content = json.loads((run / "model.json").read_text())
    content["batch_covariates"] = {"donor": ["d0", "d1"], "chemistry": ["v2", "v2"]}
    (tmp_path / "run" / "model.json").write_text(json.dumps(content))
    export_run(tmp_path / "run", tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "batch-1.\n\n- donor (2): d0, d1\n- chemistry (1): v2\n\nLabels (3)" in card


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "notes.json").write_text("[]")
    for error, out, options in (
        (ConfigError, "there", {}),
        (ConfigError, "nowhere/shared", {}),
        (ConfigError, "shared", {"scores": tmp_path / "notes.json"}),
        (ResumeError, "shared", {"checkpoint": "last"}),
    ):
        with pytest.raises(error):
            export_run(run, tmp_path / out, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"there", "notes.json"}


def test_weights_that_are_not_there_are_refused_with_those_that_are(run: Path) -> None:
    expected = (
        r"got: --checkpoint bset(.|\n)*expected: best, step-00000005\n  fix: did you mean best"
    )
    with pytest.raises(ResumeError, match=expected):
        load_model(run, "bset")


def test_weights_that_are_both_best_and_last_are_listed_once(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    step = Path("best") / "step-00000005"
    shutil.copytree(run / step, tmp_path / "run" / "checkpoints" / step.name)
    with pytest.raises(ResumeError, match=r"expected: best, last, step-00000005\n"):
        load_model(tmp_path / "run", "bset")


def test_a_line_that_was_half_written_leaves_the_others(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 6, "split": "validation", "sco')
    export_run(tmp_path / "run", tmp_path / "shared")
    assert "0.1250" in (tmp_path / "shared" / "README.md").read_text()


def test_a_model_of_an_earlier_version_is_exported_without_labels(
    run: Path, tmp_path: Path
) -> None:
    earlier = tmp_path / "run"
    setup = make_setup(run.parent / "old.zarr")
    write_model_card(earlier, setup.store, setup.config)
    content = json.loads((earlier / "model.json").read_text())
    del content["labels"], content["n_cells"]
    (earlier / "model.json").write_text(json.dumps(content))
    commit_weights(earlier / "best" / "step-00000005", make_model(setup).state_dict())
    export_run(earlier, tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "Trained on an unknown number of cells" in card
    assert "Labels" not in card
    assert "The run holds no validation of these weights." in card
