"""The same collectives over NCCL, for ranks with a GPU each [worker].

`torch.distributed.ProcessGroupNCCL` is used as an object, without `init_process_group`. Its communicator is
non-blocking (`config.blocking = 0`), and what runs on the GPU is awaited by polling, with the region's abort flag and
the timeout. Two of torch's calls may wait for peers all the same: the first collective makes the communicator, so it is
called on a thread of its own; and the first of its kind connects, so no collective begins before every rank is at it.

Not run on GPUs yet but for a group of one; see docs/cuda.md. What cannot be aborted is not waited for: the worker is
fenced by SIGKILL, which costs it nothing but its process, as its memory is the anchor's.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, GroupAborted
from .region import Rendezvous, ShmRegion

_REDUCE, _GATHER, _BARRIER = range(3)  # the low bits of a tag
_NCCL_GRACE_S = 5.0  # NCCL's own timeout comes after ours, which knows who is missing

# torch's watchdog would end the process when a collective fails or hangs: that is the controller's to decide.
_QUIET_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


class NcclGroup:
    """A `Group` whose bytes go through NCCL. Sums are gathered and added in rank order, as everywhere.

    `store_path`: as for `GlooGroup`. `device`: this rank's GPU, no other rank's. The constructor waits for every
    rank. Raises ConfigError where torch was built without NCCL. `rendezvous` is for a group that takes turns with it.
    """

    def __init__(self, region: ShmRegion, rank: int, timeout_s: float, *, store_path: str, device: torch.device):
        if not dist.is_nccl_available():
            raise ConfigError("this torch has no NCCL; install its CUDA build, or choose --collectives peer or shm")
        os.environ.update(_QUIET_WATCHDOG | {"TORCH_NCCL_NONBLOCKING_TIMEOUT": str(math.ceil(timeout_s))})
        self.epoch = region.epoch
        self.rank = rank
        self.size = region.size
        self._region = region
        self._device = device
        self.rendezvous = self._rendezvous = Rendezvous(region, rank, timeout_s)
        self._process_group: dist.ProcessGroupNCCL | None = None
        try:
            self._arrive(_BARRIER)
            self._rendezvous.wait(_BARRIER)
            self._process_group = self._connect(store_path, timeout_s)
            self._gather_all(torch.zeros(1, device=device), _BARRIER, forming=True)
        except BaseException:
            self.close()  # nobody else has this object, and what is half made holds memory and a thread
            raise

    def _connect(self, store_path: str, timeout_s: float) -> dist.ProcessGroupNCCL:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s + _NCCL_GRACE_S)
        options.config.blocking = 0
        file_store = dist.FileStore(store_path, self.size)
        file_store.set_timeout(options._timeout)
        return dist.ProcessGroupNCCL(dist.PrefixStore(f"epoch-{self.epoch}", file_store), self.rank, self.size, options)

    def all_reduce(self, x: Tensor) -> Tensor:
        assert x.dtype in (torch.float32, torch.bfloat16), x.dtype
        if self.size == 1:
            self._rendezvous.begin()
            return x
        partials = self._gather_all(x.to(torch.float32).contiguous(), x.numel() << 2 | _REDUCE)
        total = partials[0]
        for part in partials[1:]:
            total.add_(part)
        return total.to(x.dtype)

    def gather(self, x: Tensor, cols: Sequence[int], root: int = 0) -> list[Tensor] | None:
        assert len(cols) == self.size and 0 <= root < self.size, (cols, root, self.size)
        assert x.shape == (x.shape[0], cols[self.rank]), (x.shape, cols, self.rank)
        padded = x.new_zeros(x.shape[0], max(cols))  # NCCL gathers equal sizes only
        padded[:, : x.shape[1]] = x
        outs = self._gather_all(padded, x.shape[0] * sum(cols) << 2 | _GATHER)
        if self.rank != root:
            return None
        return [out[:, :num_cols] for out, num_cols in zip(outs, cols, strict=True)]

    def barrier(self) -> None:
        self._gather_all(torch.zeros(1, device=self._device), _BARRIER)

    def _gather_all(self, x: Tensor, tag: int, *, forming: bool = False) -> list[Tensor]:
        group = self._process_group
        assert group is not None, "the group is closed"
        outs = [torch.empty_like(x) for _ in range(self.size)]
        self._arrive(tag)
        self._rendezvous.wait(tag)
        try:
            work = self._aside(group.allgather, [outs], [x]) if forming else group.allgather([outs], [x])
            self._rendezvous.poll(work.is_completed)
            work.wait()  # orders the current stream after it; nothing is left to wait for
        except dist.DistError as error:
            self._region.check()
            raise GroupAborted(self.epoch, f"NCCL lost a peer: {str(error).splitlines()[0]}") from error
        return outs

    def _aside(self, work: Callable[..., Any], *args: object) -> Any:
        """What `work(*args)` returns or raises. It runs on a thread of its own, which ends by NCCL's timeout at last;
        the wait for it ends by the flag too."""
        outcome: Future[Any] = Future()

        def run() -> None:
            try:
                outcome.set_result(work(*args))
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=run, name=f"nccl-form-{self.epoch}", daemon=True).start()
        self._rendezvous.poll(outcome.done)
        return outcome.result()

    def _arrive(self, tag: int) -> None:
        self._rendezvous.begin()
        self._rendezvous.arrive(tag)

    def close(self) -> None:
        if self._process_group is not None:
            # In a thread: aborting waits for the communicator's kernels to leave the GPU, and for who is making it.
            group, self._process_group = self._process_group, None
            threading.Thread(target=group.abort, name=f"nccl-abort-{self.epoch}", daemon=True).start()
