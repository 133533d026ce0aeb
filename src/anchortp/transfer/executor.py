"""Carries out a load: threads that do what `transfer.queue` decides, check what arrives, and say when a layer is there.

Runs in a worker, beside the thread that computes. One thread watches (progress, copies that take too long, the end);
a few move. They share one lock, never held while bytes move.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from anchortp.errors import AnchorTPError, GroupAborted, StateError, WireError
from anchortp.layout import Shard
from anchortp.plan.plan import REPLICATED
from anchortp.transfer.checksum import SumBook, digest
from anchortp.transfer.device import DeviceDestination
from anchortp.transfer.queue import Failure, Flight, Limits, TransferQueue
from anchortp.transfer.sources import Destination, Source, Stopped
from anchortp.transfer.work import HOST, Chunk, Geometry

NUM_MOVERS = 2
PROGRESS_EVERY_S = 0.05
STUCK_S = 10.0  # a copy that was told to stop and does not: then the load ends without it
PREFETCH_BYTES = 64 << 20  # asked of the disk ahead of what is read
_WATCH_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`links`: per link bytes, and bytes per second while it was busy."""

    num_bytes: int
    total_bytes: int
    links: dict[str, tuple[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """All bytes are there and were checked against the sums that were known. `sums`: of all units that came."""

    num_bytes: int
    peer_bytes: int
    seconds: float
    sums: dict[str, str]
    links: dict[str, tuple[int, float]]
    rerouted: tuple[str, ...]


@dataclass(slots=True, eq=False)
class _Stop:
    """Tells one copy to stop."""

    asked_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What a load calls, all from its own threads. `open_source` gives the source of a device (or `HOST`), once per
    load. `before_chunk` may raise or never return: a fault on purpose. `on_error` is told what a chunk met, before the
    load decides what follows, and need not return: it may be no matter of one chunk. `on_end` is not called after a
    cancel."""

    open_source: Callable[[str], Source]
    on_progress: Callable[[Progress], None] = lambda progress: None
    on_end: Callable[[Loaded | Failure], None] = lambda result: None
    before_chunk: Callable[[], None] = lambda: None
    on_error: Callable[[Exception], None] = lambda error: None


class Load:
    """One load, from `start` to its end or `cancel`.

    `chunks`: in the order in which they are needed. `expected`: sums by `checksum.sum_key`. `pace`: the share of the
    time in which bytes move; below 1.0 one thread moves alone. `rates`: bytes per second of links, from before.
    """

    def __init__(
        self,
        geometry: Geometry,
        chunks: Sequence[Chunk],
        destination: Destination | DeviceDestination,
        hooks: Hooks,
        *,
        expected: Mapping[str, str] | None = None,
        pace: float = 1.0,
        num_movers: int = NUM_MOVERS,
        limits: Limits | None = None,
        rates: Mapping[str, float] | None = None,
    ):
        assert 0.0 < pace <= 1.0, pace
        self._hooks = hooks
        self._destination = destination
        self._pace = pace
        self._num_movers = num_movers if pace == 1.0 else 1
        self._queue = TransferQueue(chunks, limits=limits, rates=rates)
        self._book = SumBook(geometry, chunks, expected or {})
        lock = threading.Lock()
        self._changed = threading.Condition(lock)  # for movers and whoever waits for a layer
        self._over = threading.Condition(lock)  # for the watcher: the end is near
        self._stops: dict[tuple[int, int], _Stop] = {}  # by flight
        self._sources: dict[str, Source] = {}
        # One each: while a peer does not answer, others are opened.
        self._opening = {name: threading.Lock() for name in (HOST, *(chunk.source for chunk in chunks))}
        self._cancelled = False
        self._num_asked = self._asked_bytes = 0  # chunks that the disk was asked for ahead of their time
        self._movers: list[threading.Thread] = []
        self._began_s = 0.0
        self._watcher = threading.Thread(target=self._watch, name="load", daemon=True)

    # ---------------------------------------------------------------------------------------- for the worker

    def start(self) -> None:
        self._began_s = time.monotonic()
        self._watcher.start()

    @property
    def is_whole(self) -> bool:
        """Every byte is there and right: nobody has to wait for anything."""
        return self._queue.is_done and self._book.is_complete

    def writes_to(self, shard: Shard) -> bool:
        """Whether it fills slots of this shard; else the shard can be used without waiting for anything."""
        return any(c.region.family == REPLICATED or c.slot < len(shard[c.region.family]) for c in self._queue.chunks)

    def wait(self, position: int, check: Callable[[], None], epoch: int) -> None:
        """Returns once the bytes of all positions up to this one are there and were found right.

        `check` is asked now and then, and raises when nobody wants the answer any more. Raises GroupAborted (of
        `epoch`) if the load fails or is cancelled.
        """
        while True:
            with self._changed:
                if self._book.first_missing > position:
                    return
                if self._is_stopped:
                    raise GroupAborted(epoch, "the weights did not arrive")
                self._changed.wait(_WATCH_S)
            check()

    def cancel(self, timeout_s: float = STUCK_S) -> None:
        """Ends the load; nothing is written into the arena after this has returned.

        Raises StateError if a copy does not stop: then only the end of this process makes the arena safe.
        """
        with self._changed:
            self._cancelled = True
            self._wake_all()
        if self._watcher.ident is None:
            return
        deadline_s = time.monotonic() + timeout_s
        for thread in (self._watcher, *self._movers):
            thread.join(max(0.0, deadline_s - time.monotonic()))
            if thread.is_alive():
                raise StateError(f"a copy did not stop within {timeout_s} s; end this worker's process")

    # -------------------------------------------------------------------------------------------- the watcher

    def _watch(self) -> None:
        self._hooks.on_progress(self._progress())  # before a byte moves: whoever hears of it takes the time from there
        for _ in range(self._num_movers):
            self._add_mover()
        next_s = self._began_s + PROGRESS_EVERY_S
        while not self._is_over():
            now_s = time.monotonic()
            if now_s >= next_s:
                next_s = now_s + PROGRESS_EVERY_S
                self._hooks.on_progress(self._progress())
            with self._changed:
                self._hurry(now_s)
                self._over.wait(_WATCH_S)
        self._end()

    def _is_over(self) -> bool:
        """Whether nothing moves any more, and nothing will."""
        with self._changed:
            if self._is_stopped:
                self._stop_all()
            return (self.is_whole or self._is_stopped) and not (self._stops and self._is_worth_waiting())

    @property
    def _is_stopped(self) -> bool:
        return self._cancelled or self._queue.failure is not None

    def _is_worth_waiting(self) -> bool:
        now_s = time.monotonic()
        return any(stop.asked_s is None or now_s < stop.asked_s + STUCK_S for stop in self._stops.values())

    def _hurry(self, now_s: float) -> None:
        """Tells copies that take too long to stop, and puts others in their place."""
        for flight in self._queue.overdue(now_s):
            stop = self._stops[flight.key]
            if stop.asked_s is None:
                stop.asked_s = now_s
                self._add_mover()
            elif now_s >= stop.asked_s + STUCK_S:
                # It may still write whatever it reads: no other copy can be sure of these bytes.
                self._give_up(
                    f"{flight.chunk}: a read from {flight.source or 'the host'} hangs. Check the storage or the "
                    f"device, and replace this worker's process.",
                    flight.source,
                )

    def _give_up(self, reason: str, device: str = "") -> None:
        self._queue.failure = self._queue.failure or Failure(reason=reason, device=device)
        self._wake_all()

    def _wake_all(self) -> None:
        self._changed.notify_all()
        self._over.notify_all()

    def _add_mover(self) -> None:
        mover = threading.Thread(target=self._move_all, name=f"load-{len(self._movers)}", daemon=True)
        self._movers.append(mover)
        mover.start()

    def _stop_all(self) -> None:
        now_s = time.monotonic()
        for stop in self._stops.values():
            if stop.asked_s is None:
                stop.asked_s = now_s

    def _end(self) -> None:
        with self._changed:
            cancelled = self._cancelled
            now_s = time.monotonic()
            result = self._queue.failure or self._loaded(now_s)
            self._wake_all()
        if not cancelled:
            self._hooks.on_end(result)
        for source in self._sources.values():  # nobody has to wait until what they mapped is gone
            source.close()

    def _loaded(self, now_s: float) -> Loaded:
        return Loaded(
            num_bytes=self._queue.done_bytes,
            peer_bytes=self._queue.peer_bytes,
            seconds=now_s - self._began_s,
            sums=self._book.sums(),
            links=self._queue.links(now_s),
            rerouted=tuple(self._queue.rerouted),
        )

    def _progress(self) -> Progress:
        with self._changed:
            return Progress(
                num_bytes=self._queue.done_bytes,
                total_bytes=self._queue.total_bytes,
                links=self._queue.links(time.monotonic()),
            )

    # --------------------------------------------------------------------------------------------- the movers

    def _move_all(self) -> None:
        while (flight := self._take()) is not None:
            began_s = time.monotonic()
            self._move(flight, self._stops[flight.key])
            if self._pace < 1.0:
                self._rest((time.monotonic() - began_s) * (1.0 / self._pace - 1.0))

    def _take(self) -> Flight | None:
        """Waits for something to do; None when there will be nothing more."""
        with self._changed:
            while not (self._is_stopped or self.is_whole):
                flight = self._queue.next(time.monotonic())
                if flight is not None:
                    self._stops[flight.key] = _Stop()
                    return flight
                self._changed.wait()
        return None

    def _move(self, flight: Flight, stop: _Stop) -> None:
        chunk = flight.chunk
        try:
            self._hooks.before_chunk()
            self._destination.prepare(chunk.start, chunk.stop)
        except Exception as error:  # whatever it is, no other source is of any help
            self._hooks.on_error(error)
            is_theirs = isinstance(error, OSError | AnchorTPError)
            if not is_theirs:
                traceback.print_exc()
            self._failed(flight, str(error) if is_theirs else f"{chunk}: {error!r}", fatal=True)
            return
        try:
            source = self._source(flight.source)
            with self._changed:
                self._queue.begin(flight, time.monotonic())
            if flight.source == HOST:
                self._prefetch(source)
            out = self._destination.tensor(chunk.start, chunk.stop)
            digests = source.read(chunk, out, lambda: stop.asked_s is not None)
        except Stopped:
            self._failed(flight, f"{chunk}: {flight.source or 'the host'} did not answer in time")
        except (OSError, AnchorTPError) as error:
            self._hooks.on_error(error)
            gone = flight.source != HOST and isinstance(error, StateError | WireError)
            self._failed(flight, f"{chunk}: {error}", gone=gone)
        except Exception as error:  # ours; without this the load would wait for the chunk for ever
            self._hooks.on_error(error)
            traceback.print_exc()
            self._failed(flight, f"{chunk}: {error!r}", fatal=True)
        else:
            self._check(flight, source, digests)

    def _failed(self, flight: Flight, reason: str, *, gone: bool = False, fatal: bool = False) -> None:
        with self._changed:
            del self._stops[flight.key]
            self._queue.fail(flight, time.monotonic(), reason, gone=gone)
            if fatal:
                self._give_up(reason)
            self._wake_all()

    def _check(self, flight: Flight, source: Source, digests: Sequence[int] | None) -> None:
        """The bytes have arrived; are they right? `digests`: of the chunk's segments, if they were taken already."""
        try:
            self._compare(flight, source, digests)
        except Exception as error:  # it has landed and is not accepted: the load would wait for it for ever
            self._hooks.on_error(error)
            traceback.print_exc()
            with self._changed:
                self._give_up(f"{flight.chunk} cannot be checked: {error!r}")

    def _compare(self, flight: Flight, source: Source, digests: Sequence[int] | None) -> None:
        chunk = flight.chunk
        with self._changed:
            del self._stops[flight.key]
            self._queue.finish(flight, time.monotonic())
            if not self._book.arrived(chunk):
                self._changed.notify_all()
                return
            wanted = self._book.expected(chunk)
            if digests == wanted:
                self._accept(chunk, digests)
                return  # nearly always
        if digests is None:
            digests = [digest(self._destination.view(segment.start, segment.stop)) for segment in chunk.segments]
        triples = list(zip(chunk.segments, wanted, digests, strict=True))
        wrong = {segment: _wrong_sum(flight) for segment, value, found in triples if value not in (None, found)}
        if None in wanted:
            try:
                source.check_unchanged()
            except (OSError, AnchorTPError) as error:
                wrong |= {segment: f"{chunk}: {error}" for segment, value, _ in triples if value is None}
        with self._changed:
            if not wrong:
                self._accept(chunk, digests)
                return
            again = {index: reason for segment, reason in wrong.items() for index in self._book.reject(segment)}
            for index, reason in again.items():
                self._queue.reject(index, reason)
            self._wake_all()

    def _accept(self, chunk: Chunk, digests: Sequence[int]) -> None:
        self._book.accept(chunk, digests)
        self._changed.notify_all()
        if self.is_whole:
            self._wake_all()

    def _source(self, name: str) -> Source:
        if (source := self._sources.get(name)) is not None:
            return source
        with self._opening[name]:
            if name not in self._sources:
                self._sources[name] = self._hooks.open_source(name)
            return self._sources[name]

    def _rest(self, seconds: float) -> None:
        deadline_s = time.monotonic() + seconds
        with self._changed:
            while not self._cancelled and (left_s := deadline_s - time.monotonic()) > 0.0:
                self._changed.wait(left_s)

    def _prefetch(self, source: Source) -> None:
        """Asks the disk for what will be read from the host, a window ahead. Cached files cost next to nothing."""
        if self._num_asked == len(self._queue.chunks):
            return
        with self._changed:
            stop_bytes = self._queue.done_bytes + PREFETCH_BYTES
            ahead = []
            while self._num_asked < len(self._queue.chunks) and self._asked_bytes < stop_bytes:
                chunk = self._queue.chunks[self._num_asked]
                self._num_asked += 1
                self._asked_bytes += chunk.num_bytes
                if chunk.source == HOST:
                    ahead.append(chunk)
        for chunk in ahead:
            source.prefetch(chunk)


def _wrong_sum(flight: Flight) -> str:
    if flight.source == HOST:
        return (
            f"{flight.chunk}: the checkpoint's bytes are not those that were loaded first. The file was changed on "
            f"disk; restore it, or restart with the new weights."
        )
    return f"{flight.chunk}: the bytes copied from {flight.source} are not those that were loaded first"
