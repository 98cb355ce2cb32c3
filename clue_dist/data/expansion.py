"""Coded rows -> CSR, in Triton for a GPU.

So a non-zero crosses to the GPU as the one byte that it takes in the store, instead of a column and
a count of four bytes each, and no processor of the host decodes it. `store.rows` says what the code
is. The twin, which gives the same bits, is `store.kernels.decode_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from clue_dist.data.batch import CodedCounts, SparseCounts
from clue_dist.store.rows import make_coding_error

BLOCK = 512  # non-zeros that a program holds at a time


def expand_counts(counts: CodedCounts) -> SparseCounts:
    """Decode counts where they lie, and wait until that is done.

    Raises:
        StoreError: a row is not coded as it should be.
    """
    n_cells, device = len(counts.bits), counts.codes.device
    indices = torch.empty(len(counts.codes), dtype=torch.int32, device=device)
    values = torch.empty(len(counts.codes), dtype=torch.float32, device=device)
    fits = torch.empty(n_cells, dtype=torch.bool, device=device)
    _expand_rows[(n_cells,)](
        *(counts.starts, counts.codes, counts.rest, counts.bits, indices, values, fits),
        counts.n_features,
        BLOCK=BLOCK,
    )
    if not bool(fits.all()):
        row, lengths = int(fits.int().argmin()), counts.starts[:, 0].diff()
        raise make_coding_error(
            counts.where, f"row {row} of a batch", int(lengths[row]), counts.n_features
        )
    return SparseCounts(counts.starts[:, 0].contiguous(), indices, values, counts.n_features)


@triton.jit
def _expand_rows(starts, codes, rest, bits, indices, values, fits, n_features, BLOCK: tl.constexpr):
    """One program for each row: its columns are sums of gaps, carried from block to block.

    Whatever the bytes are, it reads and writes within the bounds of its row.
    """
    row = tl.program_id(0)
    start, end = tl.load(starts + 2 * row), tl.load(starts + 2 * row + 2)
    rest_start, rest_end = tl.load(starts + 2 * row + 1), tl.load(starts + 2 * row + 3)
    shift = tl.load(bits + row).to(tl.int32)
    far, high = (256 >> shift) - 1, (1 << shift) - 1
    lanes = tl.arange(0, BLOCK)
    column, n_far, n_high = 0, 0, 0
    far_sum = tl.full([], 0, tl.int64)  # 32 bits might wrap around unseen
    for first in range(start, end, BLOCK):
        inside = first + lanes < end
        code = tl.load(codes + first + lanes, mask=inside, other=0).to(tl.int32)
        gap, count = code >> shift, code & high
        is_far = inside & (gap == far)
        place = rest_start + n_far + tl.cumsum(is_far.to(tl.int32), 0) - 1
        wide = tl.load(rest + place, mask=is_far & (place < rest_end), other=0).to(tl.int64)
        gap = tl.where(is_far, wide.to(tl.int32), gap)
        columns = column + tl.cumsum(gap, 0)
        columns = tl.minimum(tl.maximum(columns, 0), n_features - 1)
        tl.store(indices + first + lanes, columns, mask=inside)
        tl.store(values + first + lanes, (count + 1).to(tl.float32), mask=inside)
        column += tl.sum(gap, 0)
        n_far += tl.sum(is_far.to(tl.int32), 0)
        n_high += tl.sum((inside & (count == high) & (shift > 0)).to(tl.int32), 0)
        far_sum += tl.sum(wide, 0)
    tl.debug_barrier()  # other threads of the program wrote what high counts overwrite
    passed, n_placed = tl.full([], 0, tl.int64), 0
    for first in range(0, n_high, BLOCK):
        inside = first + lanes < n_high
        place = rest_start + n_far + first + lanes
        distance = tl.load(rest + place, mask=inside & (place < rest_end), other=0).to(tl.int64)
        place += n_high
        count = tl.load(rest + place, mask=inside & (place < rest_end), other=0)
        target = passed + tl.cumsum(distance, 0)
        is_placed = inside & (target < end - start)
        tl.store(values + start + target, count.to(tl.float32) + 1.0, mask=is_placed)
        passed += tl.sum(distance, 0)
        n_placed += tl.sum(is_placed.to(tl.int32), 0)
    is_read = (n_far + 2 * n_high == rest_end - rest_start) & (n_placed == n_high)
    is_inside = (end - start <= n_features) & (far_sum < n_features) & (column < n_features)
    tl.store(fits + row, is_read & is_inside)
