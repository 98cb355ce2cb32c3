"""AnnData and MuData in memory: they give what the store of the same cells gives."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from clue_dist.errors import ConfigError
from clue_dist.inference.cells import open_cells
from clue_dist.inference.cells.memory_obs import collect_obs
from clue_dist.inference.embed import embed_anndata
from clue_dist.inference.stream import embed_in_memory
from clue_dist.store.batch_vocabulary import BatchVocabulary
from clue_dist.store.reader import Store
from tests.fakes import FakeTrainedModel, dense, widen_modalities
from tests.stores import make_store

CELLS = {"rna+adt": 70, "rna": 41, "adt": 20}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("store") / "s.zarr", cells=CELLS)


@pytest.fixture(scope="module")
def loaded(store) -> FakeTrainedModel:
    """Knows one modality more than the store, and one batch fewer, in another order."""
    return FakeTrainedModel(
        widen_modalities(store),
        batch_vocabulary=BatchVocabulary.from_lists(["batch-1", "elsewhere"]),
    )


def read_mudata(store: Store, form=sp.csr_matrix) -> md.MuData:
    """All cells of a store; features in another order, one more, cells shuffled."""
    rng = np.random.default_rng(3)
    tables = {}
    for name in store.modalities:
        modality = store.manifest.modalities[name]
        parts, frames = [], []
        for reader in store.segments.values():
            if name in reader.modalities:
                positions = np.arange(reader.n_cells)
                rows = reader.read_rows(name, positions)
                parts.append(rows if isinstance(rows, np.ndarray) else rows.to_scipy().toarray())
                metadata = reader.read_metadata(positions)
                batches = [store.manifest.batches[code] for code in metadata.batch]
                frames.append(pd.DataFrame({"batch": batches}, index=metadata.barcodes))
        counts = np.concatenate(parts).astype(np.float64)
        order = rng.permutation(modality.n_features)
        counts = np.column_stack([counts[:, order], np.ones(len(counts))])
        names = [modality.features[i] for i in order] + [f"unknown-{name}"]
        cells = rng.permutation(len(counts))
        tables[name] = ad.AnnData(
            form(counts[cells]), pd.concat(frames).iloc[cells], pd.DataFrame(index=names)
        )
    return md.MuData(tables)


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_array, np.array])
def test_mudata_gives_what_its_store_gives(store, loaded, form):
    mdata = read_mudata(store, form)
    cells = open_cells(mdata, loaded)
    from_store = open_cells(store, loaded)
    assert cells.modalities == from_store.modalities == ["adt", "rna"]
    expected = embed_in_memory(loaded, from_store, batch_size=32)
    found = embed_in_memory(loaded, cells, batch_size=32)
    order = cells.read_obs().index.get_indexer(from_store.read_obs().index)
    np.testing.assert_allclose(found.joint[order], expected.joint, atol=1e-6)
    for name in ("rna", "adt"):
        np.testing.assert_allclose(found.alone[name][order], expected.alone[name], atol=1e-6)
        assert (found.mark_measured(name)[order] == expected.mark_measured(name)).all()


def collect_batches(cells):
    """Everything that a model is given: by barcode and modality, counts and batch code."""
    found = {}
    names = cells.read_obs().index
    for cell_slice in cells.slice_cells(16):
        batch = cells.read_slice(cell_slice)
        for k, name in enumerate(("adt", "atac", "rna")):
            assert batch.observed[:, k].sum() == (
                len(batch.modalities[name].rows) if name in batch.modalities else 0
            )
        for name, part in batch.modalities.items():
            for row, values in zip(part.rows.tolist(), dense(part.counts), strict=True):
                key = names[cell_slice.rows[row]], name
                found[key] = (values.tolist(), int(batch.batch_code[row]), len(part.paired) > 0)
    return found


def test_batches_are_those_of_the_store(store, loaded):
    found = collect_batches(open_cells(read_mudata(store), loaded))
    assert found == collect_batches(open_cells(store, loaded))
    assert {code for _, code, _ in found.values()} == {0, 1}
    batches = open_cells(store, loaded).batches
    assert batches.names == ["batch-0", "batch-1"]
    # batch-0 is not the model's
    assert loaded.batch_vocabulary.encode_levels(batches).tolist() == [[-1], [0]]


@pytest.mark.parametrize("form", [read_mudata, lambda store: store])
def test_slices_hold_a_cell_at_least(store, loaded, form):
    cells = open_cells(form(store), loaded)
    assert sum(cell_slice.n_cells for cell_slice in cells.slice_cells(1)) == cells.n_cells
    for batch_size in (0, -3, 2.5, True, "all"):
        with pytest.raises(ConfigError, match=f"batch_size\n.*{batch_size}.*\n.* whole number, 1"):
            cells.slice_cells(batch_size)


@pytest.mark.parametrize("form", [read_mudata, lambda store: store])
def test_a_share_of_features_is_a_number_from_0_to_1(store, loaded, form):
    for min_known in ("half", 50, float("nan")):
        with pytest.raises(ConfigError, match=r"where: min_known\n.*\n.* 0 or more, 1 at most"):
            open_cells(form(store), loaded, min_known=min_known)


def test_batches_lie_where_those_of_the_training_cells_did(store, loaded):
    mdata = read_mudata(store)
    for table in mdata.mod.values():
        table.obs = table.obs.rename(columns={"batch": "donor"})
    mdata.obs = mdata.obs[[]]
    assert {code for _, code, _ in collect_batches(open_cells(mdata, loaded)).values()} == {-1}
    by_donor = replace(
        loaded,
        batch_vocabulary=BatchVocabulary.from_lists(loaded.batch_vocabulary.names, column="donor"),
    )
    found = open_cells(mdata, by_donor)
    assert collect_batches(found) == collect_batches(open_cells(store, loaded))
    mdata.obs["batch"] = "elsewhere"  # which stands for another thing here
    assert collect_batches(open_cells(mdata, by_donor)) == collect_batches(found)


def test_embedding_is_written_where_the_cells_are(store, loaded):
    mdata = read_mudata(store)
    cells = open_cells(mdata, loaded)
    joint = embed_anndata(loaded, mdata, cells)
    assert (mdata.obsm["X_clue"] == joint).all()
    assert sorted(mdata.obs["clue_modalities"].unique()) == ["adt", "adt+rna", "rna"]
    lacks_rna = (mdata.obs["clue_modalities"] == "adt").to_numpy()
    assert mdata.obsm["X_clue_var"][lacks_rna] == pytest.approx(2 / 3)
    alone = mdata["rna"].obsm["X_clue"][mdata["rna"].obs_names.str.startswith("rna-")]
    assert alone.shape == (41, 9)
    names = mdata["rna"].obs_names[mdata["rna"].obs_names.str.startswith("rna-")]
    assert (alone == joint[mdata.obs_names.get_indexer(names)]).all()


def test_a_column_that_several_modalities_have_becomes_one_unless_they_contradict() -> None:
    rna = pd.DataFrame({"donor": ["a", "b"], "depth": [1, 2]}, index=["c0", "c1"])
    adt = pd.DataFrame({"donor": ["b", "a"], "depth": [7, 8]}, index=["c1", "c2"])
    mdata = md.MuData({"rna": ad.AnnData(obs=rna), "adt": ad.AnnData(obs=adt)})
    mdata.pull_obs()
    obs = collect_obs(mdata)
    assert obs.loc[["c0", "c1", "c2"], "donor"].tolist() == ["a", "b", "a"]
    assert not {"rna:donor", "adt:donor", "depth"} & set(obs)
    assert obs.loc["c1", ["rna:depth", "adt:depth"]].tolist() == [2, 7]
    mdata.obs["donor"] = pd.Categorical(["x", "y", "z"])
    assert collect_obs(mdata)["donor"].tolist() == ["x", "y", "z"]
