"""What benchmarks of stores share: the two stores of one .h5ad, ours and annbatch's; memory."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import ClassVar

import psutil

from clue_dist.data.plan import CellPlan
from clue_dist.store.reader import Store
from tests.benchmarks import cells
from tests.benchmarks.cells import SHAPES, Shape
from tests.benchmarks.commands import install_python, read_pins, run_command
from tests.benchmarks.kept import compute_digest, make_once
from tests.benchmarks.peers.measure import read_memory, watch_peak
from tests.benchmarks.report import Result
from tests.benchmarks.runner import Benchmark, Option
from tests.distributed.command import ROOT

PEERS = Path(__file__).with_name("peers")
METHODS = ("ours", "annbatch")
MIB_OF_GB = 1e9 / 2**20
TORCH_PEER = (PEERS / "torch_datasets.py", PEERS / "torch_datasets.txt", None)
# Of each peer its script, the pins of its environment, and the Python it needs if not this one.
SCRIPTS: dict[str, tuple[Path, Path, str | None]] = {
    "annbatch": (PEERS / "annbatch_store.py", PEERS / "annbatch.txt", "3.12"),
    "scdl": TORCH_PEER,
    "scdataset": TORCH_PEER,
    "anndata": TORCH_PEER,
}
MADE_BY = {  # the code that a method's stores follow from; the other peers read the .h5ad
    "ours": [ROOT / part for part in ("clue_dist/store", "data_prep", "constraints.txt")],
    "annbatch": [*SCRIPTS["annbatch"][:2]],
    "scdl": [*SCRIPTS["scdl"][:2]],
}
# All code that either method's speed follows from. One list for both, so that a change of ours has
# both measured anew: ratios are of runs side by side.
SOURCES = [ROOT / "clue_dist/data", *MADE_BY["ours"], *sorted(PEERS.glob("annbatch*"))]
SOURCES += [PEERS / "measure.py", Path(__file__)]


class StoreBenchmark(Benchmark):
    """A benchmark in which methods take turns on stores of the same files."""

    work, counted, limits_cores = "streaming", "repeat", True
    packages = ("tensorstore", "zarr", "numcodecs", "numba", "dask", "anndata")
    options: ClassVar = {
        "sets": Option(list(SHAPES), ["rna"], choices=SHAPES),
        "repeats": Option(3, 1),
    }

    def list_extras(self) -> Result:
        return {"peers": {"annbatch": read_pins(PEERS / "annbatch.txt")}}

    def choose_shape(self, name: str) -> Shape:
        return cells.choose_shape(name, self.args.quick)

    def list_command(
        self, method: str, shape: Shape, folder: Path, copies: int = 1
    ) -> Sequence[str | Path]:
        """Convert a shape's .h5ad into `folder`; ours also several times over, as data sets."""
        h5ad, out = cells.find_file(shape, self.args.work), folder / f"{method}.zarr"
        threads = str(self.args.threads)
        if method == "ours":
            lanes = [f"lane{i}:" for i in range(copies)] if copies > 1 else [""]
            return list_conversion([f"{lane}{shape.name}={h5ad}" for lane in lanes], out, threads)
        return [*self.list_peer(method, out), "--file", h5ad, "--threads", threads]

    def list_peer(self, method: str, place: Path) -> list[str | Path]:
        """The command by which a peer reads or writes `place`, in an environment of its own."""
        script, pins, version = SCRIPTS[method]
        python = install_python(pins, self.args.work, version)
        return [python, script, *([] if method == "annbatch" else [method]), place]

    def find_cells(self, method: str, shape: Shape, copies: int = 1) -> Path:
        """What a method reads the cells of a shape from: its store, or else the .h5ad."""
        if method in MADE_BY:
            return self.convert_once(method, shape, copies)
        return cells.find_file(shape, self.args.work)

    def convert_once(self, method: str, shape: Shape, copies: int = 1) -> Path:
        """The store of a shape's cells, unless it is kept."""

        def make(folder: Path) -> None:
            log, command = folder.with_name(f"{folder.name}.log"), self.list_command
            run_command(command(method, shape, folder, copies), log, self.args.threads)

        code = compute_digest(cells.digest_shape(shape), compute_digest(*MADE_BY[method]))[:8]
        name = f"{method}-{shape.name}-{shape.cells * copies}-{code}"
        return make_once(self.args.work / "stores" / name, make) / f"{method}.zarr"


def list_conversion(inputs: Sequence[str], out: Path, threads: str) -> list[str | Path]:
    keys = ("--batch-key", "plate", "--label-key", "cell_type", "--workers", threads)
    return [sys.executable, "-m", "data_prep", "convert", *inputs, "--out", out, *keys]


def count_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def plan_evenly(store: Store, batch: int, lanes: int, window_blocks: int) -> CellPlan:
    """Batches to which every segment of a store gives the same number of cells."""
    sizes = {name: reader.n_cells for name, reader in store.segments.items()}
    shares = dict.fromkeys(sizes, batch // len(sizes))
    return CellPlan(0, sizes, shares, lanes, window_blocks, store.manifest.block_cells)


def read_children() -> tuple[float, float]:
    """MiB that all that this process started takes: anonymous and shared memory, and in all."""
    anon = rss = 0.0
    for child in psutil.Process().children(recursive=True):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has gone
            alone, shared, every = read_memory(str(child.pid))
            anon, rss = anon + alone + shared, rss + every
    return anon, rss


watch_children = partial(watch_peak, read_children, every_s=0.05)
