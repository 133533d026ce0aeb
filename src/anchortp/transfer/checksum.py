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
    """Which chunks of a load have arrived and been found right, and what they add up to. One thread at a time.

    `expected`: sums by `sum_key` (any may be missing); one that is not of this model's shape counts as missing.
    """

    def __init__(self, geometry: Geometry, chunks: Sequence[Chunk], expected: Mapping[str, str]):
        self._geometry = geometry
        self._chunks = chunks
        self._expected = expected
        self._parsed: dict[tuple[str, int], list[int | None]] = {}  # of `expected`, by family and unit
        self._digests: dict[tuple[str, int, int], list[int]] = {}  # by family, unit and slot; 0 where there is none
        self._parts: dict[int, IntervalSet] = defaultdict(IntervalSet)  # by the start of a segment that comes in parts
        # By position: of each chunk the start of its first segment, which is all that it has if it comes in parts.
        self._missing = [set[int]() for _ in range(geometry.num_positions)]
        for chunk in chunks:
            self._missing[chunk.position].add(chunk.first_segment_start)
        self._num_missing = sum(map(len, self._missing))

    def arrived(self, chunk: Chunk) -> bool:
        """The bytes of the chunk are there: whether its segments are whole by now."""
        if chunk.is_whole:
            return True
        (segment,) = chunk.segments  # chunks are cut so
        parts = self._parts[segment.start]
        parts.add(chunk.start, min(chunk.stop, segment.stop))
        return parts.total == segment.stop - segment.start

    def expected(self, chunk: Chunk) -> list[int | None]:
        """What each segment should add up to, where that is known."""
        found: list[int | None] = []
        for unit, _, begin, end in chunk.spans:
            key = chunk.region.family, unit
            if key not in self._parsed:
                self._parsed[key] = self._parse(*key)
            found += self._parsed[key][begin:end]
        return found

    def _parse(self, family: str, unit: int) -> list[int | None]:
        known = self._expected.get(sum_key(family, unit), "")
        count = self._geometry.num_segments[family]
        is_known = len(known) == DIGITS * count
        return list(struct.unpack(f">{count}Q", bytes.fromhex(known))) if is_known else [None] * count

    def accept(self, chunk: Chunk, digests: Sequence[int]) -> None:
        """Its segments, which are whole, are right."""
        family, first = chunk.region.family, 0
        for unit, slot, begin, end in chunk.spans:
            key = family, unit, slot
            if key not in self._digests:
                self._digests[key] = [0] * self._geometry.num_segments[family]
            last = first + end - begin
            self._digests[key][begin:end] = digests[first:last]
            first = last
        missing, start = self._missing[chunk.position], chunk.first_segment_start
        self._num_missing -= start in missing
        missing.discard(start)

    def reject(self, segment: Segment) -> set[int]:
        """The segment is wrong; returns the chunks (their numbers) that have to bring it again."""
        self._parts.pop(segment.start, None)
        bring = enumerate(self._chunks)
        return {index for index, chunk in bring if chunk.start < segment.stop and segment.start < chunk.stop}

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
            if 0 not in digests:
                found[sum_key(family, unit)] = struct.pack(f">{len(digests)}Q", *digests).hex()
        return found
