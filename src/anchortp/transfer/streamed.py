"""Copies from mapped memory and sums in one pass, past the cache (`native/copy.h`)."""

from __future__ import annotations

import ctypes

import xxhash
from torch import Tensor

from anchortp.errors import ConfigError
from anchortp.transfer.work import Chunk


class Streamer:
    """`streamer(to, start, num_bytes)` copies between addresses, and returns the xxh3_64 of what it stored, or 1 for 0
    as `checksum.digest` does. The memory must be mapped, and not overlap. Other threads run meanwhile."""

    def __init__(self, library: str):
        """`library`: of `native.build_kernels`. Raises ConfigError if it is none of ours that this process can load."""
        try:
            functions = ctypes.CDLL(library)
            self._copy, self._shortest = functions.copy_summed, int(functions.shortest_summed())
        except (OSError, AttributeError) as error:
            raise ConfigError(f"the kernels in {library} cannot be loaded ({error}); use --kernels torch.") from error
        self._copy.argtypes, self._copy.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), ctypes.c_uint64

    def __call__(self, to: int, start: int, num_bytes: int) -> int:
        if num_bytes >= self._shortest:
            return self._copy(to, start, num_bytes) or 1
        ctypes.memmove(to, start, num_bytes)
        return xxhash.xxh3_64_intdigest(ctypes.string_at(to, num_bytes)) or 1

    def chunk(self, chunk: Chunk, start: int, out: Tensor) -> list[int]:
        """Fills `out` (uint8, the bytes of a chunk of whole segments) from an address on. The segments' digests."""
        source, to = start - chunk.start, out.data_ptr() - chunk.start
        return [self(to + s.start, source + s.start, s.stop - s.start) for s in chunk.segments]
