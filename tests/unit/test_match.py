"""Matches of a model's cells: pairs, their matrix, and what their confidence is worth."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from clue_dist.api.comparison_methods import ComparisonMethods
from clue_dist.errors import ConfigError, DataError
from clue_dist.inference import match
from clue_dist.inference.cells import open_cells
from clue_dist.inference.match import MatchedCells, match_cells, write_matches
from clue_dist.neighbours import pair_confidence
from clue_dist.neighbours.pair_confidence import PairConfidence, fit_pair_confidence
from clue_dist.neighbours.partner_settings import PARTNER_METHODS, PartnerSettings
from clue_dist.neighbours.partners import METHODS, find_partners
from clue_dist.store.reader import Store
from clue_dist.store.seen_cells import identify_cells
from tests.fakes import FakeTrainedModel
from tests.stores import make_store
from tests.unit.test_cells_in_memory import read_mudata

CELLS = {"rna+adt": 70, "rna": 41, "adt": 20}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("store") / "s.zarr", cells=CELLS)


@pytest.fixture(scope="module")
def loaded(store) -> FakeTrainedModel:
    return FakeTrainedModel(dict(store.manifest.modalities))


@pytest.fixture(scope="module")
def matched(store, loaded) -> MatchedCells:
    settings = PartnerSettings(n_partners=3)
    return match_cells(loaded, open_cells(store, loaded), "rna", "adt", settings=settings)


def draw_profiles(n_cells: int, noise: float, seed: int) -> list[np.ndarray]:
    """Two noisy looks at the same cells, (N, 6) each."""
    rng = np.random.default_rng(seed)
    cells = rng.normal(size=(n_cells, 6))
    return [cells + noise * rng.normal(size=cells.shape) for _ in range(2)]


def measure_calibration(confidence: PairConfidence, n_cells: int, noise: float) -> float:
    """How far mean confidence is from the share of true pairs, weighted over ten bins."""
    first, second = draw_profiles(n_cells, noise, seed=9)
    chosen = find_partners(first, second).tocoo()
    sure = confidence.compute_confidence(first, second, chosen.row, chosen.col)
    bins = np.minimum((10 * sure).astype(int), 9)
    is_true = chosen.row == chosen.col
    errors = [
        (bins == b).mean() * abs(sure[bins == b].mean() - is_true[bins == b].mean())
        for b in np.unique(bins)
    ]
    return float(np.sum(errors))


def test_every_cell_with_the_first_modality_gets_partners_with_the_second(matched, store, loaded):
    assert matched.weights.shape == (70 + 41, 70 + 20)
    assert set(matched.pairs.cell) == {
        name for name in open_cells(store, loaded).read_obs().index if not name.startswith("adt")
    }
    assert not any(name.startswith("rna-") for name in matched.pairs.partner)
    sums = matched.pairs.groupby("cell").weight.sum()
    np.testing.assert_allclose(sums, 1)
    assert matched.pairs.confidence.between(0, 1).all()


def test_profiles_of_cells_that_are_all_measured_are_not_copied(tmp_path, monkeypatch):
    store = make_store(tmp_path / "s.zarr", cells={"rna+adt": 90})
    loaded, embedded, sides = FakeTrainedModel(dict(store.manifest.modalities)), [], []

    def record_embedding(*arguments):
        embedded.append(embed(*arguments))
        return embedded[0]

    def record_sides(*arguments):
        sides.append(arguments[:2])
        return find_partners(*arguments)

    embed = match.embed_for_comparison
    monkeypatch.setattr(match, "embed_for_comparison", record_embedding)
    monkeypatch.setattr(match, "find_partners", record_sides)
    match_cells(loaded, open_cells(store, loaded), "rna", "adt")
    alone = embedded[0].embedding.alone
    assert np.shares_memory(sides[0][0], alone["rna"])
    assert np.shares_memory(sides[0][1], alone["adt"])


def test_the_table_says_what_the_matrix_says(matched):
    best = matched.pairs[~matched.pairs.cell.duplicated()]
    np.testing.assert_allclose(best.weight, matched.weights.max(axis=1).toarray().ravel())
    assert len(matched.pairs) == matched.weights.nnz


def test_within_a_batch_pairs_do_not_cross(store, loaded):
    cells = open_cells(store, loaded)
    found = match_cells(loaded, cells, "rna", "adt", within_batch=True)
    batch = cells.read_obs().batch.astype(str)
    assert (batch[found.pairs.cell].to_numpy() == batch[found.pairs.partner].to_numpy()).all()
    assert found.pairs.confidence.between(0, 1).all()


def test_cells_of_unknown_batches_are_not_matched_with_each_other(store, loaded):
    mdata = read_mudata(store)
    for table in mdata.mod.values():
        table.obs["batch"] = table.obs["batch"].where(table.obs["batch"] == "batch-1")
    cells = open_cells(mdata, loaded)
    with pytest.warns(UserWarning, match="no partner for [0-9]+ cells"):
        found = match_cells(loaded, cells, "rna", "adt", within_batch=True)
    assert set(cells.read_obs().batch[found.pairs.cell]) == {"batch-1"}


def test_cells_to_calibrate_on_need_no_batches(store, loaded):
    methods = ComparisonMethods()
    methods.trained_model = loaded
    mdata, paired = read_mudata(store), read_mudata(store)
    for table in mdata.mod.values():
        table.obs["donor"] = "d1"
    pairs = methods.match(
        mdata, "rna", "adt", within_batch=True, batch_key="donor", calibrate_on=paired
    )
    assert pairs.attrs["is_calibrated"]


def test_confidence_is_calibrated_on_pairs_the_model_has_not_seen(matched, store, loaded):
    assert matched.confidence.n_pairs == 70
    assert "calibrated on 70 pairs" in repr(matched)
    seen = FakeTrainedModel(loaded.modalities, seen_cells=frozenset(identify_cells(store.manifest)))
    found = match_cells(seen, open_cells(store, seen), "rna", "adt")
    assert not found.confidence.is_calibrated
    assert "not calibrated, which takes 50 cells with both modalities" in repr(found)


def test_cells_in_memory_calibrate_only_where_they_are_named(store, loaded):
    """They may be what the model was trained on, and nothing says so."""
    cells = open_cells(read_mudata(store), loaded)
    with pytest.warns(UserWarning, match="nothing says whether the model was trained"):
        found = match_cells(loaded, cells, "rna", "adt")
    assert not found.pairs.attrs["is_calibrated"]
    again = match_cells(loaded, cells, "rna", "adt", calibrate_on=cells)
    assert again.pairs.attrs["is_calibrated"]
    assert again.confidence.n_pairs == 70


def test_calibration_may_be_given(store, loaded, tmp_path):
    few = open_cells(make_store(tmp_path / "few.zarr", cells={"rna+adt": 10}), loaded)
    with pytest.raises(DataError, match="too few pairs"):
        match_cells(loaded, open_cells(store, loaded), "rna", "adt", calibrate_on=few)
    many = open_cells(make_store(tmp_path / "many.zarr", cells={"rna+adt": 60}), loaded)
    found = match_cells(loaded, open_cells(store, loaded), "rna", "adt", calibrate_on=many)
    assert found.confidence.n_pairs == 60


def test_a_calibration_on_few_cells_holds_for_more():
    confidence = fit_pair_confidence(*draw_profiles(400, 0.3, seed=1), PartnerSettings())
    assert measure_calibration(confidence, 400, 0.3) < 0.1
    assert measure_calibration(confidence, 1_200, 0.3) < 0.1


def test_of_many_pairs_a_random_part_calibrates(monkeypatch):
    first, second = draw_profiles(300, 0.05, seed=1)
    second[1::2] = np.random.default_rng(0).normal(size=second[1::2].shape)  # of a lane that failed
    whole = fit_pair_confidence(first, second, PartnerSettings())
    monkeypatch.setattr(pair_confidence, "_MOST_JUDGED", 299)
    assert fit_pair_confidence(first, second, PartnerSettings()).n_pairs == 299
    monkeypatch.setattr(pair_confidence, "_MOST_JUDGED", 150)
    part = fit_pair_confidence(first, second, PartnerSettings())
    assert part.n_pairs == 150
    # Cells of one lane alone are all right or all wrong, which makes the slope 0.
    assert part.slope == pytest.approx(whole.slope, rel=0.5)


def test_confidence_of_slices_of_pairs_is_that_of_all(monkeypatch):
    first, second = draw_profiles(90, 0.3, seed=1)
    rows, columns = np.arange(80), np.roll(np.arange(80), 3)
    whole = PairConfidence().compute_confidence(first, second, rows, columns)
    monkeypatch.setattr(pair_confidence, "_SLICE_ELEMENTS", 200)
    found = PairConfidence().compute_confidence(first, second, rows, columns)
    np.testing.assert_allclose(found, whole, rtol=1e-4)


@pytest.mark.parametrize("ending", [".npz", ".csv", ".csv.gz"])
def test_matches_are_read_back(matched, tmp_path, ending):
    out = tmp_path / f"pairs{ending}"
    write_matches(matched, out)
    if ending == ".npz":
        assert abs(sp.load_npz(out) - matched.weights).max() == 0
    else:
        pd.testing.assert_frame_equal(pd.read_csv(out), matched.pairs)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_modalities_and_batches_that_are_not_there_are_refused(store, loaded, tmp_path):
    cells = open_cells(store, loaded)
    with pytest.raises(ConfigError, match="two different modalities"):
        match_cells(loaded, cells, "rna", "rna")
    with pytest.raises(ConfigError, match="two different modalities"):
        match_cells(loaded, cells, "rna", "atac")
    rna = make_store(tmp_path / "rna.zarr", cells={"rna": 9}, features={"rna": 30})
    with pytest.raises(ConfigError, match=r"two of rna\n  fix: (.*)`reference`"):
        match_cells(loaded, open_cells(rna, loaded), "rna", "adt")
    plain = make_store(tmp_path / "plain.zarr", cells=CELLS, batches=0)
    with pytest.raises(ConfigError, match="batches of the cells are not known"):
        match_cells(loaded, open_cells(plain, loaded), "rna", "adt", within_batch=True)


def test_an_ending_that_no_format_has_is_refused(matched, tmp_path):
    with pytest.raises(ConfigError, match="ending says its format"):
        write_matches(matched, tmp_path / "pairs.txt")


def test_the_command_offers_every_method():
    """Their names lie apart, so that its help imports nothing heavy."""
    assert tuple(METHODS) == PARTNER_METHODS
