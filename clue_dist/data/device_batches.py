"""Batches on a GPU: each is copied while the one before is trained on.

A batch is packed end to end into one buffer of pinned memory, so that it takes one copy, on a
stream of its own. Two such buffers take turns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clue_dist.data.batch import Batch
from clue_dist.data.loader import Loader
from clue_dist.data.timing import time_phase

_ALIGNMENT = 256  # bytes; where tensors begin, as the allocator of a GPU has it
_BUFFERS = 2  # one is filled while the other is copied
_SPARE = 8  # a buffer is larger by 1/8 than what it was first asked for, as batches differ in size


class DeviceBatch(NamedTuple):
    """A batch whose copy to the device has begun."""

    batch: Batch  # views of `memory`
    memory: Tensor  # (bytes,) uint8, on the device
    arrival: torch.cuda.Event | None  # when the copy is done; None: it is


class DeviceBatches:
    """An iterator over a loader's batches, on the device. Use it as a context manager.

    Args:
        loader: on the host; it is closed with this iterator.
        device: where batches are to lie.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.waited_seconds = 0.0  # by `next()`, so far
        self._packer = BatchPacker(device)
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="copy")
        self._due: Future[DeviceBatch] = self._copier.submit(self._copy_next)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            batch, memory, arrival = self._due.result()
        finally:
            self.waited_seconds += time.perf_counter() - started
        self._due = self._copier.submit(self._copy_next)
        if arrival is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(arrival)  # the stream waits, and this thread goes on
            memory.record_stream(stream)
        return batch

    def __enter__(self) -> DeviceBatches:
        return self

    def __exit__(self, *_: Any) -> None:
        self.loader.close()  # which ends a wait for its next batch
        self._copier.shutdown()

    def _copy_next(self) -> DeviceBatch:
        return self._packer.copy_batch(next(self.loader))


class BatchPacker:
    """Copies batches to a device, each as one piece. One thread alone may use it.

    Args:
        device: where batches are to lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * _BUFFERS
        self._copied: list[torch.cuda.Event | None] = [None] * _BUFFERS
        self._turn = 0

    @time_phase("pack")
    def copy_batch(self, batch: Batch) -> DeviceBatch:
        """Begin to copy a batch; its own memory is free again at once."""
        tensors = batch.list_tensors()
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._turn = (self._turn + 1) % _BUFFERS
        buffer = self._prepare_buffer(size)
        for start, tensor in zip(starts, tensors, strict=True):
            _view_part(buffer, start, tensor).copy_(tensor)
        memory, arrival = self._copy_buffer(buffer[:size])
        parts = iter(starts)
        moved = batch.map_tensors(lambda tensor: _view_part(memory, next(parts), tensor))
        return DeviceBatch(moved, memory, arrival)

    def _prepare_buffer(self, size: int) -> Tensor:
        """The buffer whose turn it is, with room for `size` bytes, once its last copy is done."""
        copied, buffer = self._copied[self._turn], self._buffers[self._turn]
        if copied is not None:
            copied.synchronize()
        if len(buffer) < size:
            size += size // _SPARE
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None)
            self._buffers[self._turn] = buffer
        return buffer

    def _copy_buffer(self, buffer: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Begin to copy a buffer into new memory on the device."""
        if self._stream is None:
            return buffer.clone(), None
        with torch.cuda.stream(self._stream):
            memory = buffer.to(self.device, non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record(self._stream)
        self._copied[self._turn] = arrival
        return memory, arrival


def _view_part(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """The part of a piece of memory that holds a tensor of the type and shape of `like`."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)
