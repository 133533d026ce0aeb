"""Sums over the bytes of units, as they lie in an arena: the same on every device, whatever way they came.

A unit's sum is the xxh3_64 of each of its segments (`transfer.work`), one after the other in hex. So a segment can be
judged as soon as it is there, while it is still in the cache, and a load can tell which bytes to bring again.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import xxhash

from anchortp.arena.intervals import IntervalSet
from anchortp.transfer.checkpoint import fill
from anchortp.transfer.work import Chunk, Geometry, Segment

DIGITS = 16  # hex digits of one segment
# What is read before it is summed: it and its source stay in the L2 cache together.
PIECE_BYTES = 512 << 10


def sum_key(family: str, unit: int) -> str:
    """The name of a unit's sum on the wire."""
    return f"{family}:{unit}"


def digest(data: memoryview) -> int:
    """xxh3_64, but never 0, which stands for nothing."""
    return xxhash.xxh3_64_intdigest(data) or 1


def fill_summed(fd: int, start: int, chunk: Chunk, view: memoryview, check: Callable[[], None]) -> list[int] | None:
    """Fills `view` (the chunk's bytes) from `start` of a file on. Returns the digests of its segments, taken on the
    way; None if it is a part of one. `check` is called before each piece, and may raise. Raises CheckpointError if the
    file ends."""
    digests = []
    for piece in chunk.pieces(PIECE_BYTES):
        check()
        first, last = piece[0].start - chunk.start, piece[-1].stop - chunk.start
        fill(fd, start + first, [view[first:last]])
        digests += [digest(view[s.start - chunk.start : s.stop - chunk.start]) for s in piece]
    if not digests:
        fill(fd, start, [view])
    return digests or None


class SumBook:
    """Which segments of a load have arrived and been found right, and what they add up to. One thread at a time.

    `expected`: sums by `sum_key` (any may be missing); one that is not of this model's shape counts as missing.
    """

    def __init__(self, geometry: Geometry, chunks: Sequence[Chunk], expected: Mapping[str, str]):
        self._geometry = geometry
        self._chunks = chunks
        self._expected = expected
        self._parsed: dict[tuple[str, int], tuple[int, ...]] = {}  # of `expected`, by family and unit
        self._digests: dict[tuple[str, int, int], dict[int, int]] = defaultdict(dict)  # by family, unit and slot
        self._parts: dict[int, IntervalSet] = defaultdict(IntervalSet)  # by the start of a segment that comes in parts
        self._missing = [set[int]() for _ in range(geometry.num_positions)]  # starts of segments, by position
        for chunk in chunks:
            self._missing[chunk.position].update(segment.start for segment in chunk.segments)
        self._num_missing = sum(map(len, self._missing))

    def arrived(self, chunk: Chunk) -> list[Segment]:
        """The bytes of the chunk are there: the segments that are whole by now."""
        segments = chunk.segments
        if chunk.is_whole:
            return segments
        (segment,) = segments  # chunks are cut so
        parts = self._parts[segment.start]
        parts.add(chunk.start, min(chunk.stop, segment.stop))
        return segments if parts.total == segment.stop - segment.start else []

    def expected(self, segment: Segment) -> int | None:
        """What the segment should add up to, if that is known."""
        key = segment.family, segment.unit
        if key not in self._parsed:
            self._parsed[key] = self._parse(*key)
        known = self._parsed[key]
        return known[segment.index] if known else None

    def _parse(self, family: str, unit: int) -> tuple[int, ...]:
        known = self._expected.get(sum_key(family, unit), "")
        count = self._geometry.num_segments[family]
        return struct.unpack(f">{count}Q", bytes.fromhex(known)) if len(known) == DIGITS * count else ()

    def accept(self, chunk: Chunk, segments: Sequence[Segment], digests: Sequence[int]) -> None:
        """These segments, which the chunk made whole, are right."""
        missing = self._missing[chunk.position]
        for segment, found in zip(segments, digests, strict=True):
            self._digests[segment.family, segment.unit, segment.slot][segment.index] = found
            self._num_missing -= segment.start in missing
            missing.discard(segment.start)

    def reject(self, segment: Segment) -> set[int]:
        """The segment is wrong; returns the chunks (their numbers) that have to bring it again."""
        self._parts.pop(segment.start, None)
        bring = enumerate(self._chunks)
        return {index for index, chunk in bring if any(s.start == segment.start for s in chunk.segments)}

    @property
    def is_complete(self) -> bool:
        return self._num_missing == 0

    @property
    def first_missing(self) -> int:
        """All positions before this one are there."""
        return next((position for position, starts in enumerate(self._missing) if starts), len(self._missing))

    def sums(self) -> dict[str, str]:
        """By `sum_key`, of every unit that is whole."""
        found = {}
        for (family, unit, _), digests in self._digests.items():
            count = self._geometry.num_segments[family]
            if len(digests) == count:
                found[sum_key(family, unit)] = "".join(f"{digests[index]:016x}" for index in range(count))
        return found
