"""How fast does the loader serve shuffled batches, next to annbatch and to what the machine can do at all?

.venv/bin/python -m tests.benchmarks.streaming --json OUT.json [--quick]

Both read stores made of the same .h5ad, at the same batch size, window and threads, in turns, each measurement in a
process of its own. annbatch runs with the fastest of several settings of its chunks, tried first. Measurements that
have been made are kept: typed again, it goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from clue_dist.process import run_main
from tests.benchmarks import cells, common, repeats
from tests.benchmarks.common import Bar, BenchmarkError, Result, Run
from tests.benchmarks.conversion import stores
from tests.benchmarks.repeats import Repeat, median, ratio, shown
from tests.s3 import serve

BATCH = 512
STEP_MS = 2.0
CHUNKS = (
    64,
    128,
    256,
    512,
    1024,
)  # cells annbatch reads in a row, with as many chunks as fill the window ...
DEFAULT = (512, 32)  # ... and what it does if not told otherwise, in a window of its own
QUICK_SETTING = (512, 4)

# What is measured in turns with annbatch, and what of ours alone.
PAIRED = {"rna": ("csr", "dense", "step"), "atac": ("csr", "step")}
ALONE = {"rna": ("windows", "s3"), "atac": ("large", "windows", "s3")}
LIMITS = ("decode", "memcpy", "memset")
COPIES = 8  # of the cells that are in a store too large for the loader to keep decoded
INDEX_BYTES, VALUE_BYTES = (
    4,
    4,
)  # of a non-zero in a CSR batch; batches of binary counts share their values

BARS: dict[tuple[str, str], Bar] = {
    ("rna", "csr"): Bar("rna: cells/s of CSR batches, times annbatch's", ">=", 2.5),
    ("rna", "dense"): Bar("rna: cells/s of dense batches, times annbatch's", ">=", 4.0),
    ("atac", "csr"): Bar("atac: cells/s of CSR batches, times annbatch's", ">=", 3.5),
    ("atac", "large"): Bar(
        "atac: cells/s of CSR batches of a store too large to keep, times annbatch's", ">=", 3.5
    ),
    ("rna", "windows"): Bar(
        "rna: cells/s of decoded windows, times annbatch's CSR batches", ">=", 5.0
    ),
    ("rna", "disk"): Bar("rna: bytes per non-zero on disk, times annbatch's", "<=", 0.6),
    ("atac", "disk"): Bar("atac: bytes per non-zero on disk, times annbatch's", "<=", 0.6),
    ("rna", "waiting"): Bar("rna: share of time waiting with a 2 ms step", "<", 0.03),
    ("atac", "waiting"): Bar("atac: share of time waiting with a 2 ms step", "<", 0.03),
    ("rna", "p99_ms"): Bar("rna: 99th percentile of next() with a 2 ms step, ms", "<", 2.0),
    ("atac", "p99_ms"): Bar("atac: 99th percentile of next() with a 2 ms step, ms", "<", 2.0),
}

FOOTNOTES = """\
medians over repeats in turns; ratio: our cells/s to annbatch's; batches of 512
csr, dense: as fast as batches come; step: CSR batches with a sleep of 2 ms after each, as an accelerator would work
annbatch: the fastest setting for CSR batches, in all measures
large: CSR batches of ours out of eight times as many cells, next to annbatch's of the set as it is
windows: blocks of ours decompressed, in random order, still coded; nothing in clue_dist expands them on a GPU yet
s3: our CSR batches from an S3 server on loopback, moto's, which is Python on the same cores; ratio: to those of the
folder
waiting: share of the time inside next(); anon MiB: peak anonymous memory; annbatch's dense: its CSR batch, .toarray()
decode: our blocks decompressed from memory, nothing else; memcpy: bytes copied, each read and written once; memset:
bytes set to zero, as all of a dense batch must be before it is filled
blocks kept decoded: those ours need not decompress again; annbatch keeps none"""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = repeats.parser("streaming", __doc__)
    parser.add_argument(
        "--window", type=int, help="cells mixed at a time (default: 8192, of a quick look 2048)"
    )
    parser.add_argument(
        "--seconds", type=float, help="of each measurement (default: 10, of a quick look 0.5)"
    )
    args = repeats.parsed(parser, words)
    args.window = args.window or (2048 if args.quick else 8192)
    args.seconds = args.seconds or (0.5 if args.quick else 10.0)
    return args


def settings_of(args: argparse.Namespace) -> list[tuple[int, int]]:
    """annbatch's settings to try: chunk and number of chunks. All mix a window like ours, or more."""
    if args.quick:
        return [QUICK_SETTING]
    return sorted({(chunk, args.window // chunk) for chunk in CHUNKS} | {DEFAULT})


def runs_of(args: argparse.Namespace) -> list[Run]:
    """Of each data set: the stores, annbatch's settings, then all measures, ours and annbatch's in turns."""
    runs: list[Run] = []
    for name in args.sets:
        methods = ["ours-disk", "annbatch-disk", *map(tuning, settings_of(args))]
        runs += [Repeat(method, name, 0, 0, digest_of(name, args)) for method in methods]
        taking_turns = [
            f"{method}-{measure}" for measure in PAIRED[name] for method in stores.METHODS
        ]
        taking_turns += [f"ours-{measure}" for measure in (*ALONE[name], *LIMITS)]
        runs += [
            Repeat(method, name, number, 0, digest_of(name, args))
            for number in range(args.repeats)
            for method in taking_turns
        ]
    return runs


def tuning(setting: tuple[int, int]) -> str:
    return f"annbatch-try-{setting[0]}x{setting[1]}"


def digest_of(name: str, args: argparse.Namespace) -> str:
    """Of the cells, all sources and settings: of both methods, as their ratio is what counts."""
    how = f"{args.window} {args.seconds} {args.threads}"
    shape = cells.shape_of(name, args.quick)
    return common.digest(cells.digest_of(shape), stores.sources(), Path(__file__).parent, how)


def steps_of(args: argparse.Namespace) -> common.Steps:
    return common.Steps(lambda run, folder: do(run, folder, args))


def do(run: Run, folder: Path, args: argparse.Namespace) -> Result:
    """One measurement; a store is made before the first that reads it."""
    unchanged(run, args)
    method, _, measure = run.method.partition("-")
    shape = cells.shape_of(run.data_set, args.quick)
    store = stores.store_of(
        method, shape, args.threads, args.work, COPIES if measure == "large" else 1
    )
    if measure == "disk":
        return {
            "bytes_per_nonzero": stores.bytes_in(store)
            / cells.nonzeros_in(cells.file_of(shape, args.work))
        }
    chosen: dict[str, Any] = {}
    log = folder / "log.txt"
    if method == "ours":
        probe = [sys.executable, "-m", "tests.benchmarks.streaming.probe"]
        with on_s3(store) if measure == "s3" else nullcontext(store) as place:
            common.call(
                [*probe, place, *ours(measure, args), *limits(measure, args)], log, args.threads
            )
    else:
        setting = setting_of(run, measure, args)
        chosen = {"chunk": setting[0], "preload": setting[1]}
        python = stores.annbatch(args.work)
        command = [python, stores.PEERS / "annbatch_stream.py", store, *theirs(measure, setting)]
        common.call([*command, *limits(measure, args)], log, args.threads)
    unchanged(run, args)
    return common.last_json(log) | chosen


@contextmanager
def on_s3(store: Path) -> Iterator[str]:
    """The URL of a copy of the store on a server that the commands of this process find."""
    with serve() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server.upload(store, "store")


def unchanged(run: Run, args: argparse.Namespace) -> None:
    """A result is kept under the digest its run was planned with, so that must be true until it ends."""
    if digest_of(run.data_set, args) != run.digest:
        raise BenchmarkError(
            "sources changed while the benchmark ran", where=run.name, fix="start it again"
        )


def ours(measure: str, args: argparse.Namespace) -> list[str]:
    return ["csr" if measure in ("step", "large", "s3") else measure, "--window", str(args.window)]


def theirs(measure: str, setting: tuple[int, int]) -> list[str]:
    words = ["--chunk", str(setting[0]), "--preload", str(setting[1])]
    return [*words, "--dense"] if measure == "dense" else words


def limits(measure: str, args: argparse.Namespace) -> list[str]:
    options = {
        "batch": BATCH,
        "threads": args.threads,
        "seconds": args.seconds,
        "warm": args.seconds / 3,
    }
    options["step-ms"] = STEP_MS if measure == "step" else 0
    return [f"--{name}={value}" for name, value in options.items()]


def setting_of(run: Run, measure: str, args: argparse.Namespace) -> tuple[int, int]:
    """The setting a run of annbatch tries, or the fastest of all tried on the data set."""
    if measure.startswith("try-"):
        chunk, _, preload = measure.removeprefix("try-").partition("x")
        return int(chunk), int(preload)

    def speed(setting: tuple[int, int]) -> float:
        tried = Repeat(tuning(setting), run.data_set, 0, 0, run.digest)
        return float(common.done(tried, args.work, steps_of(args))["cells_per_s"])

    return max(settings_of(args), key=speed)


def told(record: Result) -> str:
    if "bytes_per_nonzero" in record:
        return f"{record['bytes_per_nonzero']:.2f} bytes per non-zero"
    if "bytes_per_s" in record:
        return f"{record['bytes_per_s'] / 1e9:.1f} GB/s"
    return f"{record['cells_per_s']:,.0f} cells/s"


# --- what is told of all ---


def table(records: Sequence[Result]) -> str:
    names = [name for name in cells.SHAPES if any(r["data_set"] == name for r in records)]
    rows = [
        [
            "set",
            "measure",
            "method",
            "cells/s",
            "M non-zeros/s",
            "waiting %",
            "p99 ms",
            "anon MiB",
            "ratio",
        ]
    ]
    for name in names:
        for measure in (*PAIRED[name], *ALONE[name]):
            for method in stores.METHODS:
                rows += _row(records, name, measure, method)
    notes = [line for name in names for line in (*_disk(records, name), *_limits(records, name))]
    return "\n".join([common.aligned(rows), "", *notes])


COLUMNS = {
    "cells_per_s": (1, 0),
    "nonzeros_per_s": (1e-6, 0),
    "waiting": (100, 1),
    "p99_ms": (1, 2),
    "anon_mib": (1, 0),
}


def _row(records: Sequence[Result], name: str, measure: str, method: str) -> list[list[str]]:
    values = [median(records, f"{method}-{measure}", name, what) for what in COLUMNS]
    if values[0] is None:
        return []
    scaled = [
        None if v is None else v * by for v, (by, _) in zip(values, COLUMNS.values(), strict=True)
    ]
    texts = [shown(v, digits) for v, (_, digits) in zip(scaled, COLUMNS.values(), strict=True)]
    if measure != "step":
        texts[list(COLUMNS).index("waiting")] = ""  # whoever does nothing else waits all the time
    if measure == "dense":
        texts[list(COLUMNS).index("nonzeros_per_s")] = ""  # ours are not counted
    faster = shown(times(records, name, measure), 2) if method == "ours" else ""
    return [[name, measure, method, *texts, faster]]


def times(records: Sequence[Result], name: str, measure: str, least: int = 1) -> float | None:
    """Our cells/s to annbatch's; of windows and of a large store to its CSR batches; from S3 to our own."""
    peer = {"windows": "annbatch-csr", "large": "annbatch-csr", "s3": "ours-csr"}.get(
        measure, f"annbatch-{measure}"
    )
    mine = median(records, f"ours-{measure}", name, "cells_per_s", least)
    return ratio(mine, median(records, peer, name, "cells_per_s", least))


def disk(records: Sequence[Result], name: str) -> float | None:
    return ratio(
        *(median(records, f"{method}-disk", name, "bytes_per_nonzero") for method in stores.METHODS)
    )


def _disk(records: Sequence[Result], name: str) -> Iterator[str]:
    sizes = [
        shown(median(records, f"{m}-disk", name, "bytes_per_nonzero"), 2) for m in stores.METHODS
    ]
    yield f"{name}: {sizes[0]} bytes per non-zero, annbatch {sizes[1]}, ratio {shown(disk(records, name), 2)}"
    tried = [r for r in records if r["method"].startswith("annbatch-try") and r["data_set"] == name]
    speeds = [f"{r['chunk']}x{r['preload']} {r['cells_per_s'] / 1e3:.0f}k" for r in tried]
    measured = (r for r in records if (r["method"], r["data_set"]) == ("annbatch-csr", name))
    best = next((f"{r['chunk']}x{r['preload']}" for r in measured), "-")
    yield f"{name}: annbatch's chunk x preload {best} of: {', '.join(speeds)} cells/s"


def _limits(records: Sequence[Result], name: str) -> Iterator[str]:
    """How near the machine's limits we come."""
    which = "large" if "large" in ALONE[name] else "csr"
    csr, decode = (median(records, f"ours-{m}", name, "nonzeros_per_s") for m in (which, "decode"))
    copied = median(records, "ours-memcpy", name, "bytes_per_s")
    written = INDEX_BYTES + (0 if cells.SHAPES[name].binary else VALUE_BYTES)
    for measure in ("csr", "large"):
        if (kept := median(records, f"ours-{measure}", name, "kept")) is not None:
            yield f"{name}: {measure}: our loader keeps up to {kept:.0%} of this store's blocks decoded"
    if csr and decode and copied:
        yield (
            f"{name}: decode alone {decode / 1e6:,.0f} M non-zeros/s, of which {which} reaches {csr / decode:.0%}; "
            f"memcpy {copied / 1e9:.1f} GB/s, of which its batches reach {csr * written / copied:.0%}"
        )
    dense = median(records, "ours-dense", name, "cells_per_s")
    cleared = median(records, "ours-memset", name, "bytes_per_s")
    if dense and cleared:
        row = 4 * cells.SHAPES[name].features  # float32
        yield (
            f"{name}: memset {cleared / 1e9:.1f} GB/s, {cleared / row:,.0f} dense rows/s, of which dense batches reach "
            f"{dense * row / cleared:.0%}"
        )


def bars_of(records: Sequence[Result], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Judged where every repeat has been measured, and never on a quick look."""
    return [
        bar.judged(None if args.quick else _value(records, *key, args.repeats))
        for key, bar in BARS.items()
    ]


def _value(records: Sequence[Result], name: str, what: str, least: int) -> float | None:
    if what in ("waiting", "p99_ms"):
        return median(records, "ours-step", name, what, least)
    return disk(records, name) if what == "disk" else times(records, name, what, least)


def main() -> None:
    args = arguments()
    repeats.settle(args)
    common.carry_out(
        args,
        runs_of(args),
        steps_of(args),
        told,
        table,
        FOOTNOTES,
        lambda records: bars_of(records, args),
        packages=stores.PACKAGES,
        peers={"annbatch": common.pins(stores.PEERS / "annbatch.txt")},
    )


if __name__ == "__main__":
    run_main(main)
