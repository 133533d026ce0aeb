"""The same collectives over NCCL, for ranks with a GPU each [worker].

`torch.distributed.ProcessGroupNCCL` is used as an object, without `init_process_group`. Its communicator is
non-blocking (`config.blocking = 0`), and what runs on the GPU is awaited by polling, with the region's abort flag and
the timeout. Two of torch's calls may wait for peers all the same: the first collective makes the communicator, so it is
called on a thread of its own; and the first of its kind connects, so no collective begins before every rank is at it.

So no kernel of NCCL's waits for a rank that has died, unless it died within a collective, and after a loss the
communicator is mostly idle: it is kept through the change of epochs, and shrunk. torch's `shrink_group` wants a group
that is registered with the process; what it calls does not, and is called here: `Backend.shrink`.

Not run on GPUs yet but for a group of one; see docs/cuda.md. What cannot be aborted is not waited for: the worker is
fenced by SIGKILL, which costs it nothing but its process, as its memory is the anchor's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, GroupAborted
from .region import Rendezvous, ShmRegion

log = logging.getLogger("anchortp.engine")

_REDUCE, _GATHER, _BARRIER = range(3)  # the low bits of a tag
DERIVE_S = 10.0  # for a communicator out of an old one, together with its first collective; the coordinator waits 30
_POLL_S = 0.001
_SHRINK_ABORT = 1  # nccl.h, NCCL_SHRINK_ABORT: operations of the parent that may be under way are ended first
_NCCL_GRACE_S = 5.0  # NCCL's own timeout comes after ours, which knows who is missing

# torch's watchdog would end the process when a collective fails or hangs: that is the controller's to decide.
_QUIET_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Communicator:
    """Idle, and made in `epoch` by the workers of `members`, which are its ranks."""

    process_group: dist.ProcessGroupNCCL
    epoch: int
    members: tuple[str, ...]


class Kept:
    """What the last group of this process has left, for the next one to go on with. It is passed in, as a group is."""

    def __init__(self) -> None:
        self._communicator: Communicator | None = None

    def put(self, communicator: Communicator) -> None:
        assert self._communicator is None, "the group before was not closed"
        self._communicator = communicator

    def take(self) -> Communicator | None:
        communicator, self._communicator = self._communicator, None
        return communicator


class NcclGroup:
    """A `Group` whose bytes go through NCCL. Sums are gathered and added in rank order, as everywhere.

    `store_path`: as for `GlooGroup`. `device`: this rank's GPU, no other rank's. `members`: the names of all ranks'
    devices. The constructor waits for every rank. Raises ConfigError where torch was built without NCCL. `rendezvous`
    is for a group that takes turns with it.

    `kept`: what the worker's group before this one left. If all ranks have the same communicator there, this group goes
    on with it, shrunk by the ranks that are gone; else, and if that fails for any rank, a new one is made. A group that
    is closed while no collective is under way leaves its communicator there, in the place of an abort.
    """

    def __init__(
        self,
        region: ShmRegion,
        rank: int,
        timeout_s: float,
        *,
        store_path: str,
        device: torch.device,
        members: Sequence[str],
        kept: Kept,
    ):
        assert len(members) == region.size, (members, region.size)
        if not dist.is_nccl_available():
            raise ConfigError("this torch has no NCCL; install its CUDA build, or choose --collectives peer or shm")
        os.environ.update(_QUIET_WATCHDOG | {"TORCH_NCCL_NONBLOCKING_TIMEOUT": str(math.ceil(timeout_s))})
        self.epoch = region.epoch
        self.rank = rank
        self.size = region.size
        self._region = region
        self._device = device
        self._members = tuple(members)
        self._kept = kept
        self.rendezvous = self._rendezvous = Rendezvous(region, rank, timeout_s)
        self._process_group: dist.ProcessGroupNCCL | None = None
        self._made_in = self.epoch  # the communicator
        self._is_idle = False
        try:
            if not self._goes_on_with(kept.take()):
                self._process_group = self._connect(store_path, timeout_s)
                self._gather_all(self._own(), _BARRIER, forming=True)
        except BaseException:
            self._is_idle = False
            self.close()  # nobody else has this object, and what is half made holds memory and a thread
            raise

    def _goes_on_with(self, before: Communicator | None) -> bool:
        """Whether all ranks do, each with its own part of one communicator; else `before` is aborted."""
        why_not = "this worker has none" if before is None else self._why_not(before)
        try:
            offers = self._rendezvous.exchange(0 if before is None or why_not else before.epoch + 1)
        except BaseException:
            _abort(before and before.process_group)
            raise
        if before is not None and 0 < min(offers) == max(offers):
            return self._derives_from(before)
        if max(offers) or before is not None:
            why_not = why_not or "other workers have another one, or none"
            log.warning("epoch %d: a new NCCL communicator is made, none derived: %s", self.epoch, why_not)
        _abort(before and before.process_group)
        return False

    def _why_not(self, before: Communicator) -> str:
        staying = tuple(member for member in before.members if member in self._members)
        if staying != self._members:
            return "there are other ranks, or in another order"
        can_shrink = getattr(before.process_group, "supports_shrinking", False)
        return "" if can_shrink or staying == before.members else "this NCCL cannot shrink one (2.27 can)"

    def _derives_from(self, before: Communicator) -> bool:
        """All ranks shrink it (if any are gone), try the result, and say whether it works: within a bound, as one that
        fails leaves the others waiting inside of NCCL."""
        gone = [rank for rank, member in enumerate(before.members) if member not in self._members]
        end_s = time.monotonic() + DERIVE_S
        outcome = self._aside(_derived, before.process_group, gone, self._outs(), self._own(), end_s)
        why_not = ""
        try:
            self._rendezvous.poll(lambda: outcome.done() or time.monotonic() > end_s)
            try:
                outcome.result(0.0)
            except Exception as error:
                why_not = str(error).partition("\n")[0] or f"it took longer than {DERIVE_S} s"
            works = all(self._rendezvous.exchange(not why_not))
        except BaseException:
            outcome.add_done_callback(lambda made: _abort(before.process_group, made))
            raise
        if not works:
            log.warning(
                "epoch %d: a new NCCL communicator is made; the one of epoch %d cannot be derived from: %s",
                self.epoch,
                before.epoch,
                why_not or "another rank failed",
            )
            outcome.add_done_callback(lambda made: _abort(before.process_group, made))
            return False
        self._process_group, self._is_idle = outcome.result(), True
        if gone:
            _abort(before.process_group)
        else:
            self._made_in = before.epoch
        log.info("epoch %d: NCCL's communicator of epoch %d goes on, without %s", self.epoch, before.epoch, gone)
        return True

    def _own(self) -> Tensor:
        return torch.zeros(1, device=self._device)

    def _outs(self) -> list[Tensor]:
        return [self._own() for _ in range(self.size)]

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
        self._gather_all(self._own(), _BARRIER)

    def _gather_all(self, x: Tensor, tag: int, *, forming: bool = False) -> list[Tensor]:
        group = self._process_group
        assert group is not None, "the group is closed"
        outs = [torch.empty_like(x) for _ in range(self.size)]
        self._arrive(tag)
        self._rendezvous.wait(tag)
        self._is_idle = False
        try:
            work = self._wait_aside(group.allgather, [outs], [x]) if forming else group.allgather([outs], [x])
            self._rendezvous.poll(work.is_completed)
            work.wait()  # orders the current stream after it; nothing is left to wait for
        except dist.DistError as error:
            self._region.check()
            raise GroupAborted(self.epoch, f"NCCL lost a peer: {str(error).splitlines()[0]}") from error
        self._is_idle = True
        return outs

    def _wait_aside(self, work: Callable[..., Any], *args: object) -> Any:
        outcome = self._aside(work, *args)
        self._rendezvous.poll(outcome.done)
        return outcome.result()

    def _aside(self, work: Callable[..., Any], *args: object) -> Future[Any]:
        """What `work(*args)` returns or raises. It runs on a thread of its own, which ends by NCCL's timeout at last:
        who waits for it can leave."""
        outcome: Future[Any] = Future()

        def run() -> None:
            try:
                with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
                    result = work(*args)
            except BaseException as error:
                outcome.set_exception(error)
            else:
                outcome.set_result(result)

        threading.Thread(target=run, name=f"nccl-form-{self.epoch}", daemon=True).start()
        return outcome

    def _arrive(self, tag: int) -> None:
        self._rendezvous.begin()
        self._rendezvous.arrive(tag)

    def close(self) -> None:
        group, self._process_group = self._process_group, None
        if group is None:
            return
        if self._is_idle:
            # No kernel of it is on the GPU, whose end this worker has to wait for before the epoch is left.
            self._kept.put(Communicator(process_group=group, epoch=self._made_in, members=self._members))
        else:
            _abort(group)


def _derived(
    group: dist.ProcessGroupNCCL, gone: list[int], outs: list[Tensor], own: Tensor, end_s: float
) -> dist.ProcessGroupNCCL:
    """[a thread of its own] `group` without the ranks `gone`, after a collective."""
    derived = group.shrink(gone, _SHRINK_ABORT) if gone else group
    try:
        work = derived.allgather([outs], [own])
        while not work.is_completed():
            if time.monotonic() > end_s:
                raise TimeoutError("its first collective does not end")
            time.sleep(_POLL_S)
    except BaseException:
        if derived is not group:
            derived.abort()
        raise
    return derived


def _abort(group: dist.ProcessGroupNCCL | None, made: Future[Any] | None = None) -> None:
    """`made`: another one, perhaps. On threads: aborting waits for the communicator's kernels to leave the GPU, and for
    who is making it."""
    groups = {group} if made is None or made.exception() else {group, made.result()}
    for each in groups - {None}:
        threading.Thread(target=each.abort, name="nccl-abort", daemon=True).start()
