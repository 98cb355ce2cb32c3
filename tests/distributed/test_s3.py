"""Every command reads a store on an S3 server as it reads a folder."""

import json
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import pytest

from tests.distributed.command import (
    alone,
    best_weights,
    largest_difference,
    metrics,
    run,
    spawned,
    train_args,
    trained_weights,
)
from tests.s3 import S3, serve
from tests.stores import make_store

SHORT = ("train.epochs=3", "log.every=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("s3")
    make_store(
        folder / "s.zarr",
        cells={"rna+adt": 200, "rna": 60, "adt": 40},
        features={"rna": 60, "adt": 10},
    )
    alone(*train_args(folder, folder / "s.zarr", "local", *SHORT))
    return folder


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    with serve() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def test_a_run_on_a_url_is_the_run_on_the_folder(s3: S3, folder: Path) -> None:
    url = s3.upload(folder / "s.zarr", "s.zarr")
    args = train_args(folder, folder / "s.zarr", "remote", *SHORT, f"store={url}")
    alone(*args)
    losses = [[line["loss"] for line in metrics(folder / name)] for name in ("local", "remote")]
    assert losses[0] == losses[1]
    assert (
        largest_difference(best_weights(folder / "local"), best_weights(folder / "remote")) == 0.0
    )

    results = []
    for name, store in (("local", str(folder / "s.zarr")), ("remote", url)):
        out = folder / f"{name}.json"
        alone(
            "launch/evaluate.py", "--run", str(folder / name), "--store", store, "--out", str(out)
        )
        results.append(json.loads(out.read_text()))
        assert results[-1].pop("about")["store"] == store
    assert results[0] == results[1]
    alone(
        "launch/embed.py",
        "--run",
        str(folder / "remote"),
        "--store",
        url,
        "--out",
        str(folder / "z.h5ad"),
    )
    assert ad.read_h5ad(folder / "z.h5ad").obsm["X_clue"].shape == (300, 12)
    assert "300 cells" in alone("-m", "data_prep", "inspect", url).stdout
    assert f"{url}: sound" in alone("-m", "data_prep", "check", url).stdout


def test_two_ranks_read_a_url(s3: S3, folder: Path) -> None:
    url = s3.upload(folder / "s.zarr", "s.zarr")
    run(*spawned(2, *train_args(folder, folder / "s.zarr", "two", *SHORT, f"store={url}")))
    assert (
        largest_difference(trained_weights(folder / "local"), trained_weights(folder / "two"))
        < 1e-5
    )


def test_what_is_not_there_ends_with_2_before_anything_starts(s3: S3, folder: Path) -> None:
    where = "s3://other-cells/s.zarr"
    commands = [
        train_args(folder, folder / "s.zarr", "none", f"store={where}"),
        [
            "launch/embed.py",
            "--run",
            str(folder / "local"),
            "--store",
            where,
            "--out",
            str(folder / "none.h5ad"),
        ],
        ["-m", "data_prep", "check", where],
    ]
    for command in commands:
        message = alone(*command, expect=2).stderr
        assert f"no such bucket\n  where: {where}" in message
        assert "Traceback" not in message
    assert not (folder / "none").exists()
