"""New cells for a model: modalities that it lacks are left aside, missing features are told."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from pathlib import Path
from typing import Any

import mudata as md
import numpy as np
import pytest

from clue_dist.commands.model_arguments import build_model_parser
from clue_dist.errors import ConfigError, StoreError
from clue_dist.inference.cells import choose_modalities, open_cells
from clue_dist.inference.cells.named_counts import CellWarning
from clue_dist.inference.embed import embed_cells
from clue_dist.inference.evaluate import evaluate_store
from clue_dist.inference.query import (
    holds_training_cells,
    require_measured_features,
    select_modalities,
)
from clue_dist.inference.score_tables import select_pairs
from clue_dist.store.reader import Store
from clue_dist.store.seen_cells import identify_cells
from tests.fakes import FakeTrainedModel
from tests.stores import make_store
from tests.unit.run_helpers import embed_store

CELLS = {"rna+adt+atac": 30, "rna+atac": 25, "rna": 20, "atac": 40}
FEATURES = {"rna": 20, "adt": 6, "atac": 15}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store") / "s.zarr", cells=CELLS, features=FEATURES)


@pytest.fixture(scope="module")
def loaded(store: Store) -> FakeTrainedModel:
    """A model that knows no atac."""
    return FakeTrainedModel({name: store.manifest.modalities[name] for name in ("adt", "rna")})


def note_input(modality: str, missing: int, **more: Any) -> dict[str, Any]:
    """What the provenance of a conversion says of one input."""
    return {
        "file": f"{missing}.h5ad",
        "modality": modality,
        "dataset": "",
        "cells": 9,
        "empty": 0,
        "features": {"missing": missing, "extra": 0},
        **more,
    }


def add_provenance(store: Store, *inputs: dict[str, Any], appended: bool = False) -> Store:
    """The same store with other notes about the files that it was converted from."""
    notes: dict[str, Any] = {"inputs": list(inputs)}
    changed = Store(store.root)
    provenance = {"appended": [notes]} if appended else notes
    changed.manifest = store.manifest.model_copy(update={"provenance": provenance})
    return changed


def test_modalities_that_the_model_lacks_are_left_aside(
    store: Store, loaded: FakeTrainedModel, tmp_path: Path
) -> None:
    with pytest.warns(CellWarning, match="does not know atac") as warned:
        cells = open_cells(store, loaded)
    assert str(warned[1].message) == "left out: 40 cells without rna, adt"
    embed_cells(loaded, cells, tmp_path / "o.h5mu", run="r", per_modality=True)
    embedding = md.read_h5mu(tmp_path / "o.h5mu")
    assert {name: part.n_obs for name, part in embedding.mod.items()} == {"rna": 75, "adt": 30}
    assert embedding.n_obs == 75, "cells that have atac alone are left out"
    assert list(embedding.uns["clue_dist"]["modalities"]) == ["rna", "adt"]
    with pytest.warns(CellWarning, match="does not know atac"):
        scores = evaluate_store(loaded, store, tmp_path / "s.json", run="r")
    assert list(select_pairs(scores)) == ["adt->rna", "rna->adt"]
    assert scores["joint"]["islands"].keys() == {"rna", "rna+adt"}
    assert store.modalities == ["rna", "adt", "atac"], "the store itself is what it was"
    assert store.segments["rna+atac"].modalities == ["rna", "atac"]


def test_of_modalities_that_are_asked_for_only_cells_are_left_out(
    store: Store, loaded: FakeTrainedModel
) -> None:
    with pytest.warns(CellWarning) as warned:
        assert choose_modalities(store, loaded, ["adt"]).modalities == ["adt"]
    assert [str(each.message) for each in warned] == ["left out: 85 cells without adt"]
    whole = FakeTrainedModel(store.manifest.modalities)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_modalities(store, whole) is store
    with pytest.raises(ConfigError, match=r"does not know a modality[\s\S]*got: atac"):
        open_cells(store, loaded, modalities=["rna", "adt", "atac"])
    with pytest.raises(ConfigError, match="no modality is asked for"):
        open_cells(store, loaded, modalities=[])


def test_a_store_of_which_the_model_knows_nothing_is_refused(store: Store) -> None:
    other = FakeTrainedModel({"clr": store.manifest.modalities["adt"]})
    with pytest.raises(StoreError, match=r"these modalities\n[\s\S]*got: rna, adt, atac\n"):
        open_cells(store, other)


def test_a_view_has_the_same_cells(store: Store, tmp_path: Path) -> None:
    alone = FakeTrainedModel({"rna": store.manifest.modalities["rna"]})
    embed_store(alone, select_modalities(store, ["rna"]), tmp_path / "o.h5ad", run="r")
    reader = select_modalities(store, ["rna"]).segments["rna+atac"]
    barcodes = store.segments["rna+atac"].read_barcodes(np.arange(25))
    assert (reader.modalities, reader.n_cells) == (["rna"], 25)
    np.testing.assert_array_equal(reader.read_barcodes(np.arange(25)), barcodes)


def test_modalities_that_are_not_there_are_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such modality[\s\S]*got: atca"):
        select_modalities(store, ["rna", "atca"])
    lone = make_store(tmp_path / "s.zarr", cells={"rna": 9}, features={"rna": 5, "adt": 3})
    with pytest.raises(ConfigError, match="no cell carries these modalities"):
        select_modalities(lone, ["adt"])


@pytest.mark.parametrize("appended", [False, True])
def test_next_to_no_known_feature_is_an_error(store: Store, appended: bool) -> None:
    query = add_provenance(store, note_input("rna", 2), note_input("rna", 19), appended=appended)
    with pytest.raises(StoreError, match=r"next to none[\s\S]*19.h5ad: 1 of 20 features") as error:
        require_measured_features(query)
    assert "--feature-ids" in str(error.value.fix)
    assert "--min-known 0" in str(error.value.fix)
    (warning,) = require_measured_features(query, min_known=0)
    assert warning.startswith("rna: 19.h5ad: 1 of 20 features known;")


def test_a_share_of_missing_features_is_a_warning(store: Store, loaded: FakeTrainedModel) -> None:
    query = add_provenance(
        store,
        note_input("rna", 4),
        note_input("rna", 5),
        note_input("rna", 9),
        note_input("rna", 9, file="lane2.h5ad"),
        note_input("adt", 1),
    )
    (warning,) = require_measured_features(query)
    assert warning.startswith("rna: 9.h5ad: 11 of 20 features known, and 2 more files like it;")
    with pytest.warns(CellWarning, match=re.escape(warning)):
        open_cells(query, loaded, modalities=["rna", "adt"])


def test_what_was_measured_is_no_reason_to_complain(store: Store) -> None:
    assert require_measured_features(store) == []  # nothing is known of its files
    hit = note_input("atac", 14, counted="middle")
    assert require_measured_features(add_provenance(store, hit)) == []


def test_files_of_the_training_store_may_have_few_features(
    store: Store, loaded: FakeTrainedModel, tmp_path: Path
) -> None:
    view = select_modalities(add_provenance(store, note_input("rna", 19)), ["rna", "adt"])
    with pytest.raises(StoreError, match="next to none"):
        embed_store(loaded, view, tmp_path / "o.h5ad", run="r")
    trained = FakeTrainedModel(loaded.modalities, seen_cells=frozenset({store.fingerprint}))
    embed_store(trained, view, tmp_path / "o.h5ad", run="r")


def test_cells_of_a_store_that_grew_are_known_by_what_it_was_and_is(
    store: Store, tmp_path: Path
) -> None:
    """Training may have been on the store as it was before, as it is now, or on another addition"""
    before = store.manifest
    notes = {"appended": [{"before": before.fingerprint}]}
    grown, grown_too, copied, other = (
        before.model_copy(update={"fingerprint": letter * 64, **update})
        for letter, update in (
            ("a", {"provenance": notes}),
            ("b", {"provenance": notes}),
            ("c", {"modalities": {}}),  # the same segments, without a word on where they come from
            ("d", {"shards": {}}),
        )
    )
    for manifests in itertools.permutations((before, grown, grown_too, copied), 2):
        view, seen = copy.copy(store), frozenset(identify_cells(manifests[1]))
        view.manifest = manifests[0]
        assert holds_training_cells(view, seen)
    for manifest in (before, grown, copied):
        assert not holds_training_cells(store, frozenset(identify_cells(other)))
        view = copy.copy(store)
        view.manifest = other
        assert not holds_training_cells(view, frozenset(identify_cells(manifest)))


def test_the_command_line_names_modalities_and_the_share() -> None:
    words = ["--run", "r", "--store", "s", "--out", "o.h5ad", "--modalities", "rna", "adt"]
    parser = build_model_parser("embed", "", "")
    assert parser.parse_args(words).modalities == ["rna", "adt"]
    assert parser.parse_args([*words, "--min-known", "0"]).min_known == 0
    for mistake, message in (
        (["--min-known", "2"], "not a number from 0 to 1"),
        (["--batch-size", "0"], "not a number from 1 on"),
        (["--bogus"], r"unrecognized arguments: --bogus\n  fix: `clue embed --help` lists"),
    ):
        with pytest.raises(ConfigError, match=message):
            parser.parse_args([*words, *mistake])
