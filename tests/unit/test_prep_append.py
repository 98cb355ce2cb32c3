"""More cells for a store: what it has does not change, and a killed addition goes on."""

from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from clue_dist.errors import ConfigError, DataError, StoreError
from clue_dist.store.manifest import Manifest
from clue_dist.store.reader import Store
from clue_dist.store.writer import hash_file
from data_prep import append as additions
from data_prep import svd
from data_prep.append import append_cells, format_addition
from data_prep.check import check_store
from data_prep.cli.commands import build_preparation_parser, main
from data_prep.cli.feature_choices import parse_choices
from data_prep.cli.inputs import parse_inputs
from data_prep.jobs.workers import ThreadPool
from data_prep.options import FIELDS, FeatureChoice, ObsColumns, ReadingOptions
from data_prep.planned_cells import ConversionOptions
from tests.distributed.command import KILLED
from tests.unit.prep_helpers import (
    convert_files,
    make_anndata,
    make_counts,
    read_counts,
    read_field,
    write_h5ad,
    write_h5mu,
)
from tests.unit.prep_victims import run_victim

RNA, ADT = make_counts(300, 40), make_counts(300, 8, 1, "p", density=0.8)


def write_cells(folder: Path, cells: slice, name: str, **obs: str) -> str:
    """RNA of some cells, and proteins of the later half of them."""
    rna, adt = RNA[cells], ADT[cells]
    half = len(rna) // 2
    tables = {"rna": make_anndata(rna, **obs), "adt": make_anndata(adt[half:], **obs)}
    return str(write_h5mu(folder / f"{name}.h5mu", **tables))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    convert_files(
        tmp_path / "s.zarr",
        write_cells(tmp_path, slice(0, 200), "first", batch="a", cell_type="x"),
        block_cells=4,
    )
    return tmp_path / "s.zarr"


def append_files(store: Path, *inputs: str) -> Store:
    """Add the cells of some files, as the command line would."""
    found = parse_inputs(list(inputs), ReadingOptions(ObsColumns(dict(FIELDS))))
    choices = parse_choices([i.modality for i in found], {}, (), (), (), None)
    append_cells(found, store, ConversionOptions(feature_choices=choices), ThreadPool(2))
    return Store(store)


def hash_files(store: Path) -> dict[str, object]:
    return {str(p.relative_to(store)): hash_file(p) for p in store.rglob("*") if p.is_file()}


def test_all_cells_are_there_and_nothing_else_has_changed(tmp_path: Path, store: Path) -> None:
    before, files = Store(store), hash_files(store)
    after = append_files(
        store, write_cells(tmp_path, slice(200, 300), "more", batch="b", cell_type="x")
    )
    assert {n: s.n_cells for n, s in after.manifest.strata.items()} == {
        "rna": 100,
        "rna+adt": 100,
        "rna.2": 50,
        "rna+adt.2": 50,
    }
    pd.testing.assert_frame_equal(read_counts(after, "rna").loc[RNA.index], RNA, check_dtype=False)
    has = [c for i, c in enumerate(ADT.index) if 100 <= i < 200 or i >= 250]
    pd.testing.assert_frame_equal(
        read_counts(after, "adt").loc[has], ADT.loc[has], check_dtype=False
    )
    assert read_field(after, "batch") == {
        c: "a" if i < 200 else "b" for i, c in enumerate(RNA.index)
    }
    assert set(read_field(after, "label").values()) == {"x"}
    assert after.fingerprint != before.fingerprint
    assert check_store(store) == []
    now = hash_files(store)
    assert {name for name in files if now[name] != files[name]} == {"manifest.json"}
    assert not list(store.parent.glob("*.addition*"))


def test_a_third_addition_is_a_third_segment(tmp_path: Path, store: Path) -> None:
    first = Store(store).fingerprint
    second = append_files(store, write_cells(tmp_path, slice(200, 240), "b")).fingerprint
    after = append_files(store, write_cells(tmp_path, slice(240, 300), "c"))
    assert [n for n in after.segments if n.startswith("rna+adt")] == [
        "rna+adt",
        "rna+adt.2",
        "rna+adt.3",
    ]
    # A model that was trained on the store before knows these cells by it.
    appended = after.manifest.provenance["appended"]
    assert [notes["before"] for notes in appended] == [first, second]
    pd.testing.assert_frame_equal(read_counts(after, "rna").loc[RNA.index], RNA, check_dtype=False)


def test_a_modality_alone_starts_a_stratum(tmp_path: Path, store: Path) -> None:
    after = append_files(store, f"adt={write_h5ad(tmp_path / 'p.h5ad', ADT[200:])}")
    assert after.segments["adt"].n_cells == 100


def test_cells_that_the_store_has_are_refused(tmp_path: Path, store: Path) -> None:
    files = hash_files(store)
    again = write_cells(tmp_path, slice(190, 230), "again")
    with pytest.raises(DataError, match=r"already has 10 cells of these(.|\n)*c190"):
        append_files(store, again)
    assert hash_files(store) == files
    after = append_files(store, f"lane2:{again}")
    assert after.manifest.n_cells == 240


def test_unknown_modalities_and_no_store_are_refused(tmp_path: Path, store: Path) -> None:
    with pytest.raises(DataError, match=r"modalities that (.|\n)*got: atac"):
        append_files(
            store, f"atac={write_h5ad(tmp_path / 'p.h5ad', make_counts(9, 5, 2, 'peak', 'z'))}"
        )
    with pytest.raises(StoreError, match="added to a folder"):
        append_cells([], "s3://bucket/s.zarr", ConversionOptions(), ThreadPool(1))
    with pytest.raises(StoreError, match="no store here"):
        append_files(tmp_path / "nowhere.zarr", write_cells(tmp_path, slice(200, 210), "x"))


@pytest.mark.parametrize(
    ("place", "n"),
    [
        ("data_prep.convert.settle_strata", 1),  # in the conversion
        ("data_prep.append._move_stratum", 1),
        ("data_prep.append._move_stratum", 2),  # one stratum of two has its place
        ("data_prep.append.hash_metadata", 2),
        ("os.fsync", 1),  # the manifest is written, but not in its place
    ],
)
def test_killed_and_run_again(tmp_path: Path, store: Path, place: str, n: int) -> None:
    more = write_cells(tmp_path, slice(200, 300), "more")
    shutil.copytree(store, tmp_path / "whole.zarr")
    want = append_files(tmp_path / "whole.zarr", more)
    before = Store(store).fingerprint
    kill_append(store, more, place, n)
    assert Store(store).fingerprint == before
    again = append_files(store, more)
    assert again.fingerprint == want.fingerprint
    assert check_store(store) == []
    assert not list(tmp_path.glob("*.addition*"))
    pd.testing.assert_frame_equal(read_counts(again, "rna").loc[RNA.index], RNA, check_dtype=False)


def kill_append(store: Path, more: str, place: str, n: int) -> None:
    options = ("--to", str(store), "--workers", "1")
    ended = run_victim("append", more, *options, place=place, n=n)
    assert ended.returncode == KILLED, ended.stderr


@pytest.mark.parametrize(
    "place", ["data_prep.append._remove_outdated_svd", "data_prep.jobs.job_folder.discard_job"]
)
def test_killed_after_the_commit(tmp_path: Path, store: Path, place: str) -> None:
    """The same command adds nothing twice, another one is not taken for it."""
    svd.compute_svd(str(store), [], svd.SvdOptions(5, 2, 0), ThreadPool(1))
    one, two = (
        write_cells(tmp_path, slice(200, 260), "one"),
        write_cells(tmp_path, slice(260, 300), "two"),
    )
    kill_append(store, one, place, 2 if place.endswith("svd") else 1)
    assert Store(store).manifest.n_cells == 260
    assert list(tmp_path.glob("*.addition.partial"))
    shutil.copytree(tmp_path, tmp_path.with_name("again"))
    assert append_files(store, one).manifest.n_cells == 260
    again = tmp_path.with_name("again") / "s.zarr"
    assert append_files(again, two).manifest.n_cells == 300
    for path in (store, again):
        assert check_store(path) == []
        assert not (path / "svd").exists()
        assert not list(path.parent.glob("*.addition*"))
    shutil.rmtree(again.parent)


def test_cells_that_another_addition_commits_meanwhile_stay(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (
        write_cells(tmp_path, slice(200, 260), "one"),
        write_cells(tmp_path, slice(260, 300), "two"),
    )
    real = additions.claim_job

    def late(*args: Any) -> Any:
        monkeypatch.setattr(additions, "claim_job", real)
        append_files(store, one)
        return real(*args)

    monkeypatch.setattr(additions, "claim_job", late)
    with pytest.raises(
        DataError, match=r"other cells were added meanwhile(.|\n)*run the same command again"
    ):
        append_files(store, two)
    assert Store(store).manifest.n_cells == 260
    assert append_files(store, two).manifest.n_cells == 300
    assert check_store(store) == []


def test_an_svd_of_the_cells_before_is_removed_once_there_are_others(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    svd.compute_svd(str(store), [], svd.SvdOptions(5, 2, 0), ThreadPool(1))
    more = write_cells(tmp_path, slice(200, 300), "more")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Manifest, "write", full)
        with pytest.raises(StoreError, match="the disk is full"):
            append_files(store, more)
    assert (store / "svd").exists()
    problems = check_store(store)
    assert [p.split(":")[0] for p in problems] == ["strata/rna+adt.2", "strata/rna.2"]
    assert all("of an addition that was broken off" in p for p in problems)
    append_files(store, more)
    assert not (store / "svd").exists()
    assert check_store(store) == []


def test_what_an_addition_left_that_was_given_up_goes_with_the_next(
    tmp_path: Path, store: Path
) -> None:
    kill_append(
        store, write_cells(tmp_path, slice(200, 300), "more"), "data_prep.append.hash_metadata", 2
    )
    shutil.rmtree(tmp_path / "s.zarr.addition.partial")
    assert (store / "strata/rna+adt.2").exists()
    append_files(store, f"rna={write_h5ad(tmp_path / 'rna.h5ad', RNA[250:])}")
    assert {p.name for p in (store / "strata").iterdir() if p.is_dir()} == {
        "rna",
        "rna+adt",
        "rna.2",
    }
    assert check_store(store) == []


def test_an_svd_is_not_saved_across_an_addition(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = svd.find_leading_vectors

    def meanwhile(*args: Any) -> Any:
        monkeypatch.setattr(svd, "find_leading_vectors", real)
        append_files(store, write_cells(tmp_path, slice(200, 300), "more"))
        return real(*args)

    monkeypatch.setattr(svd, "find_leading_vectors", meanwhile)
    with pytest.raises((DataError, StoreError), match="cells were added meanwhile"):
        svd.compute_svd(str(store), ["rna"], svd.SvdOptions(5, 0, 0), ThreadPool(1))
    assert not (store / "svd").exists()
    assert (
        svd.compute_svd(str(store), ["rna"], svd.SvdOptions(5, 0, 0), ThreadPool(1))["rna"].n_cells
        == 300
    )


def test_the_store_decides_features(tmp_path: Path, store: Path) -> None:
    with pytest.raises(ConfigError, match="--top"):
        build_preparation_parser().parse_args(
            ["append", "rna=x.h5ad", "--to", str(store), "--top", "rna=10"]
        )
    found = parse_inputs(
        [write_cells(tmp_path, slice(200, 300), "more")], ReadingOptions(ObsColumns(dict(FIELDS)))
    )
    with pytest.raises(ValueError, match="another store decide"):
        append_cells(
            found,
            store,
            ConversionOptions(feature_choices={"rna": FeatureChoice(top_features=10)}),
            ThreadPool(1),
        )


def test_batches_come_from_the_column_that_the_store_was_made_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def typed(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["data_prep", *words])
        main()
        return capsys.readouterr().out

    store = str(tmp_path / "s.zarr")
    parts = {"a": RNA[:100], "b": RNA[100:200], "none": RNA[200:]}
    files = {
        n: write_h5ad(tmp_path / f"{n}.h5ad", x, **({"donor": n} if n != "none" else {}))
        for n, x in parts.items()
    }
    typed("convert", f"rna={files['a']}", "--out", store, "--batch-key", "donor")
    assert "no batch" not in typed("append", f"rna={files['b']}", "--to", store)
    printed = typed("append", f"rna={files['none']}", "--to", store)
    assert "100 cells without batch: the files have nothing in column 'donor'" in printed
    assert read_field(Store(store), "batch") == {
        c: "ab"[i // 100] if i < 200 else None for i, c in enumerate(RNA.index)
    }
    shown = typed("inspect", store)
    assert shown.count("100 cells in, 0 dropped") == 3
    assert "b.h5ad -> rna" in shown


def test_features_that_do_not_fit_are_listed(tmp_path: Path, store: Path) -> None:
    found = parse_inputs(
        [f"rna={write_h5ad(tmp_path / 'x.h5ad', RNA[200:].rename(columns={'g3': 'x'}))}"],
        ReadingOptions(),
    )
    manifest = append_cells(found, store, ConversionOptions(), ThreadPool(1))
    assert "x.h5ad: 1 feature missing, taken as zero (g3)" in format_addition(manifest)
    assert "x.h5ad: 1 feature extra, left out (x)" in format_addition(manifest)


def test_a_link_to_a_store(tmp_path: Path, store: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link.zarr").symlink_to(store)
    more = write_cells(tmp_path, slice(200, 300), "more")
    kill_append(tmp_path / "elsewhere/link.zarr", more, "data_prep.append._move_stratum", 1)
    assert (tmp_path / "s.zarr.addition.partial").exists()  # on the store's own disk
    assert append_files(store, more).manifest.n_cells == 300
