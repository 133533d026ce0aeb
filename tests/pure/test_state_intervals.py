"""IntervalSet against an oracle: a plain set of its members."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from anchortp.arena import PAGE_BYTES, IntervalSet, round_down, round_up

SPAN = 40
ranges = st.tuples(st.integers(0, SPAN), st.integers(0, SPAN)).map(lambda pair: (min(pair), max(pair)))
operations = st.lists(st.tuples(st.sampled_from(["add", "remove"]), ranges), max_size=30)


@given(operations)
def test_it_is_a_set_of_its_members(steps: list[tuple[str, tuple[int, int]]]) -> None:
    intervals, oracle = IntervalSet(), set()
    for name, (start, stop) in steps:
        members = set(range(start, stop))
        changed = members - oracle if name == "add" else members & oracle
        assert getattr(intervals, name)(start, stop) == len(changed)
        oracle ^= changed
        intervals.validate()
        assert {member for a, b in intervals for member in range(a, b)} == oracle
        assert intervals.total == len(oracle) and bool(intervals) == bool(oracle)
        assert all((member in intervals) == (member in oracle) for member in range(SPAN))


@given(operations)
def test_equal_members_are_equal_sets_however_they_came_about(
    steps: list[tuple[str, tuple[int, int]]],
) -> None:
    intervals = IntervalSet()
    for name, (start, stop) in steps:
        getattr(intervals, name)(start, stop)
    assert intervals == IntervalSet((a, a + 1) for start, stop in intervals for a in range(start, stop))


@given(operations, ranges)
def test_a_copy_is_independent(steps: list[tuple[str, tuple[int, int]]], more: tuple[int, int]) -> None:
    intervals = IntervalSet(bounds for name, bounds in steps if name == "add")
    before = list(intervals)
    twin = intervals.copy()
    twin.remove(0, SPAN)
    twin.add(*more)
    assert list(intervals) == before and intervals.total == sum(b - a for a, b in before)


@given(operations, ranges)
def test_it_covers_what_has_no_member_outside(steps: list[tuple[str, tuple[int, int]]], asked: tuple[int, int]) -> None:
    intervals = IntervalSet(bounds for name, bounds in steps if name == "add")
    start, stop = asked[0], asked[1] + 1
    assert intervals.covers(start, stop) == all(member in intervals for member in range(start, stop))


@given(operations, operations)
def test_a_difference_is_what_the_other_set_lacks(steps, more) -> None:
    one, other = (IntervalSet(bounds for name, bounds in made if name == "add") for made in (steps, more))
    members = {member for a, b in one for member in range(a, b)}
    rest = one - other
    rest.validate()
    assert {member for a, b in rest for member in range(a, b)} == {m for m in members if m not in other}
    assert one == IntervalSet((m, m + 1) for m in members), "the difference is a new set"


@given(st.integers(0, 1 << 40))
def test_rounding_to_pages(num_bytes: int) -> None:
    low, high = round_down(num_bytes), round_up(num_bytes)
    assert low % PAGE_BYTES == high % PAGE_BYTES == 0
    assert low <= num_bytes <= high
    assert high - low == (0 if num_bytes % PAGE_BYTES == 0 else PAGE_BYTES)
