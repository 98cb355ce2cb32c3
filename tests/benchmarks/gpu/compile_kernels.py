"""Compile every fused kernel to machine code of GPUs, which takes no GPU.

Triton's interpreter, in which the tests run the kernels, takes more than its compiler does.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clue_dist.data import expansion
from clue_dist.model.fused import FUSED_LIKELIHOODS, counter_draws, likelihood, projection

CAPABILITIES = 80, 90  # A100; H100 and H200
POINTERS = {"indptr": "*i32", "indices": "*i32", "place": "*i32"}  # all others are "*fp32"
SCALARS = {
    "width": "i32",
    "n_cells": "i32",
    "n_rows": "i32",
    "n_features": "i32",
    "draw": "i32",
    "key": "i64",
}


class KernelVariant(NamedTuple):
    """A kernel and the constants that it is compiled for."""

    kernel: Any
    constants: dict[str, int]
    types: dict[str, str]  # of arguments, where these are not the usual ones


def list_variants() -> Iterator[KernelVariant]:
    """List every kernel with every combination of constants that training may ask for."""
    kinds = FUSED_LIKELIHOODS.values()
    for kind in kinds:
        constants = {"KIND": kind, "BLOCK": likelihood.BLOCK}
        yield KernelVariant(likelihood._add_entry_gradients, constants, {})
        for dense in (0, 1):
            # What is not read of dense profiles is the values once more.
            types = dict.fromkeys(POINTERS, "*fp32") if dense else {}
            by_row = constants | {"DENSE": dense}
            yield KernelVariant(likelihood._score_rows, by_row, types)
            by_block = by_row | {"ROWS": likelihood.ROWS_PER_PROGRAM}
            yield KernelVariant(likelihood._write_column_gradients, by_block, {})
    for kind, drawn in ((0, "*i32"), (1, "*fp32"), (2, "*fp32")):
        constants = {"KIND": kind, "BLOCK": counter_draws.BLOCK}
        types = {"cells": "*i32", "drawn": drawn}
        yield KernelVariant(counter_draws._fill_rows, constants, types)
    for rest in ("*u8", "*u16", "*u32"):
        types = {"starts": "*i32", "codes": "*u8", "rest": rest, "bits": "*u8", "fits": "*i1"}
        yield KernelVariant(expansion._expand_rows, {"BLOCK": expansion.BLOCK}, types)
    for (has_idf, scaled, logged), weight in itertools.product(
        [(1, 1, 1), (0, 1, 1), (0, 0, 1), (0, 0, 0)], ["*fp32", "*bf16"]
    ):
        constants = {"HAS_IDF": has_idf, "SCALED": scaled, "LOGGED": logged}
        constants |= {"BLOCK": projection.BLOCK, "WIDTH": 128}
        yield KernelVariant(projection._project_rows, constants, {"weight": weight})
        if weight == "*fp32":  # gradients are summed in float32, whatever the weights are
            yield KernelVariant(projection._add_row_gradients, constants, {})


def compile_variant(variant: KernelVariant, capability: int) -> int:
    """Compile for a capability, as 90; return the bytes of machine code."""
    kernel, constants, types = variant
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name) or SCALARS.get(name) or POINTERS.get(name, "*fp32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    return len(compiled.asm["cubin"])


def main(capabilities: Sequence[int]) -> None:
    """Compile all of them, a line each."""
    for variant, capability in itertools.product(list_variants(), capabilities):
        size = compile_variant(variant, capability)
        constants, types = variant.constants, variant.types
        name = variant.kernel.__name__
        print(f"sm_{capability} {name} {constants} {types} {size} bytes")


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or CAPABILITIES)
