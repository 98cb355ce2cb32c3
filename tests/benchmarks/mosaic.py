"""Data sets cut into mosaics, and clue_dist run on them: convert, train, embed."""

import argparse
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mudata as md
import numpy as np
import pandas as pd

from clue_dist.errors import DataError
from clue_dist.kinds import find_kinds
from tests.benchmarks.commands import run_command
from tests.benchmarks.kept import compute_digest, make_once
from tests.distributed.command import ROOT, launched

PAIRED: dict[str, tuple[str, ...]] = {
    "cbmc_cite": ("rna", "adt"),
    "snare_adbrain_8lib": ("rna", "atac"),
    "bmmc_cite_starter": ("rna", "adt"),
    "bmmc_multiome_starter": ("rna", "atac"),
    "hao_mosaic": ("rna", "adt"),
    "cbmc_batches": ("rna", "adt"),  # cbmc_cite, in batches that are drawn
}
# More than two modalities of every cell: one of them halved, or views of handwritten digits.
MANY: dict[str, tuple[str, ...]] = {
    "cbmc_halves": ("rna_odd", "rna_even", "adt"),
    "snare_halves": ("rna", "atac_odd", "atac_even"),
    "digits": ("fac", "fou", "kar", "mor", "pix", "zer"),
}
# Pairs are of half the batches; of cells of the others both profiles are known, but not as pairs.
BY_BATCH: dict[str, tuple[str, ...]] = {
    "snare_by_batch": ("rna", "atac"),
    "bmmc_by_batch": ("rna", "adt"),
    "hao_by_batch": ("rna", "adt"),
    "multiome_by_batch": ("rna", "atac"),
}
SETS = PAIRED | MANY | BY_BATCH
WITH_DRAWN_BATCHES = "cbmc_batches"
# Of sets that have no file of their name.
FILES = {
    WITH_DRAWN_BATCHES: "cbmc_cite",
    "cbmc_halves": "cbmc_cite",
    "snare_halves": "snare_adbrain_8lib",
    "snare_by_batch": "snare_adbrain_8lib",
    "bmmc_by_batch": "bmmc_cite_starter",
    "hao_by_batch": "hao_mosaic",
    "multiome_by_batch": "bmmc_multiome_starter",
}
LARGE, SMALL = ("cbmc_cite", "snare_adbrain_8lib"), "bmmc_cite_starter"
BATCHED = tuple(name for name in PAIRED if name != "cbmc_cite")  # cells of two batches or more
RECIPE = "configs/atlas.json"
SOURCES = ("clue_dist", "data_prep", "launch", "configs", "constraints.txt")
KEPT = ("config.json", "metrics.jsonl")  # of a run's folder, beside its best weights
MODEL = ("config.json", "model.json")  # beside the best weights: what a model is loaded from
JOINT = "joint"  # z from every modality that a cell has; the others are called as their modality
Embedded = dict[str, np.ndarray]  # by source of z: (cells, dimensions)


@dataclass(frozen=True)
class Split:
    """One fold of one data set."""

    folder: Path  # of train.h5mu and test.h5mu
    mods: tuple[str, ...]

    @property
    def train(self) -> Path:
        return self.folder / "train.h5mu"

    @property
    def test(self) -> Path:
        return self.folder / "test.h5mu"


def find_data_set(name: str, data: Path) -> Path:
    """The file of a data set; a DataError where it is not there."""
    path = data / f"{FILES.get(name, name)}.h5mu"
    if not path.is_file():
        have = ", ".join(sorted(p.stem for p in data.glob("*.h5mu"))) or "no .h5mu file"
        fix = "name its folder with --data"
        raise DataError("the data set is not there", where=path, got=have, fix=fix)
    return path


def digest_sources() -> str:
    """Digest all that our embeddings follow from, but for data, recipe and settings."""
    return compute_digest(*(ROOT / part for part in SOURCES), Path(__file__))


@dataclass(frozen=True)
class Training:
    """One training of clue_dist on a split, with what is embedded by it."""

    split: Split
    folder: Path  # of the run
    seed: int
    settings: Sequence[str]  # as for `--set`
    args: argparse.Namespace  # with work and threads
    recipe: str = RECIPE
    earlier: Split | None = None  # trained on first, and then fine-tuned, all weights, on `split`

    def embed_parts(self, *parts: str) -> tuple[dict[str, md.MuData], float]:
        """Train, and leave settings and metrics in the folder; seconds of the training command.

        First the parts, "train" or "test", with their z, joint and from each modality alone.
        """
        log, run, threads = self.folder / "log.txt", self.folder / "run", self.args.threads
        stores = convert_split(self.split, self.args)
        seconds = self._train_model(stores / "train.zarr", run)
        tables, out = {}, self.folder / "z.h5mu"
        for part in parts:
            words = ["--run", run, "--store", stores / f"{part}.zarr", "--out", out]
            embed = [sys.executable, "launch/embed.py", *words, "--per-modality"]
            run_command(embed, log, threads)
            with ignore_warnings():
                tables[part] = md.read(out)
            out.unlink()
        for name in KEPT:
            shutil.copy(run / name, self.folder)
        keep_model(run)
        return tables, seconds

    def _train_model(self, store: Path, run: Path) -> float:
        """Train into a folder, perhaps from an earlier training; seconds of both commands."""
        log, threads, seconds = self.folder / "log.txt", self.args.threads, 0.0
        words = [f"seed={self.seed}", *self.settings]
        train = ["launch/train.py", "--config", self.recipe]
        if self.earlier is not None:
            before, first = convert_split(self.earlier, self.args), self.folder / "earlier"
            paths = [f"store={before / 'train.zarr'}", f"run={first}"]
            seconds = run_command(launched(1, *train, "--set", *paths, *words), log, threads)
            train = ["launch/fine_tune.py", "--train", "all", "--run", str(first)]
            train += ["--store", str(store), "--out", str(run)]
        else:
            words += [f"store={store}", f"run={run}"]
        seconds += run_command(launched(1, *train, "--set", *words), log, threads)
        if self.earlier is not None:
            shutil.rmtree(first)
        return seconds

    def save_z(self) -> float:
        """Train, and leave z.npz in the folder; seconds of the training command.

        u1, u2, ...: the test cells' z of each modality alone, (N, K x d), rows as in test.h5mu;
        test_SOURCE: `Embedded` of these cells;
        mosaic, pattern: the joint z of all training cells, and what each of them carries.
        """
        tables, seconds = self.embed_parts("train", "test")
        z = select_z(tables["test"], list_tested(self.split))
        arrays = {f"test_{source}": latent for source, latent in z.items()}
        alone = {f"u{i}": arrays[f"test_{m}"] for i, m in enumerate(self.split.mods, 1)}
        mosaic, pattern = tables["train"].obsm["X_clue"], list_patterns(tables["train"])
        np.savez(self.folder / "z.npz", **arrays, **alone, mosaic=mosaic, pattern=pattern)
        return seconds


def keep_model(run: Path) -> None:
    """Remove all of a run's folder but what a trained model is loaded from."""
    newest = sorted(run.glob("best/step-*"))[-1]
    for path in [*run.iterdir(), *run.glob("best/*")]:
        if path.name in MODEL or path in (run / "best", newest):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def list_tested(split: Split) -> pd.Index:
    """Barcodes of the test cells."""
    with ignore_warnings():
        return md.read(split.test)[split.mods[0]].obs_names


def select_z(table: md.MuData, cells: Sequence[str]) -> Embedded:
    """z of cells with every modality, in the order of their barcodes: joint, and of each alone."""
    tables = {JOINT: table} | dict(table.mod)
    return {source: np.asarray(t[cells].obsm["X_clue"]) for source, t in tables.items()}


def list_patterns(table: md.MuData) -> np.ndarray:
    """What each cell carries, such as "rna+adt", (N,)."""
    carried = [np.where(table.obs_names.isin(t.obs_names), m, "") for m, t in table.mod.items()]
    return np.array(["+".join(filter(None, names)) for names in zip(*carried, strict=True)])


def convert_split(split: Split, args: argparse.Namespace) -> Path:
    """The folder of a split's train.zarr and test.zarr, converted unless these sources have."""

    def make(folder: Path) -> None:
        # What no name of ours tells is of real values.
        kinds = [f"{m}=dense" for m in split.mods if not find_kinds(m)]
        features = {
            "train": ["--kind", *kinds] if kinds else [],
            "test": ["--features-from", folder / "train.zarr"],
        }
        for part, chosen in features.items():
            words = [split.folder / f"{part}.h5mu", "--out", folder / f"{part}.zarr", *chosen]
            words += ["--workers", str(args.threads)]
            convert = [sys.executable, "-m", "data_prep", "convert", *words]
            run_command(convert, folder / "log.txt", args.threads)

    name = "-".join([*split.folder.parts[-2:], digest_sources()[:12]])
    return make_once(args.work / "stores" / name, make)


@contextmanager
def ignore_warnings() -> Iterator[None]:
    """Ignore mudata's warnings of names that modalities share, and of defaults to come."""
    with warnings.catch_warnings(), md.set_options(pull_on_update=False):
        warnings.simplefilter("ignore")
        yield
