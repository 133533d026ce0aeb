"""Where chunks come from and where they go: the host's checkpoint, another device's arena, this device's arena.

Runs in a worker, on the threads of a load (`transfer.executor`). A source's errors are OSError and AnchorTPError; of
these StateError and WireError say that it will not answer again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from anchortp.arena import IntervalSet, MemfdArena
from anchortp.arena.intervals import Range
from anchortp.arena.pages import MappedPages, pages_to_write
from anchortp.errors import StateError
from anchortp.layout import EXPERT, ReplicatedTensor, UnitTensor
from anchortp.transfer.checkpoint import Checkpoint
from anchortp.transfer.checksum import PIECE_BYTES, digest, fill_summed
from anchortp.transfer.packed import PackedWeights
from anchortp.transfer.streamed import Streamer
from anchortp.transfer.work import Chunk


class Stopped(Exception):
    """The read was told to stop (`stopped` in `Source.read`)."""


def _raising(stopped: Callable[[], bool]) -> Callable[[], None]:
    def check() -> None:
        if stopped():
            raise Stopped

    return check


class Source(Protocol):
    """Holds the bytes of chunks. Several threads read at once."""

    def read(self, chunk: Chunk, out: Tensor, stopped: Callable[[], bool]) -> list[int] | None:
        """Fills `out` (uint8, the chunk's bytes). Where it waits for something, as between two reads from a file, it
        asks `stopped`, and raises Stopped; it writes nothing into `out` after it has returned or raised. A read that
        the kernel does not give back cannot be stopped.

        Returns the digests of the chunk's segments, if it took them from `out` on the way, where the bytes were still
        in the cache."""
        ...

    def check_unchanged(self) -> None:
        """Raises if bytes that were read since the source was opened may be others than they should."""
        ...

    def prefetch(self, chunk: Chunk) -> None:
        """The chunk will be read soon."""
        ...

    def close(self) -> None: ...


class HostSource:
    """The checkpoint's files, and what is kept of them in a better order; for one load. Keeps nothing open itself."""

    def __init__(self, checkpoint: Checkpoint, packed: PackedWeights | None = None):
        self._checkpoint = checkpoint
        self._packed = packed
        self._asked_for: set[tuple[str, int, int]] = set()  # of the disk, as a whole
        self._units = checkpoint.units
        config = self._units.config
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._row_bytes = config.hidden_size * config.dtype_bytes

    def read(self, chunk: Chunk, out: Tensor, stopped: Callable[[], bool]) -> list[int] | None:
        tensor = chunk.region.tensor
        if isinstance(tensor, ReplicatedTensor):
            self._checkpoint.read_replicated(tensor, chunk.region.copy, out.view(self._dtype).view(tensor.shape))
            return None
        check = _raising(stopped)
        if self._packed is not None and (digests := self._packed.read(chunk, out, check)):
            return digests
        return self._checkpoint.stream_rows(chunk, out) or self._read_rows(tensor, chunk, out, check)

    def _read_rows(self, tensor: UnitTensor, chunk: Chunk, out: Tensor, check: Callable[[], None]) -> list[int] | None:
        # Columns that become rows are read many at a time, and are not in the cache afterwards.
        piece_bytes = PIECE_BYTES if tensor.parts[0].axis == 0 else chunk.num_bytes
        view, digests = memoryview(out.numpy()), []
        for piece in chunk.pieces(piece_bytes):
            start, stop = piece[0].start - chunk.start, piece[-1].stop - chunk.start
            rows = out[start:stop].view(self._dtype).view(-1, self._units.config.hidden_size)
            first_row = (piece[0].index - chunk.region.first_segment) * chunk.region.segment_bytes // self._row_bytes
            self._checkpoint.read_rows(tensor, chunk.region.copy, piece[0].unit, first_row, rows, check)
            digests += [digest(view[s.start - chunk.start : s.stop - chunk.start]) for s in piece]
        if not digests:
            self._read_part(tensor, chunk, out)
        return digests or None

    def _read_part(self, tensor: UnitTensor, chunk: Chunk, out: Tensor) -> None:
        first_row, num_rows, skipped = self._rows(tensor, chunk)
        if num_rows * self._row_bytes == chunk.num_bytes:
            rows = out.view(self._dtype).view(num_rows, -1)
            self._checkpoint.read_rows(tensor, chunk.region.copy, chunk.unit, first_row, rows)
            return
        # A part of a unit that begins or ends within a row or panel: rare, and at most one more at each end.
        rows = torch.empty(num_rows, self._row_bytes // self._dtype.itemsize, dtype=self._dtype)
        self._checkpoint.read_rows(tensor, chunk.region.copy, chunk.unit, first_row, rows)
        out.copy_(rows.view(torch.uint8).flatten()[skipped : skipped + chunk.num_bytes])

    def check_unchanged(self) -> None:
        self._checkpoint.check_unchanged()

    def prefetch(self, chunk: Chunk) -> None:
        tensor = chunk.region.tensor
        if self._packed is not None and self._packed.prefetch(chunk):
            return
        if not isinstance(tensor, ReplicatedTensor):
            if tensor.parts[0].axis == 1 and not self._is_first(tensor, chunk):
                return
            first_row, num_rows, _ = self._rows(tensor, chunk)
            self._checkpoint.prefetch(tensor, chunk.region.copy, chunk.unit, first_row, num_rows)

    def close(self) -> None:
        pass

    def _is_first(self, tensor: UnitTensor, chunk: Chunk) -> bool:
        """Whether no other chunk of its matrix was asked for in this load: with one, all of it is."""
        matrix = tensor.key, chunk.region.copy, chunk.unit if tensor.family == EXPERT else 0
        is_first = matrix not in self._asked_for
        self._asked_for.add(matrix)
        return is_first

    def _rows(self, tensor: UnitTensor, chunk: Chunk) -> tuple[int, int, int]:
        """The rows that a chunk touches, in whole panels where there are some: the first, how many, and how many of
        their bytes lie before the chunk."""
        piece_bytes = self._units.piece_bytes(tensor)
        rows_each = piece_bytes // self._row_bytes
        first, skipped = divmod(chunk.first_byte, piece_bytes)
        num_pieces = -(-(skipped + chunk.num_bytes) // piece_bytes)
        return first * rows_each, num_pieces * rows_each, skipped


class PeerSource:
    """Another device's weights arena, or this device's own (a unit that changes its slot).

    With a `stream` it is read through a mapping, whose pages are made ready a chunk at a time; else through its
    descriptor: that needs no page, but takes 1.4 times as long, and half as many bytes more cross the memory bus.
    `is_gone`: whether the arena's anchor has gone; its memory is not to be believed then.
    """

    def __init__(
        self,
        device: str,
        arena: MemfdArena,
        *,
        is_gone: Callable[[], bool],
        on_close: Callable[[], None],
        stream: Streamer | None = None,
    ):
        self._device = device
        self._arena = arena
        self._is_gone = is_gone
        self._on_close = on_close
        self._stream = stream
        self._pages = MappedPages(arena.fd, arena.reserved_bytes) if stream is not None else None

    def read(self, chunk: Chunk, out: Tensor, stopped: Callable[[], bool]) -> list[int] | None:
        digests = self._streamed(chunk, out)
        if digests is None:
            view = memoryview(out.numpy())
            digests = fill_summed(self._arena.fd, chunk.source_start, chunk, view, _raising(stopped))
        self.check_unchanged()
        return digests

    def _streamed(self, chunk: Chunk, out: Tensor) -> list[int] | None:
        """As `fill_summed`, through the mapping; None if it is a part of a segment, or its pages cannot be had."""
        pages, start = self._pages, chunk.source_start
        if pages is None or not chunk.is_whole or not pages.make_ready(start, start + chunk.num_bytes):
            return None
        assert self._stream is not None
        return self._stream.chunk(chunk, pages.address + start, out)

    def check_unchanged(self) -> None:
        if self._is_gone():
            raise StateError(f"the anchor of {self._device} went away while its units were copied; load them elsewhere")

    def prefetch(self, chunk: Chunk) -> None:
        pass

    def close(self) -> None:
        self._pages = None
        self._on_close()


def map_pages(buffer: Tensor, start: int, stop: int) -> None:
    """Maps the pages of `[start, stop)` of an arena's mapping for writing, in bulk.

    Where the kernel is too old for it, they are mapped one by one as they are written. Measured, CPU time of 128 MB
    with allocation and the copy: 79 ms; with MADV_POPULATE_READ 101, with no mapping ahead 88, without allocation ahead
    93, with neither 95; and 8 where all of it was done before (`engine.plane.StatePlane.commit_ahead`).
    """
    pages_to_write(buffer.data_ptr() + start, stop - start)


class Destination:
    """One of this device's arenas. `buffer`: 1-D uint8, a mapping of all of it."""

    def __init__(self, arena: MemfdArena, buffer: Tensor):
        self._arena = arena
        self._buffer = buffer
        self._view = memoryview(buffer.numpy())
        self._prepared = IntervalSet()
        self._lock = threading.Lock()

    def prepare(self, start: int, stop: int) -> None:
        """Allocates and maps the pages of `[start, stop)` in bulk, once: page by page, as they are written, would
        take longer than the copy. Raises StateError when there is no memory."""
        with self._lock:
            if not self._prepared.add(start, stop):
                return
        self._arena.allocate(start, stop)
        map_pages(self._buffer, start, stop)

    def prepare_by_and_by(self, ranges: Sequence[Range], num_steps: int) -> Callable[[], None]:
        """Prepares a share of the ranges each time that it is called, all of them in `num_steps` calls."""
        each, left = -(-len(ranges) // num_steps), deque(ranges)

        def step() -> None:
            for _ in range(each):
                try:
                    start, stop = left.popleft()
                except IndexError:  # that was all, or another thread took it
                    return
                self.prepare(start, stop)

        return step

    def tensor(self, start: int, stop: int) -> Tensor:
        return self._buffer[start:stop]

    def view(self, start: int, stop: int) -> memoryview:
        return self._view[start:stop]
