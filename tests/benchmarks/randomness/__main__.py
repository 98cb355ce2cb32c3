"""Are the plan's batches as random as independent draws, out of an atlas sorted by plate and type?

.venv/bin/python -m tests.benchmarks.randomness --json OUT.json [--quick]

The cells of each plate and type are counted in every batch of whole passes, over many seeds of both
the store's shuffle and the plan. No count is read: where a store's cells lie follows from its seed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clue_dist.data.batch_shares import share_rounds, weigh_strata
from clue_dist.data.plan import CellPlan
from clue_dist.store.layout import BLOCK_CELLS
from tests.benchmarks.randomness import deal
from tests.benchmarks.randomness.atlas import SortedAtlas, make_atlas, order_input, order_stored
from tests.benchmarks.report import Result
from tests.benchmarks.runner import Benchmark, Case, Run
from tests.distributed.command import ROOT

BATCH = 512
# Lanes, and blocks of a lane's window; the first is the default.
SETTINGS = ((8, 16), (8, 1), (1, 16), (64, 16))
KINDS = ("paired", "mosaic")  # all cells paired, or three plates of five with one modality alone


@dataclass(frozen=True)
class AtlasSize:
    """How much is dealt."""

    cells: int
    seeds: int
    passes: int  # over every stratum
    settings: tuple[tuple[int, int], ...]


SIZES = (
    AtlasSize(200_000, 32, 2, SETTINGS),
    AtlasSize(10_000_000, 3, 1, (SETTINGS[0], SETTINGS[-1])),
)
QUICK = (AtlasSize(20_000, 4, 2, SETTINGS[:2]),)
IDEALS = {"spread": 1.0, "neighbours": 0.0}


class Randomness(Benchmark):
    """The plan in all settings; what is to be compared with it in the default one."""

    name = work = "randomness"

    @property
    def sizes(self) -> tuple[AtlasSize, ...]:
        return QUICK if self.args.quick else SIZES

    def list_cases(self) -> Iterator[Case]:
        for size in self.sizes:
            names = [f"plan-{lanes}x{window}" for lanes, window in size.settings]
            if size is self.sizes[0]:
                names += [f"{method}-8x16" for method in ("draws", "unshuffled")]
            yield from ((name, f"{kind}-{size.cells}", 0, 0) for kind in KINDS for name in names)

    def list_inputs(self, method: str, data_set: str) -> list[Path | str]:
        sources = ("clue_dist/data/plan.py", "clue_dist/store/shuffle.py")
        size = repr(self.find_size(data_set))
        return [*(ROOT / part for part in sources), Path(__file__).parent, size]

    def find_size(self, data_set: str) -> AtlasSize:
        return next(size for size in self.sizes if data_set.endswith(f"-{size.cells}"))

    def measure(self, run: Run, folder: Path) -> Result:
        size, (method, _, setting) = self.find_size(run.data_set), run.method.partition("-")
        lanes, window = map(int, setting.split("x"))
        atlas = make_atlas(size.cells, unpaired=run.data_set.startswith("mosaic"))
        return measure_deals(atlas, method, lanes, window, range(size.seeds), size.passes)

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        for size in self.sizes:
            plans = [
                r
                for r in records
                if r["method"].startswith("plan") and r["data_set"].endswith(f"-{size.cells}")
            ]
            whole = len(plans) == len(KINDS) * len(size.settings)
            bars = {key: bar.fill_name(size.cells) for key, bar in self.bars.items()}
            for key, ideal in IDEALS.items():
                # The plate or type that is farthest from its ideal.
                far = [(abs(r[key]["worst"] - ideal), r[key]["worst_error"]) for r in plans]
                yield bars[key].judge(*max(far)) if whole else bars[key].judge(None)
            yield bars["not_once"].judge(sum(r["not_once"] for r in plans) if whole else None)


def measure_deals(
    atlas: SortedAtlas, method: str, lanes: int, window: int, seeds: Sequence[int], passes: int
) -> Result:
    """How a method deals: a plan, independent draws, or a plan on a store that is not shuffled."""
    variances, neighbours, again, wrong, steps = [], [], None, 0, 0
    paired = {stratum: "+" in stratum for stratum in atlas.sizes}
    weights = weigh_strata(atlas.sizes, paired, "auto", BATCH)
    modalities = {stratum: stratum.split("+") for stratum in atlas.sizes}
    shares = share_rounds(BATCH, lanes, weights, modalities).every_batch
    for seed in seeds:
        plan = CellPlan(seed, atlas.sizes, shares, lanes, window, BLOCK_CELLS)
        steps = deal.count_steps(plan, passes)
        dealt = (deal.deal_draws if method == "draws" else deal.deal_plan)(plan, steps)
        order = order_input(atlas) if method == "unshuffled" else order_stored(atlas, seed)
        variance, correlation = deal.measure_shares(plan, dealt, order)
        variances.append(variance)
        neighbours.append(correlation)
        wrong += deal.count_not_once(plan, dealt)
        again = again or deal.count_met_again(plan, dealt)
    spread, neighbours = np.stack(variances), np.stack(neighbours)
    found = {"batches": steps * len(seeds), "not_once": wrong}
    found |= dict(zip(("again", "chance"), again or (None, None), strict=True))
    found["spread"] = describe_seeds(spread, 1.0, square_root=True)
    return found | {"neighbours": describe_seeds(neighbours, 0.0)}


def describe_seeds(values: np.ndarray, ideal: float, square_root: bool = False) -> Result:
    """Means over seeds with their standard errors, of (seeds, PLATES + TYPES).

    Of all plates and types, and of the worst, which is farthest from its ideal.
    """
    means = values.mean(0)
    errors, error = (v.std(0, ddof=1) / len(v) ** 0.5 for v in (values, values.mean(1)))
    if square_root:
        means = np.sqrt(means)
        errors, error = errors / means / 2, error / 2
    worst = int(np.abs(means - ideal).argmax())
    found = {"mean": means.mean(), "error": error, "worst": means[worst]}
    return {name: float(v) for name, v in (found | {"worst_error": errors[worst]}).items()}


if __name__ == "__main__":
    Randomness.main()
