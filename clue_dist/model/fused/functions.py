"""What the kernels share: functions of single numbers, and the loading of non-zeros."""

from __future__ import annotations

import triton
import triton.language as tl

SHIFT = tl.constexpr(8)  # Stirling's series is good to 1e-6 from here on


@triton.jit
def log1p(x):
    """ln(1 + x) for x >= 0, also where 1 + x is rounded (Higham, 2002, section 1.14.1)."""
    u = 1.0 + x
    rounded = u - 1.0
    return tl.where(rounded == 0.0, x, tl.log(u) * x / tl.where(rounded == 0.0, 1.0, rounded))


@triton.jit
def softplus(x):
    """ln(1 + exp x)."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp -x)."""
    z = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, z) / (1.0 + z)


@triton.jit
def log_rising_factorial(r, x):
    """ln Gamma(r + x) - ln Gamma(r): Stirling's series at r + 8, and eight steps down from there.

    Differences of large numbers are taken before they are rounded.
    """
    a = r + SHIFT
    y = a + x
    result = (a - 0.5) * log1p(x / a) + x * (tl.log(y) - 1.0) + (1.0 / y - 1.0 / a) / 12.0
    for i in tl.static_range(SHIFT):
        result -= log1p(x / (r + i))
    return result


@triton.jit
def rising_factorial_slope(r, x):
    """The derivative by r of `log_rising_factorial`."""
    a = r + SHIFT
    y = a + x
    slope = log1p(x / a) - (a - 0.5) * x / (a * y) + x / y + (1.0 / (a * a) - 1.0 / (y * y)) / 12.0
    for i in tl.static_range(SHIFT):
        slope += x / ((r + i) * (r + i + x))
    return slope


@triton.jit
def load_entries(indices, values, entry, end):
    """Features and values of non-zeros, and which of `entry` are below `end`, and so are there."""
    mask = entry < end
    feature = tl.load(indices + entry, mask=mask, other=0)
    value = tl.load(values + entry, mask=mask, other=0.0)
    return feature, value, mask
