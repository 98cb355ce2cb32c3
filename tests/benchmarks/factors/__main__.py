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
from typing import Any

from clue_dist.config import load
from clue_dist.errors import run_main
from tests.benchmarks import common, mosaic
from tests.benchmarks.common import Bar, Result, Run, Steps
from tests.benchmarks.factors import methods
from tests.benchmarks.factors.probes import r2
from tests.benchmarks.factors.simulate import Assay, Design, Simulation, simulate
from tests.benchmarks.factors.simulate import mosaic as parts_of
from tests.benchmarks.mosaic import JOINT
from tests.distributed.command import ROOT

RNA, ADT, ATAC = Assay("rna", 1000, 2000, 4), Assay("adt", 100, 2000, 10), Assay("atac", 2000, 1000, 10)
DESIGNS = {"cite": Design((RNA, ADT)), "multiome": Design((RNA, ATAC)), "three": Design((RNA, ADT, ATAC))}
METHODS = {"ours": "ours", "common": "common space", "counts": "counts"}
QUICK_CELLS, QUICK_SETTINGS = 1500, ("train.epochs=12", "model.trunk.hidden=64")

FOOTNOTES = """\
R² on test cells, mean of the factors (and seeds), by ridge probes on z of the paired training cells
z from: everything, or one modality alone; private: factors of that modality, or of every modality for everything
common space: a VAE with one z for all modalities (common_space.py), of the same size, batches and steps
counts: components of the normalised counts, 50 of each modality: what there is to be read"""

# z from everything or from one modality alone; shared or private factors; ours minus the common space.
LEADS = (
    (True, False, Bar("R² of private factors, z from everything, ours minus common space", ">", 0.0)),
    (False, False, Bar("R² of private factors, z from their modality alone, ours minus common space", ">", 0.0)),
    (True, True, Bar("R² of shared factors, z from everything, ours minus common space", ">=", -0.02)),
    (False, True, Bar("R² of shared factors, z from one modality alone, ours minus common space", ">=", -0.02)),
)
KEPT = Bar("R² of private factors, z from everything, ours as a share of counts", ">=", 0.9)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser("factors", __doc__, work="factors")
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="PATH=VALUE", help="of our training")
    args = parser.parse_args(words)
    args.designs = args.designs or (["cite"] if args.quick else list(DESIGNS))
    args.set = [*(QUICK_SETTINGS if args.quick else ()), *args.set]
    return args


def design_of(name: str, quick: bool) -> Design:
    return replace(DESIGNS[name], cells=QUICK_CELLS) if quick else DESIGNS[name]


def runs_of(args: argparse.Namespace) -> list[Run]:
    here, sources = common.digest(Path(__file__).parent), mosaic.sources()
    code = {"ours": (sources, *args.set), "common": (budget(args.set),), "counts": ()}
    return [
        Run(method, name, 0, seed, common.digest(here, str(design_of(name, args.quick)), *code[method]))
        for seed in args.seeds
        for name in args.designs
        for method in METHODS
    ]


def budget(settings: Sequence[str]) -> str:
    """What the common space takes over of our settings: all but the objective."""
    config = load(ROOT / "configs/atlas.json", list(settings))
    return config.model_dump_json(include={"seed", "model", "data", "train"})


def do(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    """One method on one simulation: R² of every factor."""
    simulation = simulate(design_of(run.data_set, args.quick), run.seed)
    if run.method == "ours":
        name = f"{run.data_set}-{run.digest[:12]}"
        z, fit_s = methods.by_ours(simulation, name, folder, args.set, args.threads, args.work)
    elif run.method == "common":
        z, fit_s = methods.by_common_space(simulation, args.set)
    else:
        z, fit_s = methods.by_counts(simulation)
    return {"r2": scored(simulation, z), "fit_s": fit_s}


def scored(simulation: Simulation, z: methods.Embedded) -> dict[str, dict[str, list[float]]]:
    """R² by source of z, then by whose factors they are; nothing tells a modality the private factors of another."""
    parts = parts_of(simulation.design)
    return {
        source: {
            whose: r2(train, factors[parts["paired"]], test, factors[parts["test"]]).tolist()
            for whose, factors in simulation.factors.items()
            if source == JOINT or whose in ("shared", source)
        }
        for source, (train, test) in z.items()
    }


def told(record: Result) -> str:
    means = {kind: mean([record], joint=True, shared=kind == "shared") for kind in ("shared", "private")}
    return ", ".join(f"{kind} {value:.3f}" for kind, value in means.items())


def mean(records: Sequence[Result], joint: bool, shared: bool) -> float:
    """R² over modalities, factors and seeds."""
    return statistics.fmean(
        value
        for record in records
        for source, by_owner in record["r2"].items()
        for whose, values in by_owner.items()
        if (source == JOINT, whose == "shared") == (joint, shared)
        for value in values
    )


def table(records: Sequence[Result]) -> str:
    """One row for each design, source of z and owner of factors; one column for each method."""
    rows = [["design", "z from", "factors", *METHODS.values()]]
    for name in dict.fromkeys(r["data_set"] for r in records):
        mine = {m: [r for r in records if (r["method"], r["data_set"]) == (m, name)] for m in METHODS}
        any_r2 = next(r for rs in mine.values() for r in rs)["r2"]
        for source, whose in ((s, w) for s, by_owner in any_r2.items() for w in by_owner):
            values = [[v for r in rs for v in r["r2"][source][whose]] for rs in mine.values()]
            cells = [f"{statistics.fmean(v):.3f}" if v else "" for v in values]
            owner = "shared" if whose == "shared" else f"private of {whose}"
            rows.append([name, "everything" if source == JOINT else f"{source} alone", owner, *cells])
    return common.aligned(rows)


def bars_of(records: Sequence[Result], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Design by design; open where not every method was run with every seed, and on a quick look."""
    for name in args.designs:
        of = {m: [r for r in records if (r["method"], r["data_set"]) == (m, name)] for m in METHODS}
        complete = not args.quick and all(len(rs) == len(args.seeds) for rs in of.values())
        for joint, shared, bar in LEADS:
            lead = mean(of["ours"], joint, shared) - mean(of["common"], joint, shared) if complete else None
            yield replace(bar, name=f"{name}: {bar.name}").judged(lead)
        share = mean(of["ours"], True, False) / mean(of["counts"], True, False) if complete else None
        yield replace(KEPT, name=f"{name}: {KEPT.name}").judged(share)


def main() -> None:
    args = arguments()
    common.carry_out(
        args,
        runs_of(args),
        Steps(lambda run, folder: do(run, folder, args)),
        told,
        table,
        FOOTNOTES,
        lambda records: bars_of(records, args),
        settings=args.set,
    )


if __name__ == "__main__":
    run_main(main)
