"""What is left of a barcode without the suffix and prefix that programs put around it.

`AAACCTGAGAAACCAT-1` (Cell Ranger), `AAACCTGAGAAACCAT` (CITE-seq-Count, alevin, STARsolo),
`lane1_AAACCTGAGAAACCAT-1` (Seurat) and `lane1#AAACCTGAGAAACCAT-1` (ArchR) share one core: the
sequence of bases. A name without such a sequence loses numbers at its end: the core of `c12-1` is
`c12`. What stands before a colon is a data set, and stays.
"""

from __future__ import annotations

import numpy as np

from clue_dist.store.kernel_cache import compile_kernel

FEWEST_BASES = 8  # letters that make a sequence: the parts of combinatorial barcodes have eight
MOST_DIGITS = 3  # of a number at the end of a name that is a suffix


def extract_cores(barcodes: np.ndarray, with_dataset: bool = True) -> np.ndarray:
    """Reduce barcodes to their cores.

    Args:
        barcodes: (n,) bytes, `dataset:barcode` or `barcode`.
        with_dataset: whether the data set stays.

    Returns:
        The cores, `dataset:core` or `core`, of the same shape and type.
    """
    width = barcodes.dtype.itemsize
    letters = np.ascontiguousarray(barcodes).view(np.uint8).reshape(len(barcodes), width)
    return _copy_cores(letters, with_dataset).view(barcodes.dtype).reshape(len(barcodes))


def find_alike_cells(
    barcodes: np.ndarray, masks: np.ndarray, with_dataset: bool = True
) -> np.ndarray:
    """Find the cells whose barcodes have the same core and that have no modality in common.

    A core that two cells of one modality share says nothing about which of them is meant: such
    cells stay apart.

    Args:
        barcodes: (n,) bytes, each once.
        masks: (n,) int64, bit m is set where a cell has modality m.
        with_dataset: whether cells of different data sets are different.

    Returns:
        For each cell the number of the cell that it is a part of, (n,) int64: its own number, or
        that of the alike cell with the first modality.
    """
    if not len(barcodes):
        return np.zeros(0, np.int64)
    _, group = np.unique(extract_cores(barcodes, with_dataset), return_inverse=True)
    united = unite_masks(masks, group)
    times = np.bincount(group, weights=np.bitwise_count(masks))
    is_disjoint = times == np.bitwise_count(united)
    # Of each group the cell with the lowest bit comes first.
    order = np.lexsort((masks & -masks, group))
    first = order[np.searchsorted(group[order], np.arange(len(united)))]
    return np.where(is_disjoint[group], first[group], np.arange(len(group)))


def unite_masks(masks: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """Unite the masks of cells that are one. merged: the number of the cell each becomes, (n,)."""
    united = np.zeros(merged.max(initial=-1) + 1, np.int64)
    np.bitwise_or.at(united, merged, masks)
    return united


def count_ambiguous_cells(barcodes: np.ndarray, masks: np.ndarray) -> int:
    """Count the cells whose core does not say which of several cells would complete them.

    Args:
        barcodes: (n,) bytes, each once.
        masks: (n,) int64, as of `find_alike_cells`.
    """
    _, group, times = np.unique(extract_cores(barcodes), return_inverse=True, return_counts=True)
    united = unite_masks(masks, group)
    return int(((times[group] > 1) & (masks != united[group])).sum())


@compile_kernel
def _is_letter(byte):  # type: ignore[no-untyped-def]
    """Whether a byte belongs to a word: a letter, a digit, or a part of a UTF-8 letter."""
    return 48 <= byte <= 57 or 65 <= byte <= 90 or 97 <= byte <= 122 or byte >= 128


@compile_kernel
def _is_base(byte):  # type: ignore[no-untyped-def]
    """Whether a byte is one of A, C, G, T, N."""
    return byte == 65 or byte == 67 or byte == 71 or byte == 84 or byte == 78


@compile_kernel
def _copy_cores(letters, with_dataset):  # type: ignore[no-untyped-def]
    """Copy (data set and) core of each row of letters, (n, width) uint8; zeros follow them."""
    out = np.zeros_like(letters)
    for i in range(len(letters)):
        end = letters.shape[1]
        while end and letters[i, end - 1] == 0:
            end -= 1
        start = end
        while start and letters[i, start - 1] != 58:  # a colon
            start -= 1
        first, last = _find_sequence(letters[i], start, end)
        if last == 0:
            first, last = start, _skip_numbers(letters[i], start, end)
        n_before = start if with_dataset else 0
        out[i, :n_before] = letters[i, :n_before]
        out[i, n_before : n_before + last - first] = letters[i, first:last]
    return out


@compile_kernel
def _find_sequence(row, start, end):  # type: ignore[no-untyped-def]
    """Find where the first word of bases begins and the last one ends; 0, 0 where none is."""
    first, last, k = 0, 0, start
    while k < end:
        begin, is_bases = k, True
        while k < end and _is_letter(row[k]):
            is_bases = is_bases and _is_base(row[k])
            k += 1
        if is_bases and k - begin >= FEWEST_BASES:
            first, last = (first if last else begin), k
        k += 1
    return first, last


@compile_kernel
def _skip_numbers(row, start, end):  # type: ignore[no-untyped-def]
    """Find where a name ends without the numbers behind it, `-1` or `-1-0`."""
    while True:
        k = end
        while k > start and 48 <= row[k - 1] <= 57:
            k -= 1
        is_suffix = 1 <= end - k <= MOST_DIGITS and k - 1 > start and row[k - 1] == 45  # a dash
        if not is_suffix:
            return end
        end = k - 1
