"""The kinds of modality, one row each: how a kind is stored, simulated, selected, normalised and modelled.

A new kind is a new row of `KINDS`. Conversion, the store and the model ask the row; none of them knows a kind by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from clue_dist.errors import DataError, list_names

Storage = Literal["sparse", "dense"]
FeatureSelection = Literal["seurat_v3", "detection"]


@dataclass(frozen=True)
class Kind:
    """What the rest of the code must know of a kind of modality.

    Raises:
        ValueError: real values that are to be stored sparse.
    """

    name: str  # as the manifest and `--kind NAME=KIND` spell it
    storage: Storage
    # Words in the name of a modality that tell its kind, in lower case, with _ between the parts of a word.
    aliases: tuple[str, ...]
    normalise: str  # default of `modalities.NAME.normalise`
    likelihood: str  # default of `modalities.NAME.likelihood`
    real_values: bool = False  # float32 of either sign; else counts
    tenx_type: str | None = None  # the feature type of 10x files that holds this kind
    binnable: bool = (
        False  # features are regions of the genome, which fragments hit and `--bins` lays into bins
    )
    selection: FeatureSelection | None = None  # how `--top` ranks features; None: it cannot
    simulated_mean: float = (
        0.6  # mean count of a feature in a simulated cell, where storage is sparse
    )

    def __post_init__(self) -> None:
        if self.real_values and self.storage == "sparse":
            raise ValueError(f"kind {self.name}: sparse rows hold counts, not real values")


_ROWS = (
    Kind(
        name="rna",
        storage="sparse",
        aliases=("rna", "gex", "gene_expression"),
        normalise="log_cp10k",
        likelihood="nb",
        tenx_type="Gene Expression",
        selection="seurat_v3",
    ),
    Kind(
        name="adt",  # proteins, by the tags of antibodies: a panel is small, and few of its counts are zero
        storage="dense",
        aliases=("adt", "prot", "protein", "cite", "antibody", "antibody_capture"),
        normalise="log",
        likelihood="nb",
        tenx_type="Antibody Capture",
    ),
    Kind(
        name="atac",
        storage="sparse",
        aliases=("atac", "peak", "peaks", "chromatin"),
        normalise="tfidf",
        likelihood="poisson",
        tenx_type="Peaks",
        binnable=True,
        selection="detection",
        simulated_mean=0.08,
    ),
    Kind(
        name="dense",
        storage="dense",
        aliases=("dense",),
        normalise="none",
        likelihood="normal",
        real_values=True,
    ),
)

KINDS = {kind.name: kind for kind in _ROWS}  # in the order in which messages list them
# Feature types of 10x files, and the kind that each holds.
TENX_TYPES = {kind.tenx_type: kind.name for kind in KINDS.values() if kind.tenx_type is not None}


def infer_kind(modality: str, given: Mapping[str, str]) -> str:
    """The name of the kind that a modality is of.

    Args:
        modality: The modality's name, in which an alias of one kind is looked for.
        given: Kinds that were given as `--kind NAME=KIND`, by modality; these come first.

    Raises:
        DataError: the name holds aliases of no kind or of several, or the given kind is unknown.
    """
    if modality in given:
        if given[modality] not in KINDS:
            raise DataError(
                "unknown kind",
                where=f"--kind {modality}={given[modality]}",
                expected=list_names(KINDS),
            )
        return given[modality]
    name = "_".join(re.findall(r"[a-z0-9]+", modality.lower()))
    found = [
        kind.name
        for kind in KINDS.values()
        if any(f"_{alias}_" in f"_{name}_" for alias in kind.aliases)
    ]
    if len(found) != 1:
        raise DataError(
            "cannot tell from its name what a modality measures",
            where=f"modality {modality!r}",
            got=list_names(sorted(found)) or "no known word in the name",
            expected=f"one of {list_names(KINDS)}",
            fix=f"add `--kind {modality}=rna` (or another kind)",
        )
    return found[0]
