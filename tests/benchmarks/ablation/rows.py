"""The rows of the ablation: recipes with one thing changed."""

import re
import tomllib
from pathlib import Path

from tests.benchmarks import mosaic
from tests.benchmarks.ablation.cells import OTHER_CELLS

PAPER = {  # by second modality
    "adt": "configs/neurips2021_cite.json",
    "atac": "configs/neurips2021_multiome.json",
}
ATLAS = "atlas.json"
OF_BATCHES = "contrast across batches", "batches not shrunk", "batches not shrunk, contrast across"
THINNED = "no thinning"
COUNTED_ANEW = "proteins, counted anew"


TABLE = tomllib.loads(Path(__file__).with_name("rows.toml").read_text())
ROWS: dict[str, str] = TABLE["paper"] | TABLE["atlas"]
ROWS |= dict.fromkeys([*OTHER_CELLS, COUNTED_ANEW], "")


def applies_to(row: str, name: str) -> bool:
    """Whether a row says anything of a data set."""
    if row in OF_BATCHES:
        return name in mosaic.BATCHED
    if row == THINNED:
        return "atac" in mosaic.SETS[name]
    return row != COUNTED_ANEW or mosaic.SETS[name][1] == "adt"


def choose_recipe(row: str, name: str) -> str:
    """The config in which a row changes something."""
    return PAPER[mosaic.SETS[name][1]] if row in TABLE["paper"] else mosaic.RECIPE


def name_method(row: str) -> str:
    """A row as runs and folders are called; atlas.json as it stands is what others call ours."""
    return "ours" if row == ATLAS else "ablation-" + "-".join(re.findall(r"\w+", row))


def find_row(method: str) -> str:
    return next(row for row in ROWS if name_method(row) == method)
