"""Rows are coded only where they are counts in canonical form."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from clue_dist.store.rows import COUNT_BITS, LARGEST, Csr, as_binary, coded, joined, try_coded


def csr(x: sp.csr_matrix) -> Csr:
    return Csr(x.indptr, x.indices, x.data, x.shape[1])


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("bits", [0, COUNT_BITS])
def test_any_order_and_type_comes_back(dtype: type, bits: int) -> None:
    rng = np.random.default_rng(0)
    dense = rng.negative_binomial(0.2, 0.02, (40, 700)).clip(max=255) * (rng.random((40, 700)) < 0.1)
    dense[3], dense[4, 699] = 0, 200
    dense = np.minimum(dense, 1) if bits == 0 else dense
    order = rng.permutation(40)
    x = sp.csr_matrix(dense.astype(dtype))
    got = [try_coded(csr(part), bits) for part in (x[:25], x[25:])]
    rows = joined([part for part, _ in got], order)
    np.testing.assert_array_equal(rows.csr(700).scipy().toarray(), dense[order])
    assert max(largest for _, largest in got) == dense.max()


@pytest.mark.parametrize("density", [0.0, 0.002, 0.01, 0.3, 1.0])
def test_rows_of_ones_need_no_bits_for_them(density: float) -> None:
    x = sp.random(60, 3000, density, "csr", random_state=1)
    x.data[:] = 1
    rows = csr(x)
    want, got = coded(rows, 0), as_binary(coded(rows, COUNT_BITS))
    for name in ("codes", "rest", "lengths", "bits"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    if density:
        x.data[-1] = 2
        with pytest.raises(ValueError, match="a count above 1"):
            as_binary(coded(csr(x), COUNT_BITS))


def test_the_largest_count_and_the_farthest_gap_fit() -> None:
    x = sp.csr_matrix(([LARGEST, 1, LARGEST], ([0, 0, 1], [0, 2**31 - 2, 2**31 - 2])), shape=(2, 2**31 - 1))
    got, largest = try_coded(csr(x), COUNT_BITS)
    back = got.csr(2**31 - 1)
    assert largest == LARGEST
    assert back.indices.tolist() == [0, 2**31 - 2, 2**31 - 2]
    assert back.values.tolist() == [LARGEST, 1, LARGEST]


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
    rows = Csr(np.array([0, 2]), np.array(columns, np.int32), np.array(values), 4)
    assert try_coded(rows, COUNT_BITS) is None
    with pytest.raises(ValueError, match="not canonical"):
        coded(rows, COUNT_BITS)
