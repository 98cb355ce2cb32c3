"""Rows are coded only where they are counts in canonical form."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp

from clue_dist.store.encoding_kernels import LARGEST_COUNT
from clue_dist.store.kernels import LINE_VALUES, SPAN_VALUES, prefetch_array
from clue_dist.store.rows import (
    COUNT_BITS,
    CodedBlocks,
    CsrRows,
    LocatedRows,
    code_rows,
    join_rows,
    recode_rows_with_counts,
    try_code_rows,
)


def csr(x: sp.csr_matrix) -> CsrRows:
    return CsrRows(x.indptr, x.indices, x.data, x.shape[1])


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("bits", [0, COUNT_BITS])
def test_any_order_and_type_comes_back(dtype: type, bits: int) -> None:
    rng = np.random.default_rng(0)
    dense = rng.negative_binomial(0.2, 0.02, (40, 700)).clip(max=255) * (
        rng.random((40, 700)) < 0.1
    )
    dense[3], dense[4, 699] = 0, 200
    dense = np.minimum(dense, 1) if bits == 0 else dense
    order = rng.permutation(40)
    x = sp.csr_matrix(dense.astype(dtype))
    coded = [try_code_rows(csr(part), bits) for part in (x[:25], x[25:])]
    rows = join_rows([part for part, _ in coded], order)
    np.testing.assert_array_equal(rows.to_csr(700).to_scipy().toarray(), dense[order])
    assert max(largest for _, largest in coded) == dense.max()


@pytest.mark.slow
@pytest.mark.parametrize("far", [80, 200, 1000, 70_000])  # rest of none, of one, two or four bytes
@pytest.mark.parametrize("n", [0, 1, 2, 3, 40])
def test_rows_of_blocks_come_in_any_order_and_again(n: int, far: int) -> None:
    """Prefetching reads nothing wrong: the last row, empty rows, one row many times."""
    rng = np.random.default_rng(0)
    dense = np.zeros((12, 100_000), np.int32)
    dense[:, :60] = rng.random((12, 60)) < 0.3
    dense[1::2, far] = 1
    dense[5] = 0
    codes = [code_rows(csr(sp.csr_matrix(part)), COUNT_BITS) for part in np.split(dense, 3)]
    wide = np.result_type(*(part.rest for part in codes))
    blocks = CodedBlocks(
        _stacked([part.codes for part in codes], np.uint8),
        _stacked([part.rest for part in codes], wide),
        np.stack([part.lengths for part in codes]),
        np.stack([part.compute_starts() for part in codes]),
    )
    rows = np.append(rng.integers(0, 12, n), [11, 11, 5])[-max(n, 1) :]
    located = LocatedRows(
        blocks, (rows // 4).astype(np.int32), rows % 4, dense.shape[1], COUNT_BITS
    )
    np.testing.assert_array_equal(located.to_csr().to_scipy().toarray(), dense[rows])
    out = np.full((len(rows), dense.shape[1]), 7, np.float32)
    located.decode_dense(out)
    np.testing.assert_array_equal(out, dense[rows])


@pytest.mark.parametrize("n_features", [1, 5, 700, SPAN_VALUES - 1, 2 * SPAN_VALUES + 33])
@pytest.mark.parametrize("shift", [0, 1, LINE_VALUES - 1])
def test_a_dense_row_is_written_wherever_it_begins(n_features: int, shift: int) -> None:
    """Rows begin and end in the middle of cache lines and pieces; nothing beyond is written."""
    rng = np.random.default_rng(n_features)
    dense = rng.integers(0, 9, (5, n_features)) * (rng.random((5, n_features)) < 0.1)
    dense[0], dense[1], dense[2, -1] = 1, 0, 3
    coded = code_rows(csr(sp.csr_matrix(dense)), COUNT_BITS)
    blocks = CodedBlocks(
        coded.codes[None], coded.rest[None], coded.lengths[None], coded.compute_starts()[None]
    )
    located = LocatedRows(blocks, np.zeros(5, np.int32), np.arange(5), n_features, COUNT_BITS)
    memory = np.full(shift + dense.size + LINE_VALUES, 7, np.float32)
    located.decode_dense(memory[shift : shift + dense.size].reshape(dense.shape))
    expected = [np.full(shift, 7), dense.ravel(), np.full(LINE_VALUES, 7)]
    np.testing.assert_array_equal(memory, np.concatenate(expected))


def _stacked(parts: list[np.ndarray], dtype: np.typing.DTypeLike) -> np.ndarray:
    out = np.zeros((len(parts), max(map(len, parts))), dtype)
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out


@pytest.mark.parametrize(
    "array", [np.empty(0), np.ones(1000)[::3], np.ones((3, 4))[:, 1], np.ones(8)[5:]], ids=str
)
def test_asking_for_memory_changes_nothing(array: np.ndarray) -> None:
    before = array.copy()
    prefetch_array(array)
    np.testing.assert_array_equal(array, before)


def test_kernels_run_as_plain_python() -> None:
    """So that a debugger can step through them."""
    script = """
import numpy as np
from clue_dist.store.rows import CodedBlocks, CsrRows, LocatedRows, code_rows
coded = code_rows(CsrRows(np.array([0, 2, 3]), np.array([1, 9, 4]), np.ones(3), 40), 2)
rows = coded.to_csr(40)
print(rows.indices.tolist(), rows.indptr.tolist())
parts = (coded.codes, coded.rest, coded.lengths, coded.compute_starts())
blocks, dense = CodedBlocks(*(part[None] for part in parts)), np.full((2, 40), 7, np.float32)
LocatedRows(blocks, np.zeros(2, int), np.arange(2), 40, 2).decode_dense(dense)
assert np.array_equal(dense, rows.to_scipy().toarray())
"""
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "[1, 9, 4] [0, 2, 3]\n", done.stderr


@pytest.mark.parametrize("density", [0.0, 0.002, 0.01, 0.3, 1.0])
def test_rows_of_ones_need_no_bits_for_them(density: float) -> None:
    x = sp.random(60, 3000, density, "csr", random_state=1)
    x.data[:] = 1
    rows = csr(x)
    want, recoded = code_rows(rows, COUNT_BITS), recode_rows_with_counts(code_rows(rows, 0))
    for name in ("codes", "rest", "lengths", "bits"):
        np.testing.assert_array_equal(getattr(recoded, name), getattr(want, name))
    assert recode_rows_with_counts(want) is want
    if density:
        x.data[-1] = 2
        with pytest.raises(ValueError, match=r"counts be 1$"):
            code_rows(csr(x), 0)


def test_the_largest_count_and_the_farthest_gap_fit() -> None:
    x = sp.csr_matrix(
        ([LARGEST_COUNT, 1, LARGEST_COUNT], ([0, 0, 1], [0, 2**31 - 2, 2**31 - 2])),
        shape=(2, 2**31 - 1),
    )
    coded, largest = try_code_rows(csr(x), COUNT_BITS)
    back = coded.to_csr(2**31 - 1)
    assert largest == LARGEST_COUNT
    assert back.indices.tolist() == [0, 2**31 - 2, 2**31 - 2]
    assert back.values.tolist() == [LARGEST_COUNT, 1, LARGEST_COUNT]


@pytest.mark.parametrize(
    ("columns", "values"),
    [
        ([1, 0], [1.0, 1.0]),
        ([1, 1], [1.0, 1.0]),
        ([0, 1], [0.0, 1.0]),
        ([0, 1], [1.0, -1.0]),
        ([0, 1], [1.0, 1.5]),
        ([0, 1], [1.0, np.nan]),
        ([0, 1], [np.inf, 1.0]),
        ([0, 1], [1.0, 2.0**24 + 2]),
        ([-1, 1], [1.0, 1.0]),
    ],
)
def test_what_is_not_canonical_is_not_coded(columns: list[int], values: list[float]) -> None:
    rows = CsrRows(np.array([0, 2]), np.array(columns, np.int32), np.array(values), 4)
    assert try_code_rows(rows, COUNT_BITS) is None
    with pytest.raises(ValueError, match="not canonical"):
        code_rows(rows, COUNT_BITS)
