"""Embedding a store: every cell gets its own z, in every format, on any number of ranks."""

from __future__ import annotations

import fcntl
import re
import resource
import signal
from dataclasses import replace

import anndata as ad
import mudata as md
import numpy as np
import pytest
import torch

from clue_dist.data.assembly import read_batch
from clue_dist.errors import ConfigError, ResumeError, StoreError
from clue_dist.inference.answer_files import require_answer_path
from clue_dist.inference.query import require_known_features
from clue_dist.store.manifest_parts import Modality
from clue_dist.store.reader import Store
from tests.distributed.command import alone
from tests.fakes import FakeTrainedModel, widen_modalities
from tests.processes import run_ranks
from tests.stores import make_store
from tests.unit.run_helpers import embed_store

CELLS = {"rna+adt": 90, "rna": 41, "adt": 20}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("store") / "s.zarr", cells=CELLS)


@pytest.fixture(scope="module")
def loaded(store) -> FakeTrainedModel:
    """Knows one modality more than the store, and names them in another order."""
    return FakeTrainedModel(widen_modalities(store))


@pytest.fixture(scope="module")
def expected(store, loaded) -> dict[str, dict[str, np.ndarray]]:
    """Barcode -> z, by source: one batch per stratum, straight through the model."""
    out: dict[str, dict[str, np.ndarray]] = {"joint": {}, "rna": {}, "adt": {}}
    for name, reader in store.segments.items():
        everyone = np.arange(reader.n_cells)
        joint, alone = loaded.model.embed_batch(
            read_batch(store, name, everyone, list(loaded.modalities))
        )
        for source, z in {"joint": joint, **alone}.items():
            out[source] |= dict(
                zip(reader.read_metadata(everyone).barcodes, z.numpy(), strict=True)
            )
    return out


def assert_rows(names, z, expected) -> None:
    assert len(names) == len(set(names)) == len(expected)
    np.testing.assert_allclose(z, np.stack([expected[n] for n in names]), rtol=1e-5, atol=1e-5)


def test_h5mu_holds_every_cell_once_with_its_own_z(store, loaded, expected, tmp_path):
    embed_store(loaded, store, tmp_path / "o.h5mu", run="runs/a", per_modality=True, batch_size=32)
    embedding = md.read_h5mu(tmp_path / "o.h5mu")
    assert embedding.obsm["X_clue"].shape == (151, 9)
    assert_rows(embedding.obs_names, embedding.obsm["X_clue"], expected["joint"])
    assert list(embedding.mod) == ["rna", "adt"]
    for m in embedding.mod:
        assert_rows(embedding[m].obs_names, embedding[m].obsm["X_clue"], expected[m])
        assert embedding[m].X is None
        assert list(embedding[m].var_names) == store.manifest.modalities[m].features
    obs = store.segments["rna"].read_metadata(np.arange(41))
    frame = embedding["rna"].obs.loc[obs.barcodes]
    assert list(frame["batch"]) == [store.manifest.batches[i] for i in obs.batch]
    assert list(frame["cell_type"]) == [store.manifest.labels[i] for i in obs.label]
    assert list(embedding.obs.loc[obs.barcodes, "batch"]) == list(frame["batch"])
    about = embedding.uns["clue_dist"]
    assert (about["run"], about["checkpoint"], about["fingerprint"]) == (
        "runs/a",
        "step-7",
        store.fingerprint,
    )
    assert about["latent"] == {"adt": 3, "atac": 3, "rna": 3}
    assert about["private"] == {"adt": 0, "atac": 0, "rna": 0}
    assert [p.name for p in tmp_path.iterdir()] == ["o.h5mu"]


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_one_table_has_nan_where_a_modality_was_not_observed(
    store, loaded, expected, tmp_path, ending
):
    out = tmp_path / f"o.{ending}"
    for _ in range(2):  # the second time over the first
        embed_store(loaded, store, out, run="r", per_modality=True)
    embedding = ad.read_h5ad(out) if ending == "h5ad" else ad.read_zarr(out)
    assert_rows(embedding.obs_names, embedding.obsm["X_clue"], expected["joint"])
    observed = [set(name.split("-")[0].split("+")) for name in embedding.obs_names]
    assert [set(text.split("+")) for text in embedding.obs["clue_modalities"]] == observed
    unseen = [1 - len(modalities) / 3 for modalities in observed]
    np.testing.assert_allclose(embedding.obsm["X_clue_var"][:, 0], unseen, atol=1e-6)
    for m in ("rna", "adt"):
        has = np.array([m in name.split("-")[0].split("+") for name in embedding.obs_names])
        assert np.isnan(embedding.obsm[f"X_clue_{m}"][~has]).all()
        assert_rows(embedding.obs_names[has], embedding.obsm[f"X_clue_{m}"][has], expected[m])
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_unknown_batch_and_label_are_left_out(tmp_path):
    store = make_store(
        tmp_path / "s.zarr", cells={"rna": 20}, features={"rna": 9}, batches=0, labels=0
    )
    embed_store(FakeTrainedModel(store.manifest.modalities), store, tmp_path / "o.h5ad", run="r")
    embedding = ad.read_h5ad(tmp_path / "o.h5ad")
    assert list(embedding.obs) == ["clue_modalities"]
    assert sorted(embedding.obsm) == ["X_clue", "X_clue_var"]


def test_cells_that_share_a_barcode_stay_apart(store, loaded, tmp_path, monkeypatch):
    obs = store.segments["rna"].read_metadata
    shared = store.segments["adt"].read_metadata(np.arange(20)).barcodes

    def doubled(positions):
        metadata = obs(positions)
        return replace(
            metadata,
            barcodes=np.where(positions < 20, shared[np.minimum(positions, 19)], metadata.barcodes),
        )

    monkeypatch.setattr(store.segments["rna"], "read_metadata", doubled)
    embed_store(loaded, store, tmp_path / "o.h5mu", run="r")
    embedding = md.read_h5mu(tmp_path / "o.h5mu")
    assert embedding.n_obs == 151
    assert sorted(embedding.obs["barcode"]).count("adt-0") == 2


# 4096 cells a batch: 3 batches, and a rank has none.
@pytest.mark.parametrize(("world", "batch_size"), [(2, 16), (4, 4096)])
def test_ranks_write_what_one_writes(store, loaded, tmp_path, world, batch_size):
    embed_store(
        loaded, store, tmp_path / "one.h5mu", run="r", per_modality=True, batch_size=batch_size
    )
    code = """
        from pathlib import Path
        from clue_dist.inference.array_folder import ArrayFolder
        from tests.unit.run_helpers import embed_store
        from clue_dist.ranks import Ranks
        from clue_dist.store.reader import Store
        from tests.fakes import FakeTrainedModel, widen_modalities
        ranks, store = Ranks.from_environment().join_group(), Store(root)
        join = ArrayFolder.join_shares

        def spied(arrays, world):
            print("files", len(list(arrays.folder.iterdir())))
            join(arrays, world)

        ArrayFolder.join_shares = spied
        options = dict(run="r", per_modality=True, batch_size=size, ranks=ranks)
        embed_store(FakeTrainedModel(widen_modalities(store)), store, Path(out), **options)
        ranks.leave_group()
    """
    given = f"root, out, size = {str(store.root)!r}, {str(tmp_path / 'two.h5mu')!r}, {batch_size}"
    outputs = run_ranks(world, given, code)
    assert f"files {4 * world}\n" in outputs[0], (
        "each rank must have a file of its own for each of four arrays"
    )
    one, two = md.read_h5mu(tmp_path / "one.h5mu"), md.read_h5mu(tmp_path / "two.h5mu")
    assert list(one.obs_names) == list(two.obs_names)
    np.testing.assert_array_equal(one.obsm["X_clue"], two.obsm["X_clue"])
    for m in one.mod:
        np.testing.assert_array_equal(one[m].obsm["X_clue"], two[m].obsm["X_clue"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.h5mu", "two.h5mu"]


@pytest.mark.parametrize(
    ("features", "listing"),
    [
        (["a", "b"], r"1 missing: c$"),
        (["a", "b", "c", "x"], r"1 extra: x$"),
        (["b", "a", "c"], r"2 reordered: a, b$"),
        ([f"n{i}" for i in range(12)], r"3 missing: a, b, c; 12 extra: n0, .*n9 ... and 2 more$"),
    ],
)
def test_other_features_are_listed(store, features, listing):
    known = {
        "rna": store.manifest.modalities["rna"],
        "adt": Modality(kind="adt", storage="dense", features=["a", "b", "c"]),
    }
    modalities = {
        **store.manifest.modalities,
        "adt": Modality(kind="adt", storage="dense", features=features),
    }
    fake = Store(store.root)
    fake.manifest = store.manifest.model_copy(update={"modalities": modalities})
    with pytest.raises(StoreError, match="not the model's") as error:
        require_known_features(fake, known)
    assert "modality adt" in str(error.value)
    assert re.search(listing, str(error.value.got))
    assert "--features-from" in str(error.value.fix)


def test_a_modality_unknown_to_the_model_is_an_error(store):
    with pytest.raises(StoreError, match=r"does not know these modalities[\s\S]*got: adt"):
        require_known_features(store, {"rna": store.manifest.modalities["rna"]})


def test_a_modality_of_another_kind_is_an_error(store):
    known = {
        **store.manifest.modalities,
        "adt": store.manifest.modalities["adt"].model_copy(update={"kind": "dense"}),
    }
    with pytest.raises(StoreError, match="another kind"):
        require_known_features(store, known)


def test_outputs_that_cannot_be_are_refused_before_any_work(store, loaded, tmp_path):
    with pytest.raises(ConfigError, match=r"expected: .h5mu or"):
        embed_store(loaded, store, tmp_path / "o.csv", run="r")
    with pytest.raises(ConfigError, match="in the way"):
        embed_store(loaded, store, store.root, run="r")
    assert Store(store.root).fingerprint == store.fingerprint
    (tmp_path / "file").write_text("")
    for folder, reason in (("file", "is a file"), ("nowhere", "does not exist")):
        with pytest.raises(ConfigError, match=f"no such folder[\\s\\S]*{reason}"):
            embed_store(loaded, store, tmp_path / folder / "o.h5mu", run="r")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_output_replaces_results_alone_and_never_what_is_read(store, loaded, tmp_path):
    out, other = tmp_path / "cells.h5ad", tmp_path / "link.h5ad"
    ad.AnnData(np.ones((2, 2))).write_h5ad(out)
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="a file that is not an embedding"):
        embed_store(loaded, store, out, run="r")
    assert out.read_bytes() == before
    ad.AnnData(np.ones((2, 2)), uns={"clue_dist": {"run": "r"}}).write_h5ad(out)
    require_answer_path(out, [".h5ad"])
    other.symlink_to(out)
    with pytest.raises(ConfigError, match="would replace what is read"):
        require_answer_path(out, [".h5ad"], source=other)


def test_a_full_disk_is_told_and_leaves_nothing(store, loaded, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As Python has it: writing fails, and is no signal.
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(StoreError, match="the disk is full"):
            embed_store(loaded, store, tmp_path / "o.h5mu", run="r")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
from clue_dist.inference import embed
from clue_dist.process import run_main
from clue_dist.store.reader import Store
from tests.distributed.command import alone
from tests.fakes import FakeTrainedModel
from tests.unit.run_helpers import embed_store
store, out, write = Store(sys.argv[1]), Path(sys.argv[2]), embed.write_tables

def write_to_full_disk(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    write(*arguments)

embed.write_tables = write_to_full_disk
run_main(lambda: embed_store(FakeTrainedModel(store.manifest.modalities), store, out, run="r"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["h5mu", "h5ad", "zarr"])
def test_a_full_disk_in_the_last_step_is_told_in_plain_words(store, tmp_path, ending):
    """In a process of its own, which HDF5 would make crash as it ends."""
    out = tmp_path / f"o.{ending}"
    done = alone("-c", FULL_DISK, str(store.root), str(out), expect=2)
    assert "error: the disk is full or refuses to be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_jobs_do_not_write_one_output(store, loaded, tmp_path):
    out, rows = tmp_path / "o.h5ad", tmp_path / ".o.h5ad.partial" / "rows"
    rows.parent.mkdir()
    rows.touch()
    with (tmp_path / ".o.h5ad.lock").open("w+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 7 on another-host")
        lock.flush()
        with pytest.raises(ConfigError, match=r"another job[\s\S]*got: process 7 on another-host"):
            embed_store(loaded, store, out, run="r")
        assert rows.exists()
    embed_store(loaded, store, out, run="r")  # the other one was killed
    assert [p.name for p in tmp_path.iterdir()] == ["o.h5ad"]


def test_an_error_of_one_rank_is_raised_on_all(store, tmp_path):
    code = """
        import torch
        from pathlib import Path
        from tests.unit.run_helpers import embed_store
        from clue_dist.errors import ResumeError
        from clue_dist.ranks import Ranks
        from clue_dist.store.reader import Store
        from tests.fakes import FakeTrainedModel
        ranks, store = Ranks.from_environment().join_group(timeout_s=60), Store(root)
        loaded = FakeTrainedModel(store.manifest.modalities)
        if ranks.rank == 1:
            loaded.model.weights["adt"] *= torch.nan
        try:
            embed_store(loaded, store, Path(out), run="r", ranks=ranks)
        except ResumeError as error:
            print("told:", error.what)
        ranks.leave_group()
    """
    outputs = run_ranks(2, f"root, out = {str(store.root)!r}, {str(tmp_path / 'o.h5mu')!r}", code)
    assert all(re.search(r"told: rank 1 on \S+: the model gives NaN", output) for output in outputs)
    assert list(tmp_path.iterdir()) == []


def test_nan_is_refused_and_the_earlier_output_stands(store, loaded, tmp_path):
    out = tmp_path / "o.h5ad"
    embed_store(loaded, store, out, run="r")
    before = out.read_bytes()
    broken = FakeTrainedModel(loaded.modalities)
    broken.model.weights["adt"] = broken.model.weights["adt"] * torch.nan
    with pytest.raises(ResumeError, match=r"NaN or Inf[\s\S]*segment rna\+adt"):
        embed_store(broken, store, out, run="r")
    assert out.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["o.h5ad"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--run", "x" * 300, "--store", "s.zarr", "--out", "o.h5ad"],
            "a path that cannot be used",
        ),
        (["--run", "r", "--store", "s.zarr", "--out", "x" * 300], "a path that cannot be used"),
        (
            ["--run", "r", "--store", "s.zarr", "--out", "o.h5ad", "--batch-size", "0"],
            "'0' is not a number from 1 on",
        ),
    ],
)
def test_what_is_mistyped_is_told(words, message):
    done = alone("launch/embed.py", *words, expect=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["embed", "evaluate", "report"])
def test_command_lines_explain_themselves(name):
    assert "--run" in alone(f"launch/{name}.py", "--help").stdout
