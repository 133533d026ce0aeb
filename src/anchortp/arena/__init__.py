"""Memory behind descriptors: what a device's memory is made of. No torch, no sockets.

- `intervals`: sets of half-open byte ranges, for accounts of what is committed
- `memfd`: an arena in host memory: reserve the full size, commit on use, grow, give back
"""

from anchortp.arena.intervals import IntervalSet
from anchortp.arena.memfd import PAGE_BYTES, MemfdArena, round_down, round_up

__all__ = ["PAGE_BYTES", "IntervalSet", "MemfdArena", "round_down", "round_up"]
