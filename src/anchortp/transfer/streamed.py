"""Weights moved by our kernels: copied and summed in one pass, past the cache (`native/copy.h`), or rearranged as an
arena holds them (`native/turn.h`)."""

from __future__ import annotations

import ctypes

import xxhash
from torch import Tensor

from anchortp.errors import ConfigError
from anchortp.layout import PANEL_ROWS
from anchortp.transfer.work import Chunk


class Streamer:
    """`streamer(to, start, num_bytes)` copies between addresses, and returns the digest of what it stored, as
    `checksum.digest` takes it. The memory must be mapped, and not overlap. Other threads run meanwhile."""

    def __init__(self, library: str):
        """`library`: of `native.build_kernels`. Raises ConfigError if it is none of ours that this process can load."""
        try:
            functions = ctypes.CDLL(library)
            self._copy, self._shortest = functions.copy_summed, int(functions.shortest_summed())
            self._copy_segments = functions.copy_segments
            self._columns, self._panels = functions.turn_columns, functions.turn_panels
        except (OSError, AttributeError) as error:
            raise ConfigError(f"the kernels in {library} cannot be loaded ({error}); use --kernels torch.") from error
        self._copy.argtypes, self._copy.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), ctypes.c_uint64
        self._copy_segments.argtypes = (ctypes.c_void_p, ctypes.c_void_p, *(4 * (ctypes.c_int64,)), ctypes.c_void_p)
        self._columns.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        self._panels.argtypes = (ctypes.c_void_p, ctypes.c_void_p, *(3 * (ctypes.c_int64,)))
        self._copy_segments.restype = self._columns.restype = self._panels.restype = None

    def __call__(self, to: int, start: int, num_bytes: int) -> int:
        if num_bytes >= self._shortest:
            return self._copy(to, start, num_bytes)
        ctypes.memmove(to, start, num_bytes)
        return xxhash.xxh3_64_intdigest(ctypes.string_at(to, num_bytes)) or 1

    def chunk(self, chunk: Chunk, start: int, out: Tensor) -> list[int]:
        """Fills `out` (uint8, the bytes of a chunk of whole segments) from an address on. The segments' digests."""
        region, to = chunk.region, out.data_ptr()
        if region.shortest_segment_bytes < self._shortest:
            parts = ((s.start - chunk.start, s.stop - s.start) for s in chunk.segments)
            return [self(to + skipped, start + skipped, size) for skipped, size in parts]
        sums = (ctypes.c_uint64 * chunk.num_segments)()
        sizes = chunk.first_byte, chunk.num_bytes, region.block_bytes, region.segment_bytes
        self._copy_segments(to, start, *sizes, sums)
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
        self._panels(plain.data_ptr(), out.data_ptr(), len(plain) // PANEL_ROWS, PANEL_ROWS, plain.shape[1] // 2)
