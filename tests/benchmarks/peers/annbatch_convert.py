"""annbatch: an .h5ad -> its own shuffled Zarr collection, with its default settings."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import zarr
from annbatch import DatasetCollection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path, help="COLLECTION.zarr")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    pipeline = {
        "codec_pipeline.path": "zarrs.ZarrsCodecPipeline",
        "threading.max_workers": args.threads,
    }
    with zarr.config.set(pipeline):
        DatasetCollection(args.out).add_adatas(
            [args.file], shuffle=True, rng=np.random.default_rng(0)
        )


if __name__ == "__main__":
    main()
