"""Memory behind descriptors: what a device's memory is made of. No torch, no sockets.

- `intervals`: sets of half-open byte ranges, for accounts of what is committed
- `memfd`: an arena in host memory: reserve the full size, commit on use, grow, give back
- `vmm`: an arena of chunks, through a GPU driver's virtual-memory calls; `cuda` makes the calls, `sim` answers
  them from host memory
- `pinned`: an arena in host memory, mapped for a GPU
- `dlpack`: a tensor over given memory
"""

from collections.abc import Callable

from anchortp.arena.intervals import IntervalSet
from anchortp.arena.memfd import PAGE_BYTES, MemfdArena, round_down, round_up
from anchortp.arena.pinned import PinnedMapping
from anchortp.arena.vmm import ChunkPool, OutOfPhysicalMemory, VmmArena, VmmDriver, VmmMapping
from anchortp.devices import Device

__all__ = [
    "PAGE_BYTES",
    "ChunkPool",
    "IntervalSet",
    "MemfdArena",
    "OutOfPhysicalMemory",
    "PinnedMapping",
    "VmmArena",
    "VmmDriver",
    "VmmMapping",
    "driver_of",
    "round_down",
    "round_up",
]


def driver_of(device: Device) -> Callable[[], VmmDriver]:
    """What opens the driver of a device whose arenas are chunked. Opening raises ConfigError where there is none."""
    assert device.is_chunked, device
    if device.kind == "sim":
        from anchortp.arena.sim import SimVmm

        return SimVmm
    from anchortp.arena.cuda import open_cuda

    return lambda: open_cuda(device.index)
