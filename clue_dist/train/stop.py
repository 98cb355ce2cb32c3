"""Stopping in time: SIGTERM or USR1 on any rank becomes a flag that all ranks see at the same step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Set by a signal; `agreed()` is true on every rank once it is set on one. Restores the handlers on exit."""

    def __init__(self, device: torch.device) -> None:
        self._set, self._device = False, device

    def __enter__(self) -> StopFlag:
        self._before = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._set = True

    def agreed(self) -> bool:
        """Collective: every rank must call at the same step."""
        flag = torch.tensor([float(self._set)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
