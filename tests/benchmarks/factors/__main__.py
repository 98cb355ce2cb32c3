"""Do linear probes find shared and private factors in z? Ours against a common latent space.

.venv/bin/python -m tests.benchmarks.factors --json OUT.json [--quick] [--set objective.x=1 ...]
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from clue_dist.metrics import matching
from tests.benchmarks import mosaic, report, scores
from tests.benchmarks.factors import methods
from tests.benchmarks.factors.common_space import ALIGNMENT
from tests.benchmarks.factors.methods import Sources
from tests.benchmarks.factors.simulate import Assay, Design, Simulation, cut_parts, simulate_cells
from tests.benchmarks.kept import compute_digest
from tests.benchmarks.mosaic import JOINT
from tests.benchmarks.report import Result
from tests.benchmarks.runner import Benchmark, Case, Option, Run
from tests.distributed.command import ROOT

HERE = Path(__file__).parent
RNA, ADT = Assay("rna", 1000, 2000, 4), Assay("adt", 100, 2000, 10)
ATAC = Assay("atac", 2000, 1000, 10)
ASSAYS = {"cite": (RNA, ADT), "multiome": (RNA, ATAC), "three": (RNA, ADT, ATAC)}
DESIGNS = {name: Design(assays) for name, assays in ASSAYS.items()}
COMMON_SPACES = {"aligned": ALIGNMENT, "common": 0.0}
METHODS = ("ours", *COMMON_SPACES, "counts")
SEEDS = [0, 1, 2]  # bars are judged on so many or more
PARTS = ("train", "test")  # the cells that probes learn on, and those they are scored on
QUICK_CELLS, QUICK_SETTINGS = 1500, ["train.epochs=12", "model.trunk.hidden=64"]
PENALTIES = np.logspace(-1, 5, 13)


class Question(NamedTuple):
    """Whose factors are read from which sources of z."""

    whose: str
    z_from: str
    sources: tuple[str, ...]

    @property
    def factors(self) -> str:
        return "shared" if self.whose == "shared" else f"private {self.whose}"


def list_questions(design: Design) -> Iterator[Question]:
    """Of everything, of each modality alone, and of two where there are three."""
    owners = ("shared", *design.names)
    yield from (Question(whose, "everything", (JOINT,)) for whose in owners)
    for name in design.names:
        yield from (Question(whose, f"{name} alone", (name,)) for whose in ("shared", name))
    if subsets := design.subsets.items():
        for whose in owners:
            some = tuple(subset for subset, names in subsets if whose in ("shared", *names))
            yield Question(whose, "any two", some)


class Factors(Benchmark):
    """Probes of known factors in the z of methods."""

    name = work = "factors"
    options: ClassVar = {
        "designs": Option(list(DESIGNS), ["cite"], choices=DESIGNS),
        "methods": Option(list(METHODS), list(METHODS), choices=METHODS),
        "seeds": Option(SEEDS, [0]),
        "set": Option([], [], "PATH=VALUE of our training; the common spaces share most of it"),
    }

    @property
    def settings(self) -> list[str]:
        return [*(QUICK_SETTINGS if self.args.quick else ()), *self.args.set]

    def list_cases(self) -> list[Case]:
        cases = product(self.args.seeds, self.args.designs, self.args.methods)
        return [(method, name, 0, seed) for seed, name, method in cases]

    def choose_design(self, name: str) -> Design:
        return replace(DESIGNS[name], cells=QUICK_CELLS) if self.args.quick else DESIGNS[name]

    def simulate_run(self, run: Run) -> Simulation:
        return simulate_cells(self.choose_design(run.data_set), run.seed)

    def digest_cells(self, name: str) -> str:
        return compute_digest(str(self.choose_design(name)), HERE / "simulate.py")

    def list_inputs(self, method: str, data_set: str) -> list[Path | str]:
        files = {"ours": [], "counts": ["views.py"]}.get(method, ["common_space.py"])
        trained = [] if method == "counts" else [mosaic.digest_sources(), *self.settings]
        here = [HERE / file for file in ("methods.py", *files)]
        return [self.digest_cells(data_set), *here, *trained]

    def measure(self, run: Run, folder: Path) -> Result:
        simulation, args = self.simulate_run(run), self.args
        if run.method == "counts":
            z, fit_s = methods.reduce_counts(simulation)
        else:
            name = f"{run.data_set}-{self.digest_cells(run.data_set)[:12]}"
            split = methods.write_split(simulation, name, args.work)
            settings = ["log.tensorboard=false", "log.wandb=disabled", *self.settings]
            training = mosaic.Training(split, folder, run.seed, settings, args)
            if run.method == "ours":
                tables, fit_s = training.embed_parts("test")
                table = tables["test"]
            else:
                alignment = COMMON_SPACES[run.method]
                table, fit_s = methods.embed_common_space(training, alignment)
            z = methods.select_sources(table, simulation.design)
        arrays = {f"{PARTS[i]}_{source}": z[source][i] for source in z for i in (0, 1)}
        np.savez(folder / "z.npz", **arrays)
        return {"fit_s": fit_s, "threads": self.args.threads}

    score_sources = (Path(__file__), ROOT / "clue_dist/metrics/matching.py")

    def score(self, run: Run, folder: Path) -> Result:
        """R² of every factor; FOSCTTM where the modalities have one space."""
        simulation = self.simulate_run(run)
        names = simulation.design.names
        arrays = np.load(folder / "z.npz")
        train, test = (scores.select_part(arrays, part) for part in PARTS)
        z = {source: (train[source], test[source]) for source in train}
        found: Result = {"r2": probe_factors(simulation, z)}
        return found if run.method == "counts" else found | {"foscttm": compare_spaces(test, names)}

    def describe(self, record: Result) -> str:
        means = {whose: statistics.fmean(values) for whose, values in record["r2"][JOINT].items()}
        return ", ".join(f"{whose} {value:.3f}" for whose, value in means.items())

    def tabulate(self, records: Sequence[Result]) -> str:
        """A row for each design and question, and for how modalities meet; columns are methods."""
        rows = []
        for r in records:
            base = {"design": r["data_set"], "method": r["method"]}
            for question in list_questions(DESIGNS[r["data_set"]]):
                asked = {"z from": question.z_from, "factors": question.factors}
                rows.append(base | asked | {"value": average_r2(r, question)})
            if "foscttm" in r:
                asked = {"z from": "each alone", "factors": "FOSCTTM"}
                rows.append(base | asked | {"value": r["foscttm"]})
        columns = ["design", "z from", "factors", "method", "value"]
        groups = pd.DataFrame(rows, columns=columns).groupby(columns[:4], sort=False)["value"]
        return report.format_table(groups.agg(report.format_spread).unstack())

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        """Ours against the better common space, and against counts, over three seeds or more."""
        args = self.args
        for name in args.designs:
            for question in list_questions(DESIGNS[name]):
                title = f"{name}: R² of {question.factors} factors, z from {question.z_from}, ours"
                r2: dict[str, dict[int, float]] = {method: {} for method in METHODS}
                for r in records:
                    if r["data_set"] == name:
                        r2[r["method"]][r["seed"]] = average_r2(r, question)
                whole = all(values.keys() == set(args.seeds) for values in r2.values())
                seeds = args.seeds if whole and len(args.seeds) >= len(SEEDS) else []
                better = max((sum(r2[method].values()), method) for method in COMMON_SPACES)[1]
                leads = [r2["ours"][seed] - r2[better][seed] for seed in seeds]
                kind = "shared" if question.whose == "shared" else "private"
                yield self.bars[kind].fill_name(title).judge_mean(leads)
                if kind == "private" and question.sources == (JOINT,):
                    shares = [r2["ours"][seed] / r2["counts"][seed] for seed in seeds]
                    yield self.bars["counts"].fill_name(title).judge_mean(shares)

    def list_extras(self) -> Result:
        return {"settings": self.settings}


def average_r2(record: Result, question: Question) -> float:
    """R² of what is asked, mean over factors and sources."""
    r2 = (record["r2"][source][question.whose] for source in question.sources)
    return statistics.fmean(value for values in r2 for value in values)


def probe_factors(simulation: Simulation, z: Sources) -> dict[str, dict[str, list[float]]]:
    """R² by source of z, then by whose factors they are, where their modality was observed."""
    parts, found = cut_parts(simulation.design), {}
    for source, (train, test) in z.items():
        found[source] = {
            whose: measure_r2(
                train, factors[parts["paired"]], test, factors[parts["test"]]
            ).tolist()
            for whose, factors in simulation.factors.items()
            if source == JOINT or whose in ("shared", *source.split("+"))
        }
    return found


def measure_r2(
    z: np.ndarray, factors: np.ndarray, z_test: np.ndarray, factors_test: np.ndarray
) -> np.ndarray:
    """R² of each factor on test cells, (factors,); the penalty is chosen on the training cells."""
    probe = make_pipeline(StandardScaler(), RidgeCV(PENALTIES, alpha_per_target=True))
    # A single factor comes without its axis.
    read = probe.fit(z, factors).predict(z_test).reshape(factors_test.shape)
    left = ((read - factors_test) ** 2).sum(0)
    return np.asarray(1 - left / ((factors_test - factors_test.mean(0)) ** 2).sum(0))


def compare_spaces(z: Mapping[str, np.ndarray], names: Sequence[str]) -> float:
    """FOSCTTM of the same cells' z from each modality alone, mean over pairs of modalities."""
    return statistics.fmean(matching.compute_foscttm(z[a], z[b]) for a, b in combinations(names, 2))


if __name__ == "__main__":
    Factors.main()
