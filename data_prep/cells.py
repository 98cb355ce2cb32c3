"""Which cells there are: barcodes joined across modalities, batch and label of each, and their shuffled order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clue_dist.errors import DataError, listed
from clue_dist.store import shuffle
from data_prep.sources import Codes, Head, Keys, Source, decode
from data_prep.spool import GROUP_SHIFT


@dataclass(frozen=True)
class Cells:
    """Every cell of the inputs, numbered in the order of its barcode.

    barcodes: (n,) bytes, `dataset:barcode`; planned: (n,) int64, bit m set where the inputs list modality m;
    place: (n,) int64, the cell's place in the shuffle of all; codes: (n,) int32 into `names`, per field;
    rows: per source, the cell of each of its rows.
    """

    barcodes: np.ndarray
    planned: np.ndarray
    place: np.ndarray
    codes: dict[str, np.ndarray]
    names: dict[str, list[str]]
    rows: list[np.ndarray]

    def keys(self, cells: np.ndarray) -> np.ndarray:
        """Spool keys: planned strata apart, shuffled inside. (n,) int64."""
        keys: np.ndarray = (self.planned[cells] << GROUP_SHIFT) + self.place[cells]
        return keys


def join(
    sources: list[Source], heads: list[Head], modalities: list[str], known: dict[str, list[str]], keys: Keys, seed: int
) -> Cells:
    """Join the rows of all sources into cells. known: per field, names whose codes are taken already.

    Raises:
        DataError: a barcode twice in a modality of a data set; batch or label in dispute; a column that no file has.
    """
    if not sum(head.n_rows for head in heads):
        raise DataError("the inputs hold no cells", where=listed(s.where for s in sources))
    prefixed = [_with_dataset(source.dataset, head.barcodes) for source, head in zip(sources, heads, strict=True)]
    barcodes, inverse = np.unique(np.concatenate(prefixed), return_inverse=True)
    rows = np.split(inverse, np.cumsum([head.n_rows for head in heads])[:-1])
    _reject_duplicates(sources, rows, barcodes, modalities)
    planned = np.zeros(len(barcodes), np.int64)
    for source, of in zip(sources, rows, strict=True):
        planned[of] |= 1 << modalities.index(source.modality)
    place = shuffle.permute(np.arange(len(barcodes)), len(barcodes), shuffle.key_of(seed, "cells"))
    codes, names = {}, {}
    for field in keys.columns:
        _require_column(field, keys, heads)
        names[field] = _vocabulary(field, heads, known.get(field, []))
        codes[field] = _agreed_codes(field, sources, heads, rows, barcodes, names[field])
    return Cells(barcodes, planned, place, codes, names, rows)


def _with_dataset(dataset: str, barcodes: np.ndarray) -> np.ndarray:
    return np.char.add(f"{dataset}:".encode(), barcodes) if dataset else barcodes


def _reject_duplicates(
    sources: list[Source], rows: list[np.ndarray], barcodes: np.ndarray, modalities: list[str]
) -> None:
    for modality in modalities:
        mine = [i for i, s in enumerate(sources) if s.modality == modality]
        times = np.zeros(len(barcodes), np.int64)
        for i in mine:
            times += np.bincount(rows[i], minlength=len(barcodes))
        twice = np.flatnonzero(times > 1)
        if len(twice):
            raise DataError(
                f"{len(twice)} barcodes occur more than once in modality {modality!r} of one data set",
                where=listed(dict.fromkeys(sources[i].where for i in mine)),
                got=listed(decode(barcodes[twice[:10]]))
                + (f" ... and {len(twice) - 10} more" if len(twice) > 10 else ""),
                expected="each cell once",
                fix="if the files are different data sets, keep them apart with a prefix: `lane1:FILE lane2:FILE`",
            )


def _require_column(field: str, keys: Keys, heads: list[Head]) -> None:
    if field in keys.explicit and not any(field in head.fields for head in heads):
        columns = sorted({column for head in heads for column in head.columns})
        raise DataError(
            f"no input has the {field} column asked for",
            where=f"--{field}-key {keys.columns[field]}",
            got=f"columns: {listed(columns, 30) or 'none'}",
            fix="name one of these columns",
        )


def _vocabulary(field: str, heads: list[Head], known: list[str]) -> list[str]:
    new = {name for head in heads if field in head.fields for name in head.fields[field].names}
    return known + sorted(new - set(known))


def _agreed_codes(
    field: str, sources: list[Source], heads: list[Head], rows: list[np.ndarray], barcodes: np.ndarray, names: list[str]
) -> np.ndarray:
    """One code per cell; every modality that knows it must agree."""
    code_of = {name: i for i, name in enumerate(names)}
    out = np.full(len(barcodes), -1, np.int32)
    for source, head, of in zip(sources, heads, rows, strict=True):
        own = head.fields.get(field, Codes(np.full(head.n_rows, -1, np.int32), []))
        codes = np.array([code_of[name] for name in own.names] + [-1], np.int32)[own.codes]
        dispute = np.flatnonzero((codes >= 0) & (out[of] >= 0) & (codes != out[of]))
        if len(dispute):
            cells = dispute[:10]
            pairs = zip(decode(barcodes[of[cells]]), out[of[cells]], codes[cells], strict=True)
            raise DataError(
                f"the modalities of {len(dispute)} cells disagree on their {field}",
                where=source.where,
                got=listed(f"{barcode}: {names[a]!r} and {names[b]!r}" for barcode, a, b in pairs),
                expected="one value per cell, or none",
                fix="mend the column; if the barcodes name different cells, prefix the data sets: `lane1:FILE`",
            )
        out[of] = np.where(codes >= 0, codes, out[of])
    return out
