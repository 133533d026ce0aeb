"""What a worker does for its next load, and its next steps, when it has nothing better to do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

from torch import Tensor

from anchortp.arena import IntervalSet, round_down, round_up
from anchortp.arena.pages import HUGE_PAGE_BYTES, gather_pages
from anchortp.layout import EVERY_FAMILY, Shard, WeightAddresses

PACE = 0.1  # share of the time that it takes of a worker that serves


class IdleWork:
    """A thread that takes a few milliseconds' steps, `pace` of the time, until there are no more."""

    def __init__(self, steps: Iterator[None], pace: float = PACE):
        self._steps = steps
        self._pace = pace
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="idle-work", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns once nothing is at work any more (within a step)."""
        self._stopped.set()
        self.join()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        began_s = time.monotonic()
        for _ in self._steps:
            self._stopped.wait((time.monotonic() - began_s) * (1.0 / self._pace - 1.0))
            if self._stopped.is_set():
                return
            began_s = time.monotonic()


def huge_pages(addresses: WeightAddresses, shard: Shard, buffer: Tensor) -> Iterator[None]:
    """Moves what a shard holds into huge pages, one at a step.

    `buffer`: 1-D uint8, a mapping of the weights arena (`transfer.tensors.tensor_of`). Memory that is not all of the
    shard's stays as it is, so no byte more is committed. The bytes stay, and so do their addresses, here and in other
    processes; when a part is given back, the kernel cuts the page up again.
    """
    for start in huge_extents(addresses, shard):
        try:
            gather_pages(buffer.data_ptr() + start)
        except OSError as error:
            logging.getLogger(__name__).info("%s", error)
            return
        yield


def huge_extents(addresses: WeightAddresses, shard: Shard) -> list[int]:
    """Where huge pages begin that hold nothing but committed pages of the shard, in bytes of the weights arena."""
    held = IntervalSet()
    for family in EVERY_FAMILY:
        for start, stop in addresses.slot_ranges(family, 0, len(shard[family])):
            held.add(round_down(start), round_up(stop))
    starts = (range(round_up(a, HUGE_PAGE_BYTES), round_down(b, HUGE_PAGE_BYTES), HUGE_PAGE_BYTES) for a, b in held)
    return [start for extents in starts for start in extents]
