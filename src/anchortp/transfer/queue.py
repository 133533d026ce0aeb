"""What is copied next, from where, and what follows when that fails: the decisions of a load. Pure, clock passed in.

A queue per link, each in the order in which a forward pass needs the bytes. Whoever has a free hand asks `next`: the
link with the fewest copies in flight comes first, of those the fastest, so all links are busy side by side. A chunk
that fails is tried again from the same source, then read from the host, which has everything; a source that keeps
failing, or is gone, loses all that still waits for it. A chunk that nobody can bring ends the load, with the reason.
Every chunk is begun a bounded number of times, so a load ends whatever happens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from anchortp.transfer.work import HOST, Chunk

MAX_TRIES = 2  # of one chunk from one source
MAX_FAILURES = 4  # of a peer, over all chunks, before it is given up
SLOWER = 4.0  # a peer's chunk is read from the host instead if that is this many times faster by what was measured
MIN_MEASURED_S = 0.25  # that a link was busy, before its measured speed counts: a busy machine stalls single copies
# How long a copy may take. A peer is given up sooner, since the host has the same bytes.
GRACE_S = {False: 2.0, True: 30.0}  # by "is the host"
MIN_BYTES_PER_S = 50e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of what is in flight at once, over all links and on one; bytes do not keep a lone chunk from going."""

    num_chunks: int = 8
    num_bytes: int = 64 << 20
    num_chunks_per_link: int = 4


class Flight(NamedTuple):
    """A chunk that someone copies now: the `index`-th chunk of the load, on its `attempt`-th go.

    `began_s`: when its bytes began to move, None while whoever copies it gets ready. `deadline_s`: when it has taken
    too long, with all that comes before the copy or, once that has begun, by the copy alone.

    A tuple, since every chunk takes two of them.
    """

    index: int
    chunk: Chunk
    source: str
    link: str
    attempt: int
    deadline_s: float
    began_s: float | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.index, self.attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a load cannot end well. `device`: the peer that had failed before, "" if the host was all there was."""

    reason: str
    device: str = ""


@dataclass(slots=True, kw_only=True)
class _Link:
    waiting: list[tuple[int, str]] = field(default_factory=list)  # heap of (index, source)
    in_flight: int = 0
    copying: int = 0  # of those in flight
    busy_since_s: float = 0.0
    busy_s: float = 0.0
    num_bytes: int = 0
    prior_bytes_per_s: float | None = None

    def rate(self, now_s: float) -> float | None:
        """Bytes per second while busy; what was known before until enough has passed."""
        busy_s = self.busy(now_s)
        return self.prior_bytes_per_s if busy_s < MIN_MEASURED_S else self.num_bytes / busy_s

    def busy(self, now_s: float) -> float:
        """Seconds in which bytes moved."""
        return self.busy_s + (now_s - self.busy_since_s if self.copying else 0.0)

    def is_slower_than(self, bytes_per_s: float, now_s: float) -> bool:
        """Whether this load has shown it, in enough time or (by one chunk at least) as it was before: a link that was
        slow once is looked at again in every load."""
        if not self.num_bytes or self.num_bytes >= bytes_per_s * self.busy(now_s):
            return False
        is_known = self.prior_bytes_per_s is not None and self.prior_bytes_per_s < bytes_per_s
        return is_known or self.busy(now_s) >= MIN_MEASURED_S


class TransferQueue:
    """`chunks` in the order in which they are needed. `rates`: bytes per second of links, from earlier loads."""

    def __init__(
        self, chunks: Sequence[Chunk], *, limits: Limits | None = None, rates: Mapping[str, float] | None = None
    ):
        self.chunks = chunks
        self.limits = limits or Limits()
        self.failure: Failure | None = None
        self.total_bytes = sum(chunk.num_bytes for chunk in chunks)
        self.done_bytes = 0
        self.given_up: dict[str, str] = {}  # source -> why
        self._links: dict[str, _Link] = {}
        self._rates = dict(rates or {})
        self._host_link = next((chunk.link for chunk in chunks if chunk.source == HOST), "host")
        self._tries: Counter[tuple[int, str]] = Counter()
        self._failures: Counter[str] = Counter()
        self._attempts: Counter[int] = Counter()
        self._moved_bytes: Counter[str] = Counter()  # by source
        self._flights: dict[tuple[int, int], Flight] = {}
        self._done: dict[int, str] = {}  # index -> the source it came from
        self._rerouted: dict[str, tuple[int, str]] = {}  # source -> bytes, and the first reason
        for index, chunk in enumerate(chunks):
            self._link(chunk.link).waiting.append((index, chunk.source))
        for link in self._links.values():
            heapify(link.waiting)

    # ------------------------------------------------------------------------------------------ decisions

    @property
    def is_done(self) -> bool:
        return len(self._done) == len(self.chunks)

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    def next(self, now_s: float) -> Flight | None:
        """What to copy now; None if nothing may begin before something else ends (or ever)."""
        if self.failure is not None:
            return None
        in_flight_bytes = sum(flight.chunk.num_bytes for flight in self._flights.values())
        while (name := self._pick(now_s)) is not None:
            link = self._links[name]
            index, source = link.waiting[0]
            if source in self.given_up or self._is_slow(link, source, now_s):
                heappop(link.waiting)
                self._from_host(index, source, self.given_up.get(source, "it was much slower than the host"))
                continue
            chunk = self.chunks[index]
            if self._flights and (
                len(self._flights) >= self.limits.num_chunks
                or in_flight_bytes + chunk.num_bytes > self.limits.num_bytes
            ):
                return None
            heappop(link.waiting)
            return self._take(index, source, name, now_s)
        return None

    def begin(self, flight: Flight, now_s: float) -> None:
        """The bytes begin to move; what came before (memory for them, a source to be opened) says nothing about the
        link."""
        link = self._links[flight.link]
        if link.copying == 0:
            link.busy_since_s = now_s
        link.copying += 1
        deadline_s = _deadline(flight.chunk, flight.source, now_s)
        self._flights[flight.key] = flight._replace(began_s=now_s, deadline_s=deadline_s)

    def finish(self, flight: Flight, now_s: float) -> None:
        """The bytes, which had begun to move, are there."""
        assert self._flights[flight.key].began_s is not None, flight
        self._land(flight, now_s)
        self._links[flight.link].num_bytes += flight.chunk.num_bytes
        self._moved_bytes[flight.source] += flight.chunk.num_bytes
        self._done[flight.index] = flight.source
        self.done_bytes += flight.chunk.num_bytes

    def fail(self, flight: Flight, now_s: float, reason: str, *, gone: bool = False) -> None:
        """The copy failed. `gone`: its source will never answer again."""
        self._land(flight, now_s)
        self._blame(flight.index, flight.source, reason, gone)

    def reject(self, index: int, reason: str) -> None:
        """The bytes of a chunk that had arrived turn out to be wrong."""
        source = self._done.pop(index)
        self.done_bytes -= self.chunks[index].num_bytes
        self._moved_bytes[source] -= self.chunks[index].num_bytes
        self._blame(index, source, reason, False)

    def overdue(self, now_s: float) -> list[Flight]:
        """Copies that take longer than they may. They stay in flight until somebody says how they ended."""
        return [flight for flight in self._flights.values() if now_s >= flight.deadline_s]

    # --------------------------------------------------------------------------------------------- report

    def links(self, now_s: float) -> dict[str, tuple[int, float]]:
        """Per link that carried something: bytes, and bytes per second while it was busy."""
        found = {}
        for name, link in self._links.items():
            if link.num_bytes and (busy_s := link.busy(now_s)) > 0.0:
                found[name] = (link.num_bytes, link.num_bytes / busy_s)
        return found

    @property
    def peer_bytes(self) -> int:
        return sum(size for source, size in self._moved_bytes.items() if source != HOST)

    @property
    def rerouted(self) -> list[str]:
        """In words, what came from the host instead of the peer it was planned from."""
        return [
            f"{size} bytes planned from {source} came from the host: {why}"
            for source, (size, why) in self._rerouted.items()
        ]

    def validate(self) -> None:
        """Asserts that every chunk is in one place: waiting, in flight, or done. For tests and teardowns."""
        waiting = [index for link in self._links.values() for index, _ in link.waiting]
        flying = [flight.index for flight in self._flights.values()]
        places = Counter([*waiting, *flying, *self._done])
        assert all(count == 1 for count in places.values()), places
        assert self.failure is not None or len(places) == len(self.chunks), "a chunk was forgotten"
        assert self.done_bytes == sum(self.chunks[index].num_bytes for index in self._done)
        for name, link in self._links.items():
            flights = [flight for flight in self._flights.values() if flight.link == name]
            assert link.in_flight == len(flights), name
            assert link.copying == sum(flight.began_s is not None for flight in flights), name

    # -------------------------------------------------------------------------------------------- helpers

    def _link(self, name: str) -> _Link:
        if name not in self._links:
            self._links[name] = _Link(prior_bytes_per_s=self._rates.get(name))
        return self._links[name]

    def _pick(self, now_s: float) -> str | None:
        """The link that is served next."""
        open_links = [
            name
            for name, link in self._links.items()
            if link.waiting and link.in_flight < self.limits.num_chunks_per_link
        ]
        if len(open_links) < 2:
            return open_links[0] if open_links else None
        return min(open_links, key=lambda n: (self._links[n].in_flight, -(self._links[n].rate(now_s) or 0.0), n))

    def _is_slow(self, link: _Link, source: str, now_s: float) -> bool:
        host = self._links.get(self._host_link)
        if source == HOST or host is None or link is host:
            return False
        hosts = host.rate(now_s)
        return hosts is not None and link.is_slower_than(hosts / SLOWER, now_s)

    def _take(self, index: int, source: str, name: str, now_s: float) -> Flight:
        chunk = self.chunks[index]
        self._links[name].in_flight += 1
        self._attempts[index] += 1
        flight = Flight(
            index=index,
            chunk=chunk,
            source=source,
            link=name,
            attempt=self._attempts[index],
            deadline_s=_deadline(chunk, source, now_s),
        )
        self._flights[flight.key] = flight
        return flight

    def _land(self, flight: Flight, now_s: float) -> None:
        has_begun = self._flights.pop(flight.key).began_s is not None
        link = self._links[flight.link]
        link.in_flight -= 1
        link.copying -= has_begun
        if has_begun and link.copying == 0:
            link.busy_s += now_s - link.busy_since_s

    def _blame(self, index: int, source: str, reason: str, gone: bool) -> None:
        self._tries[index, source] += 1
        self._failures[source] += 1
        if source == HOST:
            if self._tries[index, source] >= MAX_TRIES:
                self.failure = self.failure or Failure(reason=reason, device=self.chunks[index].source)
            else:
                self._wait(index, HOST)
            return
        if gone or self._failures[source] >= MAX_FAILURES:
            self.given_up.setdefault(source, reason)
        if source in self.given_up or self._tries[index, source] >= MAX_TRIES:
            self._from_host(index, source, reason)
        else:
            self._wait(index, source)

    def _wait(self, index: int, source: str) -> None:
        name = self._host_link if source == HOST else self.chunks[index].link
        heappush(self._link(name).waiting, (index, source))

    def _from_host(self, index: int, source: str, reason: str) -> None:
        size, first_reason = self._rerouted.get(source, (0, reason))
        self._rerouted[source] = (size + self.chunks[index].num_bytes, first_reason)
        self._wait(index, HOST)


def _deadline(chunk: Chunk, source: str, now_s: float) -> float:
    return now_s + GRACE_S[source == HOST] + chunk.num_bytes / MIN_BYTES_PER_S
