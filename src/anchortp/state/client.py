"""A process's connection to an anchor."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from anchortp.arena import MemfdArena, VmmDriver, VmmMapping, driver_of
from anchortp.arena.intervals import Range
from anchortp.devices import parse_device
from anchortp.errors import ChannelClosed, ChannelTimeout, ProtocolError, StateError
from anchortp.state.launch import anchor_socket
from anchortp.state.manifest import Manifest
from anchortp.state.messages import (
    AdoptArena,
    AdoptChunks,
    AnchorStatus,
    ArenaInfo,
    ArenaReply,
    ChunksReply,
    Commit,
    Committed,
    CreateArena,
    Decommit,
    DropArena,
    Failure,
    FaultKind,
    Fence,
    GetChunks,
    GetManifest,
    GetStatus,
    GrowArena,
    Hello,
    Inject,
    Lease,
    ManifestReply,
    Message,
    Ok,
    OpenArena,
    PutManifest,
    Reply,
    ReportLost,
    Role,
    Shutdown,
    Welcome,
    error_of,
)
from anchortp.state.wire import MAX_FDS, Channel, Received, connect

Arena = MemfdArena | VmmMapping

# A GPU's driver makes chunks one by one: a millisecond for each 2 MiB is far more than it is expected to take.
SLOWEST_COMMIT_BYTES_PER_S = 2 << 30
COMMIT_NOW_TIMEOUT_S = 2.0  # steps wait for it

_Expected = TypeVar("_Expected", bound=Message)


class AnchorClient:
    """One method per request, each waiting for its answer; what a request does is said in `messages`.

    All methods raise ChannelClosed when the anchor is gone, ChannelTimeout when it does not answer (the
    connection is then closed: a late answer would be taken for the next one's), and the errors of `messages`.
    Requests of several threads go one after the other. The lease and nothing else ends with the connection.

    Attributes: `welcome`, the anchor's answer to Hello.
    """

    def __init__(
        self, channel: Channel, *, role: Role, timeout_s: float, open_driver: Callable[[], VmmDriver] | None = None
    ):
        """Takes over the channel and says Hello on it."""
        self._channel = channel
        self._timeout_s = timeout_s
        self._open_driver = open_driver
        self._asking = threading.Lock()
        self.welcome = self._ask(Hello(role=role), Welcome)

    @classmethod
    def connect(
        cls,
        runtime_dir: str | os.PathLike[str],
        device: str,
        role: Role,
        timeout_s: float = 10.0,
        *,
        open_driver: Callable[[], VmmDriver] | None = None,
    ) -> AnchorClient:
        """Connects to the device's anchor. `timeout_s` holds for this and for each later request.

        `open_driver`: how arenas made of chunks get into this process; by default as if on `device` itself, else
        with the driver of the device that is to read them.
        Raises ChannelClosed if there is none, PeerRefused if it is another user's.
        """
        channel = Channel(connect(anchor_socket(runtime_dir, device), timeout_s), Reply)
        try:
            client = cls(channel, role=role, timeout_s=timeout_s, open_driver=open_driver)
            if client.welcome.device != device:
                raise StateError(
                    f"the anchor of {client.welcome.device} answers for {device}; use another runtime directory"
                )
        except BaseException:
            channel.close()
            raise
        return client

    # -- epochs

    def fence(self, epoch: int) -> None:
        self._ask(Fence(epoch=epoch), Ok)

    def lease(self, epoch: int) -> None:
        self._ask(Lease(epoch=epoch), Ok)

    # -- arenas: those returned belong to the caller, who closes them

    def create_arena(self, name: str, reserved_bytes: int, epoch: int) -> Arena:
        return self._ask_arena(CreateArena(name=name, reserved_bytes=reserved_bytes, epoch=epoch))

    def open_arena(self, name: str, epoch: int) -> Arena:
        """Where memory comes in chunks nothing is mapped yet: `refresh` does it."""
        return self._ask_arena(OpenArena(name=name, epoch=epoch))

    def refresh(self, arena: Arena, epoch: int) -> None:
        """Maps what was committed, and lets go of what was given back, since the last time.

        A memfd shows both by itself: then nothing is asked.
        """
        more = isinstance(arena, VmmMapping)
        while more:
            request = GetChunks(name=arena.name, after=arena.newest, epoch=epoch)
            received = self._exchange(request, ChunksReply, (), self._timeout_s)
            arena.keep(received.message.ranges)
            arena.attach(received.message.chunks, received.fds)
            more = received.message.more

    def grow_arena(self, name: str, reserved_bytes: int, epoch: int) -> ArenaInfo:
        """Arenas opened before know their old size; open again to map the rest."""
        return self._ask(GrowArena(name=name, reserved_bytes=reserved_bytes, epoch=epoch), ArenaReply).arena

    def adopt_arena(self, arena: Arena, ranges: Iterable[Range], epoch: int) -> ArenaInfo:
        """Hands the arena to a new anchor; the caller keeps his own. Fence with the newest epoch first: a new
        anchor starts at epoch 0. Where memory comes in chunks, take the lease first."""
        if isinstance(arena, VmmMapping):
            return self._adopt_chunks(arena, tuple(ranges), epoch)
        request = AdoptArena(name=arena.name, reserved_bytes=arena.reserved_bytes, ranges=tuple(ranges), epoch=epoch)
        return self._ask(request, ArenaReply, fds=(arena.fd,)).arena

    def _adopt_chunks(self, arena: VmmMapping, ranges: tuple[Range, ...], epoch: int) -> ArenaInfo:
        held = arena.chunks_in(ranges)
        for batch in [held[at : at + MAX_FDS] for at in range(0, len(held), MAX_FDS)] or [[]]:
            request = AdoptChunks(
                name=arena.name,
                reserved_bytes=arena.reserved_bytes,
                chunks=tuple(chunk for chunk, _ in batch),
                epoch=epoch,
            )
            self._ask(request, ArenaReply, fds=tuple(fd for _, fd in batch))
        # What was committed and never attached anywhere went with the old anchor, but nobody had written to it.
        self.commit(arena.name, ranges, epoch)
        return next(info for info in self.status().arenas if info.name == arena.name)

    def drop_arena(self, name: str, epoch: int) -> int:
        """Returns the device's committed bytes after."""
        return self._ask(DropArena(name=name, epoch=epoch), Committed).committed_bytes

    def commit_now(self, name: str, ranges: Iterable[Range], epoch: int) -> int:
        """As `commit`, for a few ranges whose memory is taken from the system at once; the wait for it is short.
        Raises StateError where the system has none."""
        request = Commit(name=name, ranges=tuple(ranges), epoch=epoch, allocate=True)
        return self._ask(request, Committed, timeout_s=COMMIT_NOW_TIMEOUT_S).committed_bytes

    def commit(self, name: str, ranges: Iterable[Range], epoch: int) -> int:
        """Returns the device's committed bytes after. Raises BudgetExceeded, with nothing changed."""
        request = Commit(name=name, ranges=tuple(ranges), epoch=epoch)
        timeout_s = self._timeout_s
        if parse_device(self.welcome.device).is_chunked:
            timeout_s += sum(stop - start for start, stop in request.ranges) / SLOWEST_COMMIT_BYTES_PER_S
        return self._ask(request, Committed, timeout_s=timeout_s).committed_bytes

    def decommit(self, name: str, ranges: Iterable[Range], epoch: int) -> int:
        """Returns the device's committed bytes after."""
        return self._ask(Decommit(name=name, ranges=tuple(ranges), epoch=epoch), Committed).committed_bytes

    # -- the manifest

    def put_manifest(self, manifest: Manifest, epoch: int) -> None:
        """`manifest` must be sealed."""
        self._ask(PutManifest(manifest=manifest.to_bytes(), epoch=epoch), Ok)

    def get_manifest(self) -> Manifest | None:
        """Verified. None when there is none: the device holds nothing to attach to."""
        data = self._ask(GetManifest(), ManifestReply).manifest
        return None if data is None else Manifest.from_bytes(data, device=self.welcome.device)

    # -- operations

    def status(self) -> AnchorStatus:
        return self._ask(GetStatus(), AnchorStatus)

    def inject(self, kind: FaultKind, timeout_s: float = 30.0) -> None:
        """Raises StateError if there is no worker to crash or hang. After `lost` the anchor is gone."""
        request = Inject(kind=kind)
        if kind != "lost":
            self._ask(request, Ok)
            return
        with contextlib.suppress(ChannelClosed):
            self._ask(request, Ok, timeout_s=timeout_s)

    def report_lost(self, reason: str, epoch: int) -> None:
        """[worker] The device's hardware has failed. The anchor is gone after."""
        with contextlib.suppress(ChannelClosed):
            self._ask(ReportLost(reason=reason, epoch=epoch), Ok)

    def shutdown(self) -> None:
        """Returns once the anchor has let go of its memory and its address is free."""
        self._ask(Shutdown(), Ok)
        with contextlib.suppress(ChannelClosed):
            self._channel.recv(self._timeout_s)

    # -- the connection

    def fileno(self) -> int:
        """For a selector: readable means that the anchor is gone, as it never speaks unasked."""
        return self._channel.fileno()

    def is_gone(self) -> bool:
        """Whether the anchor has closed the connection. Never blocks."""
        return self._channel.peer_gone()

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> AnchorClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask_arena(self, request: CreateArena | OpenArena) -> Arena:
        received = self._exchange(request, ArenaReply, (), self._timeout_s)
        device = parse_device(self.welcome.device)
        if device.is_chunked:
            received.close_fds()
            reserved_bytes = received.message.arena.reserved_bytes
            open_driver = self._open_driver or driver_of(device)
            return VmmMapping(name=request.name, reserved_bytes=reserved_bytes, open_driver=open_driver)
        try:
            (fd,) = received.fds
            return MemfdArena.from_fd(request.name, fd)
        except (ValueError, StateError):
            received.close_fds()
            raise ProtocolError(
                f"the anchor sent no arena for {request.name!r}; run the same version at both ends"
            ) from None

    def _ask(
        self,
        request: Message,
        expected: type[_Expected],
        *,
        fds: Sequence[int] = (),
        timeout_s: float | None = None,
    ) -> _Expected:
        received = self._exchange(request, expected, fds, self._timeout_s if timeout_s is None else timeout_s)
        received.close_fds()
        return received.message

    def _exchange(self, request: Message, expected: type[Message], fds: Sequence[int], timeout_s: float) -> Received:
        """Sends the request, returns its answer of the expected type, or raises the Failure that it is."""
        with self._asking:
            deadline_s = time.monotonic() + timeout_s
            try:
                # A peer that is gone may have left an answer behind that says why.
                with contextlib.suppress(ChannelClosed):
                    self._channel.send(request, fds, timeout_s)
                received = self._channel.recv(max(0.0, deadline_s - time.monotonic()))
            except ChannelTimeout:
                self._channel.close()
                raise
        if isinstance(received.message, expected):
            return received
        received.close_fds()
        if isinstance(received.message, Failure):
            raise error_of(received.message)
        self._channel.close()
        raise ProtocolError(
            f"the anchor answered {type(request).__name__} with {type(received.message).__name__}; "
            f"run the same version at both ends"
        )
