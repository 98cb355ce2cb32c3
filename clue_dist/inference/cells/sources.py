"""Opens the cells that a model is asked about: a store, a path, or an object in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd

from clue_dist.config import MIN_KNOWN
from clue_dist.data.batch import Batch
from clue_dist.errors import (
    ConfigError,
    DataError,
    format_count,
    list_names,
    name_argument,
    shorten_error,
)
from clue_dist.files import parse_path
from clue_dist.inference.cells.argument_names import OPEN_CELLS, ArgumentNames
from clue_dist.inference.cells.memory_cells import collect_memory_cells
from clue_dist.inference.cells.memory_obs import list_obs_columns
from clue_dist.inference.cells.named_counts import (
    MIN_KNOWN_IN_MEMORY,
    MemoryChoices,
    NamedCounts,
    list_chosen,
    name_parts,
    warn_of_cells,
    warn_of_unknown_modalities,
)
from clue_dist.inference.cells.store_cells import CellSlice, StoreCells
from clue_dist.inference.load_model import TrainedModel
from clue_dist.inference.query import require_fitting_store, select_modalities
from clue_dist.kinds import match_alias
from clue_dist.process import silence_mudata
from clue_dist.store.batch_vocabulary import BatchVocabulary
from clue_dist.store.reader import Store

CellSource: TypeAlias = ad.AnnData | md.MuData | Store | str | Path

_FILE_ENDINGS = (".h5ad", ".h5mu")  # of files of cells that are read into memory


class Cells(Protocol):
    """The cells that a model is asked about."""

    @property
    def modalities(self) -> list[str]:
        """Those that some cell carries, in the model's order."""
        ...

    @property
    def batches(self) -> BatchVocabulary:
        """The biological batches that codes of cells name, be they known to the model or not."""
        ...

    @property
    def n_cells(self) -> int:
        """Number of cells, which are the rows of the answer."""
        ...

    def slice_cells(self, batch_size: int) -> Sequence[CellSlice]:
        """Cut the cells into slices of about `batch_size` cells that carry the same modalities."""
        ...

    def read_slice(self, cells: CellSlice) -> Batch:
        """Read the cells of a slice; columns of `observed` are in the model's order."""
        ...

    def read_obs(self) -> pd.DataFrame:
        """Read what is known of the cells, (N) rows: barcodes as the index, `batch`, ..."""
        ...

    def describe_source(self) -> dict[str, Any]:
        """Say where the cells come from: `store`, `fingerprint`, `modalities`."""
        ...


def open_cells(
    source: CellSource,
    trained_model: TrainedModel,
    arguments: ArgumentNames = OPEN_CELLS,
    *,
    modality: str | None = None,
    modalities: Sequence[str] | None = None,
    layer: str | Mapping[str, str] | None = None,
    feature_ids: str | Mapping[str, str] | None = None,
    batch_key: str | Sequence[str] | None = None,
    min_known: float | None = None,
) -> Cells:
    """Open the cells that a model is to be asked about.

    Args:
        source: cells in memory, whose rows of the answer are in the order of `source.obs_names`;
            a store; or the path of a store, which is streamed, or of an .h5ad or .h5mu, which is
            read into memory.
        trained_model: the model.
        arguments: what the caller calls the next ones, for messages.
        modality: which modality of the model an AnnData holds; by default its features say so.
        modalities: those to use; by default all that the model knows.
        layer: where raw counts lie, for all modalities or by modality; by default X.
        feature_ids: column of var that names the features, instead of var_names, likewise.
        batch_key: column of obs with the batch; by default that of the training cells, or `batch`,
            where there is one. A list where the model knows several covariates.
        min_known: least share of a modality's features that must be there; by default 0.5 of cells
            in memory, and 0.1 of each file of a store.

    Raises:
        DataError: cells in memory that cannot be brought to the model's features.
        StoreError: modalities or features that are not the model's; no sound store.
        ConfigError: the store has none of the modalities.
    """
    source, modalities = open_source(source, arguments), list_chosen(modalities)
    if isinstance(source, Store):
        part = choose_modalities(source, trained_model, modalities)
        return open_store_cells(part, trained_model, min_known)
    least = MIN_KNOWN_IN_MEMORY if min_known is None else min_known
    choices = MemoryChoices(modality, modalities, layer, feature_ids, batch_key, least, arguments)
    return collect_memory_cells(source, trained_model, choices)


def choose_modalities(
    store: Store, trained_model: TrainedModel, modalities: Sequence[str] | None = None
) -> Store:
    """Choose modalities of a store, and the cells that carry any of them; hide the others.

    Warns of cells that are left out, and of modalities that the model does not know.

    Args:
        store: the cells.
        trained_model: the model that is to be asked about them.
        modalities: those to use; by default all that the model knows.

    Raises:
        ConfigError: the store or the model has no such modality, or no cell carries any of them.
    """
    if modalities is None:
        modalities = [name for name in store.modalities if name in trained_model.modalities]
        unknown = [name for name in store.modalities if name not in modalities]
        if not (unknown and modalities):  # where none is known, `open_store_cells` refuses them
            return store
        warn_of_unknown_modalities(unknown)
    part = select_modalities(store, modalities)
    if unknown := [name for name in modalities if name not in trained_model.modalities]:
        raise ConfigError(
            "the model does not know a modality",
            where=name_argument("modalities", " ".join(modalities)),
            got=list_names(unknown),
            expected=list_names(trained_model.modalities),
        )
    if n_left_out := store.manifest.n_cells - part.manifest.n_cells:
        cells = format_count(n_left_out, "cell")
        warn_of_cells(f"left out: {cells} without {list_names(modalities)}")
    return part


def open_source(
    source: CellSource, arguments: ArgumentNames = OPEN_CELLS, *, leave_counts: bool = False
) -> ad.AnnData | md.MuData | Store:
    """Read a file of cells into memory, or open a store; what is open already stays as it is.

    Args:
        source: the cells.
        arguments: as of `open_cells`.
        leave_counts: whether the counts of a file stay in it, and are read slice by slice.

    Raises:
        DataError: the file is missing, or cannot be read.
        StoreError: there is no sound store.
    """
    if not isinstance(source, (str, Path)):
        return source
    path = str(source)
    if Path(path).suffix in _FILE_ENDINGS:
        return _read_file(path, arguments, leave_counts)
    if "://" not in path:
        _refuse_other_formats(parse_path(path))
    return Store(path)


def _read_file(path: str, arguments: ArgumentNames, leave_counts: bool) -> ad.AnnData | md.MuData:
    """Read an .h5ad or .h5mu; its counts may stay in it."""
    file = parse_path(path)
    if not file.is_file():
        name, equals, _ = path.partition("=")
        advice = arguments.join_advice(modality=f'`{{}}"{name}"` says the modality')
        raise DataError(
            "no such file",
            where=file,
            fix=f"give the path alone; {advice}" if equals else "check the path",
        )
    try:
        backed = "r" if leave_counts else None
        if file.suffix == ".h5mu":
            with silence_mudata():
                return md.read_h5mu(file, backed=backed)
        return ad.read_h5ad(file, backed=backed)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            "the file cannot be read",
            where=file,
            got=shorten_error(error),
            fix="`python -m data_prep doctor FILE` says what is wrong with it",
        ) from error


def _refuse_other_formats(path: Path) -> None:
    """Refuse what is no store, but a file of cells, or a folder, that has to become one."""
    expected = f"{', '.join(_FILE_ENDINGS)}, or the folder of a store"
    if path.is_file():
        raise DataError(
            "not a file that cells are read from",
            where=path,
            expected=expected,
            fix=f"unpack it: `gunzip {path.name}`"
            if path.suffix == ".gz"
            else f"`python -m data_prep doctor {path.name}` says how it becomes a store",
        )
    if _is_zarr_of_cells(path):
        raise DataError(
            "a Zarr folder of anndata or mudata, and no store",
            where=path,
            expected=expected,
            fix=f"give the cells themselves, `anndata.read_zarr({str(path)!r})`",
        )


def _is_zarr_of_cells(folder: Path) -> bool:
    """Whether anndata or mudata wrote a folder, in version 2 or 3 of Zarr."""
    attributes = [folder / name for name in (".zattrs", "zarr.json")]
    return any('"encoding-type"' in path.read_text() for path in attributes if path.is_file())


def find_source_file(source: CellSource) -> Path | None:
    """Find the file or folder that cells are read from; None of cells in memory, and elsewhere."""
    if isinstance(source, Store):
        return None
    place = source if isinstance(source, (str, Path)) else source.filename
    return None if place is None or "://" in str(place) else parse_path(str(place))


def name_modalities(
    source: CellSource | Sequence[str | Path],
    trained_model: TrainedModel,
    modality: str | None = None,
    feature_ids: str | Mapping[str, str] | None = None,
) -> tuple[CellSource | Sequence[str | Path], str | None]:
    """Name the modalities of cells as a model does, and leave out those that it does not know.

    Args:
        source: cells in memory, or the path of an .h5ad or .h5mu; anything else stays as it is.
        trained_model: the model.
        modality: the modality that an AnnData is said to hold, which a MuData may not be.
        feature_ids: column of var that names the features, as of `open_cells`.

    Returns:
        The cells or the path, where their names are the model's; else other cells, or inputs as
        `python -m data_prep convert` takes them. Then the modality that an AnnData holds; None
        where its feature types say it.

    Raises:
        DataError: the model knows none of the modalities, or it cannot be told which they are.
    """
    tables = _open_tables(source)
    if tables is None:
        return source, modality
    choices = MemoryChoices(modality=modality, feature_ids=feature_ids)
    parts = name_parts(tables, trained_model, choices)
    if isinstance(tables, ad.AnnData):
        alone = next((name for name, part in parts.items() if part.feature_type is None), None)
        return (_name_types(source, tables, parts) if alone is None else source), alone
    keys = {name: part.key for name, part in parts.items()}
    if keys == {name: name for name in tables.mod}:
        return source, None
    if isinstance(source, (str, Path)):
        return [f"{name}={source}:{key}" for name, key in keys.items()], None
    return _join_tables({name: part.adata for name, part in parts.items()}, tables.obs), None


def _name_types(
    source: CellSource | Sequence[str | Path], adata: ad.AnnData, parts: Mapping[str, NamedCounts]
) -> CellSource | Sequence[str | Path]:
    """Name the feature types of an AnnData, or of its file, as a model does; leave out others."""
    columns = {name: part.find_columns(adata.var) for name, part in parts.items()}
    kept = np.sort(np.concatenate([*columns.values()]))
    # A conversion names feature types by their kinds.
    are_named = all(match_alias(str(part.feature_type)) == name for name, part in parts.items())
    if are_named and len(kept) == adata.n_vars:
        return source
    if isinstance(source, (str, Path)):
        return [f"{name}={source}:{part.feature_type}" for name, part in parts.items()]
    if are_named:
        return adata[:, kept].to_memory()
    tables = {name: adata[:, places].to_memory() for name, places in columns.items()}
    return _join_tables(tables, adata.obs)


def _join_tables(tables: Mapping[str, ad.AnnData], obs: pd.DataFrame) -> md.MuData:
    """Join AnnDatas by the names of modalities into a MuData with the obs of all cells."""
    with silence_mudata(), md.set_options(pull_on_update=False):
        mdata = md.MuData(dict(tables))
        mdata.obs = obs.loc[mdata.obs_names]
    return mdata


def find_batch_columns(source: object, known: BatchVocabulary) -> list[str] | None:
    """Find the columns of obs that gave a model its batches, in cells that are in no store yet.

    Args:
        source: cells in memory, or the path of an .h5ad or .h5mu; of anything else none is known.
        known: the batches of the model.

    Returns:
        A column for each covariate; None where the cells lack one of them.
    """
    tables = _open_tables(source)
    if tables is None:
        return None
    columns = list_obs_columns(tables)
    return [*known.covariates] if {*known.covariates} <= {*columns} else None


def _open_tables(source: object) -> ad.AnnData | md.MuData | None:
    """Read obs and var of cells that are in no store yet; None of what is no single file."""
    if isinstance(source, (ad.AnnData, md.MuData)):
        return source
    if not isinstance(source, (str, Path)) or Path(source).suffix not in _FILE_ENDINGS:
        return None
    if not parse_path(str(source)).is_file():  # `rna=cells.h5ad`, or a mistake
        return None
    opened = open_source(source, leave_counts=True)
    assert not isinstance(opened, Store)
    opened.file.close()  # obs and var are in memory
    return opened


def open_store_cells(
    store: Store,
    trained_model: TrainedModel,
    min_known: float | None = None,
    sizes: Mapping[str, int] | None = None,
) -> StoreCells:
    """Open cells of a store, whose modalities the model knows, and warn where they are doubtful.

    Args:
        store: the store, see `choose_modalities`.
        trained_model: the model.
        min_known: as of `open_cells`.
        sizes: how many cells of each segment; by default all.

    Raises:
        StoreError: modalities or features that are not the model's, or were hardly measured.
    """
    least = MIN_KNOWN if min_known is None else min_known
    for doubt in require_fitting_store(store, trained_model, least):
        warn_of_cells(doubt)
    return StoreCells(store, trained_model, sizes)
