"""The command line's inputs -> sources. Formats are told by what is in the file, not by how it is called."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import h5py

from clue_dist.errors import DataError, listed
from data_prep.h5 import AnnDataSource, TenxSource, open_h5, tenx_features
from data_prep.mtx import MtxSource, mtx_features
from data_prep.sources import TENX_TYPES, FeatureTable, Keys, Source, kind_of, require_known

_INPUT = re.compile(r"(?:(?P<dataset>[A-Za-z0-9_.-]+):)?(?:(?P<name>[^=/]+)=)?(?P<path>.+)")


def parse_inputs(texts: list[str], keys: Keys, layers: list[str], kinds: dict[str, str]) -> list[Source]:
    """`name=FILE`, `FILE.h5mu`, a 10x file or folder, each optionally `dataset:`-prefixed -> sources, in order.

    layers: `NAME` for every AnnData, or `modality=NAME`.

    Raises:
        DataError: a file that is not there or in no known format; a modality it does not have; a layer or kind of a
            modality that no input has.
    """
    by_modality = dict(layer.split("=", 1) for layer in layers if "=" in layer)
    general = [layer for layer in layers if "=" not in layer]
    if len(general) > 1 or len(by_modality) + len(general) < len(layers):
        raise DataError("two layers for one modality", where="--layer", got=listed(layers), fix="NAME=LAYER for each")
    layer = general[0] if general else None
    sources = [source for text in texts for source in _parse(text, keys, by_modality, layer, kinds)]
    require_known("--kind", kinds, [s.modality for s in sources])
    layered = [s.modality for s in sources if isinstance(s, AnnDataSource)]
    require_known("--layer", by_modality, layered)
    if layer is not None and not layered:
        raise DataError("no input has layers", where=f"--layer {layer}", expected="an .h5ad or .h5mu among the inputs")
    return sources


def _parse(text: str, keys: Keys, layers: dict[str, str], layer: str | None, kinds: dict[str, str]) -> list[Source]:
    match, fix = _INPUT.fullmatch(text), "check the path; inputs are written NAME=FILE, FILE.h5mu, or DATASET:NAME=FILE"
    if match is None:
        raise DataError("not an input", where="the inputs", got=repr(text), fix=fix)
    dataset, name, path = match["dataset"] or "", match["name"], Path(match["path"])
    if not path.exists():
        raise DataError("no such input", where=text, got=f"{path} does not exist", fix=fix)
    path = path.resolve()
    if path.is_dir():
        return _tenx(text, dataset, name, path, mtx_features(path), kinds)
    with open_h5(path) as file:
        if "mod" in file:
            return _mudata(file, text, dataset, name, path, keys, layers, layer)
        if "X" in file or "layers" in file:
            if name is None:
                raise DataError(
                    "an .h5ad needs a modality's name", where=text, fix=f"write it as `rna={path.name}`, say"
                )
            return [AnnDataSource(path, name, dataset, "", layers.get(name, layer), keys)]
        if "matrix/features" in file:
            return _tenx(text, dataset, name, path, tenx_features(file), kinds)
        got = f"top level: {listed(file) or 'nothing'}"
    raise DataError(
        "not a format this reader knows",
        where=path,
        got=got,
        expected=".h5ad, .h5mu, 10x .h5 or a Matrix Market folder",
    )


def _mudata(
    file: h5py.File,
    text: str,
    dataset: str,
    name: str | None,
    path: Path,
    keys: Keys,
    layers: dict[str, str],
    layer: str | None,
) -> list[Source]:
    there = [str(m) for m in file["mod"].attrs.get("mod-order", list(file["mod"]))]
    if name is not None and name not in there:
        raise DataError("the file has no such modality", where=text, got=listed(there), expected=name)
    wanted = there if name is None else [name]
    return [AnnDataSource(path, m, dataset, f"mod/{m}", layers.get(m, layer), keys) for m in wanted]


def _tenx(
    text: str, dataset: str, name: str | None, path: Path, table: FeatureTable, kinds: dict[str, str]
) -> list[Source]:
    """A file's feature types as modalities, or the one that `name` asks for."""
    make = MtxSource if path.is_dir() else TenxSource
    if name is not None:
        return [make(path, name, dataset, table.type_for(kind_of(name, kinds), text))]
    known = [t for t in TENX_TYPES if t in table.types]
    if not known:
        fix = f"write it as `rna={path.name}`, say"
        raise DataError(
            "the features have no type that names a modality", where=text, got=listed(sorted(set(table.types))), fix=fix
        )
    others = sorted(set(table.types) - set(known))
    if others:
        print(f"{text}: features of type {listed(others)} are left out", file=sys.stderr)
    return [make(path, TENX_TYPES[t], dataset, t) for t in known]
