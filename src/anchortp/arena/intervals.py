"""Sets of half-open byte ranges."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Range = tuple[int, int]


class IntervalSet:
    """A set of non-negative integers, kept as sorted, disjoint, non-touching ranges `[start, stop)`.

    `add` and `remove` cost O(log n) plus the ranges they merge or cut, n being the number of ranges.
    """

    __slots__ = ("_starts", "_stops", "_total")

    def __init__(self, ranges: Iterable[Range] = ()):
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._total = 0
        for start, stop in ranges:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> int:
        """Puts `[start, stop)` in; returns how many of its members are new."""
        assert 0 <= start <= stop, (start, stop)
        if start == stop:
            return 0
        low = bisect_left(self._stops, start)  # the first range that overlaps or touches
        high = bisect_right(self._starts, stop)  # one past the last such range
        old = self._length(low, high)
        if low < high:
            start, stop = min(start, self._starts[low]), max(stop, self._stops[high - 1])
        self._starts[low:high], self._stops[low:high] = [start], [stop]
        return self._count(stop - start - old)

    def remove(self, start: int, stop: int) -> int:
        """Takes `[start, stop)` out; returns how many members were there."""
        assert 0 <= start <= stop, (start, stop)
        low = bisect_right(self._stops, start)  # the first range that overlaps
        high = bisect_left(self._starts, stop)  # one past the last such range
        if start == stop or low >= high:
            return 0
        old = self._length(low, high)
        left, right = (self._starts[low], start), (stop, self._stops[high - 1])
        kept = [(a, b) for a, b in (left, right) if a < b]
        self._starts[low:high], self._stops[low:high] = [a for a, _ in kept], [b for _, b in kept]
        return -self._count(sum(b - a for a, b in kept) - old)

    @property
    def total(self) -> int:
        """The number of members (of bytes, in an account of bytes)."""
        return self._total

    def copy(self) -> IntervalSet:
        twin = IntervalSet()
        twin._starts, twin._stops, twin._total = self._starts.copy(), self._stops.copy(), self._total
        return twin

    def __sub__(self, other: IntervalSet) -> IntervalSet:
        rest = self.copy()
        for start, stop in other:
            rest.remove(start, stop)
        return rest

    def __or__(self, other: IntervalSet) -> IntervalSet:
        union = self.copy()
        for start, stop in other:
            union.add(start, stop)
        return union

    def validate(self) -> None:
        """Asserts the invariants above; for tests and teardowns."""
        edges = [edge for pair in self for edge in pair]
        assert all(a < b for a, b in itertools.pairwise(edges)), edges
        assert self._total == sum(stop - start for start, stop in self)

    def __iter__(self) -> Iterator[Range]:
        """The ranges, in rising order."""
        return zip(self._starts, self._stops, strict=True)

    def __contains__(self, member: int) -> bool:
        index = bisect_right(self._starts, member) - 1
        return index >= 0 and member < self._stops[index]

    def covers(self, start: int, stop: int) -> bool:
        """Whether all members of `[start, stop)` are in it; there must be some."""
        assert 0 <= start < stop, (start, stop)
        index = bisect_right(self._starts, start) - 1
        return index >= 0 and stop <= self._stops[index]

    def __bool__(self) -> bool:
        return self._total > 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IntervalSet):
            return NotImplemented
        return self._starts == other._starts and self._stops == other._stops

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"IntervalSet({list(self)})"

    def _length(self, low: int, high: int) -> int:
        return sum(self._stops[low:high]) - sum(self._starts[low:high])

    def _count(self, change: int) -> int:
        self._total += change
        return change
