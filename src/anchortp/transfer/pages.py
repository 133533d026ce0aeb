"""Pages of a mapping made ready in bulk: one by one, as they are touched, they take longer than copying their bytes."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # Linux 5.14; they leave the bytes as they are
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def pages_to_write(address: int, num_bytes: int) -> bool:
    """Maps the pages of `[address, address + num_bytes)` for writing; False where the kernel is too old for it."""
    return _populate(address, num_bytes, MADV_POPULATE_WRITE)


class MappedPages:
    """The first `num_bytes` of a file mapped for reading, at `address`; unmapped when nobody holds this any more."""

    def __init__(self, fd: int, num_bytes: int):
        self._bytes = np.frombuffer(mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ), np.uint8)
        self.address: int = self._bytes.ctypes.data

    def make_ready(self, start: int, stop: int) -> bool:
        """Maps the pages of `[start, stop)`; False where the kernel is too old for it, or they cannot be had (the
        storage fails, the file is shorter: to touch them would end the process)."""
        return _populate(self.address + start, stop - start, MADV_POPULATE_READ)


def _populate(address: int, num_bytes: int, advice: int) -> bool:
    first = address & -mmap.PAGESIZE
    return _libc.madvise(first, address + num_bytes - first, advice) == 0
