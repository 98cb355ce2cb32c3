"""Random numbers that follow from a key and a place: Philox 4x32-10 (Salmon et al., 2011).

Whatever is drawn takes one launch, in any order and on any number of ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # counters that a program takes; each gives four words of 32 bits
WORDS = 4
INTEGERS, UNIFORM, NORMAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_KIND_OF_NAME = {"integers": 0, "uniform": 1, "normal": 2}


def draw_for_cells(kind: str, cells: Tensor, width: int, key: int, draw: int) -> Tensor:
    """Draw `width` numbers for each of n cells.

    Args:
        kind: "integers" of 32 bits, int32; "uniform" in [0, 1) or standard "normal", float32.
        cells: (n,) int32, numbers of the cells: equal numbers get equal draws.
        width: numbers for each cell.
        key: of the micro-batch, 63 bits.
        draw: number of the draw in the micro-batch.

    Returns:
        (n, width).
    """
    dtype = torch.int32 if kind == "integers" else torch.float32
    drawn = torch.empty(len(cells), width, dtype=dtype, device=cells.device)
    grid = (len(cells), triton.cdiv(width, BLOCK * WORDS))
    _fill_rows[grid](cells, drawn, key, draw, width, KIND=_KIND_OF_NAME[kind], BLOCK=BLOCK)
    return drawn


@triton.jit
def _fill_rows(cells, drawn, key, draw, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """One program for some columns of a cell; the counter is (column / 4, cell, draw, 0)."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zeros = group * 0
    a, b, c, d = tl.philox(key, group, zeros + tl.load(cells + row), zeros + draw, zeros)
    column = 4 * group
    target = drawn + row * width + column
    if KIND == INTEGERS:
        a, b = a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)
        c, d = c.to(tl.int32, bitcast=True), d.to(tl.int32, bitcast=True)
    else:
        a, b = tl.uint_to_uniform_float(a), tl.uint_to_uniform_float(b)
        c, d = tl.uint_to_uniform_float(c), tl.uint_to_uniform_float(d)
        if KIND == NORMAL:
            a, b = tl.pair_uniform_to_normal(a, b)
            c, d = tl.pair_uniform_to_normal(c, d)
    tl.store(target, a, mask=column < width)
    tl.store(target + 1, b, mask=column + 1 < width)
    tl.store(target + 2, c, mask=column + 2 < width)
    tl.store(target + 3, d, mask=column + 3 < width)
