"""Data sets cut into mosaics, and clue_dist run on them by its own command lines: convert, train, embed, score."""

from __future__ import annotations

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
from tests.benchmarks import common
from tests.benchmarks.common import BenchmarkError, call, digest, once
from tests.benchmarks.split import cut
from tests.distributed.command import ROOT, launched

SETS: dict[str, tuple[str, str]] = {
    "cbmc_cite": ("rna", "adt"),
    "snare_adbrain_8lib": ("rna", "atac"),
    "bmmc_cite_starter": ("rna", "adt"),
    "bmmc_multiome_starter": ("rna", "atac"),
    "hao_mosaic": ("rna", "adt"),
}
BATCHED = tuple(
    name for name in SETS if name != "cbmc_cite"
)  # their cells are of two batches or more
RECIPE = "configs/atlas.json"
KEPT = ("config.json", "metrics.jsonl")  # of a run's folder; its checkpoints would fill the disk


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """What a benchmark on mosaics is told; all keep their runs, splits and stores in one place."""
    out = common.parser(name, doc, work="matching")
    data = f"{ROOT.parent}/shared/data"
    out.add_argument("--data", type=common.resolved, default=data, help="folder of the .h5mu files")
    return out


@dataclass(frozen=True)
class Split:
    """One fold of one data set: `train.h5mu` and `test.h5mu` in `folder`."""

    folder: Path
    mods: tuple[str, str]

    @property
    def train(self) -> Path:
        return self.folder / "train.h5mu"

    @property
    def test(self) -> Path:
        return self.folder / "test.h5mu"


def source_of(name: str, data: Path) -> Path:
    """The file of a data set.

    Raises:
        DataError: it is not there.
    """
    path = data / f"{name}.h5mu"
    if not path.is_file():
        have = ", ".join(sorted(p.stem for p in data.glob("*.h5mu"))) or "no .h5mu file"
        raise DataError(
            "the data set is not there", where=path, got=have, fix="name its folder with --data"
        )
    return path


def data_digest(name: str, data: Path) -> str:
    """Of the cells of all folds: the file, and the rule that cuts it."""
    return digest(source_of(name, data), Path(__file__).with_name("split.py"), *SETS[name])


def split_of(name: str, fold: int, data: Path, work: Path) -> Split:
    """A fold of a data set, cut if it has not been."""

    def make(folder: Path) -> None:
        with quiet():
            train, test = cut(md.read(source_of(name, data)), SETS[name], fold)
            train.write(folder / "train.h5mu")
            test.write(folder / "test.h5mu")

    folder = work / "splits" / f"{name}-{data_digest(name, data)[:12]}" / f"fold{fold}"
    return Split(once(folder, make), SETS[name])


def sources() -> str:
    """Digest of all that our embeddings follow from, data, recipe and settings on the command line aside."""
    parts = ("clue_dist", "data_prep", "launch", "configs", "constraints.txt")
    return digest(*(ROOT / part for part in parts), Path(__file__))


JOINT = "joint"  # z from every modality that a cell has; the others are called as their modality
Embedded = dict[str, np.ndarray]  # by source: (cells, dimensions)


def ours(
    split: Split,
    folder: Path,
    seed: int,
    overrides: Sequence[str],
    threads: int,
    work: Path,
    recipe: str = RECIPE,
) -> float:
    """Train a recipe on a split and embed its cells; the seconds of the training command.

    Leaves `z.npz`, the settings and the metrics in `folder`; the rest is as for `embedded`. In z.npz: u1, u2, the test
    cells' z of each modality alone, (N, K x d), rows as in test.h5mu; train_SOURCE and test_SOURCE, `Embedded` of the
    paired cells of each part, rows as in its first modality.
    """
    tables, seconds = embedded(
        split, folder, seed, overrides, threads, work, ("train", "test"), recipe
    )
    arrays = {}
    for part, table in tables.items():
        of_part = z_of(table, pairs_of(split, part))
        arrays |= {f"{part}_{source}": z for source, z in of_part.items()}
    u = {f"u{i}": arrays[f"test_{m}"] for i, m in enumerate(split.mods, 1)}
    np.savez(folder / "z.npz", **arrays, **u)
    return seconds


def pairs_of(split: Split, part: str) -> pd.Index:
    """Barcodes of the paired cells of "train" or "test", as they come in the first modality."""
    with quiet():
        table = md.read(split.folder / f"{part}.h5mu")
    first, second = (table[m].obs_names for m in split.mods)
    return first[first.isin(second)]


def kept(npz: Path, part: str, sources: Sequence[str]) -> Embedded:
    """What `ours` has left of "train" or "test"."""
    arrays = np.load(npz)
    return {source: arrays[f"{part}_{source}"] for source in sources}


def embedded(
    split: Split,
    folder: Path,
    seed: int,
    overrides: Sequence[str],
    threads: int,
    work: Path,
    parts: Sequence[str],
    recipe: str = RECIPE,
) -> tuple[dict[str, md.MuData], float]:
    """Train a recipe on a split: its `parts` ("train", "test") with their z, joint and from each modality
    alone, and the seconds of the training command. Leaves the settings and the metrics in `folder`.

    overrides: of settings, as for `--set`.

    Raises:
        BenchmarkError: a command failed, or the sources changed meanwhile.
    """
    before = sources()
    log, run = folder / "log.txt", folder / "run"
    stores = stores_of(split, before, threads, work)
    settings = [f"store={stores / 'train.zarr'}", f"run={run}", f"seed={seed}", *overrides]
    train = launched(1, "launch/train.py", "--config", recipe, "--set", *settings)
    seconds = call(train, log, threads)
    tables = {
        part: _embedded(run, stores / f"{part}.zarr", folder / "z.h5mu", log, threads)
        for part in parts
    }
    if sources() != before:
        raise BenchmarkError(
            "the sources changed during the run, so nobody knows whose result it is",
            fix="run again",
        )
    for name in KEPT:
        shutil.copy(run / name, folder)
    shutil.rmtree(run)
    return tables, seconds


def _embedded(run: Path, store: Path, out: Path, log: Path, threads: int) -> md.MuData:
    command = [
        sys.executable,
        "launch/embed.py",
        "--run",
        run,
        "--store",
        store,
        "--out",
        out,
        "--per-modality",
    ]
    call(command, log, threads)
    with quiet():
        table = md.read(out)
    out.unlink()
    return table


def z_of(table: md.MuData, cells: Sequence[str]) -> Embedded:
    """z of cells that carry every modality, in the order of their barcodes: joint, and from each alone."""
    tables = {JOINT: table} | dict(table.mod)
    return {source: np.asarray(t[cells].obsm["X_clue"]) for source, t in tables.items()}


def stores_of(split: Split, code: str, threads: int, work: Path) -> Path:
    """`train.zarr` and `test.zarr` of a split, converted if they have not been by these sources."""

    def make(folder: Path) -> None:
        log, workers = folder / "log.txt", ("--workers", str(threads))
        train, test = folder / "train.zarr", folder / "test.zarr"
        convert = [sys.executable, "-m", "data_prep", "convert"]
        call([*convert, split.train, "--out", train, *workers], log, threads)
        call(
            [*convert, split.test, "--out", test, "--features-from", train, *workers], log, threads
        )

    set_name, fold = split.folder.parts[-2:]
    return once(work / "stores" / f"{set_name}-{fold}-{code[:12]}", make)


@contextmanager
def quiet() -> Iterator[None]:
    """Without mudata's warnings of names that a gene and its protein share, and of defaults to come."""
    with warnings.catch_warnings(), md.set_options(pull_on_update=False):
        warnings.simplefilter("ignore")
        yield
