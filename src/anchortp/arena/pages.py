"""Mappings of shared memory, and their pages made ready, or made large, in bulk.

One by one, as they are touched, pages take longer than copying their bytes. A page table entry for each 4 KiB also
costs whoever streams through the memory: read on two cores, memory in huge pages gave 31 GB/s here, and 26 in small
ones. A memfd is small pages unless the system says otherwise for all of them; what lies in it can be moved into huge
ones later, under those who use it.

Source: mmap(2), madvise(2); https://docs.kernel.org/admin-guide/mm/transhuge.html.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import weakref
from pathlib import Path

_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # Linux 5.14; they leave the bytes as they are
_MADV_COLLAPSE = 25  # Linux 6.1
_PROT_NONE, _MAP_FIXED, _MAP_FAILED = 0, 0x10, ctypes.c_void_p(-1).value
_HUGE_PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def _read_huge_page_bytes() -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(_HUGE_PAGE_SIZE.read_text())
    return mmap.PAGESIZE


HUGE_PAGE_BYTES = _read_huge_page_bytes()  # a page's own size where the kernel has no larger ones


def map_shared(fd: int, num_bytes: int, *, writable: bool) -> ctypes.Array:
    """The first `num_bytes` of a file as a buffer, whose huge pages can be mapped as such: its address is a multiple of
    theirs. Unmapped when nobody holds it, or a view of it, any more. Raises OSError."""
    room = num_bytes + HUGE_PAGE_BYTES
    base = _mmap(None, room, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    address = base + -base % HUGE_PAGE_BYTES
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        _mmap(address, num_bytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd)
    except OSError:
        _libc.munmap(base, room)
        raise
    buffer = (ctypes.c_ubyte * num_bytes).from_address(address)
    # Not at exit: a thread may still be at work then, and the process's end unmaps everything.
    weakref.finalize(buffer, _libc.munmap, base, room).atexit = False
    return buffer


def pages_to_write(address: int, num_bytes: int) -> bool:
    """Maps the pages of `[address, address + num_bytes)` for writing; False where the kernel is too old for it."""
    return _advise(address, num_bytes, _MADV_POPULATE_WRITE) == 0


def pages_to_read(address: int, num_bytes: int) -> bool:
    """Maps the pages of `[address, address + num_bytes)` for reading; False where the kernel is too old for it, or they
    cannot be had (the storage fails, the file is shorter: to touch them would end the process)."""
    return _advise(address, num_bytes, _MADV_POPULATE_READ) == 0


def gather_pages(address: int) -> bool:
    """Moves the memory of a shared mapping at `address`, a multiple of `HUGE_PAGE_BYTES`, into one huge page: 0.8 ms of
    copying, during which whoever touches it waits. Holes in it would be filled, so there should be none.

    False if no huge page was free, or somebody held on to a page: another time it may work. Raises OSError where the
    kernel cannot do it at all.
    """
    code = _advise(address, HUGE_PAGE_BYTES, _MADV_COLLAPSE)
    if code in (0, errno.ENOMEM, errno.EAGAIN, errno.EBUSY):
        return code == 0
    raise OSError(code, f"memory cannot be gathered into huge pages: {os.strerror(code)}")


class MappedPages:
    """The first `num_bytes` of a file mapped for reading, at `address`; unmapped when nobody holds this any more."""

    def __init__(self, fd: int, num_bytes: int):
        self._bytes = map_shared(fd, num_bytes, writable=False)
        self.address = ctypes.addressof(self._bytes)

    def make_ready(self, start: int, stop: int) -> bool:
        """Maps the pages of `[start, stop)`, as `pages_to_read`."""
        return pages_to_read(self.address + start, stop - start)


def _advise(address: int, num_bytes: int, advice: int) -> int:
    """The error's number, 0 if there was none."""
    first = address & -mmap.PAGESIZE
    return 0 if _libc.madvise(first, address + num_bytes - first, advice) == 0 else ctypes.get_errno()


def _mmap(address: int | None, num_bytes: int, protection: int, flags: int, fd: int) -> int:
    found = _libc.mmap(address, num_bytes, protection, flags, fd, 0)
    if found == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"{num_bytes} bytes cannot be mapped: {os.strerror(code)}")
    return found
