"""The rows of the ablation: recipes with one thing changed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks import mosaic
from tests.benchmarks.ablation.cells import OTHER_CELLS


@dataclass(frozen=True)
class Row:
    """settings: what is changed, as for `--set`; paper: in the authors' recipe for such cells, not in atlas.json."""

    settings: tuple[str, ...] = ()
    paper: bool = False


PAPER = {
    "adt": "configs/neurips2021_cite.json",
    "atac": "configs/neurips2021_multiome.json",
}  # by second modality
TERMS = ("cross", "mse", "d")  # of eq. 15, that Table 5 leaves out; the self ELBO is always there


def zero(terms: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"objective.lambda_{term}=0" for term in terms)


ATLAS = "atlas.json"
# In the order of Table 5: what it leaves out of the authors' recipe.
LEFT_OUT: tuple[tuple[str, ...], ...] = (
    (),
    ("mse",),
    ("cross",),
    ("d",),
    ("cross", "d"),
    ("mse", "d"),
    ("cross", "mse"),
    ("cross", "mse", "d"),
)
TABLE_5 = {
    f"paper: {', '.join(f'no {term}' for term in terms) or 'all'}": Row(zero(terms), paper=True)
    for terms in LEFT_OUT
}
WITHIN_BATCH = "contrast within batch"
BEYOND = {
    "paper: all, alignment mse (eq. 9)": Row(("objective.alignment=mse",), paper=True),
    "paper: all, 60 epochs": Row(("train.epochs=60",), paper=True),
    ATLAS: Row(),
    "posterior poe (eq. 6)": Row(("model.posterior=poe",)),
    "posterior mean": Row(("model.posterior=mean",)),
    "alignment cosine": Row(("objective.alignment=cosine",)),
    "no contrast: the paper's terms at the weights of atlas.json": Row(
        ("objective.lambda_contrastive=0",)
    ),
    "contrast alone": Row(
        (*zero(("self", *TERMS)), "model.private=0")
    ),  # which nothing would train
    "no private dimensions": Row(("model.private=0",)),
    "no mse, no d": Row(zero(("mse", "d"))),
    WITHIN_BATCH: Row(("objective.contrastive_within_batch=true",)),
    "no mixup": Row(("objective.contrastive_mixup=false",)),
    "no size input": Row(("model.trunk.size_input=false",)),
    "one member": Row(("model.trunk.members=1",)),
    "separate encoders": Row(("model.trunk.shared=false",)),
    "KL warm-up": Row(("train.kl_warmup=0.3",)),
    "trained projection": Row(("model.trunk.projection_lr=0.1",)),
    "random projection, trained": Row(
        ("model.trunk.projection_init=random", "model.trunk.projection_lr=1")
    ),
}
COUNTED_ANEW = "proteins, counted anew"
ROWS: dict[str, Row] = TABLE_5 | BEYOND | dict.fromkeys([*OTHER_CELLS, COUNTED_ANEW], Row())


def applies(row: str, name: str) -> bool:
    """Whether a row says anything of a data set."""
    if row == WITHIN_BATCH:
        return name in mosaic.BATCHED
    return row != COUNTED_ANEW or mosaic.SETS[name][1] == "adt"


def recipe_of(row: str, name: str) -> str:
    return PAPER[mosaic.SETS[name][1]] if ROWS[row].paper else mosaic.RECIPE


def method_of(row: str) -> str:
    """The row's name as runs and their folders are called; atlas.json as it stands is what others call ours."""
    return "ours" if row == ATLAS else "ablation-" + "-".join(re.findall(r"\w+", row))


def row_of(method: str) -> str:
    return next(row for row in ROWS if method_of(row) == method)
