"""annbatch: an .h5ad -> its own shuffled Zarr collection; or batches out of that, timed.

Defaults, but where the benchmark says otherwise. The matrix alone is loaded: obs would slow it.
"""

import argparse
from pathlib import Path

import anndata as ad
import measure
import numpy as np
import zarr
from annbatch import DatasetCollection, Loader


def read_batches(loader: Loader, dense: bool) -> measure.Batches:
    """Pass after pass."""
    while True:
        for batch in loader:
            counts = batch["X"]
            if dense:
                counts.toarray()
            yield counts.shape[0], counts.nnz


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("collection", type=Path)
    parser.add_argument("--file", type=Path, help="is converted; else batches are read")
    parser.add_argument("--chunk", type=int, help="cells read in a row")
    parser.add_argument("--preload", type=int, help="chunks mixed at a time")
    parser.add_argument("--dense", action="store_true", help="batches as dense float32")
    measure.add_arguments(parser)
    args = parser.parse_args()
    pipeline, rng = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}, np.random.default_rng(0)
    zarr.config.set(pipeline | {"threading.max_workers": args.threads})
    if args.file:
        DatasetCollection(args.collection).add_adatas([args.file], shuffle=True, rng=rng)
        return
    sizes = {"chunk_size": args.chunk, "preload_nchunks": args.preload, "batch_size": args.batch}
    loader = Loader(**sizes, shuffle=True, drop_last=True, rng=rng)
    collection = DatasetCollection(args.collection, mode="r")
    loader.use_collection(
        collection, load_adata=lambda group: ad.AnnData(X=ad.io.sparse_dataset(group["X"]))
    )
    measure.print_result(measure.measure_stream(read_batches(loader, args.dense), args))


if __name__ == "__main__":
    main()
