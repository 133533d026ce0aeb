"""Sources and the destination of a load into memory that is mapped as a tensor: a GPU's, or a simulated one's.

As in `transfer.sources`, on the threads of a load. On a GPU each thread copies on a stream of its own, so that kernels
go on meanwhile, and a chunk's last copy is waited for: what has been read is there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from anchortp.errors import StateError
from anchortp.layout import UnitTensor
from anchortp.transfer.sources import Source
from anchortp.transfer.work import Chunk

_mine = threading.local()  # of a load's thread: its stream and its staging buffers


class Stream(Protocol):
    def copy(self, out: Tensor, data: Tensor) -> Callable[[], None]:
        """Begins a copy behind those before it; the result returns when it is made. Until then `data` stays as it
        is."""
        ...


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
        staged = _staging(0, data.numel(), pinned=data.is_cuda)
        _copy(staged, data)
        return memoryview(staged.numpy())


class StagedSource:
    """A source that reads into host memory, for a destination that is not: chunks go through two (pinned) buffers, a
    piece at a time, so that a piece is read while the one before is copied.
    """

    def __init__(self, inner: Source, open_stream: Callable[[torch.device], Stream] | None = None):
        """`open_stream`: of the calling thread, to a device; by default torch's."""
        self._inner = inner
        self._open_stream = open_stream or _stream
        self.check_unchanged = inner.check_unchanged
        self.prefetch = inner.prefetch
        self.close = inner.close

    def read(self, chunk: Chunk, out: Tensor, stopped: Callable[[], bool]) -> list[int] | None:
        """The digests are of what lies in the buffers: to bring it back from a GPU would cost as much as the load."""
        stream = self._open_stream(out.device)
        digests: list[list[int] | None] = []
        copied: list[Callable[[], None]] = [_is_copied, _is_copied]  # wait until a buffer has been copied from
        try:
            for number, piece in enumerate(_pieces(chunk)):
                which = number % 2
                copied[which]()
                staged = _staging(which, piece.num_bytes, pinned=out.is_cuda)
                digests.append(self._inner.read(piece, staged, stopped))
                start = piece.start - chunk.start
                copied[which] = stream.copy(out[start : start + piece.num_bytes], staged)
        finally:
            for wait in copied:  # also after an error: nothing is written behind it, and the buffers are free
                wait()
        return None if None in digests else [value for found in digests for value in found or ()]


def _pieces(chunk: Chunk) -> Iterator[Chunk]:
    tensor = chunk.region.tensor
    if isinstance(tensor, UnitTensor) and all(part.axis == 0 for part in tensor.parts) and chunk.is_whole:
        yield from (chunk.part(piece) for piece in chunk.pieces(chunk.region.segment_bytes))
    else:  # columns: fewer at a time would be read as many times from the file
        yield chunk


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


def _staging(which: int, num_bytes: int, *, pinned: bool) -> Tensor:
    """The calling thread's first or second buffer."""
    held = getattr(_mine, "staging", None)
    if held is None:
        held = _mine.staging = [torch.empty(0, dtype=torch.uint8)] * 2
    if held[which].numel() < num_bytes:
        held[which] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
    return held[which][:num_bytes]


class CudaStream:
    """A queue of copies beside the one in which the steps run."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device=device)

    def copy(self, out: Tensor, data: Tensor) -> Callable[[], None]:
        with torch.cuda.stream(self._stream):
            out.copy_(data, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return event.synchronize


class HostStream:
    """Where the device's memory is the host's."""

    def copy(self, out: Tensor, data: Tensor) -> Callable[[], None]:
        out.copy_(data)
        return _is_copied


def _is_copied() -> None:
    pass


def _stream(device: torch.device) -> Stream:
    if device.type != "cuda":
        return HostStream()
    if getattr(_mine, "stream", None) is None:
        _mine.stream = CudaStream(device)
    return _mine.stream


def _copy(out: Tensor, data: Tensor) -> None:
    """Returns when the bytes are there."""
    _stream(out.device if out.is_cuda else data.device).copy(out, data)()
