"""A device's arenas and the account of its budget. Runs in the anchor process; no sockets."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from anchortp.arena import IntervalSet, MemfdArena, round_down, round_up
from anchortp.errors import ArenaUnknown, BudgetExceeded, StateError
from anchortp.state.messages import ArenaInfo, Ranges

MAX_NAME_BYTES = 200  # memfd_create takes 249, prefix included
MAX_RESERVED_BYTES = 1 << 46


@dataclass(slots=True, kw_only=True, eq=False)
class _Held:
    arena: MemfdArena
    pages: IntervalSet = field(default_factory=IntervalSet)  # accounted: whole pages, half-open byte ranges


class DeviceMemory:
    """Arenas by name, and how much of the budget their committed pages take. Not for several threads.

    Every method that can fail changes nothing when it does.
    """

    def __init__(self, *, device: str, budget_bytes: int):
        self.device = device
        self.budget_bytes = budget_bytes
        self._held: dict[str, _Held] = {}

    @property
    def committed_bytes(self) -> int:
        """Accounted, over all arenas; never more than the budget."""
        return sum(held.pages.total for held in self._held.values())

    def arena(self, name: str) -> MemfdArena:
        return self._get(name).arena

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
        self._held[name] = _Held(arena=MemfdArena.create(name, reserved_bytes))

    def grow(self, name: str, reserved_bytes: int) -> None:
        """Raises StateError if that would shrink it."""
        arena = self._get(name).arena
        _check_size(name, reserved_bytes)
        if round_up(reserved_bytes) < arena.reserved_bytes:
            raise StateError(
                f"arena {name!r} has {arena.reserved_bytes} bytes and cannot shrink to {reserved_bytes}: "
                f"decommit what is not needed, reserved memory costs nothing"
            )
        arena.grow(reserved_bytes)

    def adopt(self, name: str, reserved_bytes: int, ranges: Ranges, fd: int) -> None:
        """Takes over the memory behind `fd` (of which a duplicate is kept), with `ranges` committed.

        The same memory under the same name may come again, from each process that holds it.
        """
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

    def commit(self, name: str, ranges: Ranges) -> None:
        """Accounts the pages that `ranges` touch. Raises BudgetExceeded, with the numbers."""
        self._account(self._get(name), ranges)

    def decommit(self, name: str, ranges: Ranges) -> None:
        """Gives back the pages that lie wholly inside `ranges`."""
        held = self._get(name)
        _check_ranges(held.arena, ranges)
        for start, stop in ranges:
            held.arena.decommit(start, stop)
            if round_up(start) < round_down(stop):
                held.pages.remove(round_up(start), round_down(stop))

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

    def validate(self) -> None:
        """Asserts the invariants; for tests."""
        assert self.committed_bytes <= self.budget_bytes
        for held in self._held.values():
            held.pages.validate()
            assert all(start == round_down(start) and stop == round_up(stop) for start, stop in held.pages)
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

    def _account(self, held: _Held, ranges: Ranges) -> None:
        _check_ranges(held.arena, ranges)
        pages = held.pages.copy()
        requested_bytes = sum(pages.add(round_down(start), round_up(stop)) for start, stop in ranges if start < stop)
        committed_bytes = self.committed_bytes
        if committed_bytes + requested_bytes > self.budget_bytes:
            raise BudgetExceeded(
                device=self.device,
                requested_bytes=requested_bytes,
                committed_bytes=committed_bytes,
                budget_bytes=self.budget_bytes,
            )
        held.pages = pages


def _check_size(name: str, reserved_bytes: int) -> None:
    if not 0 < reserved_bytes <= MAX_RESERVED_BYTES:
        raise StateError(f"arena {name!r} cannot reserve {reserved_bytes} bytes; give 1 to {MAX_RESERVED_BYTES}")


def _check_ranges(arena: MemfdArena, ranges: Ranges) -> None:
    for start, stop in ranges:
        if not 0 <= start <= stop <= arena.reserved_bytes:
            raise StateError(
                f"[{start}, {stop}) is no range of arena {arena.name!r}, which has "
                f"{arena.reserved_bytes} bytes; grow the arena, or ask within it"
            )


def _same_file(fd: int, other: int) -> bool:
    return os.path.samestat(os.fstat(fd), os.fstat(other))
