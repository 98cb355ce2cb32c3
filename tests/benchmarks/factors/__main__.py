"""Do linear probes find shared and private factors in z, also when a modality is missing? Ours against a common space.

.venv/bin/python -m tests.benchmarks.factors --json OUT.json [--quick] [--designs cite ...] [--set objective.x=1 ...]

Counts are simulated from factors that all modalities share and factors of one modality alone. 20% of the cells are
test cells, 40% are paired, the others carry one modality each. Ridge probes learn on z of the paired training cells
and are scored on the test cells. Runs that have been done are kept: typed again, it goes on.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clue_dist.process import run_main
from tests.benchmarks import common, mosaic
from tests.benchmarks.common import Bar, Result, Run, Steps
from tests.benchmarks.factors import methods, probes
from tests.benchmarks.factors.common_space import ALIGNMENT
from tests.benchmarks.factors.simulate import Assay, Design, simulate
from tests.benchmarks.mosaic import JOINT
from tests.distributed.command import ROOT

HERE = Path(__file__).parent
RNA, ADT, ATAC = (
    Assay("rna", 1000, 2000, 4),
    Assay("adt", 100, 2000, 10),
    Assay("atac", 2000, 1000, 10),
)
DESIGNS = {
    "cite": Design((RNA, ADT)),
    "multiome": Design((RNA, ATAC)),
    "three": Design((RNA, ADT, ATAC)),
}
METHODS = {
    "ours": "ours",
    "aligned": "common space, aligned",
    "common": "common space",
    "counts": "counts",
}
COMMON_SPACES = {"aligned": ALIGNMENT, "common": 0.0}
COMPARED = ("ours", *COMMON_SPACES)  # whose modalities have one space
SEEDS = 3  # bars are judged on so many or more
PARTS = (
    "train",
    "test",
)  # of an embedding: the cells that probes learn on, and those they are scored on
QUICK_CELLS, QUICK_SETTINGS = 1500, ("train.epochs=12", "model.trunk.hidden=64")

FOOTNOTES = """\
R² on test cells, mean of the factors, by ridge probes on z of the paired training cells; mean ± standard deviation over
seeds, each a simulation and a training of its own
z from: everything, or some modalities alone; nothing tells the private factors of the others
FOSCTTM: between test cells' z from one modality alone and from another, mean over pairs of modalities; less is better
common space: a VAE with one z for all modalities (common_space.py), of the same size and with the same encoders,
inputs, batches, steps and optimizer, the weights of the last step; aligned: with MultiVI's penalty on what the
modalities of a cell infer
counts: components of the normalised counts, 50 of each modality: what there is to be read
bars: ours minus the better of both common spaces; shared factors may be 0.02 below, as a quarter of our z
is not for them; of private ones z tells at least nine tenths of what counts tell; ±: over seeds"""

PRIVATE, SHARED = Bar("", ">", 0.0), Bar("", ">=", -0.02)
KEPT = Bar("", ">=", 0.9)


class Question(NamedTuple):
    """Whose factors are read from which sources of z."""

    whose: str
    z_from: str
    sources: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.factors} factors, z from {self.z_from}"

    @property
    def factors(self) -> str:
        return "shared" if self.whose == "shared" else f"private {self.whose}"


def questions(design: Design) -> Iterator[Question]:
    """Of everything, of each modality alone, and of two where there are three."""
    for whose in ("shared", *design.names):
        yield Question(whose, "everything", (JOINT,))
    for name in design.names:
        for whose in ("shared", name):
            yield Question(whose, f"{name} alone", (name,))
    if design.subsets:
        for whose in ("shared", *design.names):
            some = tuple(
                subset for subset, names in design.subsets.items() if whose in ("shared", *names)
            )
            yield Question(whose, "any two", some)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser("factors", __doc__, work="factors")
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, help="default: all")
    parser.add_argument(
        "--seeds", nargs="+", type=int, help=f"default: {' '.join(map(str, range(SEEDS)))}"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH=VALUE",
        help="of our training; the common spaces share what concerns encoders, decoders, batches, steps and optimizer",
    )
    args = parser.parse_args(words)
    args.designs = args.designs or (["cite"] if args.quick else list(DESIGNS))
    args.seeds = args.seeds or ([0] if args.quick else list(range(SEEDS)))
    args.set = [*(QUICK_SETTINGS if args.quick else ()), *args.set]
    return args


def design_of(name: str, quick: bool) -> Design:
    return replace(DESIGNS[name], cells=QUICK_CELLS) if quick else DESIGNS[name]


def runs_of(args: argparse.Namespace) -> list[Run]:
    digests = {(m, name): digest_of(m, name, args) for m in METHODS for name in args.designs}
    return [
        Run(method, name, 0, seed, digests[method, name])
        for seed in args.seeds
        for name in args.designs
        for method in METHODS
    ]


def digest_of(method: str, name: str, args: argparse.Namespace) -> str:
    """Of the cells, sources and settings that a method's embeddings follow from."""
    files = {"ours": (), "counts": ("views.py",)}.get(method, ("common_space.py",))
    trained = () if method == "counts" else (mosaic.sources(), *args.set)
    here = [HERE / file for file in ("methods.py", *files)]
    return common.digest(cells_digest(name, args), *here, *trained)


def cells_digest(name: str, args: argparse.Namespace) -> str:
    return common.digest(str(design_of(name, args.quick)), HERE / "simulate.py")


def do(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    """One method on one simulation: its embedding in `z.npz`, and the seconds of its fit."""
    simulation = simulate(design_of(run.data_set, args.quick), run.seed)
    if run.method == "counts":
        z, fit_s = methods.by_counts(simulation)
    else:
        name = f"{run.data_set}-{cells_digest(run.data_set, args)[:12]}"
        split = methods.split_of(simulation, name, args.work)
        known = simulation, split, folder, args.set, args.threads, args.work
        ours = run.method == "ours"
        z, fit_s = (
            methods.by_ours(*known)
            if ours
            else methods.by_common_space(*known, COMMON_SPACES[run.method])
        )
    common.unchanged(run, digest_of(run.method, run.data_set, args))
    arrays = {
        f"{part}_{source}": x
        for source, pair in z.items()
        for part, x in zip(PARTS, pair, strict=True)
    }
    np.savez(folder / "z.npz", **arrays)
    return {"fit_s": fit_s, "threads": args.threads}


def score(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    """R² of every factor; FOSCTTM where the modalities have one space."""
    simulation = simulate(design_of(run.data_set, args.quick), run.seed)
    names = simulation.design.names
    sources = (JOINT, *names, *simulation.design.subsets)
    train, test = (mosaic.kept(folder / "z.npz", part, sources) for part in PARTS)
    r2 = probes.scored(simulation, {source: (train[source], test[source]) for source in sources})
    return {"r2": r2} | ({} if run.method == "counts" else {"foscttm": probes.foscttm(test, names)})


def told(record: Result) -> str:
    r2 = record["r2"][JOINT]
    means = {whose: statistics.fmean(values) for whose, values in r2.items()}
    return ", ".join(f"{whose} {value:.3f}" for whose, value in means.items())


def values(
    records: Sequence[Result], method: str, name: str, question: Question
) -> dict[int, float]:
    """R² by seed, mean over factors and sources."""
    return {
        r["seed"]: statistics.fmean(
            v for source in question.sources for v in r["r2"][source][question.whose]
        )
        for r in records
        if (r["method"], r["data_set"]) == (method, name)
    }


def table(records: Sequence[Result]) -> str:
    """One row for each design and question, and one for how its modalities meet; one column for each method."""
    rows = [["design", "z from", "factors", *METHODS.values()]]
    for name in dict.fromkeys(r["data_set"] for r in records):
        for question in questions(DESIGNS[name]):
            by_method = [list(values(records, m, name, question).values()) for m in METHODS]
            cells = [common.spread(v, 3) if v else "" for v in by_method]
            rows.append([name, question.z_from, question.factors, *cells])
        of = {
            m: [r["foscttm"] for r in records if (r["method"], r["data_set"]) == (m, name)]
            for m in COMPARED
        }
        cells = [common.spread(of[m], 3) if of.get(m) else "" for m in METHODS]
        rows.append([name, "each alone", "FOSCTTM", *cells])
    return common.aligned(rows)


def bars_of(records: Sequence[Result], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Design by design and modality by modality; open with fewer than three seeds, where a method was not run with
    every seed, and on a quick look."""
    judged = not args.quick and len(args.seeds) >= SEEDS
    for name in args.designs:
        for question in questions(DESIGNS[name]):
            of = {m: values(records, m, name, question) for m in METHODS}
            complete = judged and all(v.keys() == set(args.seeds) for v in of.values())
            bar = SHARED if question.whose == "shared" else PRIVATE
            title = f"{name}: R² of {question.name}, ours"
            better = (
                max(COMMON_SPACES, key=lambda m: statistics.fmean(of[m].values()))
                if complete
                else ""
            )
            leads = [of["ours"][s] - of[better][s] for s in args.seeds] if complete else []
            yield replace(bar, name=f"{title} minus common space").over(leads)
            if bar is PRIVATE and question.sources == (JOINT,):
                shares = [of["ours"][s] / of["counts"][s] for s in args.seeds] if complete else []
                yield replace(KEPT, name=f"{title} as a share of counts").over(shares)


def main() -> None:
    args = arguments()
    common.carry_out(
        args,
        runs_of(args),
        Steps(
            lambda run, folder: do(run, folder, args),
            lambda run, folder: score(run, folder, args),
            common.digest(HERE / "probes.py", ROOT / "clue_dist/matching.py"),
        ),
        told,
        table,
        FOOTNOTES,
        lambda records: bars_of(records, args),
        settings=args.set,
    )


if __name__ == "__main__":
    run_main(main)
