"""Several covariates of batches in a store: levels, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clue_dist.errors import DataError
from clue_dist.store.batch_vocabulary import BatchVocabulary, combine_levels
from clue_dist.store.manifest import Manifest
from clue_dist.store.reader import Store
from data_prep.cli.commands import run_command
from data_prep.conversion import batch_levels
from tests.unit.covariate_helpers import CHEMISTRIES, COLUMNS, DONORS, N, convert, write_files
from tests.unit.prep_helpers import make_counts, write_h5ad


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return convert(tmp_path_factory.mktemp("covariates"), "--batch-key", *COLUMNS)


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


def test_a_covariate_that_is_called_batch_has_a_column_of_another_name() -> None:
    vocabulary, codes = combine_levels({"batch": ["1", "", "2"], "kit": ["a", "", "b"]})
    assert codes.tolist() == [0, -1, 1]
    assert list(vocabulary.decode_levels(codes)) == ["batch_level", "kit"]
    with pytest.raises(DataError, match="would have one name"):
        combine_levels({"donor": ["a | b", "a"], "kit": ["c", "b | c"]})


def test_weights_of_a_level_are_taken_over_by_its_name() -> None:
    one = BatchVocabulary.from_lists(["d1", "d0"], {}, "donor")
    both = BatchVocabulary(["d0 | v2", "d1 | v2"], {"donor": ["d0", "d1"], "kit": ["v2", "v2"]})
    assert list(both.number_levels()) == [("donor", "d0"), ("kit", "v2"), ("donor", "d1")]
    assert one.match_levels(both) == {0: 1, 2: 0}
    assert both.match_levels(one) == {1: 0, 0: 2}
    named_otherwise = BatchVocabulary.from_lists(["d0", "d5"], {}, "lane")
    assert one.match_levels(named_otherwise) == {0: 1}  # both have a single covariate


def test_a_level_that_is_called_as_the_unknown_one_is_named_in_the_error() -> None:
    with pytest.raises(DataError, match=r'(?s)one name.*d0 \| \?.*none that is "\?"'):
        combine_levels({"donor": ["d0", "d0"], "chemistry": ["?", ""]})
