"""Kinds of modality: what each is stored as, normalised by and modelled with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

from clue_dist.errors import DataError, list_names

Kind = Literal["rna", "adt", "atac", "dense"]


Storage = Literal["sparse", "dense"]


STORAGE: dict[str, Storage] = {"rna": "sparse", "atac": "sparse", "adt": "dense", "dense": "dense"}


NORMALISE = {"rna": "log_cp10k", "adt": "log", "atac": "tfidf", "dense": "none"}  # by kind


LIKELIHOOD = {"rna": "nb", "adt": "nb", "atac": "poisson", "dense": "normal"}


_ALIASES = {
    "rna": "rna gex gene_expression",
    "adt": "adt prot protein cite antibody antibody_capture",
    "atac": "atac peak peaks chromatin",
    "dense": "dense",
}


def infer_kind(modality: str, given: Mapping[str, str]) -> Kind:
    """What a modality measures: from `--kind name=kind`, else from its name.

    Raises:
        DataError: the name says nothing, or two things at once.
    """
    kinds = get_args(Kind)
    if modality in given:
        if given[modality] not in kinds:
            raise DataError(
                "unknown kind",
                where=f"--kind {modality}={given[modality]}",
                expected=list_names(kinds),
            )
        return given[modality]  # type: ignore[return-value]
    name = "_".join(re.findall(r"[a-z0-9]+", modality.lower()))
    found = {
        kind
        for kind, aliases in _ALIASES.items()
        for alias in aliases.split()
        if f"_{alias}_" in f"_{name}_"
    }
    if len(found) != 1:
        raise DataError(
            "cannot tell from its name what a modality measures",
            where=f"modality {modality!r}",
            got=list_names(sorted(found)) or "no known word in the name",
            expected=f"one of {list_names(kinds)}",
            fix=f"add `--kind {modality}=rna` (or another kind)",
        )
    return found.pop()  # type: ignore[return-value]


TENX_TYPES = {"Gene Expression": "rna", "Antibody Capture": "adt", "Peaks": "atac"}
