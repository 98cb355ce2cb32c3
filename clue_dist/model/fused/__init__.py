"""Kernels in Triton for a GPU, each beside PyTorch code that gives the same numbers.

The modules in here need Triton, which comes with torch for CUDA; import them only where
`can_fuse` says so.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

from torch import Tensor

# Numbers by which the kernels know likelihoods, those that have a theta from "nb" on. Likelihoods
# that are not listed are computed by PyTorch on a GPU, too.
FUSED_LIKELIHOODS = {"poisson": 0, "bernoulli": 1, "nb": 2, "zinb": 3, "normal": 4}


def can_fuse(tensor: Tensor) -> bool:
    """Whether work on a tensor is done by these kernels."""
    return tensor.is_cuda and has_triton()


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None
