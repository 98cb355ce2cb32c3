"""Are the plan's batches as random as independent draws, out of an atlas sorted by plate and by cell type?

.venv/bin/python -m tests.benchmarks.randomness --json OUT.json [--quick]

The cells of each plate and type are counted in every batch of whole passes, over many seeds of both the store's
shuffle and the plan. No count is read: where a store's cells lie follows from its seed, which a test holds true.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clue_dist.data import plan as plans
from clue_dist.data.plan import CellPlan
from clue_dist.process import run_main
from clue_dist.store.layout import BLOCK_CELLS
from tests.benchmarks import common
from tests.benchmarks.common import Bar, Result, Run
from tests.benchmarks.randomness import deal
from tests.benchmarks.randomness.atlas import Atlas, atlas_of, stored, unshuffled
from tests.distributed.command import ROOT

BATCH = 512
SETTINGS = (
    (8, 16),
    (8, 1),
    (1, 16),
    (64, 16),
)  # lanes, blocks of a lane's window; the first is the default


@dataclass(frozen=True)
class Size:
    """cells: of the atlas; seeds: how many; passes: over every stratum; settings: which of SETTINGS."""

    cells: int
    seeds: int
    passes: int
    settings: tuple[tuple[int, int], ...]


SIZES = (Size(200_000, 32, 2, SETTINGS), Size(10_000_000, 3, 1, (SETTINGS[0], SETTINGS[-1])))
QUICK = (Size(20_000, 4, 2, SETTINGS[:2]),)
SOURCES = (
    ROOT / "clue_dist/data/plan.py",
    ROOT / "clue_dist/store/shuffle.py",
    Path(__file__).parent,
)
PAIRED, MOSAIC = (
    "paired",
    "mosaic",
)  # all cells paired, or three plates of five with one modality alone

SPREAD = Bar("how far the spread of a plate or type is from that of draws", "<", 0.05)
NEIGHBOURS = Bar("correlation between neighbouring batches, of any plate or type", "<", 0.05)
ONCE = Bar("cells that a pass did not deal exactly once", "<=", 0)

FOOTNOTES = f"""\
batches of {BATCH}; lanes x blocks of a lane's window, of {BLOCK_CELLS} cells; paired_share auto
spread: standard deviation of a plate's or type's cells in a batch, times that of draws without replacement
neighbours: correlation of that number between a batch and the next
both as mean over all plates and types ± standard error over seeds, then of the plate or type that is farthest off
again: of the others in a cell's batch, how many are with it in the next pass too (by chance); paired cells
draws: a fresh shuffle of the stratum for each pass; unshuffled: the plan on a store in the order of its input
bars judge the farthest plate or type of all rows of the plan: part of that is sampling, ± is its standard error"""


@dataclass(frozen=True)
class Setting(Run):
    """A plan, or what it is compared with, over all seeds."""

    @property
    def name(self) -> str:
        return f"{self.method} on {self.data_set}"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    return common.parser("randomness", __doc__, "randomness").parse_args(words)


def sizes_of(args: argparse.Namespace) -> tuple[Size, ...]:
    return QUICK if args.quick else SIZES


def runs_of(args: argparse.Namespace) -> list[Run]:
    """The plan in all settings; what is to be compared with it, in the default one on the fewest cells."""
    runs = []
    for size in sizes_of(args):
        for kind in (PAIRED, MOSAIC):
            methods = [f"plan-{lanes}x{window}" for lanes, window in size.settings]
            if size is sizes_of(args)[0]:
                methods += [
                    f"{name}-{SETTINGS[0][0]}x{SETTINGS[0][1]}" for name in ("draws", "unshuffled")
                ]
            digest = common.digest(*SOURCES, repr(size))
            runs += [Setting(method, f"{kind}-{size.cells}", 0, 0, digest) for method in methods]
    return runs


def plan_of(atlas: Atlas, lanes: int, window: int, seed: int) -> CellPlan:
    weights = plans.weigh_strata(atlas.sizes, {s: "+" in s for s in atlas.sizes}, "auto", BATCH)
    return CellPlan(
        seed, atlas.sizes, plans.share_rounds(BATCH, lanes, weights), lanes, window, BLOCK_CELLS
    )


def do(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    """All seeds of a setting."""
    kind, _, cells = run.data_set.partition("-")
    name, _, setting = run.method.partition("-")
    size = next(s for s in sizes_of(args) if s.cells == int(cells))
    lanes, window = map(int, setting.split("x"))
    atlas = atlas_of(size.cells, unpaired=kind == MOSAIC)
    return measured(atlas, name, lanes, window, range(size.seeds), size.passes)


def measured(
    atlas: Atlas, name: str, lanes: int, window: int, seeds: Sequence[int], passes: int
) -> Result:
    """name: plan, draws or unshuffled; see FOOTNOTES."""
    shares, again, wrong, steps = [], None, 0, 0
    for seed in seeds:
        plan = plan_of(atlas, lanes, window, seed)
        steps = deal.steps_for(plan, passes)
        dealt = (deal.by_draws if name == "draws" else deal.by_plan)(plan, steps)
        shares.append(
            deal.shares_of(
                plan, dealt, unshuffled(atlas) if name == "unshuffled" else stored(atlas, seed)
            )
        )
        wrong += deal.not_once(plan, dealt)
        again = again or deal.met_again(plan, dealt)
    variance = np.stack([s.variance for s in shares])  # (seeds, PLATES + TYPES)
    spread, of_spread = over_seeds(variance)
    neighbours, of_neighbours = over_seeds(np.stack([s.neighbours for s in shares]))
    return {
        "batches": steps * len(seeds),
        "not_once": wrong,
        "spread": told_of(
            np.sqrt(spread), of_spread / np.sqrt(spread) / 2, variance.mean(1) / 2, 1.0
        ),
        "neighbours": told_of(
            neighbours, of_neighbours, np.stack([s.neighbours.mean() for s in shares]), 0.0
        ),
        "again": again,
    }


def over_seeds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and its standard error. values: (seeds, ...)"""
    return values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5


def told_of(
    values: np.ndarray, errors: np.ndarray, by_seed: np.ndarray, ideal: float
) -> dict[str, float]:
    """values, errors: (PLATES + TYPES,); by_seed: (seeds,), means over them, up to a constant."""
    worst = int(np.abs(values - ideal).argmax())
    mean, error = float(values.mean()), float(over_seeds(by_seed)[1])
    return {
        "mean": mean,
        "error": error,
        "worst": float(values[worst]),
        "worst_error": float(errors[worst]),
    }


def told(record: Result) -> str:
    return f"spread {shown(record['spread'])}, neighbours {shown(record['neighbours'])}"


def shown(of: dict[str, float]) -> str:
    return f"{of['mean']:.4f} ± {of['error']:.4f}"


def table(records: Sequence[Result]) -> str:
    rows = [
        [
            "cells",
            "",
            "batches",
            "spread",
            "farthest",
            "neighbours",
            "farthest",
            "not once",
            "again (chance)",
        ]
    ]
    for r in records:
        kind, _, cells = r["data_set"].partition("-")
        again = "-" if r["again"] is None else "{:.2f} ({:.2f})".format(*r["again"])
        of = [
            text
            for key in ("spread", "neighbours")
            for text in (shown(r[key]), f"{r[key]['worst']:.3f}")
        ]
        rows.append(
            [
                f"{int(cells):,} {kind}",
                r["method"],
                f"{r['batches']:,}",
                *of,
                f"{r['not_once']}",
                again,
            ]
        )
    return common.aligned(rows)


def bars_of(records: Sequence[Result], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Judged for each number of cells where all settings were run, and never on a quick look."""
    for size in sizes_of(args):
        mine = [
            r
            for r in records
            if r["method"].startswith("plan") and r["data_set"].endswith(f"-{size.cells}")
        ]
        whole = not args.quick and len(mine) == 2 * len(size.settings)
        for bar, key, ideal in ((SPREAD, "spread", 1.0), (NEIGHBOURS, "neighbours", 0.0)):
            off, error = max(
                ((abs(r[key]["worst"] - ideal), r[key]["worst_error"]) for r in mine),
                default=(0.0, 0.0),
            )
            named = Bar(f"{size.cells:,} cells: {bar.name}", bar.op, bar.bar)
            yield named.judged(off, error) if whole else named.judged(None)
        once = Bar(f"{size.cells:,} cells: {ONCE.name}", ONCE.op, ONCE.bar)
        yield once.judged(sum(r["not_once"] for r in mine) if whole else None)


def main() -> None:
    args = arguments()
    common.carry_out(
        args,
        runs_of(args),
        common.Steps(lambda run, folder: do(run, folder, args)),
        told,
        table,
        FOOTNOTES,
        lambda records: bars_of(records, args),
    )


if __name__ == "__main__":
    run_main(main)
