"""A store on an S3 server gives the cells that its folder gives; errors say what is wrong."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from clue_dist.data.loader import Loader
from clue_dist.data.plan import CellPlan
from clue_dist.errors import StoreError
from clue_dist.store import location, segment_arrays, svd
from clue_dist.store.location import RemoteLocation, open_kvstore, parse_location
from clue_dist.store.reader import Store
from clue_dist.store.rows import CodedBlocks
from data_prep import inspect
from data_prep.check import check_store
from data_prep.jobs.workers import ThreadPool
from data_prep.svd import SvdOptions, compute_svd
from tests.fakes import dense
from tests.s3 import S3, serve
from tests.stores import make_store
from tests.unit.prep_helpers import convert_files, make_anndata, make_counts, write_h5ad, write_h5mu

SHARD = "strata/rna+adt/rna/codes/c/0/0"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("s3")
    return make_store(
        folder / "s.zarr", cells={"rna+adt": 203, "adt": 70}, features={"rna": 40, "adt": 6}
    )


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """Serve S3 where this process finds it, with retries that fit a test."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    patience = {"max_retries": 3, "initial_delay": "20ms", "max_delay": "50ms"}
    for name in location.RETRIES:
        monkeypatch.setitem(location.RETRIES, name, patience)
        monkeypatch.setitem(segment_arrays._CONTEXT, name, patience)
    with serve() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def url(s3: S3, local: Store) -> str:
    assert isinstance(local.root, Path)
    return s3.upload(local.root, "deep/s.zarr")


def blocks(store: Store) -> CodedBlocks:
    coded = store.segments["rna+adt"].read_blocks("rna", np.arange(13))
    assert isinstance(coded, CodedBlocks)
    return coded


# --- the same cells ---


def test_every_cell_is_the_same(local: Store, url: str) -> None:
    remote = Store(url)
    assert str(remote.root) == url
    assert remote.fingerprint == local.fingerprint
    for name, remote_segment in remote.segments.items():
        local_segment, all_cells = local.segments[name], np.arange(remote_segment.n_cells)
        for m in remote_segment.modalities:
            a, b = local_segment.read_rows(m, all_cells), remote_segment.read_rows(m, all_cells)
            pairs = (
                [(a, b)]
                if isinstance(a, np.ndarray)
                else [(a.indices, b.indices), (a.values, b.values)]
            )
            for x, y in pairs:
                np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(
            local_segment.read_metadata(all_cells).barcodes,
            remote_segment.read_metadata(all_cells).barcodes,
        )


def test_the_loader_serves_the_same_batches(local: Store, url: str) -> None:
    plan = CellPlan(5, {"rna+adt": 203, "adt": 70}, {"rna+adt": 16, "adt": 8}, 4, 2, 16)
    with Loader(local, plan) as local_batches, Loader(Store(url), plan) as remote_batches:
        for _ in range(20):
            a, b = next(local_batches), next(remote_batches)
            assert torch.equal(a.batch_code, b.batch_code)
            for name in ("rna", "adt"):
                x, y = (dense(batch.modalities[name].counts) for batch in (a, b))
                assert torch.equal(x, y)


def test_the_loader_asks_once_for_what_takes_a_few_bytes_a_cell(s3: S3, tmp_path: Path) -> None:
    n_cells = 4096
    notes = [f"note {i}" for i in range(n_cells)]
    path = write_h5ad(tmp_path / "a.h5ad", make_counts(n_cells, 20), note=notes)
    convert_files(tmp_path / "s.zarr", f"rna={path}", block_cells=16, kept_obs=("all",))
    store = Store(s3.upload(tmp_path / "s.zarr", "s.zarr"))
    plan = CellPlan(5, {"rna": n_cells}, {"rna": 64}, 4, 4, 16)
    asked = []  # arrays, by pass
    with Loader(store, plan) as loader:
        for _ in range(2):
            s3.gate.requests.clear()
            for _ in range(n_cells // 64):
                next(loader)
            keys = [request.partition("/strata/rna/")[2] for request in s3.gate.requests]
            asked.append({key.partition("/c/")[0] for key in keys})
    wide = {"rna/codes", "rna/rest"}
    assert asked == [wide | {"rna/lengths", "obs/batch"}, wide]


def test_http_serves_a_public_store_too(
    s3: S3, local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(local.root, Path)
    s3.upload(local.root, "public.zarr", acl="public-read")
    np.testing.assert_array_equal(
        blocks(Store(f"{s3.url}/cells/public.zarr/")).codes, blocks(local).codes
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    np.testing.assert_array_equal(
        blocks(Store("s3://cells/public.zarr")).codes, blocks(local).codes
    )
    assert check_store(f"{s3.url}/cells/public.zarr") == []


def test_metadata_too_large_to_be_parsed(s3: S3, local: Store, tmp_path: Path) -> None:
    """TensorStore's parser would end the process."""
    assert isinstance(local.root, Path)
    root = shutil.copytree(local.root, tmp_path / "s.zarr")
    (root / "strata/rna+adt/rna/codes/zarr.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(StoreError, match="larger than it can be"):
        blocks(Store(s3.upload(root, "nested.zarr")))


def test_new_cells_take_their_features_from_a_url(s3: S3, tmp_path: Path) -> None:
    trained = convert_files(
        tmp_path / "t.zarr",
        f"rna={write_h5mu(tmp_path / 't.h5mu', rna=make_anndata(make_counts(40, 12)))}",
    )
    assert isinstance(trained.root, Path)
    url = s3.upload(trained.root, "t.zarr")
    new = write_h5mu(tmp_path / "q.h5mu", rna=make_anndata(make_counts(30, 9)))
    query = convert_files(tmp_path / "q.zarr", f"rna={new}", features_from=url)
    assert query.manifest.modalities == trained.manifest.modalities


# --- what is wrong with the server ---


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("s3://cells/nothing.zarr", "no store here"),
        ("s3://other-cells/s.zarr", "no such bucket"),
        ("s3://B_!/s.zarr", "Invalid S3 bucket name"),
        ("ftp://cells/s.zarr", "a store cannot lie there"),
        ("s3:///", "a store cannot lie there"),
        ("https://host/s.zarr?signed=1", "a store cannot lie there"),
        ("https://cells.s3.eu-west-1.amazonaws.com/s.zarr", r"takes the \+"),
    ],
)
def test_a_wrong_url_is_told(s3: S3, where: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as error:
        Store(where)
    assert where.rstrip("/") in str(error.value.where)
    assert error.value.fix


def test_credentials_that_are_missing_or_half_given(
    s3: S3, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match="no credentials for the store"):
        Store(url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StoreError, match=r"(?s)refuses access.*HTTP 403.*AWS_ACCESS_KEY_ID"):
        Store(url)


def test_a_server_that_is_down_is_given_up_after_some_tries(
    s3: S3, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.perf_counter()
    with pytest.raises(
        StoreError, match=r"(?s)cannot be reached.*All 3 retry attempts failed.*AWS_ENDPOINT_URL"
    ):
        Store(url)
    assert time.perf_counter() - started < 10


def test_patience_without_a_test_is_bounded() -> None:
    assert segment_arrays._CONTEXT.items() >= location.RETRIES.items()
    seconds = {"250ms": 0.25, "8s": 8.0}
    for given in location.RETRIES.values():
        delays = [
            min(seconds[given["initial_delay"]] * 2**i, seconds[given["max_delay"]])
            for i in range(8)
        ]
        assert given["max_retries"] == 8
        assert sum(delays) < 60


def test_faults_that_pass_are_not_seen(s3: S3, local: Store, url: str) -> None:
    s3.gate.fail = ["503", "500"]
    store = Store(url)  # the manifest came at the third try
    for fault in ("503", "429", "cut"):
        s3.gate.fail = [fault]
        np.testing.assert_array_equal(blocks(store).codes, blocks(local).codes)
        assert s3.gate.fail == []


@pytest.mark.parametrize("fault", ["500", "503", "cut"])
def test_faults_that_stay_raise_where_the_batch_was_due(s3: S3, url: str, fault: str) -> None:
    store = Store(url)
    s3.gate.always = fault
    plan = CellPlan(5, {"rna+adt": 203, "adt": 70}, {"rna+adt": 16, "adt": 8}, 4, 2, 16)
    with (
        Loader(store, plan) as loader,
        pytest.raises(StoreError, match="cannot be reached, or fails") as error,
    ):
        next(loader)
    assert "blocks" in str(error.value.where)


# --- what is wrong with the data ---


def test_damaged_objects_raise_and_never_give_other_values(s3: S3, local: Store, url: str) -> None:
    key, right, store = f"deep/s.zarr/{SHARD}", blocks(local).codes, Store(url)
    good, rng = s3.get(key), np.random.default_rng(0)
    flipped = [
        good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1 :]
        for position in rng.integers(0, len(good), 40)
    ]
    caught = []
    for damaged in [*flipped, good[:-1], good[: len(good) // 2], good[1:], b""]:
        s3.put(key, damaged)
        try:
            # No error: the changed byte belongs to no chunk.
            np.testing.assert_array_equal(blocks(store).codes, right)
        except StoreError as error:
            caught.append(error)
    assert len(caught) >= 40
    assert {error.what for error in caught} == {"part of the store is missing or damaged"}
    assert all("rna/codes" in str(error.where) for error in caught)
    s3.client.delete_object(Bucket="cells", Key=key)
    with pytest.raises(StoreError, match="missing or damaged"):
        blocks(store)


def test_a_manifest_that_was_cut_off_or_edited(s3: S3, url: str) -> None:
    key = "deep/s.zarr/manifest.json"
    good = s3.get(key)
    s3.put(key, good[:-20])
    with pytest.raises(StoreError, match="does not describe a store"):
        Store(url)
    s3.put(key, good.replace(b"rna-7", b"rna-x", 1))
    with pytest.raises(StoreError, match="was changed after it was written"):
        Store(url)


def test_check_lists_what_is_wrong_and_inspect_reads(s3: S3, local: Store, url: str) -> None:
    assert check_store(url) == []
    local_facts, remote_facts = inspect.collect_facts(str(local.root)), inspect.collect_facts(url)
    assert remote_facts == local_facts | {"store": url}
    keys = sorted(local.manifest.shards)
    good = s3.get(f"deep/s.zarr/{keys[0]}")
    s3.put(f"deep/s.zarr/{keys[0]}", good[:5] + bytes([good[5] ^ 1]) + good[6:])
    s3.put(f"deep/s.zarr/{keys[1]}", s3.get(f"deep/s.zarr/{keys[1]}")[:-1])
    s3.client.delete_object(Bucket="cells", Key=f"deep/s.zarr/{keys[2]}")
    s3.put("deep/s.zarr/strata/extra", b"x")
    size = local.manifest.shards[keys[1]].bytes
    assert set(check_store(url)) == {
        f"{keys[0]}: content changed (sha256 differs)",
        f"{keys[1]}: {size - 1} bytes, expected {size}",
        f"{keys[2]}: missing",
        "strata/extra: not part of the store",
    }


# --- URLs ---


def test_specs_take_the_server_and_the_region_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    plain = {"driver": "s3", "bucket": "b", "path": "x/s.zarr/"}
    assert open_kvstore(parse_location("s3://b/x/s.zarr/")) == plain
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://a:1/")
    assert open_kvstore(RemoteLocation("s3://b/x/s.zarr")) == plain | {
        "endpoint": "http://a:1",
        "aws_region": "eu-west-1",
    }
    monkeypatch.setenv("AWS_REGION", "eu-west-2")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://b:2")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    named = {
        "endpoint": "http://b:2",
        "aws_region": "eu-west-2",
        "aws_credentials": {"type": "environment"},
    }
    assert open_kvstore(RemoteLocation("s3://b/x/s.zarr")) == plain | named


def test_specs_of_other_servers() -> None:
    assert open_kvstore(RemoteLocation("gs://b/s.zarr"), "strata/rna") == {
        "driver": "gcs",
        "bucket": "b",
        "path": "s.zarr/strata/rna/",
    }
    assert open_kvstore(RemoteLocation("https://h:8/a/s.zarr"), "c") == {
        "driver": "http",
        "base_url": "https://h:8",
        "path": "/a/s.zarr/c/",
    }


def test_a_folder_is_a_folder(local: Store, tmp_path: Path) -> None:
    assert parse_location("a/b.zarr") == Path("a/b.zarr")
    assert isinstance(local.root, Path)
    shutil.copytree(local.root, tmp_path / "c.zarr")
    inside = tmp_path / "c.zarr/strata/rna+adt/rna"
    shutil.move(inside, tmp_path / "elsewhere")
    inside.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="holds files and folders alone"):
        Store(tmp_path / "c.zarr")


def test_an_svd_is_read_and_may_be_missing(s3: S3, tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", cells={"rna": 40}, features={"rna": 20})
    url = s3.upload(tmp_path / "s.zarr", "without.zarr")
    assert svd.read_svd(parse_location(url), store.manifest, "rna") is None
    compute_svd(str(store.root), [], SvdOptions(components=3), ThreadPool(1))
    url = s3.upload(tmp_path / "s.zarr", "with.zarr")
    local_svd, remote_svd = (
        svd.read_svd(parse_location(root), store.manifest, "rna") for root in (str(store.root), url)
    )
    assert local_svd is not None
    assert remote_svd is not None
    np.testing.assert_array_equal(local_svd.loadings, remote_svd.loadings)
    assert check_store(url) == []
    # A server whose objects may not be listed answers so for a missing one.
    s3.gate.always = "403"
    assert svd.read_svd(parse_location(url), store.manifest, "rna") is None
