"""Cells and settings of a training that takes seconds."""

from __future__ import annotations

import mudata as md

from data_prep.simulate import SimulationSpec, build_mudata, parse_features

SMALL = {
    "train.epochs": 2,
    "model.latent": 4,
    "model.trunk.hidden": 8,
    "model.decoder.hidden": 8,
    "data.batch_size": 32,
    "train.validate_every": 5,
    "log.tensorboard": False,
}


def make_mudata(cells: int = 60) -> md.MuData:
    spec = SimulationSpec.from_features(
        parse_features(["rna:30", "adt:6"]), {}, cells=cells, paired=0.5, seed=0
    )
    return build_mudata(spec)
