"""Pages of a mapping made ready in bulk: one by one, as they are touched, they take longer than copying their bytes."""

from __future__ import annotations

import ctypes
import mmap

MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # Linux 5.14; they leave the bytes as they are
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def pages_to_write(address: int, num_bytes: int) -> bool:
    """Maps the pages of `[address, address + num_bytes)` for writing; False where the kernel is too old for it."""
    return _populate(address, num_bytes, MADV_POPULATE_WRITE)


def pages_to_read(address: int, num_bytes: int) -> bool:
    """Maps the pages for reading; False where the kernel is too old for it, or what they hold cannot be read."""
    return _populate(address, num_bytes, MADV_POPULATE_READ)


def _populate(address: int, num_bytes: int, advice: int) -> bool:
    first = address & -mmap.PAGESIZE
    return _libc.madvise(first, address + num_bytes - first, advice) == 0
