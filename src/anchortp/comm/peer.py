"""Collectives through device memory that every rank maps, and through host memory where they cannot [worker].

For ranks that share a GPU, which NCCL refuses, and for small messages between GPUs that can read each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .region import Rendezvous, ShmRegion
from .shm import TWO_PHASE_FROM, ShmGroup

Mark = Callable[[], Callable[[], bool]]


def mark_stream() -> Callable[[], bool]:
    """Marks the present end of the current CUDA stream; the result says whether the device has got there."""
    event = torch.cuda.Event()
    event.record()
    return event.query


class PeerGroup(ShmGroup):
    """An `ShmGroup` whose slots are device memory; the region's flags say, on the host, what they hold.

    `memory[rank]`: 1-D uint8, `2 * region.slot_bytes` or more, on `memory[self.rank].device` or readable from there;
    every rank passes the same memory, in rank order. It must stay mapped until `close`.

    A rank announces what it wrote when the device has written it: `mark` makes a mark in the device's queue, and the
    group polls it as it polls its peers, so an abort or the timeout ends that wait too. The same mark covers what the
    rank has read of the collective before, which is what `Rendezvous` asks of an arrival. No kernel ever waits for
    another rank's: on one shared GPU the two might not run at the same time.
    """

    def __init__(
        self,
        region: ShmRegion,
        rank: int,
        timeout_s: float,
        memory: Sequence[Tensor],
        *,
        mark: Mark = mark_stream,
        two_phase_from: int = TWO_PHASE_FROM,
        rendezvous: Rendezvous | None = None,
    ):
        assert len(memory) == region.size, (len(memory), region.size)
        self._memory = memory
        self._mark = mark
        super().__init__(region, rank, timeout_s, two_phase_from=two_phase_from, rendezvous=rendezvous)

    def _open_slots(self, region: ShmRegion) -> list[list[Tensor]]:
        size = region.slot_bytes
        return [[part[parity * size : (parity + 1) * size] for part in self._memory] for parity in range(2)]

    def _arrive(self, tag: int) -> None:
        reached = self._mark()
        if not reached():
            self._rendezvous.poll(reached)
        super()._arrive(tag)

    def close(self) -> None:
        super().close()
        self._memory = ()


class StagedGroup:
    """A `Group` for tensors of a device, over one for tensors of the host, to which they are copied.

    Works wherever there is a host; two copies and a wait for the device per collective. `gather` returns copies.
    """

    def __init__(self, host: ShmGroup):
        """Takes over `host`, which it closes."""
        self.epoch, self.rank, self.size = host.epoch, host.rank, host.size
        self._host = host
        self.barrier = host.barrier
        self.close = host.close

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._host.all_reduce(x.cpu()).to(x.device)

    def gather(self, x: Tensor, cols: Sequence[int], root: int = 0) -> list[Tensor] | None:
        parts = self._host.gather(x.cpu(), cols, root)
        return None if parts is None else [part.to(x.device) for part in parts]
