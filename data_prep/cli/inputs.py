"""The command line's inputs -> sources. Formats are told by what is in the file, not by how it is called."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py

from clue_dist.errors import DataError, list_names
from clue_dist.files import parse_path
from clue_dist.kinds import KINDS, TENX_TYPES, infer_kind
from data_prep.options import ObsColumns, PerModality, require_known_modalities
from data_prep.readers.fragments import ConversionInput, FragmentsInput, looks_like_fragments
from data_prep.readers.h5_file import open_h5
from data_prep.readers.h5ad import AnnDataSource
from data_prep.readers.matrix_market import MatrixMarketSource, read_mtx_features
from data_prep.readers.tenx import FeatureTable, TenxSource, read_tenx_features
from data_prep.readers.text_files import explain_unreadable

_INPUT = re.compile(r"(?:(?P<dataset>[A-Za-z0-9_.-]+):)?(?:(?P<name>[^=/]+)=)?(?P<path>.+)")


@dataclass(frozen=True)
class ReadingOptions:
    """What the command line says about how inputs are read; see `python -m data_prep convert --help`."""

    obs_columns: ObsColumns = field(default_factory=ObsColumns)
    kinds: dict[str, str] = field(default_factory=dict)
    layers: PerModality = field(default_factory=lambda: PerModality("--layer"))
    id_columns: PerModality = field(default_factory=lambda: PerModality("--feature-ids"))
    barcodes: PerModality = field(default_factory=lambda: PerModality("--barcodes"))
    cut_sites: bool = False


def parse_inputs(texts: list[str], asked: ReadingOptions) -> list[ConversionInput]:
    """`name=FILE`, `FILE.h5mu`, a 10x file or folder, each optionally `dataset:`-prefixed -> inputs, in order.

    Raises:
        DataError: a file that is not there or in no known format; a modality it does not have; a layer, column,
            list of barcodes or kind of a modality that no input has.
    """
    inputs = [source for text in texts for source in _parse(text, asked)]
    names = [s.modality for s in inputs]
    require_known_modalities("--kind", asked.kinds, names)
    asked.id_columns.require_known(names)
    layered = [s.modality for s in inputs if isinstance(s, AnnDataSource)]
    asked.layers.require_known(layered)
    if asked.layers.default is not None and not layered:
        where = f"--layer {asked.layers.default}"
        raise DataError(
            "no input has layers", where=where, expected="an .h5ad or .h5mu among the inputs"
        )
    counted = [s.modality for s in inputs if isinstance(s, FragmentsInput)]
    asked.barcodes.require_known(counted)
    for flag, given in (
        ("--barcodes", asked.barcodes.default is not None),
        ("--cut-sites", asked.cut_sites),
    ):
        if given and not counted:
            raise DataError("no input is a fragments file", where=flag, fix=f"leave {flag} out")
    return inputs


def _parse(text: str, asked: ReadingOptions) -> Sequence[ConversionInput]:
    match, fix = (
        _INPUT.fullmatch(text),
        "check the path; inputs are written NAME=FILE, FILE.h5mu, or DATASET:NAME=FILE",
    )
    if match is None:
        raise DataError("not an input", where="the inputs", got=repr(text), fix=fix)
    dataset, name, path = match["dataset"] or "", match["name"], parse_path(match["path"])
    if not path.exists():
        raise DataError("no such input", where=text, got=f"{path} does not exist", fix=fix)
    if not (path.is_file() or path.is_dir()):
        raise DataError(
            "an input is a file or a folder", where=text, got="a pipe, socket or device", fix=fix
        )
    path = path.resolve()
    if path.is_dir():
        return _tenx(text, dataset, name, path, read_mtx_features(path), asked)
    try:
        is_hdf5 = h5py.is_hdf5(path)
    except OSError as error:
        raise explain_unreadable(path, error) from None
    if not is_hdf5 and looks_like_fragments(path):
        return [_fragments(text, dataset, name, path, asked)]
    if {".tsv", ".bed"} & set(path.suffixes):
        expected = "lines of chromosome, start, end and barcode, with tabs between them"
        raise DataError(
            "a text file that cannot be read as fragments", where=path, expected=expected
        )
    with open_h5(path) as file:
        if "mod" in file:
            return _mudata(file, text, dataset, name, path, asked)
        if "X" in file or "layers" in file:
            if name is None:
                raise DataError(
                    "an .h5ad needs a modality's name",
                    where=text,
                    fix=f"write it as `rna={path.name}`, say",
                )
            return [
                AnnDataSource(
                    path,
                    name,
                    dataset,
                    "",
                    asked.layers.get_value(name),
                    asked.obs_columns,
                    asked.id_columns.get_value(name),
                )
            ]
        if "matrix/features" in file:
            return _tenx(text, dataset, name, path, read_tenx_features(file), asked)
        got = f"top level: {list_names(file) or 'nothing'}"
    raise DataError(
        "not a format this reader knows",
        where=path,
        got=got,
        expected=".h5ad, .h5mu, 10x .h5, a Matrix Market folder or fragments.tsv.gz",
    )


def _fragments(
    text: str, dataset: str, name: str | None, path: Path, asked: ReadingOptions
) -> FragmentsInput:
    if name is None:
        raise DataError(
            "a fragments file needs a modality's name",
            where=text,
            fix=f"write it as `atac={path.name}`",
        )
    if not KINDS[kind := infer_kind(name, asked.kinds)].binnable:
        fitting = list_names(name for name, row in KINDS.items() if row.binnable)
        raise DataError(
            f"fragments are of kind {fitting}", where=text, got=kind, fix=f"`atac={path.name}`"
        )
    return FragmentsInput(path, name, dataset, asked.cut_sites, asked.barcodes.get_value(name))


def _mudata(
    file: h5py.File, text: str, dataset: str, name: str | None, path: Path, asked: ReadingOptions
) -> list[AnnDataSource]:
    there = [str(m) for m in file["mod"].attrs.get("mod-order", list(file["mod"]))]
    if name is not None and name not in there:
        raise DataError(
            "the file has no such modality", where=text, got=list_names(there), expected=name
        )
    wanted = there if name is None else [name]
    return [
        AnnDataSource(
            path,
            m,
            dataset,
            f"mod/{m}",
            asked.layers.get_value(m),
            asked.obs_columns,
            asked.id_columns.get_value(m),
        )
        for m in wanted
    ]


def _tenx(
    text: str,
    dataset: str,
    name: str | None,
    path: Path,
    table: FeatureTable,
    asked: ReadingOptions,
) -> list[MatrixMarketSource | TenxSource]:
    """A file's feature types as modalities, or the one that `name` asks for."""
    make = MatrixMarketSource if path.is_dir() else TenxSource
    if name is not None:
        return [
            make(
                path,
                name,
                dataset,
                table.type_for(infer_kind(name, asked.kinds), text),
                asked.id_columns.get_value(name),
            )
        ]
    known = [t for t in TENX_TYPES if t in table.types]
    if not known:
        fix = f"write it as `rna={path.name}`, say"
        raise DataError(
            "the features have no type that names a modality",
            where=text,
            got=list_names(sorted(set(table.types))),
            fix=fix,
        )
    others = sorted(set(table.types) - set(known))
    if others:
        print(f"{text}: features of type {list_names(others)} are left out", file=sys.stderr)
    return [
        make(path, TENX_TYPES[t], dataset, t, asked.id_columns.get_value(TENX_TYPES[t]))
        for t in known
    ]
