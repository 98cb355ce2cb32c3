"""Batches on a GPU: each is copied while the one before is trained on.

A batch is packed end to end into one buffer of pinned memory, so that it takes one copy, on a
stream of its own. Sparse counts that are still coded are expanded there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clue_dist.data.batch import Batch, CodedCounts, ObservedModality
from clue_dist.data.loader import Loader
from clue_dist.data.timing import time_phase

_ALIGNMENT = 256  # bytes; where tensors begin, as the allocator of a GPU has it
_SPARE = 8  # a buffer is larger by 1/8 than what it was first asked for, as batches differ in size


class DeviceBatches:
    """An iterator over a loader's batches, on the device. Use it as a context manager.

    An error in a batch is raised by the `next()` that would have given it.

    Args:
        loader: on the host; it is closed with this iterator.
        device: where batches are to lie.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.waited_seconds = 0.0  # by `next()`, so far
        self._packer = BatchPacker(device)
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="copy")
        self._due: Future[Batch] = self._copier.submit(self._copy_next)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            batch = self._due.result()
        finally:
            self.waited_seconds += time.perf_counter() - started
        self._due = self._copier.submit(self._copy_next)
        if self.device.type == "cuda":
            # Its memory must not be given to a batch to come before this stream is done with it.
            stream = torch.cuda.current_stream(self.device)
            for tensor in batch.list_tensors():
                tensor.record_stream(stream)
        return batch

    def __enter__(self) -> DeviceBatches:
        return self

    def __exit__(self, *_: Any) -> None:
        self.loader.close()  # which ends a wait for its next batch
        self._copier.shutdown()

    def _copy_next(self) -> Batch:
        return self._packer.copy_batch(next(self.loader))


class BatchPacker:
    """Copies batches to a device, each as one piece. One thread alone may use it.

    Args:
        device: where batches are to lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @time_phase("pack")
    def copy_batch(self, batch: Batch) -> Batch:
        """Copy a batch, expand what is coded, and wait until that is done.

        Raises:
            StoreError: a row is not coded as it should be.
        """
        tensors = batch.list_tensors()
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        buffer = self._prepare_buffer(size)
        for start, tensor in zip(starts, tensors, strict=True):
            _view_part(buffer, start, tensor).copy_(tensor)
        with torch.cuda.stream(self._stream):
            memory = buffer.to(self.device, non_blocking=True, copy=True)
            parts = iter(starts)
            moved = batch.map_tensors(lambda tensor: _view_part(memory, next(parts), tensor))
            moved = _expand_coded(moved)
        if self._stream is not None:
            self._stream.synchronize()
        return moved

    def _prepare_buffer(self, size: int) -> Tensor:
        """Give `size` bytes of the buffer, which is made anew where it is too small."""
        if len(self._buffer) < size:
            self._buffer = torch.empty(
                size + size // _SPARE, dtype=torch.uint8, pin_memory=self._stream is not None
            )
        return self._buffer[:size]


def _expand_coded(batch: Batch) -> Batch:
    """The batch with every `CodedCounts` expanded, by the device on which it lies."""

    def expand_modality(part: ObservedModality) -> ObservedModality:
        if not isinstance(part.profiles, CodedCounts):
            return part
        from clue_dist.data.expansion import expand_counts

        return replace(part, profiles=expand_counts(part.profiles))

    modalities = {name: expand_modality(part) for name, part in batch.modalities.items()}
    return replace(batch, modalities=modalities)


def _view_part(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """The part of a piece of memory that holds a tensor of the type and shape of `like`."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)
