"""How much do matchers gain over the nearest neighbours in our embedding of unseen cells?

.venv/bin/python -m tests.benchmarks.matchers --json OUT.json [--quick] [--sets ...] [--folds ...]

The embeddings are the runs of `matching`, which are done here where they are not kept.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np

from clue_dist.metrics.matching import compute_scores
from clue_dist.neighbours.partner_settings import MOST_PARTNERS, PartnerSettings
from clue_dist.neighbours.partners import METHODS, find_partners
from tests.benchmarks import mosaic, scores
from tests.benchmarks.kept import compute_digest
from tests.benchmarks.matching import Matching
from tests.benchmarks.report import Result
from tests.benchmarks.runner import Benchmark, Case, Option, Run
from tests.distributed.command import ROOT

BASE = "neighbour"  # eq. 16 of one neighbour: what `matching` calls the matching score
MATCHERS = (BASE, *METHODS)
SETS = ["cbmc_cite", "snare_adbrain_8lib", "bmmc_cite_starter", "hao_mosaic"]


class Matchers(Matching):
    """Matching scores (eq. 17) of every matcher on our embeddings."""

    name = "matchers"
    score_sources = (
        Path(__file__),
        *(ROOT / "clue_dist/neighbours" / name for name in ("partners.py", "nearest.py")),
        ROOT / "clue_dist/metrics/matching.py",
    )
    options: ClassVar = {
        **Matching.cells,
        "sets": Option(SETS, [mosaic.SMALL], choices=mosaic.PAIRED),
        "seeds": Option([0], [0]),
        "methods": Option([*MATCHERS], [*MATCHERS], "", MATCHERS),
    }
    columns = ("match", "match_within_batch")
    list_extras = Benchmark.list_extras  # no peers

    def list_cases(self) -> list[Case]:
        args = self.args
        cases = product(args.methods, args.seeds, args.folds, args.sets)
        return [(method, name, fold, seed) for method, seed, fold, name in cases]

    def list_inputs(self, method: str, data_set: str) -> Iterable[Path | str]:
        if method == "ours":
            return super().list_inputs(method, data_set)
        return (*super().list_inputs("ours", data_set), method)

    def measure(self, run: Run, folder: Path) -> Result:
        if run.method == "ours":
            return super().measure(run, folder)
        ours = self.embed_cells(run)
        (folder / "z.npz").symlink_to(ours.folder(self.args.work).resolve() / "z.npz")
        return {"threads": self.args.threads}

    def embed_cells(self, run: Run) -> Run:
        """The run of `matching` with the embedding of a data set and fold, which is kept."""
        digest = compute_digest(*self.list_inputs("ours", run.data_set))
        ours = Run("ours", run.data_set, run.fold, run.seed, digest)
        Matching(args=self.args).obtain(ours)
        return ours

    def score(self, run: Run, folder: Path) -> Result:
        arrays = np.load(folder / "z.npz")
        obs = scores.HeldOutCells.read_from(self.cut_split(run)).obs
        batch = obs["batch"].astype(str).to_numpy() if "batch" in obs else np.zeros(len(obs))
        return score_matcher(run.method, arrays["u1"], arrays["u2"], batch)

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        """The gain of the matcher that is best on average over the folds of a set."""
        for name in self.args.sets:
            means = {
                method: np.mean(list(found.values()))
                for method in MATCHERS
                if (found := self.average_seeds(records, method, name, "match"))
            }
            base = means.pop(BASE, None)
            best = max(means, key=means.__getitem__, default="the best matcher")
            whole = base is not None and len(means) == len(METHODS)
            bar = self.bars["gain"].fill_name(name, best)
            yield bar.judge(float(means[best] / base) if whole else None)


def score_matcher(method: str, first: np.ndarray, second: np.ndarray, batch: np.ndarray) -> Result:
    """The mean weight of the true partner, of both directions, among all cells and in batches.

    Args:
        method: one of MATCHERS.
        first: (N, D), profiles by the first modality.
        second: (N, D), the same cells by the second.
        batch: (N,) names.
    """
    if method == BASE:
        found = compute_scores(first, second, batch)
        return {
            "match": found["global"]["match"],
            "match_within_batch": found["within_batch"]["match"],
        }
    # Eq. 16 gives weights to all that share a neighbour; of the others one partner is the best.
    settings = PartnerSettings(method, n_partners=MOST_PARTNERS if method == "shared" else 1)
    batches = {"match": None, "match_within_batch": (batch, batch)}
    values: Result = {}
    for score, groups in batches.items():
        weights = [
            find_partners(u, v, settings, groups) for u, v in ((first, second), (second, first))
        ]
        values[score] = float(np.mean([matrix.diagonal().mean() for matrix in weights]))
    return values


if __name__ == "__main__":
    Matchers.main()
