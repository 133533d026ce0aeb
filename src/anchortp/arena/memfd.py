"""An arena in host memory: a `memfd` that reserves its full size and commits pages only as they are used.

Source: memfd_create(2), fallocate(2), fcntl(2) "File Sealing".
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterable
from types import TracebackType

from anchortp.arena.intervals import Range
from anchortp.errors import StateError

PAGE_BYTES = mmap.PAGESIZE

GARBAGE = 0xFF  # repeated, it is NaN in bf16, f16, f32 and f64, and -1 in every signed integer
_GARBAGE_BLOCK_BYTES = 1 << 20  # stays in the cache while it is copied out

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02

# Nobody who holds the descriptor can shrink the arena under those who map it (they would die of SIGBUS), nor
# seal it against writing or growing.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int


def round_down(num_bytes: int, step: int = PAGE_BYTES) -> int:
    """The greatest multiple of `step` that is at most `num_bytes`."""
    return num_bytes - num_bytes % step


def round_up(num_bytes: int, step: int = PAGE_BYTES) -> int:
    """The least multiple of `step` that is at least `num_bytes`."""
    return -(-num_bytes // step) * step


class MemfdArena:
    """A range of memory behind a descriptor of this process, which the arena owns and `close` gives up.

    Mappings (`map`) and duplicates of the descriptor, here or in other processes, see the same bytes and keep
    them alive after `close`, also when every other process is dead. Any process may hold one; anchors do.

    Attributes: `name` (a label), `fd`, `reserved_bytes` (a multiple of `page_bytes`).
    """

    __slots__ = ("fd", "name", "reserved_bytes")
    page_bytes = PAGE_BYTES

    def __init__(self, *, name: str, fd: int, reserved_bytes: int):
        self.name = name
        self.fd = fd
        self.reserved_bytes = reserved_bytes

    @classmethod
    def create(cls, name: str, reserved_bytes: int) -> MemfdArena:
        """A new arena of `reserved_bytes` rounded up to pages, all zero, with no page committed.

        Raises StateError when the system refuses the size or a further descriptor.
        """
        assert reserved_bytes > 0, reserved_bytes
        fd = -1
        try:
            fd = os.memfd_create(f"anchortp:{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, round_up(reserved_bytes))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise StateError(
                f"arena {name!r} of {reserved_bytes} bytes cannot be made: {error.strerror}. Reserve less, "
                f"or raise the limit on open files."
            ) from error
        return cls(name=name, fd=fd, reserved_bytes=round_up(reserved_bytes))

    @classmethod
    def from_fd(cls, name: str, fd: int) -> MemfdArena:
        """The arena behind a descriptor that came from another process.

        The descriptor becomes the arena's, unless StateError is raised: it is not of an arena's kind.
        """
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            seals = 0
        size_bytes = os.fstat(fd).st_size
        if seals & _SEALS != _SEALS or size_bytes == 0 or size_bytes % PAGE_BYTES:
            raise StateError(
                f"the descriptor given for arena {name!r} is not an arena's (a memfd of whole pages, "
                f"sealed against shrinking). Hand over a descriptor that an anchor made."
            )
        return cls(name=name, fd=fd, reserved_bytes=size_bytes)

    def map(self) -> mmap.mmap:
        """A shared, writable mapping of all `reserved_bytes`, which the caller closes.

        It lives on when `fd` is closed. Touching a page commits it, reading included.
        """
        return mmap.mmap(self.fd, self.reserved_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def grow(self, reserved_bytes: int) -> None:
        """Reserves more, in place: offsets and bytes stay. Older mappings still end where they ended."""
        assert reserved_bytes >= self.reserved_bytes, (reserved_bytes, self.reserved_bytes)
        try:
            os.ftruncate(self.fd, round_up(reserved_bytes))
        except OSError as error:
            raise StateError(
                f"arena {self.name!r} cannot grow to {reserved_bytes} bytes: {error.strerror}. Reserve less."
            ) from error
        self.reserved_bytes = round_up(reserved_bytes)

    def allocate(self, start: int, stop: int) -> None:
        """Allocates the pages that `[start, stop)` touches, so that writing them cannot fail and is fast.

        About three times as fast as taking a page fault for each. Raises StateError when there is no memory.
        """
        assert 0 <= start < stop <= self.reserved_bytes, (start, stop, self.reserved_bytes)
        start = round_down(start)
        if _libc.fallocate(self.fd, 0, start, round_up(stop) - start) != 0:
            reason = os.strerror(ctypes.get_errno())
            raise StateError(
                f"arena {self.name!r}: the system has no memory for {stop - start} bytes more ({reason}). "
                f"Give the devices smaller budgets, or stop what else uses the memory."
            )

    def commit(self, ranges: Iterable[Range]) -> None:
        """Nothing to do: the kernel commits a page when it is touched."""

    def decommit(self, start: int, stop: int) -> int:
        """Gives back the pages that lie wholly inside `[start, stop)`.

        They read as zeros from now on, in every mapping. Returns how many bytes they are, committed or not.
        Rounding is inwards, so that bytes of a neighbour on a shared page survive.
        """
        assert 0 <= start <= stop <= self.reserved_bytes, (start, stop, self.reserved_bytes)
        start, stop = round_up(start), round_down(stop)
        if start >= stop:
            return 0
        mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        if _libc.fallocate(self.fd, mode, start, stop - start) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return stop - start

    def committed_bytes(self) -> int:
        """Memory that the arena really takes, as the kernel counts it."""
        return os.fstat(self.fd).st_blocks * 512

    def committed_ranges(self) -> list[Range]:
        """Where the committed pages lie, as the kernel knows it; in rising order."""
        ranges, offset = [], 0
        while (start := self._seek(offset, os.SEEK_DATA)) is not None:
            offset = self._seek(start, os.SEEK_HOLE) or self.reserved_bytes
            ranges.append((start, offset))
        return ranges

    def scribble(self, ranges: Iterable[Range]) -> int:
        """Overwrites the committed pages within `ranges` with `GARBAGE`, at memory speed.

        Returns how many bytes. Holes stay holes: garbage takes no memory that was not in use.
        """
        block = memoryview(bytes([GARBAGE]) * _GARBAGE_BLOCK_BYTES)
        committed = self.committed_ranges()
        num_bytes = 0
        for start, stop in ranges:
            for low, high in committed:
                num_bytes += self._fill(block, max(start, low), min(stop, high))
        return num_bytes

    def close(self) -> None:
        """Gives up the descriptor. Harmless when repeated."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> MemfdArena:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def __repr__(self) -> str:
        return f"MemfdArena(name={self.name!r}, fd={self.fd}, reserved_bytes={self.reserved_bytes})"

    def _seek(self, offset: int, whence: int) -> int | None:
        # The file offset is shared with every process that holds a duplicate, but only the result is used.
        try:
            return os.lseek(self.fd, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise

    def _fill(self, block: memoryview, start: int, stop: int) -> int:
        # pwrite and not a mapping: no page-table entry per page, hence several times faster.
        offset = start
        while offset < stop:
            offset += os.pwrite(self.fd, block[: stop - offset], offset)
        return max(0, stop - start)
