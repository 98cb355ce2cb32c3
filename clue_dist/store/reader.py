"""Reads a store: what the arrays of its segments say of cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clue_dist.errors import StoreError, format_count
from clue_dist.store import layout, location
from clue_dist.store.kernels import compute_row_starts
from clue_dist.store.location import Location
from clue_dist.store.manifest import Manifest
from clue_dist.store.obs_columns import name_kept_array
from clue_dist.store.rows import CHECK_FIX, CodedBlocks, CsrRows, LocatedRows
from clue_dist.store.segment_arrays import SegmentArrays


@dataclass(frozen=True)
class CellMetadata:
    """What a store holds of cells besides their counts; all (n,)."""

    batch: np.ndarray  # int32 codes into the manifest's batches, -1 = unknown
    label: np.ndarray  # int32 codes into the manifest's labels, -1 = unknown
    barcodes: np.ndarray  # str


class SegmentReader:
    """Reads the cells of one segment.

    Cells are asked for by position, from 0 to `n_cells` - 1, or by block. Position p lies in block
    p // B, row p % B, where B is `block_cells`.

    Args:
        root: where the store lies.
        manifest: the store's manifest.
        name: the segment's name.

    Raises:
        StoreError: an array cannot be opened, or does not fit the manifest.
    """

    def __init__(self, root: Location, manifest: Manifest, name: str) -> None:
        self.root, self.manifest, self.name = root, manifest, name
        self.segment = manifest.strata[name]
        self.n_cells, self.block_cells = self.segment.n_cells, manifest.block_cells
        self.n_blocks = layout.count_blocks(self.n_cells, self.block_cells)
        self.arrays = SegmentArrays(root, manifest, name)

    @property
    def modalities(self) -> list[str]:
        """The modalities that the cells carry, in the manifest's order."""
        return self.segment.modalities

    def read_blocks(self, modality: str, blocks: np.ndarray) -> CodedBlocks | np.ndarray:
        """Read whole blocks of one modality.

        Args:
            modality: the modality's name.
            blocks: numbers of the blocks, (n,).

        Returns:
            The blocks, rows still coded; (n, B, features) where the modality is stored dense.

        Raises:
            StoreError: part of the store is missing or damaged.
        """
        if self.manifest.modalities[modality].storage == "dense":
            return self.arrays.read_blocks(f"{modality}/values", blocks)
        names = [f"{modality}/{array}" for array in ("codes", "rest", "lengths")]
        codes, rest, lengths = self.arrays.read_together(names, blocks)
        return CodedBlocks(codes, rest, lengths, self.compute_starts(modality, lengths))

    def compute_starts(self, modality: str, lengths: np.ndarray) -> np.ndarray:
        """Find where each row of some blocks starts.

        Args:
            modality: a sparse modality.
            lengths: what the store holds of the blocks, (n, B, 3).

        Returns:
            Places in the block's codes and in its rest, (n, B + 1, 2).

        Raises:
            StoreError: the rows of a block are longer than the block.
        """
        starts, packed = compute_row_starts(lengths), self.segment.packed[modality]
        longest = starts[:, -1].max(0, initial=0)
        if (longest > (packed.capacity, packed.rest)).any():
            raise self._make_impossible_error(
                modality,
                f"a block of {longest[0]} non-zeros and {longest[1]} rests",
                f"{packed.capacity} and {packed.rest} at most",
            )
        return starts

    def locate_rows(
        self, modality: str, blocks: CodedBlocks, slot: np.ndarray, row: np.ndarray
    ) -> LocatedRows:
        """Point at rows inside blocks of a sparse modality.

        Args:
            modality: the modality's name.
            blocks: some of its blocks.
            slot: which of these blocks each row lies in, (n,).
            row: which row of its block it is, (n,).
        """
        return LocatedRows(
            blocks,
            slot,
            row,
            self.manifest.modalities[modality].n_features,
            self.segment.packed[modality].bits,
            where=f"{self.root}: segment {self.name}, {modality}",
        )

    def read_lengths(self, modality: str, blocks: np.ndarray) -> np.ndarray:
        """Read what each cell of some blocks takes in a sparse modality.

        Returns:
            (n, B, 3) uint32: non-zeros, far gaps and high counts, as in `CodedRows`; the padding
            of the last block has none.
        """
        return self.arrays.read_blocks(f"{modality}/lengths", blocks)

    def read_located_rows(self, modality: str, positions: np.ndarray) -> LocatedRows | np.ndarray:
        """Read one modality of any cells, in the order asked for, rows still coded.

        Returns:
            The rows inside their blocks; (n, features) where the modality is stored dense.
        """
        blocks, slot, row = self._split(positions)
        found = self.read_blocks(modality, blocks)
        if isinstance(found, np.ndarray):
            return found[slot, row]
        return self.locate_rows(modality, found, slot, row)

    def read_rows(self, modality: str, positions: np.ndarray) -> CsrRows | np.ndarray:
        """Read the counts of any cells in one modality, in the order asked for.

        Returns:
            The rows; (n, features) where the modality is stored dense.
        """
        found = self.read_located_rows(modality, positions)
        return found.to_csr() if isinstance(found, LocatedRows) else found

    def read_codes(self, field: str, positions: np.ndarray) -> np.ndarray:
        """Read the `batch` or `label` codes of any cells.

        Returns:
            (n,) int32, -1 = unknown.
        """
        blocks, slot, row = self._split(positions)
        return self.require_known_codes(
            field, self.arrays.read_blocks(f"obs/{field}", blocks)[slot, row]
        )

    def require_known_codes(self, field: str, codes: np.ndarray) -> np.ndarray:
        """Return `batch` or `label` codes of cells, (n,), as they are.

        Raises:
            StoreError: a code has no name in the manifest.
        """
        n_names = len(self.manifest.batches if field == "batch" else self.manifest.labels)
        self._require_codes(f"obs/{field}", codes, n_names)
        return codes

    def _require_codes(self, array: str, codes: np.ndarray, n_names: int) -> None:
        """Refuse codes that are neither -1 nor places in a list of names."""
        if len(codes) and not (codes.min() >= -1 and codes.max() < n_names):
            raise self._make_impossible_error(
                array, f"codes from {codes.min()} to {codes.max()}", f"-1 to {n_names - 1}"
            )

    def read_metadata(self, positions: np.ndarray) -> CellMetadata:
        """Read batch, label and barcode of any cells, in the order asked for."""
        try:
            barcodes = np.char.decode(self.read_barcodes(positions), "utf-8")
        except UnicodeDecodeError as error:
            raise self._make_impossible_error("obs/barcode", str(error), "UTF-8") from None
        batch, label = (self.read_codes(field, positions) for field in ("batch", "label"))
        return CellMetadata(batch, label, barcodes)

    def read_kept_column(self, name: str, positions: np.ndarray) -> np.ndarray:
        """Read a kept column of any cells, (n,) as it is stored; see `KeptColumn.decode_values`.

        Raises:
            StoreError: a category has no name in the manifest.
        """
        columns = self.manifest.obs_columns
        array = f"obs/{name_kept_array(list(columns).index(name))}"
        blocks, slot, row = self._split(positions)
        values = self.arrays.read_blocks(array, blocks)[slot, row]
        if columns[name].kind == "category":
            self._require_codes(array, values, len(columns[name].categories))
        return values

    def read_barcodes(self, positions: np.ndarray) -> np.ndarray:
        """Read the barcodes of any cells, in the order asked for.

        Returns:
            (n,) bytes, UTF-8.
        """
        blocks, slot, row = self._split(positions)
        letters = self.arrays.read_blocks("obs/barcode", blocks)[slot, row]  # (n, w) uint8
        return np.ascontiguousarray(letters).view(f"S{letters.shape[1]}").reshape(-1)

    def _split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the blocks that hold these cells, each cell's block among them, and its row."""
        blocks, slot = np.unique(positions // self.block_cells, return_inverse=True)
        return blocks, slot, positions % self.block_cells

    def _make_impossible_error(self, array: str, found: str, expected: str) -> StoreError:
        """Make the error for values that are impossible although their checksum is right."""
        return StoreError(
            "values that no conversion writes",
            where=f"{self.root}: segment {self.name}, {array}",
            got=found,
            expected=expected,
            fix=CHECK_FIX,
        )


class Store:
    """A store that exists: its manifest, and a reader of each segment.

    Args:
        root: a folder or a URL; see `location`.
        name: what messages call it; by default where it lies.

    Raises:
        StoreError: there is no store or an unfinished one, it does not fit its manifest, it holds
            a link, or its server fails.
    """

    def __init__(self, root: str | Location, name: str | None = None) -> None:
        self.root = location.parse_location(root)
        self.name = str(self.root) if name is None else name
        location.require_plain_files(self.root)
        self.manifest = Manifest.read(self.root)
        self.segments = {
            name: SegmentReader(self.root, self.manifest, name) for name in self.manifest.strata
        }

    def __repr__(self) -> str:
        lines = [f"Store {self.name}: {format_count(self.manifest.n_cells, 'cell')}"]
        for name, modality in self.manifest.modalities.items():
            lines.append(
                f"  {name}: {modality.kind}, {format_count(modality.n_features, 'feature')}"
            )
        for name, segment in self.manifest.strata.items():
            lines.append(f"  segment {name}: {format_count(segment.n_cells, 'cell')}")
        lines.append(f"  {len(self.manifest.batches)} batches, {len(self.manifest.labels)} labels")
        return "\n".join(lines)

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities, in the manifest's order."""
        return list(self.manifest.modalities)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the cells, SHA-256 in hexadecimal."""
        return self.manifest.fingerprint
