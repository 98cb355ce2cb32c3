"""How many cells the authors' CLUE (scglue's SCCLUEModel) trains on and encodes in a CPU second.

It reads 100 components of each cell, which are drawn here: its speed does not hang on their values.
What it takes to make them from counts, by components that are known, is timed as well.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import measure
import mudata as md
import numpy as np
import peer
import reference
import scglue

EPOCHS = 3  # timed, beyond the first
CALLS = 3  # of what encodes
FITTED = 512  # cells that components are fitted to


def time_call(work: Callable[[], object]) -> float:
    """CPU seconds of a call, the median of some."""
    work()
    seconds = []
    for _ in range(CALLS):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def main() -> None:
    """Print cells per CPU second of training, validation left out, and of encoding."""
    warnings.filterwarnings("ignore")
    scglue.config.CPU_ONLY = True
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mosaic", type=Path)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--encoded", type=int, required=True, help="cells at a time")
    args = parser.parse_args()
    md.set_options(pull_on_update=False)
    rng = np.random.default_rng(0)
    mosaic = md.read(args.mosaic)
    cells = {
        name: reference.register_cells(
            table,
            rng.normal(size=(table.n_obs, 100)).astype(np.float32),
            reference.choose_decoded(name, table),
        )
        for name, table in mosaic.mod.items()
    }
    settings = reference.MULTIOME if "atac" in cells else reference.CITE
    shape = reference.SHAPE | settings["shape"]
    cpu_seconds = {}
    for epochs in (1, 1 + EPOCHS):
        model = scglue.models.SCCLUEModel(cells, shared_batches=True, random_seed=0, **shape)
        model.compile(**reference.WEIGHTS, **settings["weights"])
        began = time.process_time()
        folder = args.mosaic.parent / f"scglue-{args.batch}-{epochs}"
        length = {"max_epochs": epochs, "patience": 10**6, "reduce_lr_patience": 10**5}
        model.fit(cells, batch_size=args.batch, val_split=0.01, directory=str(folder), **length)
        cpu_seconds[epochs] = time.process_time() - began
    n_cells = len(set().union(*(table.obs_names for table in cells.values())))
    epoch_seconds = (cpu_seconds[1 + EPOCHS] - cpu_seconds[1]) / EPOCHS
    result = {"train": 0.99 * n_cells / epoch_seconds}
    for number, (name, table) in enumerate(cells.items()):
        raw, fitted = mosaic[name], mosaic[name][:FITTED]
        encoding = time_call(lambda n=name, t=table: model.encode_data(n, t, args.encoded))
        # All cells beside one of them, so that fitting does not count.
        every, one = (
            time_call(lambda n=name, f=fitted, c=these: peer.reduce_cells(n, f, c))
            for these in (raw, raw[:1])
        )
        result[f"encode_{number}"] = table.n_obs / (every - one + encoding)
        result[f"ready_{number}"] = table.n_obs / encoding
    result["peak_mib"] = measure.read_peak()
    measure.print_result(result)


if __name__ == "__main__":
    main()
