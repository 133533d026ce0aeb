"""DeviceMemory: the account of a budget, against a slow oracle, and what it refuses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp.arena import PAGE_BYTES, ChunkPool, MemfdArena
from anchortp.arena.sim import SimVmm
from anchortp.errors import ArenaUnknown, BudgetExceeded, StateError
from anchortp.state.memory import DeviceMemory

P = PAGE_BYTES
NUM_PAGES = 8
BUDGET_PAGES = 10


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


def chunks() -> ChunkPool:
    return ChunkPool(SimVmm(granule_bytes=P))


@pytest.fixture
def memory() -> Iterator[DeviceMemory]:
    yield from checked(DeviceMemory(device="cpu:0", budget_bytes=BUDGET_PAGES * P))


@pytest.fixture(params=["memfd", "chunks"])
def either(request) -> Iterator[DeviceMemory]:
    """Memory of either kind, with the same pages."""
    pool = chunks() if request.param == "chunks" else None
    yield from checked(DeviceMemory(device="cpu:0", budget_bytes=BUDGET_PAGES * P, pool=pool))


def checked(memory: DeviceMemory) -> Iterator[DeviceMemory]:
    yield memory
    memory.validate()
    memory.close()


def pages_touched(start: int, stop: int) -> set[int]:
    return {byte // P for byte in range(start, stop, P)} | ({(stop - 1) // P} if start < stop else set())


def pages_inside(start: int, stop: int) -> set[int]:
    return {page for page in range(NUM_PAGES) if start <= page * P and (page + 1) * P <= stop}


span = st.integers(0, NUM_PAGES * P)
ranges = st.lists(st.tuples(span, span).map(lambda pair: (min(pair), max(pair))), max_size=3).map(tuple)
steps = st.lists(st.tuples(st.sampled_from(["commit", "decommit", "drop"]), st.sampled_from("ab"), ranges))


@pytest.mark.parametrize("pool", [lambda: None, chunks], ids=["memfd", "chunks"])
@settings(max_examples=100, deadline=None)
@given(steps)
def test_the_account_is_that_of_the_oracle(pool, steps: list) -> None:
    memory = DeviceMemory(device="cpu:0", budget_bytes=BUDGET_PAGES * P, pool=pool())
    oracle: dict[str, set[int]] = {"a": set(), "b": set()}
    with contextlib.closing(memory):
        for name in oracle:
            memory.create(name, NUM_PAGES * P)
        for action, name, parts in steps:
            if action == "commit":
                check_commit(memory, oracle, name, parts)
            elif action == "decommit":
                memory.decommit(name, parts)
                oracle[name] -= {page for part in parts for page in pages_inside(*part)}
            else:
                memory.drop(name)
                memory.create(name, NUM_PAGES * P)
                oracle[name].clear()
            memory.validate()
            assert memory.committed_bytes == P * sum(map(len, oracle.values()))
            for info in memory.infos():
                accounted = {page for part in info.ranges for page in pages_touched(*part)}
                assert accounted == oracle[info.name] and info.accounted_bytes == P * len(accounted)


def check_commit(memory: DeviceMemory, oracle: dict[str, set[int]], name: str, parts: tuple) -> None:
    wanted = {page for part in parts for page in pages_touched(*part)} - oracle[name]
    committed = sum(map(len, oracle.values()))
    if committed + len(wanted) <= BUDGET_PAGES:
        memory.commit(name, parts)
        oracle[name] |= wanted
        return
    with pytest.raises(BudgetExceeded) as caught:
        memory.commit(name, parts)
    assert caught.value.requested_bytes == P * len(wanted)
    assert caught.value.committed_bytes == P * committed
    assert caught.value.budget_bytes == BUDGET_PAGES * P
    assert caught.value.device == "cpu:0"


def test_what_is_refused_changes_nothing(either: DeviceMemory) -> None:
    either.create("a", NUM_PAGES * P)
    either.commit("a", ((0, P),))
    for start, stop in ((-1, P), (P, 0), (0, NUM_PAGES * P + 1)):
        with pytest.raises(StateError, match="is no range"):
            either.commit("a", ((P, 2 * P), (start, stop)))
        with pytest.raises(StateError, match="is no range"):
            either.decommit("a", ((0, P), (start, stop)))
    for size in (0, -P, 1 << 60):
        with pytest.raises(StateError, match="cannot reserve"):
            either.create("b", size)
    for name in ("", "a\0b", "x" * 201):
        with pytest.raises(StateError, match="cannot name"):
            either.create(name, P)
    with pytest.raises(StateError, match="already"):
        either.create("a", P)
    with pytest.raises(StateError, match="cannot shrink"):
        either.grow("a", P)
    with pytest.raises(ArenaUnknown, match="it has: a"):
        either.commit("b", ())
    assert either.info("a").ranges == ((0, P),) and len(either.infos()) == 1


def test_growing_makes_room_for_commits(either: DeviceMemory) -> None:
    either.create("a", P)
    either.grow("a", 3 * P)
    either.commit("a", ((2 * P, 3 * P),))
    assert either.info("a").reserved_bytes == 3 * P


def test_dropping_gives_back_the_memory_under_a_mapping(memory: DeviceMemory) -> None:
    memory.create("a", 4 * P)
    twin = MemfdArena.from_fd("twin", os.dup(memory.arena("a").fd))
    with twin, twin.map() as mapping:
        mapping[:] = b"x" * 4 * P
        memory.drop("a")
        assert twin.committed_bytes() == 0


def test_adoption_keeps_the_bytes_and_counts_them(memory: DeviceMemory) -> None:
    with MemfdArena.create("kv", 4 * P) as arena, arena.map() as mapping:
        mapping[:5] = b"state"
        memory.adopt("kv", 4 * P, ((0, 1),), arena.fd)
        memory.adopt("kv", 4 * P, ((0, P),), arena.fd)  # from a second holder
        assert memory.info("kv").ranges == ((0, P),)
        assert os.pread(memory.arena("kv").fd, 5, 0) == b"state"
        with MemfdArena.create("kv", 4 * P) as other, pytest.raises(StateError, match="already"):
            memory.adopt("kv", 4 * P, (), other.fd)
        with pytest.raises(StateError, match="not 20480" if P == 4096 else "hand over"):
            memory.adopt("less", 5 * P, (), arena.fd)
        with MemfdArena.create("big", 64 * P) as big, pytest.raises(BudgetExceeded):
            memory.adopt("big", 64 * P, ((0, 64 * P),), big.fd)
        assert [info.name for info in memory.infos()] == ["kv"]
        arena.grow(6 * P)
        memory.adopt("grown", 4 * P, (), arena.fd)  # by a holder who does not know yet
        assert memory.info("grown").reserved_bytes == 6 * P


def test_scribbling_hits_every_arena_accounted_or_not(memory: DeviceMemory) -> None:
    for name in "ab":
        memory.create(name, 2 * P)
    os.pwrite(memory.arena("b").fd, b"\1", P)
    assert memory.scribble() == P
    assert os.pread(memory.arena("b").fd, 2 * P, 0) == bytes(P) + b"\xff" * P


def test_memory_that_the_system_does_not_have_is_not_counted(memory: DeviceMemory, monkeypatch) -> None:
    memory.create("a", 8 * PAGE_BYTES)
    memory.commit("a", ((0, PAGE_BYTES),), allocate=True)
    assert memory.arena("a").committed_bytes() == PAGE_BYTES
    allocate, calls = MemfdArena.allocate, []

    def refuse_the_second(arena: MemfdArena, start: int, stop: int) -> None:
        calls.append((start, stop))
        if len(calls) == 2:
            raise StateError("the system has no memory")
        allocate(arena, start, stop)

    monkeypatch.setattr(MemfdArena, "allocate", refuse_the_second)
    with pytest.raises(StateError, match="no memory"):
        memory.commit("a", ((0, 3 * PAGE_BYTES), (5 * PAGE_BYTES, 6 * PAGE_BYTES)), allocate=True)
    assert calls == [(PAGE_BYTES, 3 * PAGE_BYTES), (5 * PAGE_BYTES, 6 * PAGE_BYTES)]
    assert memory.arena("a").committed_bytes() == memory.committed_bytes == PAGE_BYTES
    memory.validate()
