"""Several covariates of batches: from files over a store and a model to counterfactual values."""

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
from clue_dist.store.batch_vocabulary import BatchVocabulary, combine_levels
from clue_dist.store.feature_reference import read_feature_reference
from clue_dist.store.manifest import Manifest
from clue_dist.store.reader import Store
from data_prep.cli.commands import run_command
from data_prep.conversion import batch_levels
from data_prep.from_python import ConversionRequest
from tests.unit.impute_helpers import make_trained
from tests.unit.prep_helpers import make_counts, write_h5ad

N = 40
DONORS = np.array([f"d{i % 3}" for i in range(N)], object)
# No cell of d2 was measured with v3.
CHEMISTRIES = np.array(["v3" if i % 6 in (3, 4) else "v2" for i in range(N)], object)
COLUMNS = ["donor", "chemistry"]


def write_files(folder: Path, cells: str = "c", **obs: object) -> list[str]:
    """The two modalities of cells; only the file of RNA says what the chemistry was."""
    columns = {"donor": DONORS, "chemistry": CHEMISTRIES} | obs
    rna = write_h5ad(folder / "rna.h5ad", make_counts(N, 12, cells=cells), **columns)
    adt = make_counts(N, 5, 1, "p", cells)
    return [f"rna={rna}", f"adt={write_h5ad(folder / 'adt.h5ad', adt, donor=columns['donor'])}"]


def convert(folder: Path, *words: str, **obs: object) -> Store:
    run_command(["convert", *write_files(folder, **obs), *words, "--out", str(folder / "s.zarr")])
    return Store(folder / "s.zarr")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return convert(tmp_path_factory.mktemp("covariates"), "--batch-key", *COLUMNS)


@pytest.fixture(scope="module")
def trained(store: Store) -> TrainedModel:
    return make_trained(store)


def impute(trained: TrainedModel, source: Store | ad.AnnData, **choices: object) -> ad.AnnData:
    cells = open_cells(source, trained)
    return impute_cells(trained, cells, ImputationChoices("rna", **choices))


def make_table(**obs: Sequence[object]) -> ad.AnnData:
    """RNA of four cells, as in memory."""
    counts = make_counts(N, 12).iloc[:4]
    table = ad.AnnData(counts.to_numpy(np.float32))
    table.obs_names, table.var_names = list(counts.index), list(counts.columns)
    for column, values in obs.items():
        table.obs[column] = values
    return table


# --- the store ----------------------------------------------------------------------------------


def test_a_batch_is_a_combination_of_levels(store: Store) -> None:
    manifest = store.manifest
    assert manifest.batches == ["d0 | v2", "d0 | v3", "d1 | v2", "d1 | v3", "d2 | v2"]
    assert manifest.batch_covariates == {
        "donor": ["d0", "d0", "d1", "d1", "d2"],
        "chemistry": ["v2", "v3", "v2", "v3", "v2"],
    }
    codes = store.segments["rna+adt"].read_codes("batch", np.arange(N))
    barcodes = store.segments["rna+adt"].read_barcodes(np.arange(N))
    for code, barcode in zip(codes, barcodes, strict=True):
        cell = int(barcode[1:])
        assert manifest.batches[code] == f"{DONORS[cell]} | {CHEMISTRIES[cell]}"


def test_a_store_of_one_covariate_is_what_it_was(tmp_path: Path) -> None:
    one = convert(tmp_path, "--batch-key", "donor").manifest
    assert one.batches == ["d0", "d1", "d2"]
    assert "batch_covariates" not in json.loads((tmp_path / "s.zarr" / "manifest.json").read_text())
    # The fingerprint of these cells before there were covariates.
    assert one.fingerprint[:16] == "03ccb738a6d88bd3"


def test_a_level_that_no_file_tells_is_unknown(tmp_path: Path, capsys) -> None:
    chemistries = CHEMISTRIES.copy()
    chemistries[:5] = None
    found = convert(tmp_path, "--batch-key", *COLUMNS, chemistry=chemistries).manifest
    assert found.batches[:2] == ["d0 | ?", "d0 | v2"]
    assert found.batch_covariates["chemistry"][:2] == ["", "v2"]
    assert "5 cells without chemistry: the files have nothing in column 'chemistry'" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["donor", "donor"], "a column is named twice"),
        (["donor", "none"], "no batches, or some"),
        (["donor", "chemistry", "adt=donor,chemistry,lane"], "other covariates"),
        (["donor", "chemistry", "adt=kit"], "other covariates"),
        (["donor", "chemistry", "atac=donor,chemistry"], "no such modality"),
        (["donor", "chemistry", "adt=donor,kit"], "no input has the chemistry column"),
    ],
)
def test_what_is_no_choice_of_covariates_is_refused(
    tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        convert(tmp_path, "--batch-key", *words)


def test_a_column_of_nearly_as_many_levels_as_cells_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_levels, "MANY_LEVELS", 10)
    with pytest.raises(DataError, match=r"as many levels as there are cells(.|\n)*depth"):
        convert(tmp_path, "--batch-key", "donor", "depth", depth=np.arange(N) * 17)


def test_modalities_that_disagree_on_a_covariate_are_refused(tmp_path: Path) -> None:
    inputs = write_files(tmp_path)
    write_h5ad(tmp_path / "adt.h5ad", make_counts(N, 5, 1, "p"), donor=DONORS[::-1])
    with pytest.raises(DataError, match=r"disagree on their donor(.|\n)*--batch-key none"):
        run_command(
            ["convert", *inputs, "--batch-key", *COLUMNS, "--out", str(tmp_path / "s.zarr")]
        )


def test_cells_that_are_added_keep_known_levels_and_bring_new_ones(tmp_path: Path) -> None:
    before = convert(tmp_path, "--batch-key", *COLUMNS).manifest
    other = tmp_path / "other"
    other.mkdir()
    donors = np.where(DONORS == "d1", "d9", DONORS)
    inputs = write_files(other, "x", donor=donors)
    run_command(["append", *inputs, "--to", str(tmp_path / "s.zarr")])
    after = Manifest.read(tmp_path / "s.zarr")
    assert after.batches == [*before.batches, "d9 | v2", "d9 | v3"]
    numbers = before.batch_vocabulary.number_levels()
    assert list(after.batch_vocabulary.number_levels()) == [*numbers, ("donor", "d9")]
    words = ["--features-from", str(tmp_path / "s.zarr"), "--out", str(other / "s.zarr")]
    run_command(["convert", *inputs, *words, "--batch-key", "donor", "chemistry"])
    assert Manifest.read(other / "s.zarr").batch_covariates == after.batch_covariates


def test_covariates_of_other_cells_must_be_those_that_are_known(tmp_path: Path) -> None:
    one = convert(tmp_path, "--batch-key", "donor")
    words = ["--features-from", str(one.root), "--out", str(tmp_path / "t.zarr")]
    with pytest.raises(DataError, match="have one covariate"):
        run_command(["convert", *write_files(tmp_path), *words, "--batch-key", *COLUMNS])


def test_a_store_is_cut_by_a_covariate(store: Store, tmp_path: Path) -> None:
    outs = ["--out-train", str(tmp_path / "a.zarr"), "--out-test", str(tmp_path / "b.zarr")]
    run_command(["split", str(store.root), "--by", "chemistry", "--test", "v3", *outs])
    train, test = (Manifest.read(tmp_path / name) for name in ("a.zarr", "b.zarr"))
    assert train.batch_covariates["chemistry"] == ["v2", "v2", "v2"]
    assert set(test.strata["rna+adt"].batch_counts) == {"d0 | v3", "d1 | v3"}
    assert test.n_cells == (CHEMISTRIES == "v3").sum()
    with pytest.raises(DataError, match=r"no such chemistry(.|\n)*expected: v2, v3"):
        run_command(["split", str(store.root), "--by", "chemistry", "--test", "v4", *outs])


@pytest.mark.parametrize(
    "covariates",
    [
        {"a": ["x", "y"]},
        {"a": ["x"], "b": ["y", "z"]},
        {"a": ["x", "x"], "b": ["y", "y"]},
        {"a": ["x", ""], "b": ["y", ""]},
        {"a/b": ["x", "y"], "b": ["y", "y"]},
    ],
)
def test_a_manifest_must_tell_the_levels_of_each_batch(store: Store, covariates: dict) -> None:
    content = store.manifest.model_dump() | {"batches": ["one", "two"]}
    content["strata"]["rna+adt"]["batch_counts"] = {}
    with pytest.raises(ValueError, match="batch_covariates"):
        Manifest.model_validate(content | {"batch_covariates": covariates})


# --- the model ----------------------------------------------------------------------------------


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
        ({"donor": 7}, r"no such donor\n  got: 7"),
        (7, r"no such batch\n  got: 7"),
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


def test_a_covariate_that_is_called_batch_has_a_column_of_another_name() -> None:
    vocabulary, codes = combine_levels({"batch": ["1", "", "2"], "kit": ["a", "", "b"]})
    assert codes.tolist() == [0, -1, 1]
    assert list(vocabulary.decode_levels(codes)) == ["batch_level", "kit"]
    with pytest.raises(DataError, match="would have one name"):
        combine_levels({"donor": ["a | b", "a"], "kit": ["c", "b | c"]})


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


def test_weights_of_a_level_are_taken_over_by_its_name() -> None:
    one = BatchVocabulary.from_lists(["d1", "d0"], {}, "donor")
    both = BatchVocabulary(["d0 | v2", "d1 | v2"], {"donor": ["d0", "d1"], "kit": ["v2", "v2"]})
    assert list(both.number_levels()) == [("donor", "d0"), ("kit", "v2"), ("donor", "d1")]
    assert one.match_levels(both) == {0: 1, 2: 0}
    assert both.match_levels(one) == {1: 0, 0: 2}
    named_otherwise = BatchVocabulary.from_lists(["d0", "d5"], {}, "lane")
    assert one.match_levels(named_otherwise) == {0: 1}  # both have a single covariate


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


def test_a_level_that_is_called_as_the_unknown_one_is_named_in_the_error() -> None:
    with pytest.raises(DataError, match=r'(?s)one name.*d0 \| \?.*none that is "\?"'):
        combine_levels({"donor": ["d0", "d0"], "chemistry": ["?", ""]})


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
