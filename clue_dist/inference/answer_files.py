"""Answers as files of cells: what one may take the place of, and how it is written as a whole."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import h5py
import mudata as md

from clue_dist.errors import ConfigError, name_argument
from clue_dist.inference.output_files import require_output_format, translate_output_errors

PROVENANCE_KEY = "clue_dist"  # of uns: what made a result


def require_answer_path(
    out: Path, formats: Sequence[str], source: str | Path | None = None
) -> None:
    """Require that `out` has a known ending and would replace only an earlier result.

    Args:
        out: where a result is to go.
        formats: the known endings.
        source: a file that is read, which may not be `out`.

    Raises:
        ConfigError: it is not.
    """
    where, fix = name_argument("out", out), "choose another name"
    require_output_format(out, formats)
    if source is not None and out.exists() and Path(source).exists() and out.samefile(source):
        raise ConfigError("the output would replace what is read", where=where, fix=fix)
    if out.is_dir() and not (out / "uns" / PROVENANCE_KEY).is_dir():
        raise ConfigError("a folder that is not an embedding is in the way", where=where, fix=fix)
    if out.is_file() and not _holds_result(out):
        raise ConfigError("a file that is not an embedding is in the way", where=where, fix=fix)


def _holds_result(file: Path) -> bool:
    """Whether a file says that this project has written it."""
    try:
        with h5py.File(file) as opened:
            return file.suffix != ".zarr" and f"uns/{PROVENANCE_KEY}" in opened
    except OSError:
        return False


def write_tables(out: Path, temporary: Path, tables: ad.AnnData | md.MuData) -> None:
    """Write under a temporary name, then rename: `out` is whole or is not there.

    Raises:
        StoreError: the disk is full, or cannot be written to.
    """
    formats = ad.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False)
    with translate_output_errors(out), formats, warnings.catch_warnings():
        # anndata asks for what zarr warns of; a person can change neither.
        warnings.filterwarnings("ignore", "Consolidated metadata")
        if out.suffix == ".zarr":
            tables.write_zarr(temporary)
            if out.exists():  # a folder that is not empty cannot be replaced by a rename
                out.rename(temporary.with_name("replaced"))  # it goes with the scratch folder
        elif out.suffix == ".h5mu":
            tables.write(temporary)
        else:
            tables.write_h5ad(temporary)
        temporary.replace(out)
