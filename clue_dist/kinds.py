"""The kinds of modality, one row each: how a kind is stored, normalised, modelled and so on.

A new kind is a new row of the table. Conversion, the store and the model ask the row; none of them
knows a kind by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from clue_dist.errors import DataError, list_names

Storage = Literal["sparse", "dense"]
# By variance within batches, as Seurat v3 does, or by the number of cells that have the feature.
FeatureSelectionMethod = Literal["seurat_v3", "detection"]

# Columns of var that may say what a feature is, as 10x, scanpy and scvi-tools write them.
TYPE_COLUMNS = ("feature_types", "feature_type", "modality")


@dataclass(frozen=True)
class Kind:
    """What the rest of the code must know of a kind of modality.

    Raises:
        ValueError: real values are to be stored sparse.
    """

    name: str  # as the manifest and `--kind NAME=KIND` spell it
    storage: Storage
    # Words in a modality's name that tell its kind, in lower case, joined by _ where they are two.
    aliases: tuple[str, ...]
    normalise: str  # default of the setting modalities.NAME.normalise
    likelihood: str  # default of the setting modalities.NAME.likelihood
    real_values: bool = False  # float32 of either sign; otherwise the values are counts
    binnable: bool = False  # features are regions of the genome: `--bins`, fragments
    thinned: bool = False  # profiles are sparse samples: the setting objective.thinning is for them
    selection: FeatureSelectionMethod | None = None  # how `--top` ranks features; None: not at all
    simulated_mean: float = 0.6  # of a sparse kind: mean count of a feature in a simulated cell
    # Words for what this kind suits, too, though nobody has asked for it: messages suggest it.
    related: tuple[str, ...] = ()

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
        selection="seurat_v3",
        related=("genes", "transcripts", "spliced", "unspliced", "mirna"),
    ),
    Kind(
        name="adt",  # proteins, counted by the tags of antibodies
        storage="dense",  # a panel is small, and few of its counts are zero
        aliases=(
            "adt",
            "prot",
            "protein",
            "protein_expression",
            "cite",
            "antibody",
            "antibody_capture",
        ),
        normalise="log",
        likelihood="nb",
        related=(
            "hto",
            "hashtag",
            "hashtags",
            "hashing",
            "multiplexing",
            "tags",
            "guide",
            "guides",
            "crispr",
            "grna",
            "sgrna",
        ),
    ),
    Kind(
        name="atac",
        storage="sparse",
        aliases=("atac", "scatac", "snatac", "peak", "peaks", "chromatin"),
        normalise="tfidf",
        likelihood="poisson",
        binnable=True,
        thinned=True,
        selection="detection",
        simulated_mean=0.08,
        related=("bins", "tiles", "regions", "fragments", "cutandtag"),
    ),
    Kind(
        name="dense",
        storage="dense",
        aliases=("dense",),
        normalise="none",
        likelihood="normal",
        real_values=True,
        related=("clr", "dsb", "pca", "lsi", "embedding", "image", "metabolites"),
    ),
)

KINDS = {kind.name: kind for kind in _ROWS}  # in the order in which messages list them


def match_alias(name: str) -> str | None:
    """Return the kind of which a name is an alias, as "Gene Expression" is of rna, or None."""
    words = _join_words(name)
    return next((kind.name for kind in KINDS.values() if words in kind.aliases), None)


def find_kinds(name: str) -> list[str]:
    """List the kinds of which a name holds an alias, as `prot_raw` does of adt."""
    words = f"_{_join_words(name)}_"
    return [
        kind.name for kind in KINDS.values() if any(f"_{alias}_" in words for alias in kind.aliases)
    ]


def suggest_kind(name: str) -> str | None:
    """Return the kind that suits a name whose words are no alias, as adt suits `hto`, or None."""
    words = f"_{_join_words(name)}_"
    found = find_kinds(name) + [
        kind.name for kind in KINDS.values() if any(f"_{word}_" in words for word in kind.related)
    ]
    return found[0] if found else None


def _join_words(name: str) -> str:
    """Join the words of a name as `Kind.aliases` has them."""
    return "_".join(re.findall(r"[a-z0-9]+", name.lower()))


def choose_value(given: str | Mapping[str, str] | None, modality: str | None) -> str | None:
    """Choose what is given for a modality, which may have no name, where one may stand for all."""
    return given.get(modality or "") if isinstance(given, Mapping) else given


@dataclass(frozen=True)
class UnknownKind:
    """The mistake of a modality whose name does not say its kind."""

    modality: str


def infer_kind(modality: str, given: Mapping[str, str]) -> str:
    """Tell the kind of a modality from its name.

    Args:
        modality: the modality's name, in which an alias of a kind is looked for.
        given: kinds that `--kind NAME=KIND` gave, by modality. These take precedence.

    Returns:
        The name of the kind, a key of `KINDS`.

    Raises:
        DataError: the name holds aliases of no kind or of several, or the given kind is unknown.
    """
    if modality in given:
        if given[modality] not in KINDS:
            suggestion = suggest_kind(given[modality])
            raise DataError(
                "unknown kind",
                where=f"--kind {modality}={given[modality]}",
                expected=list_names(KINDS),
                fix=f"`--kind {modality}={suggestion}`" if suggestion else None,
            )
        return given[modality]
    found = find_kinds(modality)
    if len(found) != 1:
        suggestion = suggest_kind(modality)
        raise DataError(
            "cannot tell from its name what a modality measures",
            where=f"modality {modality!r}",
            got=list_names(sorted(found)) or "no known word in the name",
            expected=f"one of {list_names(KINDS)}",
            fix=f"add `--kind {modality}={suggestion or 'rna'}` (or another kind), in Python "
            f'`kinds={{"{modality}": "{suggestion or "rna"}"}}`',
            mistake=UnknownKind(modality),
        )
    return found[0]
