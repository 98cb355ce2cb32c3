"""The table of kinds: its rows are sound, and a new kind is one more row."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from clue_dist import config
from clue_dist.errors import DataError
from clue_dist.kinds import KINDS, Kind, infer_kind
from clue_dist.model.modality_spec import specify_modalities
from clue_dist.store.reader import Store
from data_prep.convert import convert_inputs
from data_prep.jobs.workers import ThreadPool
from data_prep.planned_cells import ConversionOptions
from data_prep.simulate import SimulationSpec


def test_rows_name_choices_of_the_config() -> None:
    for name, kind in KINDS.items():
        assert name == kind.name
        assert kind.normalise in get_args(config.NormalisationName)
        assert kind.likelihood in get_args(config.LikelihoodName)


def test_no_alias_tells_two_kinds() -> None:
    aliases = [alias for kind in KINDS.values() for alias in kind.aliases]
    assert len(set(aliases)) == len(aliases)


@pytest.mark.parametrize(
    ("modality", "given", "fix"),
    [
        ("hto", {}, "--kind hto=adt"),
        ("sample-hashtags", {}, "--kind sample-hashtags=adt"),
        ("hto", {"hto": "hto"}, "--kind hto=adt"),
        ("x", {"x": "protein"}, "--kind x=adt"),
        ("spliced", {}, "--kind spliced=rna"),
        ("mystery", {}, "--kind mystery=rna"),
    ],
)
def test_kinds_are_suggested(modality: str, given: dict[str, str], fix: str) -> None:
    with pytest.raises(DataError, match=re.escape(fix)):
        infer_kind(modality, given)


def test_no_word_is_related_to_two_kinds() -> None:
    words = [word for kind in KINDS.values() for word in (*kind.aliases, *kind.related)]
    assert len(set(words)) == len(words)


def test_real_values_are_stored_dense() -> None:
    with pytest.raises(ValueError, match="sparse rows hold counts"):
        Kind("depth", "sparse", ("depth",), "none", "normal", real_values=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        Kind("methylation", "dense", ("methylation",), "none", "normal", real_values=True),
        Kind("splicing", "sparse", ("splicing",), "log_cp10k", "poisson"),
    ],
    ids=["methylation", "splicing"],
)
def test_a_new_row_is_a_new_kind(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, kind.name, kind)
    spec = SimulationSpec.from_features({"rna": 30, kind.name: 12}, {}, cells=90)
    root = tmp_path / "s.zarr"
    convert_inputs(spec.build_sources(), root, ConversionOptions(), ThreadPool(1))
    modality = Store(root).manifest.modalities[kind.name]
    assert (modality.kind, modality.storage) == (kind.name, kind.storage)
    model = specify_modalities({kind.name: modality}, config.Config(store=str(root), run="run"))
    assert (model[kind.name].normalise, model[kind.name].likelihood) == (
        kind.normalise,
        kind.likelihood,
    )
