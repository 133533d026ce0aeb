"""The virtual-memory calls of a GPU's driver, answered from host memory: devices `sim:0`, `sim:0/1`.

A chunk is a memfd, an address range a private reservation, `map` an mmap over a piece of it. The rules are a GPU's:
a chunk crosses processes by descriptor alone, must be mapped before it is used and allowed before it is touched (a
process that forgets dies), and stays alive as long as anyone holds a handle, a mapping or a descriptor of it.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from anchortp.arena import dlpack
from anchortp.arena.vmm import OutOfPhysicalMemory
from anchortp.devices import PAGE_BYTES
from anchortp.errors import StateError

_PROT_NONE, _PROT_RW = 0, mmap.PROT_READ | mmap.PROT_WRITE
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # not writable, so it counts against no limit
_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class SimVmm:
    """`VmmDriver` over memfds. A handle is the number of a descriptor of this process.

    `capacity_bytes`: what this process may create before the "device" is full; None for no end.
    """

    def __init__(self, *, granule_bytes: int = PAGE_BYTES["sim"], capacity_bytes: int | None = None):
        assert granule_bytes % mmap.PAGESIZE == 0, granule_bytes
        self.granule_bytes = granule_bytes
        self.dlpack_device = (dlpack.CPU, 0)
        self._room_bytes = capacity_bytes
        self.pinned: dict[int, int] = {}  # host memory: address -> size

    def create(self) -> int:
        if self._room_bytes is not None:
            if self._room_bytes < self.granule_bytes:
                raise OutOfPhysicalMemory("the simulated device is full; give it more, or commit less")
            self._room_bytes -= self.granule_bytes
        handle = os.memfd_create("anchortp:sim", os.MFD_CLOEXEC)
        os.ftruncate(handle, self.granule_bytes)
        return handle

    def export(self, handle: int) -> int:
        return os.dup(handle)

    def import_(self, fd: int) -> int:
        if os.fstat(fd).st_size != self.granule_bytes:
            raise StateError(
                f"descriptor {fd} is no chunk of {self.granule_bytes} bytes; hand over what an anchor made"
            )
        return os.dup(fd)

    def release(self, handle: int) -> None:
        os.close(handle)

    def reserve(self, num_bytes: int) -> int:
        return self._mmap(None, num_bytes, _PROT_NONE, _RESERVED, -1)

    def free(self, address: int, num_bytes: int) -> None:
        self._check(_libc.munmap(address, num_bytes))

    def map(self, address: int, handle: int) -> None:
        self._mmap(address, self.granule_bytes, _PROT_NONE, mmap.MAP_SHARED | _MAP_FIXED, handle)

    def unmap(self, address: int) -> None:
        self._mmap(address, self.granule_bytes, _PROT_NONE, _RESERVED | _MAP_FIXED, -1)

    def allow(self, address: int, num_bytes: int) -> None:
        self._check(_libc.mprotect(address, num_bytes, _PROT_RW))

    def fill(self, address: int, num_bytes: int, byte: int) -> None:
        ctypes.memset(address, byte, num_bytes)

    def pin(self, address: int, num_bytes: int) -> None:
        """Refuses what a driver refuses: odd ends, and memory that is pinned already."""
        if address % mmap.PAGESIZE or num_bytes % mmap.PAGESIZE or num_bytes <= 0:
            raise StateError(f"host memory is pinned in whole pages, not {num_bytes} bytes at {address:#x}")
        if any(address < at + size and at < address + num_bytes for at, size in self.pinned.items()):
            raise StateError(f"{num_bytes} bytes at {address:#x} are pinned already, in part or all of them")
        self.pinned[address] = num_bytes

    def unpin(self, address: int) -> None:
        if self.pinned.pop(address, None) is None:
            raise StateError(f"nothing is pinned at {address:#x}")

    def synchronize(self) -> None:
        """Everything here is done when its call returns."""

    def _mmap(self, address: int | None, num_bytes: int, prot: int, flags: int, fd: int) -> int:
        result = _libc.mmap(address, num_bytes, prot, flags, fd, 0)
        self._check(-1 if result == _FAILED else 0)
        return result

    @staticmethod
    def _check(result: int) -> None:
        if result != 0:
            reason = os.strerror(ctypes.get_errno())
            raise StateError(f"the simulated device refused: {reason}; reserve or commit less")
