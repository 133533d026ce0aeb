"""Small messages one way and large ones another [worker]."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .group import Group


class MixedGroup:
    """A `Group` of two over one region and one `Rendezvous`: a collective goes to `small` if what a rank brings to it
    takes up to `max_small_bytes`, else to `large`. Both give the same bits, so it shows in nothing but time.

    For GPUs that can use each other's memory: a `PeerGroup` saves NCCL's launch and protocol where there is little to
    move. Its slots are free when they are written again, as `Rendezvous` argues: a rank announces a collective of
    `large` before its device has read what it wanted of the one before, but its peers leave that collective only when
    the device has got to it.
    """

    def __init__(self, small: Group, large: Group, max_small_bytes: int):
        """Takes over both, which it closes."""
        assert (small.epoch, small.rank, small.size) == (large.epoch, large.rank, large.size)
        self.epoch, self.rank, self.size = small.epoch, small.rank, small.size
        self._small, self._large, self._max_small_bytes = small, large, max_small_bytes
        self.barrier = small.barrier

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._for(4 * x.numel()).all_reduce(x)  # both move and sum it in float32

    def gather(self, x: Tensor, cols: Sequence[int], root: int = 0) -> list[Tensor] | None:
        return self._for(x.shape[0] * max(cols) * x.element_size()).gather(x, cols, root)

    def _for(self, num_bytes: int) -> Group:
        """The same on every rank: shapes and `cols` are."""
        return self._small if num_bytes <= self._max_small_bytes else self._large

    def close(self) -> None:
        self._small.close()
        self._large.close()
