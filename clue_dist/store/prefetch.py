"""Memory asked for before it is read, from compiled kernels: rows of a batch lie all over more than a cache holds, and
a processor that meets them one by one waits for each."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LINE = 64  # bytes that come together, on x86-64 and most ARM processors


@intrinsic
def _prefetch_line(_typing: Any, _address: Any) -> Any:
    """LLVM's llvm.prefetch: a hint, which reads nothing and fails for no address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read, to_stay, data = number(0), number(3), number(1)
        builder.call(function, [builder.inttoptr(args[0], pointer), to_read, to_stay, data])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@njit(nogil=True, cache=True)
def prefetch(array):  # type: ignore[no-untyped-def]
    """Begin to bring a contiguous array into the cache."""
    first = array.ctypes.data
    for address in range(first, first + array.size * array.itemsize, LINE):
        _prefetch_line(address)
