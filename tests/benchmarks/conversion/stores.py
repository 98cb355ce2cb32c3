"""The two stores of one .h5ad: ours, and annbatch's shuffled collection."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks import cells, common
from tests.benchmarks.cells import Shape
from tests.distributed.command import ROOT

PEERS = Path(__file__).parents[1] / "peers"
METHODS = ("ours", "annbatch")
PYTHON = "3.12"  # annbatch needs it
PACKAGES = (
    "tensorstore",
    "zarr",
    "numcodecs",
    "numba",
    "dask",
    "anndata",
)  # that decide how fast ours are
OURS = ("clue_dist/store", "clue_dist/data", "data_prep", "constraints.txt")


def path_in(folder: Path, method: str) -> Path:
    return folder / f"{method}.zarr"


def command(
    method: str, h5ad: Path, folder: Path, name: str, threads: int, work: Path, copies: int = 1
) -> Sequence[str | Path]:
    """Converts `h5ad`, whose modality is `name`, into `folder`; ours also several times over, as so many data sets."""
    out = path_in(folder, method)
    if method == "ours":
        keys = ("--batch-key", "plate", "--label-key", "cell_type", "--workers", str(threads))
        given = [
            f"lane{i}:{name}={h5ad}" if copies > 1 else f"{name}={h5ad}" for i in range(copies)
        ]
        return [sys.executable, "-m", "data_prep", "convert", *given, "--out", out, *keys]
    return [annbatch(work), PEERS / "annbatch_convert.py", h5ad, out, "--threads", str(threads)]


def annbatch(work: Path) -> Path:
    """The Python that has annbatch."""
    return common.python_with(PEERS / "annbatch.txt", work, PYTHON)


def store_of(method: str, shape: Shape, threads: int, work: Path, copies: int = 1) -> Path:
    """The store of a shape's cells, made once; copies: see `command`."""

    def make(folder: Path) -> None:
        h5ad = cells.file_of(shape, work)
        log = folder.with_name(f"{folder.name}.log")
        common.call(command(method, h5ad, folder, shape.name, threads, work, copies), log, threads)

    name = f"{method}-{shape.name}-{shape.cells * copies}-{common.digest(cells.digest_of(shape), code_of(method))[:8]}"
    return path_in(common.once(work / "stores" / name, make), method)


def code_of(method: str) -> str:
    """Digest of what a method's stores follow from, cells aside."""
    if method == "ours":
        return common.digest(
            *(ROOT / part for part in ("clue_dist/store", "data_prep", "constraints.txt"))
        )
    return common.digest(PEERS / "annbatch_convert.py", PEERS / "annbatch.txt")


def sources() -> str:
    """Digest of all code that either method's speed follows from.

    One for both, so that a change of ours has both measured anew: ratios are of runs side by side.
    """
    peers = sorted([*PEERS.glob("annbatch*"), PEERS / "measure.py"])
    return common.digest(*(ROOT / part for part in OURS), *peers)


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
