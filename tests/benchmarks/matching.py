"""Who matches the modalities of unseen cells best: clue_dist, other models, or a baseline?

.venv/bin/python -m tests.benchmarks.matching --json OUT.json [--quick]

Every method embeds the same unseen paired cells from one modality at a time.
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import ClassVar

import mudata as md
import numpy as np

from clue_dist.metrics.matching import METRICS
from tests.benchmarks import mosaic, scores
from tests.benchmarks.commands import install_python, read_pins, run_command
from tests.benchmarks.kept import compute_digest, make_once
from tests.benchmarks.mosaic import MANY, SETS, Split, Training, find_data_set, ignore_warnings
from tests.benchmarks.report import Bar, Result, select_values
from tests.benchmarks.runner import Benchmark, Case, Option, Run
from tests.benchmarks.split import FOLDS, cut_by_batch, cut_mosaic, draw_batches
from tests.distributed.command import ROOT

DATA = ROOT.parent / "shared/data"
PEERS = Path(__file__).with_name("peers")
METHODS = ["ours", "linear", "contrastive", "reference"]
METHODS += ["multivi", "totalvi", "multigrate", "midas"]
# Modalities of the data sets that a method knows; the others know all.
KNOWN = {"multivi": ("rna", "atac"), "totalvi": ("rna", "adt")}
SCRIPTS = {"multigrate": "multigrate_peer"}  # a script named as its package would hide it
# Environments that methods share, and the Python of those that need another than this one.
ENVIRONMENTS = dict.fromkeys(("multivi", "totalvi", "multigrate"), "scvi")
PYTHONS = {"scvi": "3.12"}
BASELINES = ("linear", "contrastive")  # which our transfer of labels must lead
# Methods without random numbers, of which one seed stands for all.
SEEDLESS = ("counts", "wnn", "linear", "mean", "knn", "ridge")
QUICK_SETTINGS = ("train.epochs=10", "log.tensorboard=false", "log.wandb=disabled")
QUICK_EPOCHS = {"contrastive": 8} | dict.fromkeys(METHODS[3:], 2)


class Matching(Benchmark):
    """Methods on mosaics, scored by how they match the modalities of unseen cells."""

    name = work = "matching"
    counted = "fold"
    score_sources = scores.SOURCES
    cells: ClassVar = {  # the options of all benchmarks on mosaics
        "data": Option(DATA, DATA, "folder of the .h5mu files"),
        "sets": Option([*mosaic.LARGE, mosaic.SMALL], [mosaic.SMALL], choices=mosaic.PAIRED),
        "folds": Option(list(FOLDS), [0], choices=FOLDS),
    }
    options: ClassVar = {
        **cells,
        "sets": cells["sets"]._replace(choices=SETS),
        "seeds": Option([0], [0]),
        "methods": Option(
            METHODS, METHODS[:3], "multivi is for RNA+ATAC alone, totalvi for RNA+proteins", METHODS
        ),
    }
    columns: ClassVar = [
        *(f"scores.global.{metric}" for metric in METRICS),
        *("within_type.foscttm", "without_depth.foscttm", "mixing", "islands", "transfer"),
        *("joint", "alone", "ilisi.joint"),
        *("worst.foscttm", "worst.mixing", "worst.transfer", "fit_s", "threads"),
    ]

    def list_cases(self) -> list[Case]:
        args = self.args
        cases = product(args.methods, args.seeds, args.folds, args.sets)
        return [
            (method, name, fold, seed)
            for method, seed, fold, name in cases
            if applies_to(method, name) and (method not in SEEDLESS or seed == 0)
        ]

    def list_inputs(self, method: str, data_set: str) -> Iterable[Path | str]:
        return self.digest_data(data_set), self.digest_method(method)

    def digest_data(self, name: str) -> str:
        """Digest the cells of all folds: the file, and the rule that cuts it."""
        rule = Path(__file__).with_name("split.py")
        return compute_digest(find_data_set(name, self.args.data), rule, *SETS[name])

    def cut_split(self, run: Run) -> Split:
        """The fold of a run, cut unless it is kept."""
        name, data = run.data_set, self.args.data

        def make(folder: Path) -> None:
            with ignore_warnings():
                whole = md.read(find_data_set(name, data))
                whole = draw_batches(whole) if name == mosaic.WITH_DRAWN_BATCHES else whole
                cut = cut_by_batch if name in mosaic.BY_BATCH else cut_mosaic
                parts = cut(whole, SETS[name], run.fold)
                for part, cells in zip(("train", "test"), parts, strict=True):
                    cells.write(folder / f"{part}.h5mu")

        folder = self.args.work / "splits" / f"{name}-{self.digest_data(name)[:12]}"
        return Split(make_once(folder / f"fold{run.fold}", make), SETS[name])

    def digest_method(self, method: str) -> str:
        """Digest the sources and settings that a method's embeddings follow from."""
        if method == "ours":
            return compute_digest(mosaic.digest_sources(), *self.settings)
        script, pins = find_script(method), find_pins(method)
        shared = [PEERS / "peer.py", *([PEERS / "joint.py"] if gives_joint(method) else [])]
        return compute_digest(*shared, script, pins, *self.list_epochs(method))

    @property
    def settings(self) -> tuple[str, ...]:
        return QUICK_SETTINGS if self.args.quick else ()

    def list_epochs(self, method: str) -> tuple[str, ...]:
        """The words that shorten another method for a quick look."""
        is_shorter = self.args.quick and method in QUICK_EPOCHS
        return ("--epochs", str(QUICK_EPOCHS[method])) if is_shorter else ()

    def measure(self, run: Run, folder: Path) -> Result:
        split, args = self.cut_split(run), self.args
        if run.method == "ours":
            fit_s = Training(split, folder, run.seed, self.settings, args).save_z()
        else:
            fit_s = self.run_peer(run, split, folder)
        return {"fit_s": fit_s, "threads": args.threads}

    def run_peer(self, run: Run, split: Split, folder: Path) -> float:
        """Run another method in an environment of its own; the seconds of its fit, as it says.

        It knows two modalities. Of more it is run on every pair, all kept in one file.
        """
        script, pins, python = find_script(run.method), find_pins(run.method), sys.executable
        # The baselines run here, too, and an installation is not quick.
        if run.method not in BASELINES or not self.args.quick:
            python = install_python(pins, self.args.work, PYTHONS.get(pins.stem))
        npz, pairs, seconds = folder / "z.npz", {}, 0.0
        chosen = list(combinations(split.mods, 2))
        for pair in chosen:
            words = ["--out", npz, "--seed", str(run.seed), *self.list_epochs(run.method)]
            command = [python, script, split.folder, *pair, *words]
            run_command(command, folder / "log.txt", self.args.threads)
            arrays = np.load(npz)
            seconds += float(arrays["fit_s"])
            if len(chosen) > 1:
                pairs["-".join(pair)] = np.stack([arrays["u1"], arrays["u2"]])
        if pairs:
            np.savez(npz, **pairs)
        return seconds

    def score(self, run: Run, folder: Path) -> Result:
        return scores.score_embedding(folder / "z.npz", self.cut_split(run))

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        """Each bar against ours, where every fold has been run with every seed.

        Those of `transfer` are about the lead over the better baseline.
        """
        for key, bar in self.bars.items():
            name, metric = key.split()
            path = f"scores.global.{metric}" if metric in METRICS else metric
            ours = self.average_seeds(records, "ours", name, path)
            if metric == "fit_s":
                slowest = select_values(records, path, method="ours", data_set=name)
                yield bar.judge(max(slowest) if ours else None)
            elif metric == "transfer":
                rivals = {m: self.average_seeds(records, m, name, path) for m in BASELINES}
                yield judge_lead(bar, ours, rivals)
            else:
                yield bar.judge_mean(list(ours.values()))

    def average_seeds(
        self, records: Sequence[Result], method: str, name: str, path: str
    ) -> dict[int, float]:
        """What a method has at a path, by fold; nothing unless each was run with every seed."""
        seeds, values = [0] if method in SEEDLESS else self.args.seeds, defaultdict(list)
        for r in records:
            if (r["method"], r["data_set"]) == (method, name) and r["seed"] in seeds:
                values[r["fold"]] += select_values([r], path)
        whole = all(len(values[fold]) == len(seeds) for fold in FOLDS)
        return {fold: statistics.fmean(values[fold]) for fold in FOLDS} if whole else {}

    def list_extras(self) -> Result:
        others = (m for m in self.args.methods if m != "ours")
        return {"peers": {m: read_pins(find_pins(m)) for m in others}}


def applies_to(method: str, name: str) -> bool:
    """Whether a method knows the modalities of a data set."""
    if method in KNOWN:
        return SETS[name] == KNOWN[method]
    return name not in MANY or method in ("ours", "linear")


def find_script(method: str) -> Path:
    """The script of another method."""
    return PEERS / f"{SCRIPTS.get(method, method)}.py"


def find_pins(method: str) -> Path:
    """The pins of the environment that another method runs in."""
    return PEERS / f"{ENVIRONMENTS.get(method, method)}.txt"


def gives_joint(method: str) -> bool:
    """Whether a method, none of ours, embeds cells by both modalities at once."""
    return method in METHODS[METHODS.index("multivi") :]


def judge_lead(bar: Bar, ours: dict[int, float], rivals: dict[str, dict[int, float]]) -> Result:
    """Judge how far ours leads the best of its rivals, each by fold; open where one lacks."""
    if not all((ours, *rivals.values())):
        return bar.fill_name("the best of the others").judge(None)
    best = max(rivals, key=lambda rival: sum(rivals[rival].values()))
    return bar.fill_name(best).judge_mean([ours[fold] - rivals[best][fold] for fold in ours])


if __name__ == "__main__":
    Matching.main()
