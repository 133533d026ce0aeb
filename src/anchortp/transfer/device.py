"""Sources and the destination of a load into memory that is mapped as a tensor: a GPU's, or a simulated one's.

As in `transfer.sources`, on the threads of a load. On a GPU each thread copies on a stream of its own, so that kernels
go on meanwhile, and waits for its copies: what has been read is there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from anchortp.errors import StateError
from anchortp.transfer.sources import Source
from anchortp.transfer.work import Chunk

_mine = threading.local()  # of a load's thread: its stream and its staging buffer


class DeviceDestination:
    """This device's weights arena. `buffer`: 1-D uint8, all of it; what the load writes to is committed and mapped."""

    def __init__(self, buffer: Tensor):
        self._buffer = buffer

    def prepare(self, start: int, stop: int) -> None:
        """Nothing to do: chunks are there as soon as they are mapped."""

    def tensor(self, start: int, stop: int) -> Tensor:
        return self._buffer[start:stop]

    def view(self, start: int, stop: int) -> memoryview:
        """The bytes as the device has them, brought to the host; valid until this thread's next view or read."""
        data = self._buffer[start:stop]
        staged = _staging(data.numel(), pinned=data.is_cuda)
        _copy(staged, data)
        return memoryview(staged.numpy())


class StagedSource:
    """A source that reads into host memory, for a destination that is not: chunks go through a (pinned) buffer."""

    def __init__(self, inner: Source):
        self._inner = inner
        self.check_unchanged = inner.check_unchanged
        self.prefetch = inner.prefetch
        self.close = inner.close

    def read(self, chunk: Chunk, out: Tensor, stopped: Callable[[], bool]) -> list[int] | None:
        """The digests are of what lies in the buffer: to bring it back from a GPU would cost as much as the load."""
        staged = _staging(out.numel(), pinned=out.is_cuda)
        digests = self._inner.read(chunk, staged, stopped)
        _copy(out, staged)
        return digests


class MappedSource:
    """Another device's weights arena, or this device's own, mapped here: `buffer`, 1-D uint8, all of it.

    `is_gone`: whether the arena's anchor has gone; its memory is not to be believed then.
    """

    def __init__(self, device: str, buffer: Tensor, *, is_gone: Callable[[], bool], on_close: Callable[[], None]):
        self._device = device
        self._buffer: Tensor | None = buffer
        self._is_gone = is_gone
        self._on_close = on_close

    def read(self, chunk: Chunk, out: Tensor, stopped: Callable[[], bool]) -> None:
        assert self._buffer is not None, "the source is closed"
        _copy(out, self._buffer[chunk.source_start : chunk.source_start + chunk.num_bytes])
        self.check_unchanged()

    def check_unchanged(self) -> None:
        if self._is_gone():
            raise StateError(f"the anchor of {self._device} went away while its units were copied; load them elsewhere")

    def prefetch(self, chunk: Chunk) -> None:
        pass

    def close(self) -> None:
        self._buffer = None  # before it is said: `on_close` may wait for the mapping to go
        self._on_close()


def _staging(num_bytes: int, *, pinned: bool) -> Tensor:
    held = getattr(_mine, "staging", None)
    if held is None or held.numel() < num_bytes:
        held = _mine.staging = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
    return held[:num_bytes]


def _copy(out: Tensor, data: Tensor) -> None:
    """Returns when the bytes are there."""
    if not (out.is_cuda or data.is_cuda):
        out.copy_(data)
        return
    stream = getattr(_mine, "stream", None)
    if stream is None:
        stream = _mine.stream = torch.cuda.Stream(device=out.device if out.is_cuda else data.device)
    with torch.cuda.stream(stream):
        out.copy_(data, non_blocking=True)
    stream.synchronize()
