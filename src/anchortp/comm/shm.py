"""Collectives through shared memory, for workers on one host [worker]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anchortp.native import GroupMemory, Library
from anchortp.native.library import ABORTED, MISMATCH, TIMED_OUT

from .region import Rendezvous, ShmRegion

_REDUCE, _SPREAD, _GATHER, _BARRIER = range(4)  # the low bits of a tag; `native/group.h` has others of its own
_TAG_BITS = 3

# From this many elements on, every rank sums its own share only and copies the others' sums (two waits, less
# memory traffic). Measured with 4 ranks on 2 cores; see bench/allreduce.py.
TWO_PHASE_FROM = 131_072

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_LINE_FLOATS = 16
_MAX_CACHED_SIZES = 64


class ShmGroup:
    """A `Group` over the slots of an `ShmRegion`, which must stay open and is not closed with the group.

    Small sums are one copy into the own slot, one wait, and one pass over all slots. A group of one is free.
    `library`: kernels that do so for tensors of their dtype, with the same bits. All ranks have them or none has.
    """

    def __init__(
        self,
        region: ShmRegion,
        rank: int,
        timeout_s: float,
        *,
        two_phase_from: int = TWO_PHASE_FROM,
        library: Library | None = None,
        rendezvous: Rendezvous | None = None,
    ):
        """`rendezvous`: of another group over the same region, whose collectives take turns with those of this one."""
        self.epoch = region.epoch
        self.rank = rank
        self.size = region.size
        self._two_phase_from = two_phase_from
        self._region = region
        self._rendezvous = rendezvous or Rendezvous(region, rank, timeout_s)
        self._slot_bytes = region.slot_bytes
        self._views: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        with torch.inference_mode(False):  # tensors made in inference mode could not be written outside of it
            self._slots = self._open_slots(region)
            self._scratch = torch.empty(region.slot_bytes // 4, dtype=torch.float32, device=self._slots[0][rank].device)
        self._library = library
        slots_at = self._slots[0][0].data_ptr()
        self._memory = GroupMemory(
            words=slots_at - region.slot_at(0, 0),
            slots=slots_at,
            slot_bytes=region.slot_bytes,
            size=region.size,
            rank=rank,
            two_phase_from=two_phase_from,
            timeout_ns=int(timeout_s * 1e9),
        )

    def memory_for(self, num: int) -> GroupMemory | None:
        """What a kernel needs to take part for itself in a sum of `num` values; None if that is not for a kernel. What
        it answers goes to `check`."""
        fits = num <= self._slot_bytes // 4 or self.size == 1
        return self._memory if self._library is not None and fits else None

    def check(self, outcome: int) -> None:
        """Raises what the outcome of a kernel's collective says."""
        if outcome == ABORTED:
            self._region.check()
        if outcome == TIMED_OUT:
            self._rendezvous.time_out()
        assert outcome != MISMATCH, self._rendezvous.describe_mismatch()

    def _open_slots(self, region: ShmRegion) -> list[list[Tensor]]:
        """uint8 `[slot_bytes]`, by parity and rank."""
        # `frombuffer` keeps the object alive that it is given, so give it the mapping and not a
        # memoryview, which `ShmRegion.close` would release under the tensors.
        whole = torch.frombuffer(region.buffer, dtype=torch.uint8)
        starts = [[region.slot_at(parity, r) for r in range(self.size)] for parity in range(2)]
        return [[whole[at : at + region.slot_bytes] for at in row] for row in starts]

    def _arrive(self, tag: int) -> None:
        """What was written to the own slot is there, and what was to be read of the last collective is read."""
        self._rendezvous.arrive(tag)

    def all_reduce(self, x: Tensor) -> Tensor:
        assert x.dtype in (torch.float32, torch.bfloat16), x.dtype
        if self.size == 1:
            self._rendezvous.begin()
            return x
        flat = x.reshape(-1)
        num_floats = self._slot_bytes // 4
        for piece in (flat,) if flat.numel() <= num_floats else flat.split(num_floats):
            if self._library is not None and self._library.dtype == _NAMES[x.dtype]:
                self.check(self._library.all_reduce(self._memory, piece.data_ptr(), piece.numel()))
            elif piece.numel() < self._two_phase_from:
                self._reduce(piece)
            else:
                self._reduce_and_spread(piece)
        return flat.view(x.shape)

    def _reduce(self, x: Tensor) -> None:
        """One phase: everybody sums everything."""
        tag = x.numel() << _TAG_BITS | _REDUCE
        slots = self._floats(x.numel())[self._rendezvous.begin()]
        slots[self.rank].copy_(x)
        self._arrive(tag)
        self._rendezvous.wait(tag)
        if x.dtype == torch.float32:
            _sum_in_order(slots, out=x)
        else:
            x.copy_(_sum_in_order(slots, out=self._scratch[: x.numel()]))

    def _reduce_and_spread(self, x: Tensor) -> None:
        """Two phases: everybody sums one share (reduce-scatter), then takes the other sums (all-gather)."""
        rendezvous, num = self._rendezvous, x.numel()
        partials = self._floats(num)[rendezvous.begin()]
        partials[self.rank].copy_(x)
        self._arrive(num << _TAG_BITS | _REDUCE)
        rendezvous.wait(num << _TAG_BITS | _REDUCE)

        sums = self._floats(num)[rendezvous.begin()]
        own = self._share(num, self.rank)
        _sum_in_order([partial[own] for partial in partials], out=sums[self.rank][own])
        self._arrive(num << _TAG_BITS | _SPREAD)
        rendezvous.wait(num << _TAG_BITS | _SPREAD)
        for rank in range(self.size):
            share = self._share(num, rank)
            x[share].copy_(sums[rank][share])

    def _share(self, num: int, rank: int) -> slice:
        # Whole cache lines, so that no two ranks write to the same.
        width = -(-num // (self.size * _LINE_FLOATS)) * _LINE_FLOATS
        return slice(min(num, rank * width), min(num, (rank + 1) * width))

    def _floats(self, num: int) -> tuple[list[Tensor], list[Tensor]]:
        """The first `num` float32 of every slot, by parity and rank.

        Cached, as slicing costs as much as adding.
        """
        views = self._views.get(num)
        if views is None:
            if len(self._views) == _MAX_CACHED_SIZES:
                self._views.clear()
            with torch.inference_mode(False):  # as above: another dtype's view is a tensor made here
                even, odd = ([slot[: 4 * num].view(torch.float32) for slot in slots] for slots in self._slots)
            views = self._views[num] = (even, odd)
        return views

    def gather(self, x: Tensor, cols: Sequence[int], root: int = 0) -> list[Tensor] | None:
        assert len(cols) == self.size and 0 <= root < self.size, (cols, root, self.size)
        assert x.shape == (x.shape[0], cols[self.rank]), (x.shape, cols, self.rank)
        if self.size == 1:
            self._rendezvous.begin()
            return [x]
        largest_bytes = x.shape[0] * max(cols) * x.element_size()
        if largest_bytes <= self._slot_bytes:
            return self._gather_views(x, cols, root)
        return self._gather_pieces(x, cols, root, largest_bytes)

    def _gather_views(self, x: Tensor, cols: Sequence[int], root: int) -> list[Tensor] | None:
        slots = self._exchange(_as_bytes(x), x.shape[0] * sum(cols) << _TAG_BITS | _GATHER, root)
        if slots is None:
            return None
        col_bytes = x.shape[0] * x.element_size()
        return [
            slot[: col_bytes * num_cols].view(x.dtype).view(x.shape[0], num_cols)
            for slot, num_cols in zip(slots, cols, strict=True)
        ]

    def _gather_pieces(self, x: Tensor, cols: Sequence[int], root: int, largest_bytes: int) -> list[Tensor] | None:
        tag = x.shape[0] * sum(cols) << _TAG_BITS | _GATHER
        source = _as_bytes(x)
        outs = [x.new_empty(x.shape[0], num_cols) for num_cols in cols] if self.rank == root else []
        targets = [_as_bytes(out) for out in outs]
        for at in range(0, largest_bytes, self._slot_bytes):
            slots = self._exchange(source[at : at + self._slot_bytes], tag, root)
            for rank, target in enumerate(targets):
                piece = target[at : at + self._slot_bytes]
                piece.copy_(slots[rank][: piece.numel()])
        return outs or None

    def _exchange(self, piece: Tensor, tag: int, root: int) -> list[Tensor] | None:
        """Writes bytes into the own slot; at root, waits for everybody's slots and returns them.

        The others need not wait: the `begin` of their next collective does.
        """
        slots = self._slots[self._rendezvous.begin()]
        slots[self.rank][: piece.numel()].copy_(piece)
        self._arrive(tag)
        if self.rank != root:
            return None
        self._rendezvous.wait(tag)
        return slots

    def barrier(self) -> None:
        self._rendezvous.begin()
        self._arrive(_BARRIER)
        self._rendezvous.wait(_BARRIER)

    def close(self) -> None:
        self._slots = []
        self._views.clear()


def _sum_in_order(parts: list[Tensor], *, out: Tensor) -> Tensor:
    """Left to right, so that the rounding is the same wherever it is done."""
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out.add_(part)
    return out


def _as_bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)
