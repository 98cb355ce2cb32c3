"""Labels carried over: votes, confidence that means something, and types that are not there."""

import warnings

import numpy as np
import pandas as pd
import pytest

from clue_dist.errors import ConfigError, DataError
from clue_dist.inference import transfer
from clue_dist.inference.cells import StoreCells, open_cells
from clue_dist.inference.cells.named_counts import CellWarning
from clue_dist.inference.reference_cells import embed_for_comparison
from clue_dist.inference.stream import embed_in_memory
from clue_dist.inference.transfer import label_cells, write_labels
from clue_dist.neighbours import label_transfer
from clue_dist.neighbours.label_transfer import (
    UNKNOWN_LABEL,
    TransferSettings,
    fit_label_transfer,
)
from clue_dist.store.reader import Store
from tests.fakes import FakeTrainedModel, Projection
from tests.stores import make_store

CELLS = {"rna+adt": 120, "rna": 50, "adt": 40}
TYPES = np.array(["b", "mono", "nk", "t"])


def draw_types(n_cells: int, seed: int, overlap: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Cells of four types that overlap, (N, 5), and their types, (N,)."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(42).normal(size=(4, 5)) * 2
    codes = rng.integers(4, size=n_cells)
    return centres[codes] + overlap * rng.normal(size=(n_cells, 5)), TYPES[codes]


def measure_calibration(confidence: np.ndarray, is_right: np.ndarray) -> float:
    """Expected calibration error over ten bins."""
    bins = np.minimum((10 * confidence).astype(int), 9)
    return float(
        sum(
            (bins == b).mean() * abs(confidence[bins == b].mean() - is_right[bins == b].mean())
            for b in np.unique(bins)
        )
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("store") / "s.zarr", cells=CELLS)


@pytest.fixture(scope="module")
def loaded(store) -> FakeTrainedModel:
    return FakeTrainedModel(dict(store.manifest.modalities))


def test_queries_are_labelled_in_slices(monkeypatch):
    fitted, sizes = fit_label_transfer(*draw_types(200, 0)), []
    queries = draw_types(150, 1)[0]
    whole, count = fitted.assign_labels(queries), label_transfer._count_votes

    def watch_slice(points, *arguments):
        sizes.append(len(points))
        return count(points, *arguments)

    monkeypatch.setattr(label_transfer, "_QUERIES_AT_ONCE", 64)
    monkeypatch.setattr(label_transfer, "_count_votes", watch_slice)
    pd.testing.assert_frame_equal(fitted.assign_labels(queries), whole)
    assert sizes == [64, 64, 22]
    assert len(fitted.assign_labels(queries[:0])) == 0


def test_votes_are_weighed_by_distance():
    """One cell of type a lies at the query, two of b at the edge of the three that vote."""
    reference = np.array([[0.1], [1.0], [-1.0], [1.1], [5.0], [6.0]])
    labels = np.array(["a", "b", "b", "b", "b", "b"])
    fitted = fit_label_transfer(reference, labels, settings=TransferSettings(n_neighbours=3))
    found = fitted.assign_labels(np.zeros((1, 1)))
    assert found.nearest_label[0] == "a"


@pytest.mark.parametrize("overlap", [1.0, 1.6])
def test_confidence_is_the_share_of_right_labels(overlap):
    fitted = fit_label_transfer(*draw_types(800, 0, overlap))
    queries, truth = draw_types(1_500, 1, overlap)
    found = fitted.assign_labels(queries)
    is_right = found.nearest_label.astype(str).to_numpy() == truth
    assert 0.5 < is_right.mean() < 0.99
    assert measure_calibration(found.confidence.to_numpy(), is_right) < 0.05


def test_confidence_follows_what_queries_are_seen_through():
    """Queries of a noisy modality are right less often, which views of the reference tell."""
    reference, labels = draw_types(800, 0)
    queries, truth = draw_types(1_000, 1)
    rng = np.random.default_rng(2)
    views, noisy = (u + 2 * rng.normal(size=u.shape) for u in (reference, queries))
    views[:200] = np.nan
    errors = []
    for seen in (views, None):
        found = fit_label_transfer(reference, labels, seen).assign_labels(noisy)
        is_right = found.nearest_label.astype(str).to_numpy() == truth
        errors.append(measure_calibration(found.confidence.to_numpy(), is_right))
    assert errors[0] < 0.08
    assert errors[1] > 2 * errors[0]


def test_a_type_that_the_reference_lacks_is_unknown():
    reference, labels = draw_types(800, 0, overlap=0.6)
    queries, truth = draw_types(1_000, 1, overlap=0.6)
    present = labels != "mono"
    found = fit_label_transfer(reference[present], labels[present]).assign_labels(queries)
    is_unknown = (found.label == UNKNOWN_LABEL).to_numpy()
    assert is_unknown[truth == "mono"].mean() > 0.8
    assert is_unknown[truth != "mono"].mean() < 0.15
    assert (found.nearest_label != UNKNOWN_LABEL).all()


def test_labels_below_a_threshold_are_unknown():
    fitted = fit_label_transfer(
        *draw_types(400, 0, 2.0), settings=TransferSettings(kept=1.0, least_confidence=0.8)
    )
    found = fitted.assign_labels(draw_types(300, 1, 2.0)[0])
    expected = (found.confidence < 0.8) | (found.novelty > 1)
    assert expected.any()
    pd.testing.assert_series_equal(found.label == UNKNOWN_LABEL, expected, check_names=False)


def test_small_references_and_types_of_one_cell_are_possible():
    reference, labels = draw_types(6, 0)
    labels[:] = ["a", "a", "a", "a", "a", "alone"]
    found = fit_label_transfer(reference, labels).assign_labels(reference)
    assert found.confidence.between(0, 1).all()
    with pytest.raises(DataError, match="two labelled cells"):
        fit_label_transfer(reference[:1], labels[:1])


@pytest.mark.parametrize(
    "choice",
    [
        {"n_neighbours": 0},
        {"n_neighbours": "5"},
        {"kept": 0},
        {"kept": "most"},
        {"least_confidence": 2},
    ],
)
def test_settings_that_cannot_work_are_refused(choice):
    name = next(iter(choice))
    with pytest.raises(ConfigError, match=rf"cannot be used\n  where: (.*`{name}`|{name})\n"):
        TransferSettings(**choice)


def test_cells_get_labels_across_modalities(store, loaded, tmp_path):
    query = open_cells(
        make_store(tmp_path / "q.zarr", cells={"rna": 30, "rna+adt": 20}, seed=0), loaded
    )
    found = label_cells(loaded, open_cells(store, loaded), query, "cell_type")
    assert list(found.index) == list(query.read_obs().index)
    assert found.is_calibrated.all()
    truth = query.read_obs().cell_type.astype(str)
    assert (found.nearest_label.astype(str) == truth).mean() > 0.5
    write_labels(found, tmp_path / "labels.csv")
    again = pd.read_csv(tmp_path / "labels.csv")
    assert list(again.columns) == ["cell", *found.columns]
    assert list(again.label) == list(found.label.astype(str))


@pytest.mark.parametrize("text", ["unknown", "nan"])
def test_unknown_cells_of_a_reference_carry_no_label_over(store, loaded, text):
    class Annotated(StoreCells):
        def read_obs(self):
            obs = super().read_obs()
            return obs.assign(cell_type=obs["cell_type"].astype(str).replace("type-0", text))

    cells = Annotated(store, loaded)
    found = label_cells(loaded, cells, cells, "cell_type")
    assert list(found.nearest_label.cat.categories) == ["type-1", "type-2"]
    points, labels = draw_types(60, 0)
    fitted = fit_label_transfer(points, np.where(labels == "nk", UNKNOWN_LABEL, labels), points)
    assert list(fitted.names) == ["b", "mono", "t"]
    assert UNKNOWN_LABEL in fitted.assign_labels(points).label.cat.categories


def test_labels_are_named_as_a_store_names_them(store, loaded):
    class Numbered(StoreCells):
        def read_obs(self):
            obs = super().read_obs()
            return obs.assign(cluster=obs["cell_type"].cat.codes.replace(0, None).astype(float))

    cells = Numbered(store, loaded)
    assert cells.read_obs()["cluster"].isna().any()
    found = label_cells(loaded, cells, cells, "cluster")
    assert list(found.nearest_label.cat.categories) == ["1", "2"]


def test_without_cells_of_the_queries_modalities_confidence_is_not_calibrated(loaded, tmp_path):
    reference = open_cells(make_store(tmp_path / "r.zarr", cells={"rna": 60}), loaded)
    query = open_cells(make_store(tmp_path / "q.zarr", cells={"adt": 20}), loaded)
    with pytest.warns(UserWarning, match="too few labelled cells carry adt: "):
        found = label_cells(loaded, reference, query, "cell_type")
    assert not found.is_calibrated.any()


def test_reference_cells_that_carry_more_are_seen_through_the_queries_modalities(tmp_path):
    features = {"rna": 20, "adt": 6, "atac": 15}
    stores = {
        name: make_store(tmp_path / f"{name}.zarr", cells=cells, features=features, seed=seed)
        for name, cells, seed in (
            ("r", {"rna+adt+atac": 60, "atac": 10}, 0),
            ("q", {"rna+adt": 30, "atac": 1}, 1),
        )
    }
    loaded = FakeTrainedModel(dict(stores["r"].manifest.modalities))
    reference, query = open_cells(stores["r"], loaded), open_cells(stores["q"], loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CellWarning)
        found = label_cells(loaded, reference, query, "cell_type")
    assert found.is_calibrated.to_numpy()[:30].all()
    seen = embed_in_memory(loaded, reference, sources=["adt", "rna"]).joint
    alone = embed_in_memory(loaded, reference).alone
    np.testing.assert_allclose(seen[:60], (alone["rna"] + alone["adt"])[:60] / 2, rtol=1e-5)
    assert np.isnan(seen[60:]).all()
    embedded = embed_for_comparison(loaded, reference)
    with pytest.warns(CellWarning, match=r"carry rna\+adt and nothing else"):
        assert not label_cells(loaded, embedded, query, "cell_type").is_calibrated[:30].any()


class DoubledJoint(Projection):
    """The joint z is twice as long as that of single modalities."""

    def embed_batch(self, batch, per_modality=True):
        joint, alone = super().embed_batch(batch, per_modality)
        return 2 * joint, alone

    def reweigh_as_joint(self, alone):
        return 2 * alone


def test_reference_cells_are_seen_as_queries_with_one_modality_are(store):
    modalities = dict(store.manifest.modalities)
    loaded = FakeTrainedModel(modalities, model=DoubledJoint(modalities, 3))
    reference = open_cells(store, loaded)
    known = embed_for_comparison(loaded, reference).embedding
    seen = transfer._view_reference(loaded, reference, known, "rna", 4096)
    expected = embed_in_memory(loaded, reference, sources=["rna"]).joint
    np.testing.assert_allclose(seen, expected, rtol=1e-6)
    assert np.isfinite(seen).any()


def test_a_column_that_is_not_there_and_no_labels_are_refused(store, loaded, tmp_path):
    cells = open_cells(store, loaded)
    with pytest.raises(ConfigError, match="obs of the reference has no such column"):
        label_cells(loaded, cells, cells, "leiden")
    with pytest.raises(
        ConfigError, match=r"obs of the reference has no such column(.|\n)*did you mean cell_type"
    ):
        label_cells(loaded, cells, cells, ["cell_type"])
    plain = open_cells(make_store(tmp_path / "plain.zarr", cells=CELLS, labels=0), loaded)
    with pytest.raises(ConfigError, match="obs of the reference has no such column"):
        label_cells(loaded, plain, cells, "cell_type")
    with pytest.raises(ConfigError, match="ending says its format"):
        write_labels(pd.DataFrame(), tmp_path / "labels.txt")
