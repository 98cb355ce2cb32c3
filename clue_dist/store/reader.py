"""Reads a store through TensorStore. A missing, truncated or flipped chunk raises; it is never served as zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts

from clue_dist.errors import StoreError
from clue_dist.store import layout, place
from clue_dist.store.layout import ArraySpec
from clue_dist.store.manifest import Manifest
from clue_dist.store.place import Place
from clue_dist.store.rows import Csr, gather, row_starts

# Opening a handle caches nothing: the loader keeps the blocks it needs, once.
_CONTEXT = {"cache_pool": {"total_bytes_limit": 0}, **place.RETRIES}


@dataclass(frozen=True)
class SparseBlocks:
    """Decoded blocks of a sparse modality. deltas, counts: (n, C), counts (n, 0) if binary; lengths: (n, B)."""

    deltas: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Obs:
    """Per-cell metadata. batch, label: (n,) int32 codes, -1 = unknown; barcodes: (n,) str."""

    batch: np.ndarray
    label: np.ndarray
    barcodes: np.ndarray


class StratumReader:
    """The cells of one stratum. A cell's position p lies in block p // B, row p % B."""

    def __init__(self, root: Place, manifest: Manifest, name: str) -> None:
        self.root, self.manifest, self.name = root, manifest, name
        self.stratum = manifest.strata[name]
        self.n_cells, self.block_cells = self.stratum.n_cells, manifest.block_cells
        self.n_blocks = layout.blocks_of(self.n_cells, self.block_cells)
        self._context = ts.Context(_CONTEXT)
        self._arrays = {s.path.removeprefix(f"strata/{name}/"): self._open(s) for s in manifest.arrays(name)}

    @property
    def modalities(self) -> list[str]:
        return self.stratum.modalities

    def read_blocks(self, modality: str, blocks: np.ndarray) -> SparseBlocks | np.ndarray:
        """Decoded blocks of one modality: `SparseBlocks`, or (n, B, features) where it is stored dense."""
        if self.manifest.modalities[modality].storage == "dense":
            return self._read(f"{modality}/values", blocks)
        names = [f"{modality}/{part}" for part in ("deltas", "counts", "lengths")]
        pending = {name: self._start(name, blocks) for name in names if name in self._arrays}
        got = {name: self._finish(name, blocks, future) for name, future in pending.items()}
        empty = np.empty((len(blocks), 0), np.uint8)
        return SparseBlocks(got[names[0]], got.get(names[1], empty), got[names[2]])

    def read_codes(self, field: str, blocks: np.ndarray) -> np.ndarray:
        """`batch` or `label` codes of whole blocks, (n, B) int32."""
        return self._read(f"obs/{field}", blocks)

    def read_lengths(self, modality: str, blocks: np.ndarray) -> np.ndarray:
        """Non-zeros of each cell of whole blocks of a sparse modality, (n, B) uint32; padding has none."""
        return self._read(f"{modality}/lengths", blocks)

    def rows(self, modality: str, positions: np.ndarray) -> Csr | np.ndarray:
        """Raw counts of any cells, in the order asked for: `Csr`, or (n, features) where stored dense."""
        blocks, slot = np.unique(positions // self.block_cells, return_inverse=True)
        row = positions % self.block_cells
        decoded = self.read_blocks(modality, blocks)
        if not isinstance(decoded, SparseBlocks):
            return decoded[slot, row]
        starts = row_starts(decoded.lengths)
        return gather_rows(
            decoded.deltas, decoded.counts, starts, slot, row, self.manifest.modalities[modality].n_features
        )

    def obs_codes(self, field: str, positions: np.ndarray) -> np.ndarray:
        """`batch` or `label` codes of any cells, (n,) int32, -1 = unknown."""
        blocks, slot = np.unique(positions // self.block_cells, return_inverse=True)
        return self.read_codes(field, blocks)[slot, positions % self.block_cells]

    def obs(self, positions: np.ndarray) -> Obs:
        """Batch, label and barcode of any cells, in the order asked for."""
        blocks, slot = np.unique(positions // self.block_cells, return_inverse=True)
        letters = self._read("obs/barcode", blocks)[slot, positions % self.block_cells]  # (n, w)
        encoded = np.ascontiguousarray(letters).view(f"S{letters.shape[1]}").reshape(-1)
        barcodes = np.char.decode(encoded, "utf-8")
        return Obs(self.obs_codes("batch", positions), self.obs_codes("label", positions), barcodes)

    def _open(self, spec: ArraySpec) -> Any:
        folder, kvstore = self.root / spec.path, place.kvstore(self.root, spec.path)
        request = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}
        try:
            array = ts.open(request, read=True, open=True, context=self._context, recheck_cached_data=False).result()
        except (ValueError, OSError) as error:
            what = "an array of the store cannot be opened"
            raise place.failed(error, self.root, what, where=folder, fix=_CHECK) from None
        got = (tuple(array.shape), str(array.dtype.numpy_dtype))
        if got != (spec.shape, spec.dtype):
            raise StoreError(
                "an array does not fit the manifest",
                where=folder,
                got=got,
                expected=(spec.shape, spec.dtype),
                fix=_CHECK,
            )
        return array

    def _start(self, name: str, blocks: np.ndarray) -> Any:
        return self._arrays[name][np.asarray(blocks, np.int64)].read()

    def _finish(self, name: str, blocks: np.ndarray, future: Any) -> np.ndarray:
        try:
            return np.asarray(future.result())
        except (ValueError, OSError) as error:
            raise place.failed(
                error,
                self.root,
                "part of the store is missing or damaged",
                where=f"{self.root}: stratum {self.name}, array {name}, blocks {_span(blocks)} "
                f"(cells {int(blocks.min()) * self.block_cells} to {(int(blocks.max()) + 1) * self.block_cells - 1})",
                fix=_CHECK,
            ) from None

    def _read(self, name: str, blocks: np.ndarray) -> np.ndarray:
        return self._finish(name, blocks, self._start(name, blocks))


_CHECK = "`python -m data_prep check STORE` lists every damaged shard; restore them or convert again"


class Store:
    """A committed store: its manifest, and one reader per stratum. root: a folder or a URL, see `place`.

    Raises:
        StoreError: the store does not exist, is unfinished, or does not fit its manifest; its server fails.
    """

    def __init__(self, root: str | Place) -> None:
        self.root = place.place_of(root)
        self.manifest = Manifest.read(self.root)
        self.strata = {name: StratumReader(self.root, self.manifest, name) for name in self.manifest.strata}

    @property
    def modalities(self) -> list[str]:
        return list(self.manifest.modalities)

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint


def gather_rows(
    deltas: np.ndarray, counts: np.ndarray, starts: np.ndarray, slot: np.ndarray, row: np.ndarray, n_features: int
) -> Csr:
    """Rows `row` of blocks `slot`, both (n,), out of decoded blocks; see `rows.gather`."""
    indptr = np.zeros(len(slot) + 1, np.int64)
    np.cumsum(starts[slot, row + 1] - starts[slot, row], out=indptr[1:])
    indices, values = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
    gather(deltas, counts, starts, slot, row, indptr, indices, values)
    return Csr(indptr, indices, values, n_features)


def _span(blocks: np.ndarray) -> str:
    return f"{int(blocks.min())} to {int(blocks.max())}" if len(blocks) > 1 else str(int(blocks[0]))
