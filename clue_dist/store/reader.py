"""Reads a store through TensorStore. A missing, truncated or flipped chunk raises; it is never served as zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts

from clue_dist.errors import StoreError
from clue_dist.store import layout, location
from clue_dist.store.kernels import compute_row_starts
from clue_dist.store.layout import ArraySpec
from clue_dist.store.location import Location
from clue_dist.store.manifest import Manifest
from clue_dist.store.rows import CHECK, CodedBlocks, CsrRows, LocatedRows

# Opening a handle caches nothing: the loader keeps the blocks it needs, once.
_CONTEXT = {"cache_pool": {"total_bytes_limit": 0}, **location.RETRIES}


@dataclass(frozen=True)
class CellMetadata:
    """Per-cell metadata. batch, label: (n,) int32 codes, -1 = unknown; barcodes: (n,) str."""

    batch: np.ndarray
    label: np.ndarray
    barcodes: np.ndarray


class SegmentReader:
    """The cells of one stratum. A cell's position p lies in block p // B, row p % B."""

    def __init__(self, root: Location, manifest: Manifest, name: str) -> None:
        self.root, self.manifest, self.name = root, manifest, name
        self.stratum = manifest.strata[name]
        self.n_cells, self.block_cells = self.stratum.n_cells, manifest.block_cells
        self.n_blocks = layout.count_blocks(self.n_cells, self.block_cells)
        self._context = ts.Context(_CONTEXT)
        self._specs = {
            s.path.removeprefix(f"strata/{name}/"): s for s in manifest.specify_arrays(name)
        }
        self._arrays = {array: self._open(spec) for array, spec in self._specs.items()}
        self._plain: dict[str, set[int]] = {array: set() for array in self._specs}

    @property
    def modalities(self) -> list[str]:
        return self.stratum.modalities

    def read_blocks(self, modality: str, blocks: np.ndarray) -> CodedBlocks | np.ndarray:
        """Decoded blocks of one modality: `Blocks`, or (n, B, features) where it is stored dense."""
        if self.manifest.modalities[modality].storage == "dense":
            return self._read(f"{modality}/values", blocks)
        names = [f"{modality}/{part}" for part in ("codes", "rest", "lengths")]
        pending = [self._start(name, blocks) for name in names]
        codes, rest, lengths = (
            self.finish_read(n, blocks, future) for n, future in zip(names, pending, strict=True)
        )
        return CodedBlocks(codes, rest, lengths, self.compute_starts(modality, lengths))

    def compute_starts(self, modality: str, lengths: np.ndarray) -> np.ndarray:
        """Where the rows of blocks with these lengths, (n, B, 3), start: (n, B + 1, 2).

        Raises:
            StoreError: a block's rows are longer than the block.
        """
        starts, packed = compute_row_starts(lengths), self.stratum.packed[modality]
        most = starts[:, -1].max(0, initial=0)
        if (most > (packed.capacity, packed.rest)).any():
            got = f"a block of {most[0]} non-zeros and {most[1]} rests"
            raise self._misfit(modality, got, f"{packed.capacity} and {packed.rest} at most")
        return starts

    def locate_rows(
        self, modality: str, blocks: CodedBlocks, slot: np.ndarray, row: np.ndarray
    ) -> LocatedRows:
        """Rows `row` of blocks `slot`, both (n,), among blocks of a sparse modality."""
        n_features, bits = (
            self.manifest.modalities[modality].n_features,
            self.stratum.packed[modality].bits,
        )
        return LocatedRows(
            blocks, slot, row, n_features, bits, f"{self.root}: stratum {self.name}, {modality}"
        )

    def _read_code_blocks(self, field: str, blocks: np.ndarray) -> np.ndarray:
        """`batch` or `label` codes of whole blocks, (n, B) int32."""
        return self._read(f"obs/{field}", blocks)

    def read_lengths(self, modality: str, blocks: np.ndarray) -> np.ndarray:
        """Non-zeros of each cell of whole blocks of a sparse modality, (n, B) uint32; padding has none."""
        return self._read(f"{modality}/lengths", blocks)[..., 0]

    def read_located_rows(self, modality: str, positions: np.ndarray) -> LocatedRows | np.ndarray:
        """Any cells, in the order asked for: still coded, or (n, features) where stored dense."""
        blocks, slot = np.unique(positions // self.block_cells, return_inverse=True)
        row = positions % self.block_cells
        got = self.read_blocks(modality, blocks)
        return (
            got[slot, row]
            if isinstance(got, np.ndarray)
            else self.locate_rows(modality, got, slot, row)
        )

    def read_rows(self, modality: str, positions: np.ndarray) -> CsrRows | np.ndarray:
        """Raw counts of any cells, in the order asked for: `Csr`, or (n, features) where stored dense."""
        got = self.read_located_rows(modality, positions)
        return got.to_csr() if isinstance(got, LocatedRows) else got

    def read_codes(self, field: str, positions: np.ndarray) -> np.ndarray:
        """`batch` or `label` codes of any cells, (n,) int32, -1 = unknown."""
        blocks, slot = np.unique(positions // self.block_cells, return_inverse=True)
        return self.require_known_codes(
            field, self._read_code_blocks(field, blocks)[slot, positions % self.block_cells]
        )

    def require_known_codes(self, field: str, codes: np.ndarray) -> np.ndarray:
        """The same codes of cells, (n,), of `batch` or `label`.

        Raises:
            StoreError: one is not of the manifest's names.
        """
        n = len(self.manifest.batches if field == "batch" else self.manifest.labels)
        if len(codes) and not (codes.min() >= -1 and codes.max() < n):
            raise self._misfit(
                f"obs/{field}", f"codes from {codes.min()} to {codes.max()}", f"-1 to {n - 1}"
            )
        return codes

    def read_metadata(self, positions: np.ndarray) -> CellMetadata:
        """Batch, label and barcode of any cells, in the order asked for."""
        try:
            barcodes = np.char.decode(self.read_barcodes(positions), "utf-8")
        except UnicodeDecodeError as error:
            raise self._misfit("obs/barcode", str(error), "UTF-8") from None
        return CellMetadata(
            self.read_codes("batch", positions), self.read_codes("label", positions), barcodes
        )

    def read_barcodes(self, positions: np.ndarray) -> np.ndarray:
        """Barcodes of any cells, in the order asked for, as UTF-8: (n,) bytes."""
        blocks, slot = np.unique(positions // self.block_cells, return_inverse=True)
        letters = self._read("obs/barcode", blocks)[slot, positions % self.block_cells]  # (n, w)
        return np.ascontiguousarray(letters).view(f"S{letters.shape[1]}").reshape(-1)

    def _open(self, spec: ArraySpec) -> Any:
        folder, kvstore = self.root / spec.path, location.open_kvstore(self.root, spec.path)
        location.require_plain_files(
            self.root, f"{spec.path}/zarr.json", most=layout.MAX_METADATA_BYTES
        )
        request = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}
        try:
            array = ts.open(
                request, read=True, open=True, context=self._context, recheck_cached_data=False
            ).result()
        except (ValueError, OSError) as error:
            what = "an array of the store cannot be opened"
            raise location.translate_read_error(
                error, self.root, what, where=folder, fix=CHECK
            ) from None
        found, expected = array.spec().to_json()["metadata"], layout.make_array_metadata(spec)
        if differ := [key for key, value in expected.items() if found.get(key) != value]:
            got, wanted = ({key: of.get(key) for key in differ} for of in (found, expected))
            raise StoreError(
                "an array does not fit the manifest",
                where=folder,
                got=got,
                expected=wanted,
                fix=CHECK,
            )
        return array

    def _misfit(self, array: str, got: str, expected: str) -> StoreError:
        where = f"{self.root}: stratum {self.name}, {array}"
        return StoreError(
            "values that no conversion writes", where=where, got=got, expected=expected, fix=CHECK
        )

    def require_plain_shards(self, name: str, blocks: np.ndarray) -> None:
        """The shards that hold these blocks are files, no larger than they can be: TensorStore may read one whole. Each
        is looked at once.

        Raises:
            StoreError: one is a link, say, or too large.
        """
        spec, known = self._specs[name], self._plain[name]
        new = set((np.asarray(blocks) // spec.shard[0]).tolist()) - known
        for shard in new:
            location.require_plain_files(
                self.root, spec.name_shard_file(shard), most=spec.shard_bytes
            )
        known |= new

    def _start(self, name: str, blocks: np.ndarray) -> Any:
        self.require_plain_shards(name, blocks)
        return self._arrays[name][np.asarray(blocks, np.int64)].read()

    def start_read(self, name: str, blocks: np.ndarray, target: ts.TensorStore) -> Any:
        """Begin to read whole blocks of an array, after `require_plain`, into memory, without holding this thread up;
        see `finish`."""
        return target.write(self._arrays[name][np.asarray(blocks, np.int64)])

    def finish_read(self, name: str, blocks: np.ndarray, future: Any) -> Any:
        """What `future` gives, once it is there.

        Raises:
            StoreError: part of the store is missing or damaged.
        """
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise location.translate_read_error(
                error,
                self.root,
                "part of the store is missing or damaged",
                where=f"{self.root}: stratum {self.name}, array {name}, blocks {_span(blocks)} "
                f"(cells {int(blocks.min()) * self.block_cells} to {(int(blocks.max()) + 1) * self.block_cells - 1})",
                fix=CHECK,
            ) from None

    def _read(self, name: str, blocks: np.ndarray) -> np.ndarray:
        return np.asarray(self.finish_read(name, blocks, self._start(name, blocks)))


class Store:
    """A committed store: its manifest, and one reader per stratum. root: a folder or a URL, see `place`.

    Raises:
        StoreError: the store does not exist, is unfinished, does not fit its manifest, or holds a link; its server
            fails.
    """

    def __init__(self, root: str | Location) -> None:
        self.root = location.parse_location(root)
        location.require_plain_files(self.root)
        self.manifest = Manifest.read(self.root)
        self.segments = {
            name: SegmentReader(self.root, self.manifest, name) for name in self.manifest.strata
        }

    @property
    def modalities(self) -> list[str]:
        return list(self.manifest.modalities)

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint


def _span(blocks: np.ndarray) -> str:
    return f"{int(blocks.min())} to {int(blocks.max())}" if len(blocks) > 1 else str(int(blocks[0]))
