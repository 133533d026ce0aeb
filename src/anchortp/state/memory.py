"""A device's arenas and the account of its budget. Runs in the anchor process; no sockets."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from anchortp.arena import ChunkPool, IntervalSet, MemfdArena, OutOfPhysicalMemory, VmmArena, round_down, round_up
from anchortp.errors import ArenaUnknown, BudgetExceeded, DeviceFull, ProtocolError, StateError
from anchortp.state.messages import ArenaInfo, Ranges

Arena = MemfdArena | VmmArena

MAX_NAME_BYTES = 200  # memfd_create takes 249, prefix included
MAX_RESERVED_BYTES = 1 << 46


@dataclass(slots=True, kw_only=True, eq=False)
class _Held:
    arena: Arena
    pages: IntervalSet = field(default_factory=IntervalSet)  # accounted: whole pages, half-open byte ranges


class DeviceMemory:
    """Arenas by name, and how much of the budget their committed pages take. Not for several threads.

    With a `pool` the arenas are made of its chunks, and `close` closes it; without one they are memfds. Every
    method that can fail changes nothing when it does.
    """

    def __init__(self, *, device: str, budget_bytes: int, pool: ChunkPool | None = None):
        self.device = device
        self.budget_bytes = budget_bytes
        self._pool = pool
        self._held: dict[str, _Held] = {}

    @property
    def committed_bytes(self) -> int:
        """Accounted, over all arenas; never more than the budget."""
        return sum(held.pages.total for held in self._held.values())

    def arena(self, name: str) -> Arena:
        return self._get(name).arena

    def chunks(self, name: str) -> VmmArena:
        """The arena, which must be made of chunks."""
        arena = self._get(name).arena
        if not isinstance(arena, VmmArena):
            raise ProtocolError(f"arena {name!r} of {self.device} is one descriptor and has no chunks; open it")
        return arena

    def info(self, name: str) -> ArenaInfo:
        held = self._get(name)
        return ArenaInfo(
            name=name,
            reserved_bytes=held.arena.reserved_bytes,
            accounted_bytes=held.pages.total,
            committed_bytes=held.arena.committed_bytes(),
            ranges=tuple(held.pages),
        )

    def infos(self) -> tuple[ArenaInfo, ...]:
        return tuple(self.info(name) for name in self._held)

    def create(self, name: str, reserved_bytes: int) -> None:
        """Raises StateError if the name is taken or the size cannot be."""
        self._check_new(name)
        _check_size(name, reserved_bytes)
        self._held[name] = _Held(arena=self._make(name, reserved_bytes))

    def grow(self, name: str, reserved_bytes: int) -> None:
        """Raises StateError if that would shrink it."""
        arena = self._get(name).arena
        _check_size(name, reserved_bytes)
        if round_up(reserved_bytes, arena.page_bytes) < arena.reserved_bytes:
            raise StateError(
                f"arena {name!r} has {arena.reserved_bytes} bytes and cannot shrink to {reserved_bytes}: "
                f"decommit what is not needed, reserved memory costs nothing"
            )
        arena.grow(reserved_bytes)

    def adopt(self, name: str, reserved_bytes: int, ranges: Ranges, fd: int) -> None:
        """Takes over the memory behind `fd` (of which a duplicate is kept), with `ranges` committed.

        The same memory under the same name may come again, from each process that holds it.
        """
        if self._pool is not None:
            raise ProtocolError(f"the arenas of {self.device} are chunks; hand over those, not one descriptor")
        if name in self._held and _same_file(self._held[name].arena.fd, fd):
            self.commit(name, ranges)
            return
        self._check_new(name)
        copy = os.dup(fd)
        try:
            held = _Held(arena=MemfdArena.from_fd(name, copy))
            if held.arena.reserved_bytes < reserved_bytes:  # more is right: it has grown since
                raise StateError(
                    f"arena {name!r} has {held.arena.reserved_bytes} bytes, not {reserved_bytes}; "
                    f"hand over the descriptor that belongs to the name"
                )
            self._account(held, ranges)
        except BaseException:
            os.close(copy)
            raise
        self._held[name] = held

    def adopt_chunks(self, name: str, reserved_bytes: int, chunks: Ranges, fds: tuple[int, ...]) -> None:
        """Takes over chunks: (offset, serial), and the descriptor of each, of which a duplicate is kept.

        The arena is made if there is none. A place that has a chunk keeps it, so all of this may come again. When a
        chunk is refused, those before it are adopted.
        """
        if self._pool is None or len(chunks) != len(fds):
            raise ProtocolError(
                f"{len(chunks)} chunks and {len(fds)} descriptors are nothing that {self.device} adopts"
            )
        if name not in self._held:
            self.create(name, reserved_bytes)
        held, arena = self._held[name], self.chunks(name)
        ranges = tuple((offset, offset + arena.page_bytes) for offset, _ in chunks)
        _check_ranges(arena, ranges)
        self._afforded(held, ranges)
        for (offset, serial), fd in zip(chunks, fds, strict=True):
            arena.adopt(offset, serial, fd)
            held.pages.add(offset, offset + arena.page_bytes)

    def commit(self, name: str, ranges: Ranges, *, allocate: bool = False) -> None:
        """Accounts the pages that `ranges` touch, and sees to it that they can be used: with `allocate` a memfd's
        pages are allocated here, and not when they are touched.

        Raises BudgetExceeded, with the numbers; DeviceFull or StateError where the hardware has less than the budget.
        """
        held = self._get(name)
        if not allocate or not isinstance(held.arena, MemfdArena):
            self._account(held, ranges)
            return
        _check_ranges(held.arena, ranges)
        pages = self._afforded(held, ranges)
        new = list(pages - held.pages)
        try:
            for start, stop in new:
                held.arena.allocate(start, stop)
        except StateError:
            for start, stop in new:
                held.arena.decommit(start, stop)
            raise
        held.pages = pages

    def decommit(self, name: str, ranges: Ranges) -> None:
        """Gives back the pages that lie wholly inside `ranges`."""
        held = self._get(name)
        _check_ranges(held.arena, ranges)
        page_bytes = held.arena.page_bytes
        for start, stop in ranges:
            held.arena.decommit(start, stop)
            if round_up(start, page_bytes) < round_down(stop, page_bytes):
                held.pages.remove(round_up(start, page_bytes), round_down(stop, page_bytes))

    def drop(self, name: str) -> None:
        """Ends the arena and gives back its memory, whoever still maps it."""
        arena = self._get(name).arena
        arena.decommit(0, arena.reserved_bytes)
        arena.close()
        del self._held[name]

    def scribble(self) -> int:
        """Overwrites all that is committed, accounted or not; returns how many bytes."""
        return sum(held.arena.scribble([(0, held.arena.reserved_bytes)]) for held in self._held.values())

    def close(self) -> None:
        """Lets go of every arena; who holds a descriptor or a mapping keeps the bytes."""
        for held in self._held.values():
            held.arena.close()
        self._held.clear()
        if self._pool is not None:
            self._pool.close()

    def validate(self) -> None:
        """Asserts the invariants; for tests."""
        assert self.committed_bytes <= self.budget_bytes
        for held in self._held.values():
            held.pages.validate()
            page_bytes = held.arena.page_bytes
            assert all(edge % page_bytes == 0 for page_range in held.pages for edge in page_range)
            assert not isinstance(held.arena, VmmArena) or held.arena.committed_ranges() == list(held.pages)
            assert all(stop <= held.arena.reserved_bytes for _, stop in held.pages)

    def _get(self, name: str) -> _Held:
        try:
            return self._held[name]
        except KeyError:
            known = ", ".join(sorted(self._held)) or "none"
            raise ArenaUnknown(f"{self.device} has no arena {name!r} (it has: {known}); create or adopt it") from None

    def _check_new(self, name: str) -> None:
        if not name.isprintable() or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise StateError(f"{name!r} cannot name an arena; take 1 to {MAX_NAME_BYTES} bytes of printable text")
        if name in self._held:
            raise StateError(f"{self.device} has an arena {name!r} already; open it, or drop it first")

    def _make(self, name: str, reserved_bytes: int) -> Arena:
        if self._pool is None:
            return MemfdArena.create(name, reserved_bytes)
        return VmmArena(name=name, reserved_bytes=reserved_bytes, pool=self._pool)

    def _account(self, held: _Held, ranges: Ranges) -> None:
        _check_ranges(held.arena, ranges)
        pages = self._afforded(held, ranges)
        try:
            held.arena.commit(ranges)
        except OutOfPhysicalMemory:
            raise DeviceFull(**self._numbers(pages.total - held.pages.total)) from None
        held.pages = pages

    def _afforded(self, held: _Held, ranges: Ranges) -> IntervalSet:
        """The arena's pages with those that `ranges` touch. Raises BudgetExceeded."""
        pages, page_bytes = held.pages.copy(), held.arena.page_bytes
        for start, stop in ranges:
            if start < stop:
                pages.add(round_down(start, page_bytes), round_up(stop, page_bytes))
        requested_bytes = pages.total - held.pages.total
        if self.committed_bytes + requested_bytes > self.budget_bytes:
            raise BudgetExceeded(**self._numbers(requested_bytes))
        return pages

    def _numbers(self, requested_bytes: int) -> dict[str, Any]:
        return {
            "device": self.device,
            "requested_bytes": requested_bytes,
            "committed_bytes": self.committed_bytes,
            "budget_bytes": self.budget_bytes,
        }


def _check_size(name: str, reserved_bytes: int) -> None:
    if not 0 < reserved_bytes <= MAX_RESERVED_BYTES:
        raise StateError(f"arena {name!r} cannot reserve {reserved_bytes} bytes; give 1 to {MAX_RESERVED_BYTES}")


def _check_ranges(arena: Arena, ranges: Ranges) -> None:
    for start, stop in ranges:
        if not 0 <= start <= stop <= arena.reserved_bytes:
            raise StateError(
                f"[{start}, {stop}) is no range of arena {arena.name!r}, which has "
                f"{arena.reserved_bytes} bytes; grow the arena, or ask within it"
            )


def _same_file(fd: int, other: int) -> bool:
    return os.path.samestat(os.fstat(fd), os.fstat(other))
