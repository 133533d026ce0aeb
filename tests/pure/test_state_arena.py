"""MemfdArena in one process."""

from __future__ import annotations

import fcntl
import os
import resource
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp.arena import PAGE_BYTES, IntervalSet, MemfdArena, round_down, round_up
from anchortp.errors import StateError

NUM_PAGES = 16
SIZE = NUM_PAGES * PAGE_BYTES


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_reserving_commits_nothing_and_use_commits_pages() -> None:
    with MemfdArena.create("weights", 1 << 40) as arena:
        assert arena.reserved_bytes == 1 << 40 and arena.committed_bytes() == 0
        with arena.map() as memory:
            memory[5 * PAGE_BYTES] = 1
            memory[(1 << 40) - 1] = 2
        assert arena.committed_bytes() == 2 * PAGE_BYTES
        assert arena.committed_ranges() == [
            (5 * PAGE_BYTES, 6 * PAGE_BYTES),
            ((1 << 40) - PAGE_BYTES, 1 << 40),
        ]


def test_sizes_are_rounded_up_to_pages() -> None:
    with MemfdArena.create("odd", PAGE_BYTES + 1) as arena:
        assert arena.reserved_bytes == os.fstat(arena.fd).st_size == 2 * PAGE_BYTES


def test_a_mapping_outlives_the_descriptor() -> None:
    arena = MemfdArena.create("short", PAGE_BYTES)
    with arena.map() as memory:
        arena.close()
        arena.close()
        memory[:5] = b"alive"
        assert memory[:5] == b"alive"


def test_growing_is_in_place() -> None:
    with MemfdArena.create("kv", PAGE_BYTES) as arena, arena.map() as before:
        before[:4] = b"kept"
        arena.grow(3 * PAGE_BYTES)
        with arena.map() as after:
            assert len(after) == 3 * PAGE_BYTES and after[:4] == b"kept"
            after[1] = ord("!")
            assert before[:4] == b"k!pt"


def test_no_holder_can_shrink_or_seal_it() -> None:
    with MemfdArena.create("safe", SIZE) as arena:
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, PAGE_BYTES)
        with pytest.raises(PermissionError):
            fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)


def test_only_descriptors_of_arenas_are_taken() -> None:
    with MemfdArena.create("a", SIZE) as arena:
        with MemfdArena.from_fd("b", os.dup(arena.fd)) as twin, twin.map() as memory, arena.map() as other:
            memory[7] = 7
            assert twin.reserved_bytes == SIZE and other[7] == 7
        unsealed = os.memfd_create("x", os.MFD_CLOEXEC)
        pipe = os.pipe()
        for fd in (unsealed, *pipe):
            with pytest.raises(StateError, match="not an arena's"):
                MemfdArena.from_fd("c", fd)
            os.close(fd)  # still the caller's


def test_an_arena_the_system_refuses_is_our_error() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(StateError, match="limit on open files"):
            MemfdArena.create("one too many", PAGE_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


ranges = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: (min(pair), max(pair)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, NUM_PAGES - 1)), st.lists(ranges, max_size=4))
def test_decommit_gives_back_whole_pages_and_keeps_their_neighbours(
    used: list[int], dropped: list[tuple[int, int]]
) -> None:
    with MemfdArena.create("kv", SIZE) as arena, arena.map() as memory:
        pages, content = IntervalSet(), bytearray(SIZE)
        for page in used:
            start, stop = page * PAGE_BYTES, (page + 1) * PAGE_BYTES
            memory[start:stop] = content[start:stop] = bytes([page + 1]) * PAGE_BYTES
            pages.add(start, stop)
        for start, stop in dropped:
            low, high = round_up(start), max(round_up(start), round_down(stop))
            assert arena.decommit(start, stop) == high - low
            content[low:high] = bytes(high - low)
            pages.remove(low, high)
        assert arena.committed_ranges() == list(pages)
        assert arena.committed_bytes() == pages.total
        assert memory[:] == content


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, NUM_PAGES - 1)), st.lists(ranges, max_size=3))
def test_scribbling_hits_what_is_committed_and_commits_nothing(used: list[int], hit: list[tuple[int, int]]) -> None:
    with MemfdArena.create("kv", SIZE) as arena, arena.map() as memory:
        committed, content = IntervalSet(), bytearray(SIZE)
        for page in used:
            memory[page * PAGE_BYTES] = content[page * PAGE_BYTES] = 1
            committed.add(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
        expected = [(max(a, c), min(b, d)) for a, b in hit for c, d in committed if max(a, c) < min(b, d)]
        assert arena.scribble(hit) == sum(b - a for a, b in expected)
        for a, b in expected:
            content[a:b] = b"\xff" * (b - a)
        assert arena.committed_bytes() == committed.total
        assert memory[:] == content


def test_garbage_is_not_a_number() -> None:
    with MemfdArena.create("w", SIZE) as arena, arena.map() as memory:
        memory[:] = struct.pack("<f", 1.0) * (SIZE // 4)
        assert arena.scribble([(0, SIZE)]) == SIZE
        assert all(value != value for (value,) in struct.iter_unpack("<f", memory[:]))
        assert all(value != value for (value,) in struct.iter_unpack("<e", memory[:]))
