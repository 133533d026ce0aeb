"""Weights moved by our kernels: copied and summed in one pass, past the cache (`native/copy.h`), or rearranged as an
arena holds them (`native/turn.h`)."""

from __future__ import annotations

import ctypes

import numpy as np
import xxhash
from torch import Tensor

from anchortp.errors import ConfigError
from anchortp.layout import PANEL_ROWS
from anchortp.transfer.work import Chunk

LINE_BYTES = 64  # of the cache: the kernels move whole ones


class Streamer:
    """`streamer(to, start, num_bytes)` copies between addresses, and returns the digest of what it stored, as
    `checksum.digest` takes it. The memory must be mapped, and not overlap. Other threads run meanwhile."""

    def __init__(self, library: str):
        """`library`: of `native.build_kernels`. Raises ConfigError if it is none of ours that this process can load."""
        try:
            functions = ctypes.CDLL(library)
            self._copy, self._shortest = functions.copy_summed, int(functions.shortest_summed())
            self._copy_segments, self._gather_segments = functions.copy_segments, functions.gather_segments
            self._columns, self._panels = functions.turn_columns, functions.turn_panels
        except (OSError, AttributeError) as error:
            raise ConfigError(f"the kernels in {library} cannot be loaded ({error}); use --kernels torch.") from error
        address, number = ctypes.c_void_p, ctypes.c_int64
        cut = (address, number, number, number, number, address)
        self._copy.argtypes, self._copy.restype = (address, address, number), ctypes.c_uint64
        self._copy_segments.argtypes = (address, *cut)
        self._gather_segments.argtypes = (address, number, ctypes.c_bool, *cut)
        self._columns.argtypes = (address, number, address, number, number)
        self._panels.argtypes = (address, address, number, number)
        for function in (self._copy_segments, self._gather_segments, self._columns, self._panels):
            function.restype = None

    def __call__(self, to: int, start: int, num_bytes: int) -> int:
        if num_bytes >= self._shortest:
            return self._copy(to, start, num_bytes)
        ctypes.memmove(to, start, num_bytes)
        return xxhash.xxh3_64_intdigest(ctypes.string_at(to, num_bytes)) or 1

    def chunk(self, chunk: Chunk, start: int, out: Tensor) -> list[int]:
        """Fills `out` (uint8, the bytes of a chunk of whole segments) from an address on. The segments' digests."""
        if chunk.region.shortest_segment_bytes < self._shortest:
            to, parts = out.data_ptr(), [(s.start - chunk.start, s.stop - s.start) for s in chunk.segments]
            return [self(to + skipped, start + skipped, size) for skipped, size in parts]
        sums = (ctypes.c_uint64 * chunk.num_segments)()
        self._copy_segments(start, *_cut(chunk, out), sums)
        return list(sums)

    def rows(self, chunk: Chunk, rows: np.ndarray, row_bytes: int, in_panels: bool, out: Tensor) -> list[int] | None:
        """As `chunk`, from rows of `row_bytes` each, of which `rows` (int64) has the addresses; `in_panels` they are
        rearranged (`layout.units`). None, and nothing is done, if the kernel is not made for their sizes."""
        if row_bytes % LINE_BYTES or chunk.region.shortest_segment_bytes < self._shortest:
            return None
        sums = (ctypes.c_uint64 * chunk.num_segments)()
        self._gather_segments(rows.ctypes.data, row_bytes, in_panels, *_cut(chunk, out), sums)
        return list(sums)

    def columns(self, source: Tensor, out: Tensor) -> bool:
        """`out` `[columns, rows]`, contiguous, = `source` `[rows, columns]` transposed, whose rows are apart; False,
        and nothing is done, unless both are of one dtype of two bytes an element."""
        if source.dtype != out.dtype or out.itemsize != 2 or source.stride(1) != 1:
            return False
        self._columns(source.data_ptr(), source.stride(0), out.data_ptr(), *source.shape)
        return True

    def panels(self, plain: Tensor, out: Tensor) -> None:
        """`plain` `[rows, hidden]`, bfloat16, contiguous, into `out`, of the same shape, in panels (`layout.units`)."""
        self._panels(plain.data_ptr(), out.data_ptr(), len(plain) // PANEL_ROWS, plain.shape[1] // 2)


def _cut(chunk: Chunk, out: Tensor) -> tuple[int, ...]:
    region = chunk.region
    return out.data_ptr(), chunk.num_bytes, chunk.first_byte, region.block_bytes, region.segment_bytes
