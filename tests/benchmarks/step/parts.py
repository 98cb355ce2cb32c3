"""Where the CPU time of a step goes: python -m tests.benchmarks.step.parts STORE [--batch 512].

Each operation is timed by the clock of its thread, which stands still while other processes run.
What the backward pass does counts to the part whose forward pass asked for it.
"""

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clue_dist.losses import objective
from clue_dist.model import clue, decoders, discriminator, encoders, likelihoods, noise, trunk
from clue_dist.train.engine import AdamW
from clue_dist.train.step import train_step
from clue_dist.train.trainer import Trainer
from tests.benchmarks.peers import measure
from tests.benchmarks.step.probe import WARM_UP_STEPS, open_trainer

REST = "rest"
# (owner, function) -> part. Within a part, those inside it count for themselves.
PARTS: dict[tuple[Any, str], str] = {
    (trunk.Trunk, "compute_components"): "projection",
    (trunk.Trunk, "forward"): "trunks",
    (encoders.CrossEncoderHeads, "forward"): "heads",
    (clue.CLUE, "_combine_experts"): "posterior",
    (clue.CLUE, "_mix_pairs"): "mixtures",
    (decoders.Decoder, "compute_parameters"): "decoders",
    (decoders, "select_features"): "likelihood",
    (likelihoods.NegativeBinomial, "score_profiles"): "likelihood",
    (discriminator.Discriminator, "forward"): "discriminator",
    (objective, "compute_info_nce"): "InfoNCE",
    (objective.Objective, "_compute_terms"): "other terms",
    (noise.Noise, "_draw_rows"): "draws",
    (noise.Noise, "apply_dropout"): "dropout",
    (AdamW, "step"): "optimizer",
}
# Which arguments of a product are multiplied.
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}


@dataclass
class PartTime:
    """What a part took, in nanoseconds of its thread, and the operations of its products."""

    forward: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})  # by is_product
    backward: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    multiplied: int = 0


class OperationClock(TorchDispatchMode):
    """Times every operation, and knows in which part it or its forward pass was."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, PartTime] = defaultdict(PartTime)
        self._parts = [REST]  # those that are open, the innermost last
        self._part_of_node: dict[int, str] = {}  # by the node's number in the graph

    @contextmanager
    def open_part(self, name: str) -> Iterator[None]:
        """Count what is done inside to a part."""
        first = _count_nodes()
        self._parts.append(name)
        try:
            yield
        finally:
            self._parts.pop()
            for node in range(first, _count_nodes()):
                self._part_of_node.setdefault(node, name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        began = time.thread_time_ns()
        result = func(*args, **(kwargs or {}))
        took = time.thread_time_ns() - began
        part = self._parts[-1] if node is None else self._find_part(node)
        name = func.overloadpacket.__name__
        times = self.times[part]
        spent = times.forward if node is None else times.backward
        spent[name in PRODUCTS] += took
        if name in PRODUCTS:
            left, right = (args[i] for i in PRODUCTS[name])
            times.multiplied += 2 * left.numel() * right.shape[-1]
        return result

    def _find_part(self, node: Any) -> str:
        return self._part_of_node.get(node._sequence_nr(), REST)


def _count_nodes() -> int:
    """The number that the next node of the graph gets in this thread."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


@contextmanager
def mark_parts(clock: OperationClock) -> Iterator[None]:
    """Have the functions of `PARTS` tell the clock when they run."""

    def mark_function(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run_marked(*args: Any, **kwargs: Any) -> Any:
            with clock.open_part(part):
                return function(*args, **kwargs)

        return run_marked

    with ExitStack() as stack:
        for (owner, name), part in PARTS.items():
            marked = mark_function(getattr(owner, name), part)
            stack.enter_context(mock.patch.object(owner, name, marked))
        yield


def time_parts(trainer: Trainer, n_steps: int) -> list[dict[str, Any]]:
    """What each part takes of a step, in milliseconds, the longest first."""
    clock, steps = OperationClock(), itertools.count()
    with mark_parts(clock), trainer.open_loader(0) as loader:
        for _ in range(WARM_UP_STEPS):
            train_step(trainer, loader, next(steps))
        with clock:
            for _ in range(n_steps):
                train_step(trainer, loader, next(steps))
    whole = sum(sum((*t.forward.values(), *t.backward.values())) for t in clock.times.values())
    rows = []
    for part, times in clock.times.items():
        products = times.forward[True] + times.backward[True]
        rest = times.forward[False] + times.backward[False]
        rows.append(
            {
                "part": part,
                "share": (products + rest) / whole,
                "ms": 1e-6 * (products + rest) / n_steps,
                "products_ms": 1e-6 * products / n_steps,
                "backward_ms": 1e-6 * sum(times.backward.values()) / n_steps,
                "gflop": 1e-9 * times.multiplied / n_steps,
                "gflops": times.multiplied / products if products else None,
            }
        )
    return sorted(rows, key=lambda row: -row["ms"])


def main() -> None:
    """Time the parts of steps on a store, and print them as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    trainer = open_trainer(args.store, args.batch)
    measure.print_result({"parts": time_parts(trainer, args.steps)})


if __name__ == "__main__":
    main()
