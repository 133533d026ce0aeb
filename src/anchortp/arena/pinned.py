"""Host memory that a GPU reads and writes where it lies: a memfd arena, mapped and registered with the driver.

No torch, no sockets. Registering ("pinning") commits the pages and keeps them in place, so it is done by windows, as
they are first used: an arena that reserves more than it uses takes no more memory than before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from anchortp.arena import dlpack
from anchortp.arena.intervals import Range
from anchortp.arena.memfd import MemfdArena, round_down
from anchortp.arena.vmm import VmmDriver

# Small enough that a step which meets a new window is late by milliseconds; a mirror of 64 GB has 4,096 of them.
WINDOW_BYTES = 16 << 20


class PinnedMapping:
    """[worker] A mapping of all of an arena in host memory, as memory of the driver's device.

    Tensors made by `dlpack` keep it alive; kernels on them reach over the GPU's link, so what they are good for is to
    be copied from and to. Only what `pin` was asked for may be touched through them. The registration goes before the
    mapping, once nothing on the device runs any more. The arena object is not needed after this one is made.
    """

    def __init__(self, arena: MemfdArena, driver: VmmDriver, *, window_bytes: int = WINDOW_BYTES):
        self._driver = driver
        self._memory = arena.map()
        self._window_bytes = window_bytes
        self._windows: set[int] = set()  # the first bytes of those that are registered
        self.reserved_bytes = arena.reserved_bytes
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))  # the buffer's export ends here

    def pin(self, ranges: Iterable[Range]) -> None:
        """Makes these bytes ready for the device. Raises StateError where the driver refuses."""
        for start, stop in ranges:
            for at in range(round_down(start, self._window_bytes), stop, self._window_bytes):
                if at not in self._windows:
                    size = min(self._window_bytes, self.reserved_bytes - at)
                    self._driver.pin(self.address + at, size)
                    self._windows.add(at)

    def dlpack(self) -> object:
        """A DLPack capsule of all `reserved_bytes` as uint8, for `from_dlpack`; consumed once."""
        return dlpack.capsule(self.address, self.reserved_bytes, self._driver.dlpack_device, owner=self)

    @property
    def pinned_bytes(self) -> int:
        return sum(min(self._window_bytes, self.reserved_bytes - at) for at in self._windows)

    def __del__(self) -> None:
        if self._windows:
            self._driver.synchronize()
        while self._windows:
            self._driver.unpin(self.address + self._windows.pop())
        self._memory.close()
