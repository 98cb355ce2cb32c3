"""Datasets of PyTorch over the matrix of an .h5ad, timed: plain AnnData, scDataset and SCDL.

Each hands out random batches as CSR or dense tensors. SCDL reads a folder that it has converted the
.h5ad into; the others read the .h5ad.
"""

import argparse
from functools import partial
from pathlib import Path

import anndata as ad
import h5py
import measure
import numpy as np
import scipy.sparse as sp
import torch
from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
from scdataset import BlockShuffling, scDataset
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler


class BackedMatrix:
    """The matrix of an .h5ad; each process opens the file when it first reads."""

    def __init__(self, path: Path) -> None:
        self.path, self._matrix = path, None
        with h5py.File(path) as file:
            self._cells = int(file["X"].attrs["shape"][0])

    def __len__(self) -> int:
        return self._cells

    def __getitem__(self, rows: np.ndarray) -> sp.csr_matrix:
        if self._matrix is None:
            self._matrix = ad.io.sparse_dataset(h5py.File(self.path)["X"])
        return self._matrix[rows]


class AnnDataBatches:
    """Batches of any rows of an .h5ad, read together and in ascending order, which is fastest."""

    def __init__(self, path: Path, dense: bool) -> None:
        self.matrix, self.dense = BackedMatrix(path), dense

    def __len__(self) -> int:
        return len(self.matrix)

    def __getitem__(self, rows: list[int]) -> Tensor:
        return make_tensor(self.matrix[np.sort(rows)], self.dense)


def make_tensor(rows: sp.csr_matrix, dense: bool) -> Tensor:
    if dense:
        return torch.from_numpy(rows.toarray())
    parts = (torch.from_numpy(part) for part in (rows.indptr, rows.indices, rows.data))
    return torch.sparse_csr_tensor(*parts, size=rows.shape)


def collate_rows(rows: list[Tensor], dense: bool) -> Tensor:
    batch = collate_sparse_matrix_batch(rows)
    return batch.to_dense() if dense else batch


def make_loader(args: argparse.Namespace) -> DataLoader:
    """The loader of a peer, with `args.workers` processes; 0: it reads in this one."""
    workers = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    if args.peer == "anndata":
        cells = AnnDataBatches(args.place, args.dense)
        rows = BatchSampler(RandomSampler(cells), args.batch, drop_last=True)
        return DataLoader(cells, sampler=rows, batch_size=None, **workers)
    if args.peer == "scdataset":
        batches = scDataset(
            BackedMatrix(args.place),
            BlockShuffling(block_size=args.block),
            args.batch,
            fetch_factor=args.fetch,
            drop_last=True,
            batch_transform=partial(make_tensor, dense=args.dense),
            seed=0,
        )
        # As its documentation has it, so that a worker goes on with the next fetch.
        ahead = {"prefetch_factor": args.fetch + 1} if args.workers else {}
        return DataLoader(batches, batch_size=None, **workers, **ahead)
    cells = SingleCellMemMapDataset(str(args.place))
    collate = partial(collate_rows, dense=args.dense)
    shuffled = {"batch_size": args.batch, "shuffle": True, "drop_last": True}
    return DataLoader(cells, collate_fn=collate, **shuffled, **workers)


def read_batches(loader: DataLoader) -> measure.Batches:
    """Pass after pass; non-zeros of a dense batch are not counted."""
    while True:
        for batch in loader:
            yield len(batch), 0 if batch.layout == torch.strided else batch.values().numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=("anndata", "scdataset", "scdl"))
    parser.add_argument("place", type=Path, help="the .h5ad, or SCDL's folder")
    parser.add_argument("--file", type=Path, help="an .h5ad that SCDL converts; else batches")
    parser.add_argument("--block", type=int, help="cells that scDataset reads in a row")
    parser.add_argument("--fetch", type=int, help="batches that scDataset reads at a time")
    parser.add_argument("--workers", type=int, default=0, help="processes that read")
    parser.add_argument("--dense", action="store_true", help="batches as dense float32")
    measure.add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.file:
        SingleCellMemMapDataset(str(args.place), h5ad_path=str(args.file), use_X_not_raw=True)
        return
    batches = read_batches(make_loader(args))
    measure.print_result(measure.measure_stream(batches, args))


if __name__ == "__main__":
    main()
