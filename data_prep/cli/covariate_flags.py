"""Which columns of obs make up the batch of a cell, as `--batch-key` names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clue_dist.errors import DataError, list_names
from clue_dist.store.batch_vocabulary import BatchVocabulary
from data_prep.options import COVARIATE, NO_COLUMN, ObsColumns

_FLAG = "--batch-key"


def choose_covariates(words: Sequence[str], known: BatchVocabulary | None) -> list[str]:
    """Choose the covariates of which a batch is a combination; none where it is a single column.

    Args:
        words: as they were typed behind the flag.
        known: the batches of a store, or a model, that the cells are fitted to.

    Raises:
        DataError: a column is named twice; the batches that are known have one covariate.
    """
    columns = [word for word in words if "=" not in word]
    if twice := [column for column in dict.fromkeys(columns) if columns.count(column) > 1]:
        raise DataError(
            "a column is named twice",
            where=_FLAG,
            got=list_names(columns),
            fix=f"name {list_names(twice)} once",
        )
    if known is not None and known.has_several:
        return list(known.covariates)
    if len(columns) < 2:
        return []
    if NO_COLUMN in columns:
        raise DataError("no batches, or some?", where=_FLAG, got=list_names(columns))
    if bad := [column for column in columns if not column or "/" in column]:
        raise DataError("no name of a covariate", where=_FLAG, got=repr(bad[0]))
    if known is not None and known.names:
        raise DataError(
            "the batches that are known have one covariate",
            where=_FLAG,
            got=list_names(columns),
            expected=f"one column, which may be called as {list_names(known.covariates)} or not",
            fix="convert all cells again with these columns, and train a model on them",
        )
    return columns


def match_columns(
    words: Sequence[str], covariates: Sequence[str], columns: Mapping[str, str]
) -> ObsColumns:
    """Find the column of each covariate.

    Args:
        words: `COLUMN`, one for each covariate, or some that are called as covariates are; and
            `MODALITY=COLUMN,COLUMN` for the inputs of one modality.
        covariates: of which a batch is a combination.
        columns: columns by field, where none is named.

    Returns:
        The columns of covariates alone.

    Raises:
        DataError: more or fewer columns than covariates, or others.
    """
    named = [word for word in words if "=" not in word]
    chosen = {name: columns.get(COVARIATE + name, name) for name in covariates}
    if named == [NO_COLUMN]:
        chosen = {}
    elif named:
        chosen = _pair_columns(named, covariates, _FLAG)
    by_modality = {}
    for modality, text in (word.split("=", 1) for word in words if "=" in word):
        flag = f"{_FLAG} {modality}={text}"
        listed = [NO_COLUMN] * len(covariates) if text == NO_COLUMN else text.split(",")
        if modality in by_modality:
            raise DataError("two columns for one modality", where=flag)
        by_modality[modality] = _name_fields(_pair_columns(listed, covariates, flag))
    is_named = frozenset(COVARIATE + name for name in chosen if named)
    return ObsColumns(_name_fields(chosen), is_named, by_modality)


def _pair_columns(named: Sequence[str], covariates: Sequence[str], flag: str) -> dict[str, str]:
    """Pair columns with covariates, by their order, or by name where some covariates have none."""
    if len(named) == len(covariates):
        return dict(zip(covariates, named, strict=True))
    if absent := [name for name in named if name not in covariates]:
        raise DataError(
            "the batches have other covariates",
            where=flag,
            got=list_names(absent),
            expected=f"{list_names(covariates)}, or a column for each",
        )
    return {name: name for name in named}


def _name_fields(columns: Mapping[str, str]) -> dict[str, str]:
    """The same by field."""
    return {COVARIATE + name: column for name, column in columns.items()}
