"""annbatch: batches out of its shuffled collection, timed. The matrix alone is loaded: reading obs would slow it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import measure
import numpy as np
import scipy.sparse as sp
import zarr
from annbatch import DatasetCollection, Loader


def batches(loader: Loader) -> Iterator[sp.csr_matrix]:
    """Pass after pass."""
    while True:
        for batch in loader:
            yield batch["X"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("collection", type=Path)
    parser.add_argument("--chunk", type=int, required=True, help="cells read in a row")
    parser.add_argument("--preload", type=int, required=True, help="chunks mixed at a time")
    parser.add_argument("--dense", action="store_true", help="batches as dense float32")
    measure.arguments(parser)
    args = parser.parse_args()
    zarr.config.set(
        {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": args.threads}
    )

    loader = Loader(
        chunk_size=args.chunk,
        preload_nchunks=args.preload,
        batch_size=args.batch,
        shuffle=True,
        drop_last=True,
        rng=np.random.default_rng(0),
    )
    collection = DatasetCollection(args.collection, mode="r")
    loader.use_collection(
        collection, load_adata=lambda group: ad.AnnData(X=ad.io.sparse_dataset(group["X"]))
    )
    source = batches(loader)

    def take() -> tuple[int, int]:
        counts = next(source)
        if args.dense:
            counts.toarray()
        return counts.shape[0], counts.nnz

    measure.tell(measure.stream(take, args))


if __name__ == "__main__":
    main()
