"""What every group can do. The contract tests of `tests/procs/test_comm_groups.py` hold for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Group(Protocol):
    """The ranks of one epoch, as seen by one of them [worker].

    Every rank calls the same collectives in the same order with the same shapes (`gather`: the same `cols`).
    Every method but `close` raises `GroupAborted` as soon as the epoch's abort flag is up, and
    `GroupTimeout`, which names the ranks that did not arrive, when it has waited for `timeout_s`. After
    either the group is good for nothing but `close`. One thread calls it. No gradient flows through.
    """

    epoch: int
    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The elementwise sum of every rank's `x` (any shape, float32 or bfloat16), in `x`'s shape and dtype.

        Summed in float32 in the order of the ranks and rounded once, so every rank of every kind of group
        gets the same bits. `x` may be overwritten and may be what is returned: go on with the result alone.
        """
        ...

    def gather(self, x: Tensor, cols: Sequence[int], root: int = 0) -> list[Tensor] | None:
        """Brings every rank's `x` [rows, cols[rank]] to `root`; the other ranks get `None`.

        `rows` and dtype (any) are the same on every rank; `cols` may differ from rank to rank and may be 0.
        The tensors that root gets may be views of shared memory: they hold until its next collective. A rank
        that is not the root may return before the others have arrived.
        """
        ...

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        ...

    def close(self) -> None:
        """Lets go of memory, threads and connections without waiting for anyone. May be called again."""
        ...
