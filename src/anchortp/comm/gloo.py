"""The same collectives over gloo, kept as a switch to compare with [worker].

`torch.distributed.ProcessGroupGloo` is used as an object; `init_process_group` and its global group are not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import GroupAborted
from .region import Rendezvous, ShmRegion

_REDUCE, _GATHER, _BARRIER = range(3)  # the low bits of a tag

# Gloo's own timeout comes after ours, which knows who is missing.
_GLOO_GRACE_S = 1.0


class GlooGroup:
    """A `Group` whose bytes go through gloo over loopback.

    The region serves as the epoch's control block (progress, abort flag); its slots stay unused. `store_path`
    is a file that does not exist yet, the same for every rank, in a directory that whoever chose it removes.
    The constructor waits for every rank. A peer that dies shows as `GroupAborted` before the flag is raised.

    Gloo cannot be interrupted: after an abort, a pending operation ends, in a thread of its own, when the
    peer that it waits for is gone, or else a little after `timeout_s`.
    """

    def __init__(self, region: ShmRegion, rank: int, timeout_s: float, *, store_path: str):
        self.epoch = region.epoch
        self.rank = rank
        self.size = region.size
        self._region = region
        self._rendezvous = Rendezvous(region, rank, timeout_s)
        self._process_group: dist.ProcessGroupGloo | None = None
        # Forming the group blocks without an abort flag, so wait for everybody first.
        self._arrive(_BARRIER)
        self._rendezvous.wait(_BARRIER)
        self._process_group = self._connect(store_path, timeout_s)

    def _connect(self, store_path: str, timeout_s: float) -> dist.ProcessGroupGloo:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout_s + _GLOO_GRACE_S)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        store = dist.PrefixStore(f"epoch-{self.epoch}", dist.FileStore(store_path, self.size))
        try:
            return dist.ProcessGroupGloo(store, self.rank, self.size, options)
        except RuntimeError as error:
            raise self._peer_lost(error) from error

    def all_reduce(self, x: Tensor) -> Tensor:
        """Gathers everybody's partial and sums here: gloo's own all-reduce sums in another order."""
        assert x.dtype in (torch.float32, torch.bfloat16), x.dtype
        partial = x.to(torch.float32).contiguous()
        partials = [torch.empty_like(partial) for _ in range(self.size)]
        self._arrive(x.numel() << 2 | _REDUCE)
        self._finish(lambda group: group.allgather([partials], [partial]))
        total = partials[0]
        for part in partials[1:]:
            total.add_(part)
        return total.to(x.dtype)

    def gather(self, x: Tensor, cols: Sequence[int], root: int = 0) -> list[Tensor] | None:
        assert len(cols) == self.size and 0 <= root < self.size, (cols, root, self.size)
        assert x.shape == (x.shape[0], cols[self.rank]), (x.shape, cols, self.rank)
        padded = x.new_zeros(x.shape[0], max(cols))  # gloo gathers equal sizes only
        padded[:, : x.shape[1]] = x
        outs = [torch.empty_like(padded) for _ in cols] if self.rank == root else []
        options = dist.GatherOptions()
        options.rootRank = root
        self._arrive(x.shape[0] * sum(cols) << 2 | _GATHER)
        targets = [[_as_bytes(out) for out in outs]] if outs else []
        self._finish(lambda group: group.gather(targets, [_as_bytes(padded)], options))
        if self.rank != root:
            return None
        return [out[:, :num_cols] for out, num_cols in zip(outs, cols, strict=True)]

    def barrier(self) -> None:
        self._arrive(_BARRIER)
        self._finish(lambda group: group.barrier())

    def _arrive(self, tag: int) -> None:
        self._rendezvous.begin()
        self._rendezvous.arrive(tag)

    def _finish(self, start: Callable[[dist.ProcessGroupGloo], dist.Work]) -> None:
        assert self._process_group is not None, "the group is closed"
        try:
            work = start(self._process_group)
            self._rendezvous.poll(work.is_completed)
            work.wait()
        except RuntimeError as error:
            raise self._peer_lost(error) from error

    def _peer_lost(self, error: RuntimeError) -> GroupAborted:
        self._region.check()
        return GroupAborted(self.epoch, f"gloo lost a peer: {str(error).splitlines()[0]}")

    def close(self) -> None:
        if self._process_group is not None:
            # Its destructor waits for pending operations, and there is no other way to end them.
            holder = [self._process_group]
            self._process_group = None
            threading.Thread(target=holder.clear, name=f"gloo-close-{self.epoch}", daemon=True).start()


def _as_bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)
