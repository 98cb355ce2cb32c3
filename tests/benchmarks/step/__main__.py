"""How many cells does a CPU second train on and encode, next to the authors' CLUE?

.venv/bin/python -m tests.benchmarks.step --json OUT.json [--quick]

Both train in turns on the same mosaic, each measurement in a process of its own.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from tests.benchmarks import mosaic
from tests.benchmarks.commands import install_python, read_last_json, run_command
from tests.benchmarks.kept import compute_digest, make_once
from tests.benchmarks.matching import PEERS
from tests.benchmarks.report import Result, find_median
from tests.benchmarks.runner import Benchmark, Case, Option, Run
from tests.benchmarks.step import cells
from tests.benchmarks.step.cells import QUICK_CELLS, SHAPES, Shape

PEER_CODE = [
    PEERS / name for name in ("peer.py", "reference.py", "reference_step.py", "reference.txt")
]
BATCHES = {"small": (128, 512), "large": (512,)}
ENCODED = 2048  # cells that are encoded at a time, by both: either is faster than with a batch


class Step(Benchmark):
    """Cells per CPU second: ours and the reference's; the reference only knows the small shape."""

    name = work = "step"
    counted = "repeat"
    columns = ("train", "encode_0", "encode_1", "ready_0", "ready_1", "step_ms", "operations")
    columns += ("gb_touched", "peak_mib", "share_products", "share_functions")
    columns += ("gflops", "copied_gb_per_s")
    options: ClassVar = {
        "shapes": Option(list(SHAPES), ["small"], choices=SHAPES),
        "methods": Option(["ours", "reference"], ["ours"], choices=["ours", "reference"]),
        "repeats": Option(3, 1),
        "seconds": Option(8.0, 0.3, "CPU seconds of each measurement"),
    }

    def list_cases(self) -> Iterator[Case]:
        args = self.args
        for repeat in range(args.repeats):
            for name in args.shapes:
                for batch in BATCHES[name]:
                    for method in args.methods:
                        if method == "ours" or name == "small":
                            yield f"{method}-{batch}", name, repeat, 0

    def list_inputs(self, method: str, data_set: str) -> Iterable[Path | str]:
        code = [mosaic.digest_sources(), Path(__file__).with_name("probe.py")]
        code = code if method.startswith("ours") else PEER_CODE
        return (
            *code,
            str(ENCODED),
            Path(cells.__file__),
            repr(self.choose_shape(data_set)),
            str(self.args.seconds),
        )

    def choose_shape(self, name: str) -> Shape:
        shape = SHAPES[name]
        return replace(shape, cells=QUICK_CELLS) if self.args.quick else shape

    def make_store(self, shape: Shape) -> Path:
        """The store of a shape's cells, made once; the cells lie beside it."""

        def make(folder: Path) -> None:
            cells.write_mosaic(shape, folder / "train.h5mu")
            words = ("convert", folder / "train.h5mu", "--out", folder / "train.zarr")
            command = [sys.executable, "-m", "data_prep", *words, "--label-key", "cell_type"]
            run_command(command, folder.with_name(f"{folder.name}.log"), self.args.threads)

        digest = compute_digest(Path(cells.__file__), repr(shape), mosaic.digest_sources())
        return make_once(self.args.work / "stores" / f"{shape.name}-{digest[:8]}", make)

    def measure(self, run: Run, folder: Path) -> Result:
        method, batch = run.method.split("-")
        made = self.make_store(self.choose_shape(run.data_set))
        if method == "ours":
            words = ("--seconds", str(self.args.seconds))
            command = [sys.executable, "-m", "tests.benchmarks.step.probe", made / "train.zarr"]
        else:
            python, words = install_python(PEERS / "reference.txt", self.args.work), ()
            command = [python, PEERS / "reference_step.py", made / "train.h5mu"]
        log = folder / "log.txt"
        sizes = ("--batch", batch, "--encoded", str(ENCODED))
        run_command([*command, *sizes, *words], log, threads=1)
        return read_last_json(log)

    def judge(self, records: Sequence[Result]) -> Iterator[Result]:
        """Ratios of medians over the repeats, at the batch size of the recipe."""
        for key, bar in self.bars.items():
            rates = [
                find_median(
                    records, key, self.args.repeats, method=f"{method}-512", data_set="small"
                )
                for method in ("ours", "reference")
            ]
            yield bar.judge(rates[0] / rates[1])


if __name__ == "__main__":
    Step.main()
