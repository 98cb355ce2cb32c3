"""Several covariates of batches in a model: counterfactual values, new levels, scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

from clue_dist.checkpoint.model_card import read_model_card, write_model_card
from clue_dist.config import Config, DecoderConfig
from clue_dist.data.batch import Counts
from clue_dist.errors import ClueError, ConfigError, DataError
from clue_dist.inference import new_batches
from clue_dist.inference.cells import open_cells
from clue_dist.inference.describe_run import describe_run
from clue_dist.inference.differential import DifferentialChoices, compare_groups
from clue_dist.inference.embed import collect_embedding
from clue_dist.inference.imputation_question import ImputationChoices
from clue_dist.inference.impute import impute_cells
from clue_dist.inference.load_model import TrainedModel
from clue_dist.inference.new_batches import learn_batches
from clue_dist.inference.report.layouts import list_colourings
from clue_dist.inference.report.profiles import read_profiles
from clue_dist.inference.score_tables import list_joint_scores
from clue_dist.metrics.integration import score_joint_latent
from clue_dist.model.decoders import Decoder
from clue_dist.store.batch_vocabulary import BatchVocabulary
from clue_dist.store.feature_reference import read_feature_reference
from clue_dist.store.reader import Store
from data_prep.from_python import ConversionRequest
from tests.unit.covariate_helpers import COLUMNS, DONORS, N, convert, make_table
from tests.unit.impute_helpers import make_trained


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return convert(tmp_path_factory.mktemp("covariates"), "--batch-key", *COLUMNS)


@pytest.fixture(scope="module")
def trained(store: Store) -> TrainedModel:
    return make_trained(store)


def impute(trained: TrainedModel, source: Store | ad.AnnData, **choices: object) -> ad.AnnData:
    cells = open_cells(source, trained)
    return impute_cells(trained, cells, ImputationChoices("rna", **choices))


def test_a_decoder_of_one_covariate_computes_what_it_did() -> None:
    torch.manual_seed(0)
    decoder, z = Decoder("nb", 6, 3, 4, DecoderConfig(hidden=8)), torch.randn(5, 4)
    code = torch.tensor([2, 0, -1, 1, 2])
    counts: Counts = torch.ones(5, 6)
    decoder(z, code, counts).sum().backward()
    assert decoder.batch is not None
    found, decoder.batch.weight.grad = decoder.batch.weight.grad, None
    rows = decoder.batch(code.clamp_min(0)) * (code >= 0).unsqueeze(1)
    h = decoder.mlp(torch.cat([z, rows], 1), None, None)
    assert torch.equal(
        decoder.rate(h, None),
        decoder.compute_parameters(z, decoder.find_levels(code), torch.ones(5, 1)).rate,
    )
    assert found is not None
    assert found[:, 0].abs().min() > 0
    assert "levels" not in dict(decoder.named_buffers())


def test_a_counterfactual_needs_no_cell_of_the_combination(
    store: Store, trained: TrainedModel
) -> None:
    decoder = trained.model.get_decoder("rna")
    assert decoder.batch is not None
    assert decoder.batch.num_embeddings == 5  # three donors and two chemistries
    seen = impute(trained, store, batch={"donor": "d2", "chemistry": "v2"})
    np.testing.assert_array_equal(seen.X, impute(trained, store, batch="d2 | v2").X)
    unseen = impute(trained, store, batch=["donor=d2", "chemistry=v3"])
    assert np.abs(unseen.X - seen.X).max() > 1


def test_a_covariate_that_is_not_named_is_each_cells_own(
    store: Store, trained: TrainedModel
) -> None:
    partial = impute(trained, store, batch={"chemistry": "v3"})
    by_donor = {
        d: impute(trained, store, batch=[f"donor={d}", "chemistry=v3"]) for d in set(DONORS)
    }
    for donor, expected in by_donor.items():
        chosen = (partial.obs["donor"] == donor).to_numpy()
        np.testing.assert_allclose(partial.X[chosen], expected.X[chosen], rtol=1e-5)
    average = impute(trained, store, batch={"donor": "average", "chemistry": "v3"})
    # Over the batches of training, two of which are of d0, two of d1 and one of d2.
    mean = np.average([by_donor[f"d{i}"].X for i in range(3)], 0, weights=[2, 2, 1])
    np.testing.assert_allclose(average.X, mean, rtol=1e-5)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"donor": "d7"}, r"no such donor(.|\n)*average, or one of d0, d1, d2"),
        ({"lane": "d1"}, r"no such covariate of batches(.|\n)*donor, chemistry"),
        ("d7", "no such batch(.|\n)*donor=LEVEL"),
        (["donor=d1", "donor=d2"], "two levels of one covariate"),
        (["donor=d1", "v3"], "no such batch"),
        ({"donor": 7}, r"no such donor\n  where: --batch, in Python `batch`\n  got: 7"),
        (7.0, r"no such batch(.|\n)*got: 7\n"),  # named as obs would be
        (np.int64(7), r"no such batch(.|\n)*got: 7\n"),
    ],
)
def test_a_level_that_the_model_does_not_know_is_refused(
    store: Store, trained: TrainedModel, batch: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        impute(trained, store, batch=batch)


def test_a_batch_may_be_a_number(store: Store, trained: TrainedModel) -> None:
    known = BatchVocabulary(["1", "2"], {"lane": ["1", "2"]})
    single = replace(trained, batch_vocabulary=known)
    first, *others = [impute(single, store, batch=each).X for each in ("2", 2, {"lane": 2})]
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_a_batch_of_one_covariate_may_be_named_by_it(store: Store, trained: TrainedModel) -> None:
    known = BatchVocabulary(["a=b", "c"], {"donor": ["a=b", "c"]})
    single = replace(trained, batch_vocabulary=known)
    found = [
        impute(single, store, batch=batch).X
        for batch in ("a=b", "donor=a=b", {"donor": "a=b"}, "donor=c")
    ]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    assert np.abs(found[0] - found[3]).max() > 0


def test_cells_in_memory_have_levels_of_their_own(trained: TrainedModel) -> None:
    table = make_table(donor=["d0", "d2", "d9", None], chemistry=["v2", "v3", "v3", "v3"])
    cells = open_cells(table, trained)
    obs = cells.read_obs()
    assert obs["batch"].tolist() == ["d0 | v2", "d2 | v3", "d9 | v3", "? | v3"]
    assert obs["donor"].tolist()[:3] == ["d0", "d2", "d9"]
    own, fixed = impute(trained, table), impute(trained, table, batch={"donor": "average"})
    expected = impute(trained, table, batch=["donor=d2", "chemistry=v3"])
    np.testing.assert_allclose(own.X[1], expected.X[1], rtol=1e-5)  # no cell of training was so
    # A donor that is unknown, or new, is averaged over those of training.
    np.testing.assert_allclose(own.X[2:], fixed.X[2:], rtol=1e-5)
    by_order = open_cells(
        make_table(who=["d1"] * 4, kit=["v2"] * 4), trained, batch_key=["who", "kit"]
    )
    assert by_order.batches.names == ["d1 | v2"]
    with pytest.raises(DataError, match=r"other covariates(.|\n)*expected: donor, chemistry"):
        open_cells(table, trained, batch_key="lane")
    with pytest.warns(UserWarning, match="knows the chemistry of no cell"):
        impute(trained, make_table(donor=["d1"] * 4))


def test_a_new_level_is_learnt_and_a_new_combination_is_known(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_batches, "STEPS", 4)
    donors, chemistries = np.where(DONORS == "d0", "d9", DONORS), np.full(N, "v3", object)
    query = convert(tmp_path, "--batch-key", *COLUMNS, donor=donors, chemistry=chemistries)
    tuned, report = learn_batches(trained, open_cells(query, trained))
    assert report.names == ["d9 | v3"]  # d2 | v3 is new, too, and needs nothing to be learnt
    assert list(tuned.batch_vocabulary.covariates["donor"]) == ["d0", "d0", "d1", "d1", "d2", "d9"]
    before, after = (model.model.state_dict() for model in (trained, tuned))
    weights = after["decoders.0.batch.weight"]
    assert weights[:5].equal(before["decoders.0.batch.weight"])
    assert len(weights) == 6
    assert np.abs(impute(tuned, query).X - impute(trained, query).X).max() > 0
    with pytest.raises(DataError, match="no cell is of a batch"):
        learn_batches(tuned, open_cells(query, tuned))


def test_both_sides_of_a_comparison_get_the_levels_that_are_asked_for(
    store: Store, trained: TrainedModel
) -> None:
    cells = open_cells(store, trained)
    choices = DifferentialChoices("rna", "chemistry", batch={"chemistry": "v3"}, pairs=50)
    first = compare_groups(trained, cells, choices)["v2"]
    fixed = replace(choices, batch={"chemistry": "v2"})
    assert not np.allclose(first["mean"], compare_groups(trained, cells, fixed)["v2"]["mean"])


def test_a_page_colours_cells_by_each_covariate(
    store: Store, trained: TrainedModel, tmp_path: Path
) -> None:
    embedding = collect_embedding(trained, open_cells(store, trained), "")
    assert list(embedding.obs.columns[:3]) == ["batch", *COLUMNS]
    embedding.write_h5ad(tmp_path / "e.h5ad")
    joint = read_profiles(tmp_path / "e.h5ad", 20, 0).joint
    assert joint is not None
    assert [found.title for found in list_colourings(joint)] == ["batch", *COLUMNS]
    one = joint.select_rows(joint.batch == "d2 | v2")
    assert set(one.levels["donor"]) == {"d2"}


def test_scores_tell_how_each_covariate_mixes(store: Store) -> None:
    latent = np.random.default_rng(0).normal(size=(N, 3))
    codes = store.segments["rna+adt"].read_codes("batch", np.arange(N))
    levels = store.manifest.batch_vocabulary.decode_levels(codes)
    named = {name: np.asarray(each) for name, each in levels.items()} | {"same": np.full(N, "a")}
    scores = score_joint_latent(latent, np.full(N, "rna"), codes, np.full(N, ""), covariates=named)
    assert list(scores["covariates"]) == COLUMNS  # of a single level there is nothing to say
    donors = scores["covariates"]["donor"]
    alone = score_joint_latent(latent, np.full(N, "rna"), named["donor"], np.full(N, ""))
    assert donors == {name: alone[name] for name in ("ilisi", "ilisi_random")}
    titles = dict(list_joint_scores(scores))
    assert titles["iLISI of donor"] == donors["ilisi"]


def test_cells_of_an_unknown_level_are_no_level_of_their_own() -> None:
    rng = np.random.default_rng(0)
    latent, known = rng.normal(size=(200, 3)), np.arange(200) % 4 > 0
    levels = np.where(known, rng.choice(["a", "b"], 200), "")
    latent[~known] += 50  # were they a level, it would not mix
    nothing = np.full(200, "")
    scores = score_joint_latent(latent, nothing, levels, nothing, covariates={"kit": levels})
    alone = score_joint_latent(latent[known], nothing[known], levels[known], nothing[known])
    expected = {name: alone[name] for name in ("ilisi", "ilisi_random")} | {"unknown_cells": 50}
    assert scores["covariates"] == {"kit": expected}
    assert expected.items() <= scores.items()
    assert "iLISI of kit without 50 cells whose kit is unknown" in dict(list_joint_scores(scores))
    levels[levels == "b"] = "a"  # of a single level there is nothing to say
    assert "ilisi" not in score_joint_latent(latent, nothing, levels, nothing)


@pytest.mark.parametrize("batch", [[], {}])
def test_no_batch_at_all_is_refused(
    store: Store, trained: TrainedModel, batch: Sequence[str] | dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match=r"(?s)no batch is named.*own, average"):
        impute(trained, store, batch=batch)
    with pytest.raises(DataError, match="no column of batches is named"):
        open_cells(make_table(), trained, batch_key=[])
    with pytest.raises(DataError, match="no column of batches is named"):
        ConversionRequest(batch_key=[])


def test_a_model_card_lists_the_levels(store: Store, trained: TrainedModel, tmp_path: Path) -> None:
    write_model_card(tmp_path, store, Config())
    assert read_model_card(tmp_path).batch_vocabulary == store.manifest.batch_vocabulary
    assert read_feature_reference(tmp_path).batch_vocabulary == store.manifest.batch_vocabulary
    described = describe_run(tmp_path, trained)
    assert "    donor: 3 (d0, d1, d2)\n    chemistry: 2 (v2, v3)" in described
    card = json.loads((tmp_path / "model.json").read_text())
    card["batch_covariates"]["donor"].pop()
    (tmp_path / "model.json").write_text(json.dumps(card))
    for read in (read_model_card, read_feature_reference):
        with pytest.raises(ClueError, match="batch_covariates"):
            read(tmp_path)
