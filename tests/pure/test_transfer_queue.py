"""The decisions of a load, played without threads: whatever fails, it ends, in order, within its limits."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp.config import parse_model_config
from anchortp.layout import WeightAddresses, model_units
from anchortp.plan.plan import FromHost, FromPeer, Move
from anchortp.transfer import queue as q
from anchortp.transfer.queue import Flight, Limits, TransferQueue
from anchortp.transfer.work import HOST, Chunk, Geometry
from tests.pure.test_transfer_work import CONFIG

GEOMETRY = Geometry(WeightAddresses(units=model_units(parse_model_config(CONFIG))))
MB = 1 << 20


def chunk(position: int, source: str, num_bytes: int = MB) -> Chunk:
    region = next(r for r in GEOMETRY.regions["mlp"] if r.copy == position % 2)
    return Chunk(
        region=region,
        unit=0,
        num_units=1,
        slot=0,
        first_byte=0,
        num_bytes=num_bytes,
        source=source,
        source_slot=0,
        link=source or "host",
        start=position * num_bytes,
        source_start=0,
    )


def begun(queue: TransferQueue, now_s: float) -> Flight | None:
    """The next flight, whose bytes begin to move at once."""
    flight = queue.next(now_s)
    if flight is not None:
        queue.begin(flight, now_s)
    return flight


def play(queue: TransferQueue, rng: random.Random, p_fail: float, bad: set[str]) -> list[tuple[int, str]]:
    """Random ends in random order until nothing moves; returns what was brought, in order of arrival."""
    now_s, flights, arrived = 0.0, [], []
    for _ in range(100_000):
        queue.validate()
        while (flight := queue.next(now_s)) is not None:
            flights.append(flight)
            check_limits(queue, flights)
        if not flights:
            break
        now_s += rng.random() * 0.01
        flight = flights.pop(rng.randrange(len(flights)))
        roll = rng.random()
        if roll < p_fail / 4:
            queue.fail(flight, now_s, "injected before it began")
            continue
        queue.begin(flight, now_s)
        queue.validate()
        now_s += rng.random() * 0.01
        if flight.source in bad or roll < p_fail:
            queue.fail(flight, now_s, "injected", gone=rng.random() < 0.2 and flight.source != HOST)
            continue
        queue.finish(flight, now_s)
        if roll > 1 - p_fail / 2:
            queue.reject(flight.index, "wrong sum")
            continue
        arrived.append((flight.index, flight.source))
    else:
        raise AssertionError("the load does not end")
    queue.validate()
    return arrived


def check_limits(queue: TransferQueue, flights) -> None:
    limits = queue.limits
    assert len(flights) <= limits.num_chunks
    assert len(flights) == 1 or sum(f.chunk.num_bytes for f in flights) <= limits.num_bytes
    for link in {f.link for f in flights}:
        assert sum(f.link == link for f in flights) <= limits.num_chunks_per_link
    assert len({f.index for f in flights}) == len(flights), "two copies of the same bytes at once"


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    p_fail=st.sampled_from([0.0, 0.05, 0.3, 0.8]),
    bad=st.sets(st.sampled_from([HOST, "cpu:1", "cpu:2"])),
    limits=st.builds(
        Limits,
        num_chunks=st.integers(1, 6),
        num_bytes=st.integers(1, 6 * MB),
        num_chunks_per_link=st.integers(1, 4),
    ),
)
def test_it_ends_with_every_byte_or_with_a_reason(seed, p_fail, bad, limits):
    rng = random.Random(seed)
    chunks = [
        chunk(i, rng.choice([HOST, "cpu:1", "cpu:2"]), rng.choice([1, 1000, MB])) for i in range(rng.randint(0, 40))
    ]
    queue = TransferQueue(chunks, limits=limits)
    arrived = play(queue, rng, p_fail, bad)
    if queue.failure is None:
        assert queue.is_done and sorted(index for index, _ in arrived) == list(range(len(chunks)))
        assert queue.done_bytes == queue.total_bytes
        assert all(source in (HOST, chunks[index].source) for index, source in arrived)
        assert not bad & {source for _, source in arrived}
    else:
        assert HOST in bad or p_fail, "nothing failed, and yet the load did"
        assert queue.failure.reason in ("injected", "injected before it began", "wrong sum")
    if HOST not in bad and p_fail == 0.0:
        assert queue.failure is None, "the host has everything"


def test_each_link_is_served_in_order_and_all_side_by_side():
    sources = [HOST, "cpu:1", "cpu:2"]
    chunks = [chunk(i, sources[i % 3]) for i in range(30)]
    queue = TransferQueue(chunks, limits=Limits(num_chunks=3))
    order: dict[str, list[int]] = {source: [] for source in sources}
    now_s = 0.0
    while not queue.is_done:
        flights = [begun(queue, now_s) for _ in range(3)]
        assert {flight.source for flight in flights} == set(sources)
        now_s += 0.01
        for flight in flights:
            order[flight.source].append(flight.index)
            queue.finish(flight, now_s)
    assert all(indices == sorted(indices) for indices in order.values())
    assert queue.peer_bytes == 20 * MB and queue.rerouted == []


def test_the_fastest_link_comes_first():
    queue = TransferQueue([chunk(0, HOST), chunk(1, "cpu:1")], rates={"host": 1e9, "cpu:1": 9e9})
    assert [queue.next(0.0).source, queue.next(0.0).source] == ["cpu:1", HOST]


def test_a_peer_that_dies_loses_what_waits_for_it_to_the_host():
    queue = TransferQueue([chunk(i, "cpu:1") for i in range(5)])
    queue.fail(begun(queue, 0.0), 0.0, "its anchor is gone", gone=True)
    sources = []
    while (flight := begun(queue, 0.0)) is not None:
        sources.append(flight.source)
        queue.finish(flight, 0.01)
    assert sources == [HOST] * 5 and queue.is_done and queue.peer_bytes == 0
    assert queue.rerouted == [f"{5 * MB} bytes planned from cpu:1 came from the host: its anchor is gone"]


def test_a_failed_chunk_is_tried_again_where_it_was_then_read_from_the_host():
    queue = TransferQueue([chunk(0, "cpu:1")])
    seen = []
    for _ in range(q.MAX_TRIES):
        flight = begun(queue, 0.0)
        seen.append(flight.source)
        queue.fail(flight, 0.0, "bad luck")
    seen.append(begun(queue, 0.0).source)
    assert seen == ["cpu:1"] * q.MAX_TRIES + [HOST]


def test_a_chunk_that_nobody_has_ends_the_load_and_names_the_peer():
    queue = TransferQueue([chunk(0, "cpu:1"), chunk(1, HOST)])
    for _ in range(20):
        flight = begun(queue, 0.0)
        if flight is None:
            break
        queue.fail(flight, 0.0, f"no bytes from {flight.source or 'host'}", gone=flight.source == "cpu:1")
    assert queue.failure is not None and queue.failure.reason == "no bytes from host"
    assert queue.next(0.0) is None


def test_a_link_that_turns_out_slow_is_left_for_the_host():
    chunks = [chunk(i, "cpu:1" if i % 2 else HOST, 8 * MB) for i in range(20)]
    queue = TransferQueue(chunks, limits=Limits(num_chunks=2, num_chunks_per_link=1))
    host, peer = sorted((begun(queue, 0.0), begun(queue, 0.0)), key=lambda flight: flight.source)
    queue.finish(host, 0.3)
    queue.finish(peer, 2.0)
    sources = []
    now_s = 2.0
    while (flight := begun(queue, now_s)) is not None:
        sources.append(flight.source)
        now_s += 0.01
        queue.finish(flight, now_s)
    assert set(sources) == {HOST} and queue.is_done
    assert "slower than the host" in queue.rerouted[0]


def test_a_single_slow_copy_proves_nothing():
    chunks = [chunk(i, "cpu:1" if i % 2 else HOST, 8 * MB) for i in range(20)]
    queue = TransferQueue(chunks, limits=Limits(num_chunks=2, num_chunks_per_link=1))
    host, peer = sorted((begun(queue, 0.0), begun(queue, 0.0)), key=lambda flight: flight.source)
    queue.finish(host, 0.001)
    queue.finish(peer, 0.1)
    sources, now_s = [], 0.1
    while (flight := begun(queue, now_s)) is not None:
        sources.append(flight.source)
        now_s += 0.001
        queue.finish(flight, now_s)
    assert sources.count("cpu:1") == 9 and queue.rerouted == []


def test_a_copy_that_takes_too_long_is_named_and_stays_in_flight():
    queue = TransferQueue([chunk(0, "cpu:1"), chunk(1, HOST)])
    peer, host = sorted((begun(queue, 0.0), begun(queue, 0.0)), key=lambda f: f.source, reverse=True)
    assert queue.overdue(1.0) == []
    assert [flight.key for flight in queue.overdue(3.0)] == [peer.key] and queue.in_flight == 2
    assert {flight.key for flight in queue.overdue(31.0)} == {peer.key, host.key}


def slow_peer_of_old(num_chunks: int) -> TransferQueue:
    """By earlier loads the peer is a hundred times as slow as the host."""
    chunks = [chunk(i, "cpu:1" if i % 2 else HOST, MB) for i in range(num_chunks)]
    limits = Limits(num_chunks=2, num_chunks_per_link=1)
    return TransferQueue(chunks, limits=limits, rates={"host": 1e9, "cpu:1": 1e7})


@pytest.mark.parametrize(("bytes_per_s", "from_peer"), [(1e9, 10), (1e7, 1)])
def test_a_peer_that_was_slow_before_is_tried_again(bytes_per_s, from_peer):
    """One chunk is enough to tell whether it still is, however little time that takes."""
    queue = slow_peer_of_old(20)
    now_s, sources = 0.0, []
    while (flight := begun(queue, now_s)) is not None:
        sources.append(flight.source)
        now_s += MB / (1e9 if flight.source == HOST else bytes_per_s)
        queue.finish(flight, now_s)
    assert queue.is_done and sources.count("cpu:1") == from_peer
    assert queue.links(now_s)["cpu:1"][1] == pytest.approx(bytes_per_s)


def test_a_speed_of_before_condemns_nobody():
    """However long the first chunk of this load takes to arrive."""
    queue = slow_peer_of_old(20)
    flights = [begun(queue, 0.0) for _ in range(2)]
    (host,) = [flight for flight in flights if flight.source == HOST]
    queue.finish(host, 0.001)
    assert begun(queue, 1.9).source == HOST and queue.given_up == {} and queue.rerouted == []


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_the_clock_of_a_link_runs_while_bytes_move_and_only_then(seed):
    """Against a count of the ticks at which any copy of the link moves."""
    rng = random.Random(seed)
    queue = TransferQueue([chunk(i, HOST) for i in range(8)], limits=Limits(num_chunks=4))
    waiting, moving, now_s, busy_ticks = [], [], 0.0, 0
    while not queue.is_done:
        if (flight := queue.next(now_s)) is not None:
            waiting.append(flight)
        if waiting and rng.random() < 0.5:
            moving.append(waiting.pop())
            queue.begin(moving[-1], now_s)
        elif moving and rng.random() < 0.5:
            queue.finish(moving.pop(0), now_s)
        now_s += 1.0
        busy_ticks += bool(moving)
    assert queue.links(now_s) == {"host": (8 * MB, pytest.approx(8 * MB / busy_ticks))}


def test_what_comes_before_a_copy_has_a_time_of_its_own():
    queue = TransferQueue([chunk(0, "cpu:1")])
    flight = queue.next(0.0)
    assert queue.overdue(1.9) == [] and queue.overdue(2.1) == [flight]
    queue.begin(flight, 1.9)
    assert queue.overdue(3.8) == []
    (late,) = queue.overdue(4.0)
    assert late.key == flight.key


def test_links_report_their_bytes_and_the_speed_while_busy():
    queue = TransferQueue([chunk(0, HOST, 4 * MB), chunk(1, HOST, 4 * MB)], limits=Limits(num_chunks=1))
    queue.finish(begun(queue, 10.0), 10.5)
    queue.finish(begun(queue, 100.0), 100.5)
    assert queue.links(200.0) == {"host": (8 * MB, pytest.approx(8 * MB))}


def test_the_host_reads_for_a_relocation_within_the_device_too():
    move = Move(
        device="cpu:0",
        family="mlp",
        unit=1,
        slot=0,
        source=FromPeer(device="cpu:0", slot=3),
        num_bytes=GEOMETRY.unit_bytes("mlp"),
    )
    (first, *_) = GEOMETRY.chunks([move])
    assert first.source == "cpu:0" and first.link == "cpu:0"
    host = Move(device="cpu:0", family="mlp", unit=1, slot=0, source=FromHost(), num_bytes=GEOMETRY.unit_bytes("mlp"))
    assert GEOMETRY.chunks([host])[0].link == "host"
