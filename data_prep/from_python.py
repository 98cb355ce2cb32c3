"""Conversion as a call: of files, or of an AnnData or MuData in memory."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import mudata as md
import numpy as np
import pandas as pd
import scipy.sparse as sp

from clue_dist.errors import DataError, StoreError, list_names, suggest_names
from clue_dist.files import translate_disk_errors
from clue_dist.kinds import TYPE_COLUMNS, choose_value, match_alias
from clue_dist.process import silence_mudata
from clue_dist.store.manifest import Manifest
from data_prep.cli.commands import build_preparation_parser, convert_as_typed
from data_prep.convert import format_conversion
from data_prep.jobs.job_folder import discard_job, find_partial_folder
from data_prep.options import FIELDS, IN_MEMORY, NO_COLUMN
from data_prep.readers.source import looks_whole, require_real_numbers

_DEFAULT_LAYER = ("--layer", "X")  # which the command line reads where no layer is named
_PROBED_ROWS = 20  # of X, that are looked at to guess whether it holds counts


@dataclass(frozen=True)
class ConversionRequest:
    """What a person may say of a conversion in Python, where the command line has flags."""

    batch_key: str | Sequence[str] | None = None
    label_key: str | None = None
    layer: str | Mapping[str, str] | None = None
    feature_ids: str | Mapping[str, str] | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)
    modality: str | None = None  # what an AnnData holds
    # Further flags of `python -m data_prep convert`, word by word, or as they are typed.
    conversion: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.batch_key is not None and not self.batch_key:
            raise DataError(
                "no column of batches is named",
                where="batch_key",
                got=self.batch_key,
                fix="leave batch_key out",
            )
        if not isinstance(self.label_key, str | None):
            raise DataError(
                "one column holds the labels",
                where="label_key",
                got=self.label_key,
                fix="name it alone",
            )

    def choose_layer(self, modality: str | None) -> str | None:
        """The layer that is named for a modality of cells in memory; None stands for X."""
        layer = choose_value(self.layer, modality)
        return None if layer == _DEFAULT_LAYER[1] else layer

    def choose_feature_columns(self, modality: str | None) -> list[str]:
        """Columns of var, the first of which that is there names the features of a modality."""
        named = choose_value(self.feature_ids, modality)
        return named.split(",") if named else []

    @property
    def batch_columns(self) -> list[str]:
        """The columns of obs that hold the batch; none where no one says."""
        given = [] if self.batch_key is None else self.batch_key
        return [given] if isinstance(given, str) else list(given)

    def list_flags(self) -> list[str]:
        """The words of the command line that say the same."""
        words = split_words(self.conversion)
        if self.batch_columns:
            words += ["--batch-key", *self.batch_columns]
        words += [] if self.label_key is None else ["--label-key", self.label_key]
        for flag, given in (("--layer", self.layer), ("--feature-ids", self.feature_ids)):
            if isinstance(given, Mapping):
                chosen = {name: one for name, one in given.items() if (flag, one) != _DEFAULT_LAYER}
                words += [word for name, one in chosen.items() for word in (flag, f"{name}={one}")]
            elif given is not None and (flag, given) != _DEFAULT_LAYER:
                words += [flag, given]
        return words + [
            w for name, kind in self.kinds.items() for w in ("--kind", f"{name}={kind}")
        ]


def split_words(flags: str | Sequence[str]) -> list[str]:
    """Split flags into words, as a shell does, where they are one text."""
    return shlex.split(flags) if isinstance(flags, str) else list(flags)


def convert_cells(
    data: ad.AnnData | md.MuData | str | Path | Sequence[str | Path],
    out: Path,
    request: ConversionRequest,
    name: str | None = None,
) -> None:
    """Convert cells into a store. A store of the same cells that is at `out` already stays.

    Args:
        data: cells in memory; or files, each as `python -m data_prep convert` takes it.
        out: the store.
        request: how they are to be read.
        name: what is printed for the store, where nobody is to look for it; by default `out`.

    Raises:
        DataError: the cells are not what they should be.
        StoreError: a store of other cells is at `out`, or the disk is full.
    """
    if isinstance(data, (ad.AnnData, md.MuData)):
        _convert_memory(data, out, request, name or str(out))
    else:
        _convert_files(data, out, request, name or str(out))


def name_cells(data: ad.AnnData | md.MuData | str | Path | Sequence[str | Path]) -> str:
    """Name what `convert_cells` takes, for messages."""
    if isinstance(data, (ad.AnnData, md.MuData)):
        return IN_MEMORY
    return list_names([data] if isinstance(data, (str, Path)) else data)


def _convert_memory(
    cells: ad.AnnData | md.MuData, out: Path, request: ConversionRequest, name: str
) -> None:
    """Convert cells in memory, which are written beside the store first."""
    _require_modality(cells, request)
    _require_columns(cells, request)
    _require_matrices(cells, request)
    with _discard_failed_job(out), _make_scratch_folder(out) as folder:
        # Cells of one MuData are the same where their names are, unless a flag says otherwise.
        words = [_name_input(cells, Path(folder), request), "--pair-barcodes", "exact"]
        _convert_inputs(words, out, request, name)


def _convert_files(
    data: str | Path | Sequence[str | Path], out: Path, request: ConversionRequest, name: str
) -> None:
    """Convert one file, or several."""
    _require_files(data)
    words = [str(path) for path in ([data] if isinstance(data, (str, Path)) else data)]
    if request.modality is not None and len(words) == 1 and "=" not in words[0]:
        words = [f"{request.modality}={words[0]}"]
    _convert_inputs(words, out, request, name)


def _convert_inputs(words: Sequence[str], out: Path, request: ConversionRequest, name: str) -> None:
    """Convert inputs, as words of a command line; a store that is there must have their cells."""
    command = ["convert", *words, *request.list_flags(), "--out"]
    if not out.exists():
        _run_conversion([*command, str(out)], name)
        return
    with _make_scratch_folder(out) as folder:
        again = Path(folder) / out.name
        _run_conversion([*command, str(again)], name)
        if Manifest.read(again).fingerprint != Manifest.read(out).fingerprint:
            raise StoreError(
                "a store of other cells is here already",
                where=out,
                fix="choose another `out`, remove the store, or give the store itself in place of "
                "the cells",
            )


def _run_conversion(words: Sequence[str], name: str) -> None:
    """Run the command that the words are, and print about the store what it would print."""
    manifest = convert_as_typed(build_preparation_parser("python -m data_prep").parse_args(words))
    print(f"{name}: {format_conversion(manifest)}")


def _make_scratch_folder(out: Path) -> tempfile.TemporaryDirectory[str]:
    """Make a folder beside the store, which goes when it is closed."""
    return tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)


def _require_files(data: object) -> None:
    """Require what may be files: a text or a path, or a list of them."""
    if isinstance(data, str) and data.count("=") > 1 and " " in data.strip():
        raise DataError("several files are a list", got=repr(data), fix=f"give {data.split()}")
    if isinstance(data, (str, Path)):
        return
    given = list(data) if isinstance(data, Sequence) else None
    if given is None or not all(isinstance(each, (str, Path)) for each in given):
        kinds = sorted({type(each).__name__ for each in given or ()})
        raise DataError(
            "not cells to convert",
            got=type(data).__name__ + (f" of {list_names(kinds)}" if kinds else ""),
            expected="one AnnData or MuData, a file, or a list of files",
            fix='several AnnData make one MuData: `mudata.MuData({"rna": rna, "adt": adt})`',
        )


def _require_modality(source: ad.AnnData | md.MuData, request: ConversionRequest) -> None:
    """Require that an AnnData says what it holds, or a person does."""
    if isinstance(source, md.MuData) or request.modality is not None:
        return
    column = next((column for column in TYPE_COLUMNS if column in source.var), None)
    types = [] if column is None else [str(each) for each in source.var[column].unique()]
    if not any(match_alias(each) for each in types):
        raise DataError(
            "an AnnData needs a modality's name",
            got=f"features {list_names(source.var_names, 3)}"
            + (f", of types {list_names(types, 3)}" if types else ""),
            fix='`modality="rna"`, say; proteins are "adt", peaks "atac"',
        )


def _require_columns(source: ad.AnnData | md.MuData, request: ConversionRequest) -> None:
    """Require the columns of obs that are named for all modalities.

    What is written for the conversion has none but these columns; all there are are known here.
    """
    tables = [source, *source.mod.values()] if isinstance(source, md.MuData) else [source]
    known = [*dict.fromkeys(str(column) for table in tables for column in table.obs)]
    asked = [("batch_key", column) for column in request.batch_columns]
    asked += [("label_key", request.label_key)] if request.label_key else []
    for argument, column in asked:
        # `rna=donor` is of one modality, whose column the conversion requires itself.
        if column in (*known, NO_COLUMN) or "=" in column:
            continue
        raise DataError(
            "obs has no such column",
            where=f"{argument}={column!r}",
            got=f"columns: {list_names(known, 30) or 'none'}",
            fix=suggest_names(column, known),
        )


def _require_matrices(source: ad.AnnData | md.MuData, request: ConversionRequest) -> None:
    """Require counts, and the layers and columns of var that are named for cells in memory.

    The conversion would name the file that is written for it, which has no others.
    """
    tables = source.mod if isinstance(source, md.MuData) else {request.modality: source}
    if not tables:
        raise DataError("there are no cells", got="a MuData without modalities")
    for name, table in tables.items():
        place = "" if name is None else f" of {name}"
        layers = [*table.layers, *(["raw.X"] if table.raw is not None else [])]
        layer = request.choose_layer(name)
        if table.X is None and not layers:
            raise DataError("there are no counts", got=f"no X, layers or raw{place}")
        if layer is not None and layer not in layers:
            raise DataError(
                "there is no such layer",
                where=f"layer={layer!r}{place}",
                got=f"layers: {list_names(layers) or 'none'}",
                fix=suggest_names(layer, layers) or "a dict names a layer by modality, or X",
            )
        matrix = table.layers.get(layer, table.X)
        if matrix is not None:  # nor does a file take objects
            require_real_numbers(np.empty(0, matrix.dtype), f"{layer or 'X'}{place}")
        var = table.raw.var if layer == "raw.X" else table.var
        columns, asked = [str(column) for column in var], request.choose_feature_columns(name)
        if asked and not {*asked} & {*columns}:
            raise DataError(
                "var has no such column",
                where=f"feature_ids={','.join(asked)!r}{place}",
                got=f"columns: {list_names(columns, 30) or 'none'}",
                fix=suggest_names(asked[0], columns) or "leave feature_ids out to use var_names",
            )


@contextmanager
def _discard_failed_job(out: Path) -> Iterator[None]:
    """Discard what a conversion began, if it fails or is interrupted.

    The file of cells in memory has another name each time, so that no later call can go on with it.
    """
    partial = find_partial_folder(out)
    was_begun = partial.exists()
    try:
        yield
    except BaseException:
        if not was_begun:
            discard_job(partial)
        raise


def _name_input(source: ad.AnnData | md.MuData, folder: Path, request: ConversionRequest) -> str:
    """Name the file of cells as the conversion takes it; cells that are in none are written."""
    path = source.filename if _is_whole_file(source) else _write_cells(source, folder, request)
    return f"{request.modality}={path}" if request.modality is not None else str(path)


def _is_whole_file(source: ad.AnnData | md.MuData) -> bool:
    """Whether cells are those of a file, which says of them all that they say themselves."""
    if not source.isbacked or source.is_view:
        return False
    with h5py.File(source.filename) as file:
        if isinstance(source, ad.AnnData):
            return _is_table_of_group(source, file)
        # What a MuData shows of its modalities may be in the file, too, or not.
        shown = [f"{name}:{column}" for name, table in source.mod.items() for column in table.obs]
        frames = (ad.io.read_elem(file["obs"]), source.obs)
        saved, present = (frame.drop(columns=shown, errors="ignore") for frame in frames)
        return saved.equals(present) and all(
            _is_table_of_group(table, file["mod"][name]) for name, table in source.mod.items()
        )


def _is_table_of_group(table: ad.AnnData, group: h5py.Group) -> bool:
    """Whether nothing was added to an AnnData, or changed in its tables, since it was opened."""
    return (
        set(table.layers) == set(group.get("layers", ()))
        and ad.io.read_elem(group["obs"]).equals(table.obs)
        and ad.io.read_elem(group["var"]).equals(table.var)
    )


def _write_cells(source: ad.AnnData | md.MuData, folder: Path, request: ConversionRequest) -> Path:
    """Write what the conversion reads of cells in memory."""
    ending = ".h5mu" if isinstance(source, md.MuData) else ".h5ad"
    path = folder / f"{IN_MEMORY}{ending}"  # which messages name
    with translate_disk_errors(folder, "free some space, or choose another `out`"):
        if isinstance(source, md.MuData):
            with silence_mudata(), md.set_options(pull_on_update=False):
                tables = {
                    name: _strip_table(table, name, request) for name, table in source.mod.items()
                }
                slim = md.MuData(tables)
                slim.obs = slim.obs.join(_keep_columns(source.obs, [*source.mod], request))
                slim.write(path)
        else:
            _strip_table(source, request.modality, request).write_h5ad(path)
    return path


def _strip_table(table: ad.AnnData, name: str | None, request: ConversionRequest) -> ad.AnnData:
    """What the conversion reads of an AnnData, and nothing else, which may be unfit for a file."""
    layer = request.choose_layer(name)
    columns = (*TYPE_COLUMNS, *request.choose_feature_columns(name))
    var = table.var[[column for column in table.var if column in columns]]
    obs = _keep_columns(table.obs, [], request)
    # Where X is no counts, the error names the layer that holds them.
    is_probed = layer is None and table.X is not None and _probe_counts(table)
    layers, raw = {}, None
    if not is_probed:
        layers = {
            key: matrix
            for key, matrix in table.layers.items()
            if layer in (None, key) and matrix.dtype.kind in "buif"
        }
    if not is_probed and layer in (None, "raw.X") and table.raw is not None:
        index = pd.DataFrame(index=table.obs_names)
        raw = ad.AnnData(_load_matrix(table.raw.X), index, table.raw.var)
    x = _load_matrix(table.X) if layer is None else None
    return ad.AnnData(x, obs, var, layers=layers, raw=raw)


def _probe_counts(table: ad.AnnData) -> bool:
    """Whether the first values of X are whole and not negative, as counts are."""
    rows = _load_matrix(table.X[:_PROBED_ROWS])
    values = rows.data if sp.issparse(rows) else np.asarray(rows).ravel()
    return not len(values) or looks_whole(values)


def _load_matrix(matrix: Any) -> Any:
    """A matrix in memory, also where that of an AnnData lies in its file."""
    if isinstance(matrix, h5py.Dataset):
        return matrix[()]
    return matrix.to_memory() if hasattr(matrix, "to_memory") else matrix


def _keep_columns(
    obs: pd.DataFrame, modalities: Sequence[str], request: ConversionRequest
) -> pd.DataFrame:
    """The columns of obs that hold batch or label; MuData puts modalities before their names.

    Further flags may name others, as `--keep-obs` and `--dataset-key` do: with any, all are kept.
    Where names of cells repeat, the error lists the columns that may tell the cells apart.
    """
    keeps_all = bool(request.conversion) or not obs.index.is_unique
    wanted = {*(request.batch_columns or [FIELDS["batch"]]), request.label_key or FIELDS["label"]}
    wanted |= {f"{modality}:{column}" for modality in modalities for column in wanted}
    kept = obs[[column for column in obs if keeps_all or column in wanted]]
    texts = {
        str(column): pd.Categorical(values.map(str, na_action="ignore"))
        for column, values in kept.items()
        if values.dtype.kind in "OMm"  # which may hold anything, or what no file takes
    }
    return kept.assign(**texts)
