"""The whole way: simulate, convert, train, embed, evaluate, report; and the numbers are true."""

import json
import shutil
from pathlib import Path

import mudata as md
import numpy as np
import pytest

from tests.distributed.command import alone, launched, run, spawned, train_args


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    simulate = ["simulate", "--modality", "rna:300", "adt:30", "--paired"]
    alone(
        "-m", "data_prep", *simulate, "0.5", "--cells", "900", "--out", str(folder / "train.h5mu")
    )
    alone(
        "-m", "data_prep", *simulate, "1.0", "--cells", "1200", "--out", str(folder / "both.h5mu")
    )
    test = md.read(folder / "both.h5mu")
    # A row range gives the same cells whatever the size: these were not in training.
    unseen = test.obs_names[900:]
    md.MuData({m: test[m][test[m].obs_names.isin(unseen)].copy() for m in test.mod}).write(
        folder / "test.h5mu"
    )
    convert = ("-m", "data_prep", "convert")
    alone(*convert, str(folder / "train.h5mu"), "--out", str(folder / "train.zarr"))
    test_store = ("--out", str(folder / "test.zarr"), "--features-from", str(folder / "train.zarr"))
    alone(*convert, str(folder / "test.h5mu"), *test_store)
    settings = ("train.epochs=25", "train.validate_every=50", "train.patience=0")
    run(*spawned(2, *train_args(folder, folder / "train.zarr", "run", *settings)))
    return folder


def dense_foscttm(u: np.ndarray, v: np.ndarray) -> float:
    """Eq. 18, spelt out."""
    u, v = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u.astype(float), v.astype(float))
    )
    distance = ((u[:, None] - v[None]) ** 2).sum(-1)
    true = np.diag(distance)
    return float(0.5 * ((distance < true[:, None]).mean() + (distance < true[None]).mean()))


def test_unseen_cells_find_their_other_half(folder: Path) -> None:
    store = ("--run", str(folder / "run"), "--store", str(folder / "test.zarr"))
    alone("launch/embed.py", *store, "--out", str(folder / "test-z.h5mu"), "--per-modality")
    run(*launched(2, "launch/evaluate.py", *store, "--out", str(folder / "scores.json")))
    z = md.read(folder / "test-z.h5mu")
    assert z.obsm["X_clue"].shape == (300, 12)
    assert z.uns["clue_dist"]["private"] == {"rna": 2, "adt": 2}  # of the last of each six
    assert np.abs(z["rna"].obsm["X_clue"][:, 4:6]).min() > 0
    # RNA does not know what proteins alone tell.
    assert np.abs(z["rna"].obsm["X_clue"][:, 10:]).max() == 0
    order = z["rna"].obs_names
    recomputed = dense_foscttm(z["rna"].obsm["X_clue"], z["adt"][order].obsm["X_clue"])
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["rna->adt"]["global"]["foscttm"] == pytest.approx(recomputed, abs=1e-6)
    assert recomputed < 0.3  # chance is 0.5


def test_embedding_is_the_same_on_two_ranks_and_from_last_weights_another(folder: Path) -> None:
    store = ("--run", str(folder / "run"), "--store", str(folder / "test.zarr"))
    outs = {name: folder / f"{name}.h5mu" for name in ("one", "two", "last")}
    alone("launch/embed.py", *store, "--out", str(outs["one"]))
    run(*spawned(2, "launch/embed.py", *store, "--out", str(outs["two"])))
    alone("launch/embed.py", *store, "--out", str(outs["last"]), "--checkpoint", "last")
    z = {name: md.read(path) for name, path in outs.items()}
    np.testing.assert_array_equal(
        z["one"].obsm["X_clue"], z["two"][z["one"].obs_names].obsm["X_clue"]
    )
    assert z["last"].uns["clue_dist"]["checkpoint"].startswith("step-")


def test_report_ends_with_its_path(folder: Path) -> None:
    store = ("--run", str(folder / "run"), "--store", str(folder / "test.zarr"))
    alone("launch/embed.py", *store, "--out", str(folder / "r.h5mu"), "--per-modality")
    done = alone(
        "launch/report.py", "--run", str(folder / "run"), "--embedding", str(folder / "r.h5mu")
    )
    page = Path(done.stdout.strip().splitlines()[-1])
    assert page.is_file()
    text = page.read_text()
    for section in ("scores-over-time", "losses", "embedding", "confusion", "speed", "run"):
        assert f'<section id="{section}">' in text
    assert len(list(page.parent.glob("umap_*.png"))) >= 4
    assert "UMAP of 300 points, joint z: " in done.stderr


def test_features_of_another_store_are_refused_with_a_way_out(folder: Path) -> None:
    alone(
        "-m",
        "data_prep",
        "simulate",
        "--modality",
        "rna:310",
        "adt:30",
        "--cells",
        "100",
        "--out",
        str(folder / "o.zarr"),
    )
    args = (
        "--run",
        str(folder / "run"),
        "--store",
        str(folder / "o.zarr"),
        "--out",
        str(folder / "o.h5mu"),
    )
    done = alone("launch/embed.py", *args, expect=2)
    assert "--features-from" in done.stderr
    assert not (folder / "o.h5mu").exists()


def test_weights_of_another_shape_than_the_settings_say_are_refused(folder: Path) -> None:
    run_folder = folder / "misfit"
    shutil.copytree(folder / "run", run_folder)
    config = json.loads((run_folder / "config.json").read_text())
    config["model"]["trunk"]["hidden"] += 2
    (run_folder / "config.json").write_text(json.dumps(config))
    args = (
        "--run",
        str(run_folder),
        "--store",
        str(folder / "test.zarr"),
        "--out",
        str(folder / "m.h5mu"),
    )
    done = alone("launch/embed.py", *args, expect=2)
    assert "the weights do not fit the model of these settings" in done.stderr
    assert "Traceback" not in done.stderr
