"""Arenas made of chunks, through the virtual-memory calls of a GPU's driver. No torch, no sockets.

A memfd is one descriptor, and whoever maps it sees each page as soon as it is touched. A driver knows neither:
physical memory comes in chunks of one granule, each with a handle and, to cross processes, a descriptor of its
own, and every process maps every chunk itself. So an arena has two sides here:

- `VmmArena`, in the anchor: which chunk is committed where. It maps nothing, so a CUDA daemon needs no context.
- `VmmMapping`, in whoever uses the memory: a range of addresses reserved at full size, chunks mapped into it as
  the anchor says. Chunks that are committed later are attached later; nothing that is mapped ever moves.

Between the two lies `state.messages.GetChunks`. The calls are behind `VmmDriver`: `arena.cuda` has NVIDIA's,
`arena.sim` answers them from host memory.

**What would differ on HIP.** The names are CUDA's with `hipMem...` for `cuMem...`; the DLPack device type is 10
(kDLROCM). `hipMemImportFromShareableHandle` takes the descriptor's value from ROCm 7.1 on, before that a pointer to
it. The granule is asked for in the same way (`hipMemGetAllocationGranularity`), and may be 4 KiB.
"""

from __future__ import annotations

import os
import resource
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from anchortp.arena import dlpack
from anchortp.arena.intervals import IntervalSet, Range
from anchortp.arena.memfd import GARBAGE, round_down, round_up
from anchortp.errors import StateError

NewChunk = tuple[int, int]  # offset in the arena, serial


class DriverError(StateError):
    """A call that the driver refused. `error_code` is the driver's number for why."""

    def __init__(self, message: str, *, error_code: int):
        self.error_code = error_code
        super().__init__(message)


class OutOfPhysicalMemory(StateError):
    """The driver has no memory left for a chunk."""


class VmmDriver(Protocol):
    """The calls, for one device. Addresses and handles are plain integers, sizes multiples of `granule_bytes`.

    `create`, `export`, `import_` and `release` need no context; the others may, and make it current themselves.
    Every method raises StateError, with the driver's name for what went wrong.
    """

    granule_bytes: int
    dlpack_device: tuple[int, int]  # DLPack's device type and number: where tensors over this memory are

    def create(self) -> int:
        """The handle of a new chunk of one granule, its contents undefined. Raises OutOfPhysicalMemory."""
        ...

    def export(self, handle: int) -> int:
        """A new descriptor of the chunk, for other processes; it keeps the memory alive as the handle does."""
        ...

    def import_(self, fd: int) -> int:
        """The handle, in this process, of the chunk behind a descriptor, which stays the caller's to close."""
        ...

    def release(self, handle: int) -> None:
        """Gives up a handle. The memory goes when no handle, mapping or descriptor is left, in any process."""
        ...

    def reserve(self, num_bytes: int) -> int:
        """Addresses with nothing behind them."""
        ...

    def free(self, address: int, num_bytes: int) -> None:
        """The inverse of `reserve`; nothing may be mapped there."""
        ...

    def map(self, address: int, handle: int) -> None:
        """Puts one chunk behind `address`; it can be used after `allow`."""
        ...

    def unmap(self, address: int) -> None:
        """The inverse of `map`. Nothing may be running that uses the chunk: see `synchronize`."""
        ...

    def allow(self, address: int, num_bytes: int) -> None:
        """Reading and writing, for this driver's device, in a range that is mapped throughout."""
        ...

    def fill(self, address: int, num_bytes: int, byte: int) -> None:
        """Overwrites, and returns when it is done."""
        ...

    def pin(self, address: int, num_bytes: int) -> None:
        """Lets the device use a page-aligned range of this process's host memory, at the address that it has here.

        Every page of it is committed and stays where it is. No byte may be pinned twice.
        """
        ...

    def unpin(self, address: int) -> None:
        """The inverse of `pin`, before the range is unmapped. Nothing may be running that uses it."""
        ...

    def synchronize(self) -> None:
        """Returns when nothing that this process has started on the device still runs."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Physical:
    """A chunk of memory. `fd`: the descriptor it came by, -1 if it was made here.

    The descriptor is kept because no documentation promises that what was imported can be exported again.
    """

    handle: int
    fd: int = -1


class ChunkPool:
    """The physical memory of one device in its anchor. What is given back is kept, and used again first.

    Kept, not released: a process that still maps a chunk keeps its memory alive, so releasing it frees nothing
    until that process has heard of it, and a commit that follows at once could find the device full. Memory is
    what a device's budget is for, and this never holds more than the most that was ever committed within it.
    """

    def __init__(self, driver: VmmDriver):
        self.driver = driver
        self._idle: list[Physical] = []

    def take(self, num: int) -> list[Physical]:
        """All or nothing. Raises OutOfPhysicalMemory."""
        taken = [self._idle.pop() for _ in range(min(num, len(self._idle)))]
        try:
            while len(taken) < num:
                taken.append(Physical(handle=self.driver.create()))
        except OutOfPhysicalMemory:
            self.give(taken)
            raise
        return taken

    def give(self, chunks: Iterable[Physical]) -> None:
        self._idle += chunks

    def close(self) -> None:
        """Gives the memory back to the hardware, but for what other processes still hold."""
        while self._idle:
            self.release(self._idle.pop())

    def release(self, chunk: Physical) -> None:
        self.driver.release(chunk.handle)
        if chunk.fd >= 0:
            os.close(chunk.fd)


class VmmArena:
    """[anchor] Which chunk of the device's memory lies at which offset of an arena.

    Every commit of a place gets a new `serial`, so that whoever maps the arena can ask for what is newer than
    what he has, and a place that was given back and committed again is seen to be another chunk.

    Attributes: `name`, `reserved_bytes` and `page_bytes` (the step of everything: the driver's granule).
    """

    __slots__ = ("_chunks", "_next_serial", "_pool", "name", "page_bytes", "reserved_bytes")

    def __init__(self, *, name: str, reserved_bytes: int, pool: ChunkPool):
        assert reserved_bytes > 0, reserved_bytes
        self.name = name
        self.page_bytes = pool.driver.granule_bytes
        self.reserved_bytes = round_up(reserved_bytes, self.page_bytes)
        self._pool = pool
        self._chunks: dict[int, tuple[int, Physical]] = {}  # offset -> serial, chunk; serials rise
        self._next_serial = 1

    def grow(self, reserved_bytes: int) -> None:
        """Reserves more. Older mappings still end where they ended."""
        assert reserved_bytes >= self.reserved_bytes, (reserved_bytes, self.reserved_bytes)
        self.reserved_bytes = round_up(reserved_bytes, self.page_bytes)

    def commit(self, ranges: Iterable[Range]) -> None:
        """Puts a chunk behind every page that `ranges` touch and that has none. All or nothing.

        Raises OutOfPhysicalMemory.
        """
        touched = IntervalSet(
            (round_down(a, self.page_bytes), round_up(b, self.page_bytes)) for a, b in ranges if a < b
        )
        missing = [at for a, b in touched for at in range(a, b, self.page_bytes) if at not in self._chunks]
        for offset, chunk in zip(missing, self._pool.take(len(missing)), strict=True):
            self._put(offset, self._next_serial, chunk)

    def decommit(self, start: int, stop: int) -> int:
        """Gives back the pages that lie wholly inside `[start, stop)`; returns how many bytes they are.

        Who maps them sees the old bytes, or those of the chunk's next place, until he detaches them. So it
        is the epoch that keeps a worker from using what is gone: it refreshes its mappings in the new one.
        """
        assert 0 <= start <= stop <= self.reserved_bytes, (start, stop, self.reserved_bytes)
        start, stop = round_up(start, self.page_bytes), round_down(stop, self.page_bytes)
        places: Sequence[int] = range(start, stop, self.page_bytes)
        if len(places) > len(self._chunks):
            places = [offset for offset in self._chunks if offset in places]
        self._pool.give(self._chunks.pop(offset)[1] for offset in places if offset in self._chunks)
        return max(0, stop - start)

    def committed_bytes(self) -> int:
        return len(self._chunks) * self.page_bytes

    def committed_ranges(self) -> list[Range]:
        return list(IntervalSet((offset, offset + self.page_bytes) for offset in self._chunks))

    def newer(self, serial: int, limit: int) -> list[NewChunk]:
        """The first `limit` chunks with a serial above this one, in the order of their serials."""
        chunks = [(offset, own) for offset, (own, _) in self._chunks.items()]
        first = bisect_right(chunks, serial, key=lambda chunk: chunk[1])
        return chunks[first : first + limit]

    def export(self, offset: int) -> int:
        """A new descriptor of the chunk at `offset`."""
        chunk = self._chunks[offset][1]
        return os.dup(chunk.fd) if chunk.fd >= 0 else self._pool.driver.export(chunk.handle)

    def adopt(self, offset: int, serial: int, fd: int) -> None:
        """Takes over a chunk that outlived its anchor, under the serial it had; `fd` is duplicated.

        In rising order of serials. A place that has a chunk keeps it.
        """
        if offset % self.page_bytes or not 0 <= offset < self.reserved_bytes:
            raise StateError(f"{offset} is no place of a chunk in arena {self.name!r}; run the same version everywhere")
        if offset in self._chunks:
            return
        if serial < self._next_serial:
            raise StateError(f"chunk {serial} of arena {self.name!r} comes late; hand chunks over by rising serial")
        handle = self._pool.driver.import_(fd)
        self._put(offset, serial, Physical(handle=handle, fd=os.dup(fd)))

    def scribble(self, ranges: Iterable[Range]) -> int:
        """Overwrites what is committed of `ranges` with `GARBAGE`; returns how many bytes."""
        driver, num_bytes = self._pool.driver, 0
        address = driver.reserve(self.page_bytes)
        try:
            for offset, (_, chunk) in self._chunks.items():
                parts = [(max(a, offset), min(b, offset + self.page_bytes)) for a, b in ranges]
                hit = [(a - offset, b - a) for a, b in parts if a < b]
                if hit:
                    driver.map(address, chunk.handle)
                    driver.allow(address, self.page_bytes)
                    for at, size in hit:
                        driver.fill(address + at, size, GARBAGE)
                        num_bytes += size
                    driver.unmap(address)
        finally:
            driver.free(address, self.page_bytes)
        return num_bytes

    def close(self) -> None:
        """Lets go of all chunks: those who map them keep the bytes. Harmless when repeated."""
        while self._chunks:
            self._pool.release(self._chunks.popitem()[1][1])

    def _put(self, offset: int, serial: int, chunk: Physical) -> None:
        self._chunks[offset] = (serial, chunk)
        self._next_serial = serial + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attached:
    serial: int
    handle: int
    fd: int


class VmmMapping:
    """[worker] One process's view of an arena: addresses for all of it, memory behind what is committed.

    Nothing is asked of the driver before the first `attach` or `dlpack`. Tensors made by `dlpack` see chunks
    that are attached later, and keep the mapping alive: it goes with the last of them and this object. `close`
    gives up the descriptors alone, so that the chunks can no longer be handed over to another anchor.

    Attributes: `name`, `reserved_bytes`, and `newest`, the serial of the newest chunk that was attached.
    """

    def __init__(self, *, name: str, reserved_bytes: int, open_driver: Callable[[], VmmDriver]):
        self.name = name
        self.reserved_bytes = reserved_bytes
        self.newest = 0
        self._open_driver = open_driver
        self._driver: VmmDriver | None = None
        self._address = 0
        self._attached: dict[int, _Attached] = {}  # by offset

    def attach(self, chunks: Sequence[NewChunk], fds: Sequence[int]) -> None:
        """Maps chunks, in rising order of serials; one that takes the place of another replaces it.

        The descriptors become the mapping's, also when an error is raised.
        """
        assert len(chunks) == len(fds), (chunks, fds)
        waiting = list(fds)
        try:
            driver = self._reserved()
            granule, fresh = driver.granule_bytes, IntervalSet()
            for offset, serial in chunks:
                self._detach([offset] if offset in self._attached else [])
                fd = waiting[0]
                handle = driver.import_(fd)
                try:
                    driver.map(self._address + offset, handle)
                except BaseException:
                    driver.release(handle)
                    raise
                self._attached[offset] = _Attached(serial=serial, handle=handle, fd=waiting.pop(0))
                self.newest = serial
                fresh.add(offset, offset + granule)
            for start, stop in fresh:
                driver.allow(self._address + start, stop - start)
        finally:
            for fd in waiting:
                os.close(fd)

    def keep(self, ranges: Iterable[Range]) -> None:
        """Detaches every chunk that lies outside of `ranges`: the anchor has given it back."""
        kept = IntervalSet(ranges)
        self._detach([offset for offset in self._attached if offset not in kept])

    def chunks_in(self, ranges: Iterable[Range]) -> list[tuple[NewChunk, int]]:
        """(offset, serial) and descriptor of the attached chunks that `ranges` touch, by rising serial."""
        if self._driver is None:
            return []
        page = self._driver.granule_bytes
        touched = IntervalSet((round_down(a, page), round_up(b, page)) for a, b in ranges if a < b)
        found = [((at, own.serial), own.fd) for at, own in self._attached.items() if at in touched and own.fd >= 0]
        return sorted(found, key=lambda chunk: chunk[0][1])

    @property
    def address(self) -> int:
        """Of the arena's first byte in this process."""
        self._reserved()
        return self._address

    @property
    def attached_bytes(self) -> int:
        return len(self._attached) * self._driver.granule_bytes if self._driver else 0

    def dlpack(self) -> object:
        """A DLPack capsule of all `reserved_bytes` as uint8, for `from_dlpack`; consumed once.

        DLPack and not `__cuda_array_interface__`: for the latter torch asks the driver what lies at the first
        address, and fails where that page is not committed yet.
        """
        driver = self._reserved()
        return dlpack.capsule(self._address, self.reserved_bytes, driver.dlpack_device, owner=self)

    def close(self) -> None:
        """See the class. Harmless when repeated."""
        for offset, own in self._attached.items():
            if own.fd >= 0:
                os.close(own.fd)
                self._attached[offset] = _Attached(serial=own.serial, handle=own.handle, fd=-1)

    def __enter__(self) -> VmmMapping:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._driver is not None:
            self._detach(list(self._attached))
            self._driver.free(self._address, self.reserved_bytes)
            self._driver = None

    def __repr__(self) -> str:
        return f"VmmMapping(name={self.name!r}, reserved_bytes={self.reserved_bytes})"

    def _reserved(self) -> VmmDriver:
        if self._driver is None:
            raise_descriptor_limit()
            driver = self._open_driver()
            self.reserved_bytes = round_up(self.reserved_bytes, driver.granule_bytes)
            self._address = driver.reserve(self.reserved_bytes)
            self._driver = driver
        return self._driver

    def _detach(self, offsets: Sequence[int]) -> None:
        if not offsets:
            return
        assert self._driver is not None
        self._driver.synchronize()
        for offset in offsets:
            own = self._attached.pop(offset)
            self._driver.unmap(self._address + offset)
            self._driver.release(own.handle)
            if own.fd >= 0:
                os.close(own.fd)


def raise_descriptor_limit() -> None:
    """A chunk takes a descriptor: the soft limit on open files (often 1024) becomes the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
