"""The anchor: the daemon of one device. It owns the device's memory and outlives every process that computes.

One loop, nothing that blocks: requests are answered in the order in which they come. A client that misbehaves, or
does not read, is dropped; the others do not notice. (On a GPU another thread waits for what ends it; see `gpu_health`.)
"""

from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import signal
import socket
import sys
import time
import traceback
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import msgspec

from anchortp.arena import ChunkPool, MemfdArena, VmmArena, driver_of
from anchortp.arena.cuda import open_cuda
from anchortp.arena.vmm import raise_descriptor_limit
from anchortp.devices import parse_device
from anchortp.errors import (
    AnchorRunning,
    AnchorTPError,
    ConfigError,
    LeaseHeld,
    ProtocolError,
    StaleEpoch,
    StateError,
    WireError,
)
from anchortp.state import process
from anchortp.state.gpu_health import open_watch, watch_aside
from anchortp.state.launch import anchor_socket
from anchortp.state.manifest import Manifest
from anchortp.state.memory import DeviceMemory
from anchortp.state.messages import (
    AdoptArena,
    AdoptChunks,
    AnchorStatus,
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
    LeaseInfo,
    ManifestReply,
    Message,
    Ok,
    OpenArena,
    PutManifest,
    Ready,
    Reply,
    ReportLost,
    Request,
    Role,
    Shutdown,
    Welcome,
    failure_of,
)
from anchortp.state.wire import MAX_FDS, AddressHeld, Channel, Listener, PeerRefused, Received, listen

EXIT_LOST = 86  # the exit status of an anchor whose device was lost
MAX_CLIENTS = 256
MAX_REQUEST_BYTES = 4 << 20
MAX_BACKLOG_BYTES = 16 << 20
_KILL_TIMEOUT_S = 5.0


@dataclass(slots=True, kw_only=True, eq=False)
class _Client:
    channel: Channel
    pid: int
    role: Role | None = None  # until Hello


@dataclass(slots=True, kw_only=True, eq=False)
class _Lease:
    client: _Client
    pidfd: int
    epoch: int


class Anchor:
    """The loop, its connections, the epoch and the lease. The memory itself is `DeviceMemory`'s."""

    def __init__(self, *, device: str, budget_bytes: int, listener: Listener):
        """Takes over `listener`, which `close` closes."""
        self.device = device
        self.anchor_id = uuid.uuid4().hex
        self._memory = _memory_of(device, budget_bytes)
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._clients: set[_Client] = set()
        self._lease: _Lease | None = None
        self._epoch = 0
        self._manifest: bytes | None = None
        self._accepting = False
        self._stopping = False
        self._started_s = time.monotonic()
        self._accept_more(True)

    def run(self) -> None:
        """Serves until `stop`, `stop_when_readable` or Shutdown."""
        while not self._stopping:
            for key, events in self._selector.select():
                key.data(events)

    def stop(self) -> None:
        self._stopping = True

    def stop_when_readable(self, sock: socket.socket) -> None:
        """Stops the loop once there is something to read: how a signal reaches it."""
        self._selector.register(sock, selectors.EVENT_READ, lambda _: self.stop())

    def lose_when_readable(self, sock: socket.socket) -> None:
        """Ends the device, and this process, once there is a reason to be read."""
        self._selector.register(sock, selectors.EVENT_READ, lambda _: self._lost_by_itself(sock.recv(4096).decode()))

    def close(self) -> None:
        """Lets go of everything. The address is free before the first client sees its connection end."""
        self._listener.close()
        self._end_lease()
        for client in self._clients:
            client.channel.close()
        self._clients.clear()
        self._selector.close()
        self._memory.close()

    # -- connections

    def _accept_more(self, accepting: bool) -> None:
        """Whoever connects while we do not accept waits in the listener's queue."""
        if accepting and not self._accepting:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        elif self._accepting and not accepting:
            self._selector.unregister(self._listener)
        self._accepting = accepting

    def _accept(self, _: int) -> None:
        try:
            sock = self._listener.accept()
        except PeerRefused as error:
            _log(str(error))
            return
        except OSError as error:  # out of descriptors: go on when a client has left
            _log(f"no more connections for now: {error}")
            self._accept_more(False)
            return
        if sock is not None:
            self._welcome(sock)
        self._accept_more(len(self._clients) < MAX_CLIENTS)

    def _welcome(self, sock: socket.socket) -> None:
        channel = Channel(
            sock,
            Request,
            max_payload_bytes=MAX_REQUEST_BYTES,
            max_backlog_bytes=MAX_BACKLOG_BYTES,
            farewell=failure_of,
        )
        client = _Client(channel=channel, pid=channel.peer().pid)
        self._clients.add(client)
        self._selector.register(channel, selectors.EVENT_READ, partial(self._serve, client))

    def _drop(self, client: _Client, why: str) -> None:
        _log(f"process {client.pid} ({client.role or 'no role'}) left: {why}")
        if self._lease is not None and self._lease.client is client:
            self._end_lease()
        self._clients.remove(client)
        self._selector.unregister(client.channel)
        client.channel.close()
        self._accept_more(True)

    def _serve(self, client: _Client, events: int) -> None:
        if client not in self._clients:  # dropped earlier in this round
            return
        try:
            if events & selectors.EVENT_WRITE:
                client.channel.flush()
            if events & selectors.EVENT_READ:
                self._answer_all(client, client.channel.receive_ready())
            self._watch(client)
        except (WireError, OSError) as error:
            self._drop(client, str(error))

    def _watch(self, client: _Client) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.channel.has_backlog else 0)
        key = self._selector.get_key(client.channel)
        if key.events != events:
            self._selector.modify(client.channel, events, key.data)

    def _answer_all(self, client: _Client, requests: Sequence[Received]) -> None:
        waiting = deque(requests)
        try:
            while waiting and not self._stopping:
                self._answer(client, waiting.popleft())
        finally:
            for received in waiting:
                received.close_fds()

    def _answer(self, client: _Client, received: Received) -> None:
        """Raises WireError when the client is to be dropped."""
        fds: tuple[int, ...] = ()
        try:
            reply = self._handle(client, received)
            fds = self._descriptors(received.message, reply)
        except ProtocolError as error:
            client.channel.post(failure_of(error))
            raise
        except AnchorTPError as error:
            reply = failure_of(error)
        except Exception:
            # A bug of ours, which must not cost the device its memory: it is told, logged, and survived.
            _log(f"bug in {type(received.message).__name__}:\n{traceback.format_exc()}")
            reply = failure_of(AnchorTPError(f"the anchor of {self.device} has a bug; its log says where. Report it."))
        finally:
            received.close_fds()
        try:
            client.channel.post(reply, fds)
        finally:
            if isinstance(reply, ChunksReply):  # made for this message; an arena's own stays
                for fd in fds:
                    os.close(fd)

    def _descriptors(self, request: Request, reply: Reply) -> tuple[int, ...]:
        if isinstance(reply, ChunksReply):
            return self._export(self._memory.chunks(request.name), reply)
        if isinstance(request, CreateArena | OpenArena):
            arena = self._memory.arena(request.name)
            return (arena.fd,) if isinstance(arena, MemfdArena) else ()
        return ()

    def _export(self, arena: VmmArena, reply: ChunksReply) -> tuple[int, ...]:
        fds: list[int] = []
        try:
            for offset, _ in reply.chunks:
                fds.append(arena.export(offset))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return tuple(fds)

    # -- requests

    def _handle(self, client: _Client, received: Received) -> Reply:
        request = received.message
        if isinstance(request, Hello):
            return self._hello(client, request.role)
        if client.role is None:
            raise ProtocolError(f"{type(request).__name__} came before Hello; say Hello first")
        if (epoch := getattr(request, "epoch", None)) is not None:
            self._enter(epoch)
        match request:
            case Fence():
                return Ok()
            case Lease():
                return self._lease_to(client)
            case PutManifest(manifest=manifest):
                Manifest.from_bytes(manifest, device=self.device)
                self._manifest = manifest
                return Ok()
            case GetManifest():
                return ManifestReply(manifest=self._manifest)
            case GetStatus():
                return self._status()
            case Inject(kind=kind):
                return self._inject(kind)
            case ReportLost(reason=reason):
                self._check_worker(client)
                self._end_lost(f"lost: {reason}")
            case Shutdown():
                self.stop()
                return Ok()
            case AdoptChunks():
                self._check_worker(client)
        return self._handle_memory(request, received.fds)

    def _handle_memory(self, request: Message, fds: tuple[int, ...]) -> Reply:
        memory = self._memory
        match request:
            case CreateArena(name=name, reserved_bytes=reserved_bytes):
                memory.create(name, reserved_bytes)
            case GrowArena(name=name, reserved_bytes=reserved_bytes):
                memory.grow(name, reserved_bytes)
            case AdoptArena(name=name, reserved_bytes=reserved_bytes, ranges=ranges):
                memory.adopt(name, reserved_bytes, ranges, _only(fds))
            case Commit(name=name, ranges=ranges, allocate=allocate):
                memory.commit(name, ranges, allocate=allocate)
            case Decommit(name=name, ranges=ranges):
                memory.decommit(name, ranges)
            case DropArena(name=name):
                memory.drop(name)
            case AdoptChunks(name=name, reserved_bytes=reserved_bytes, chunks=chunks):
                memory.adopt_chunks(name, reserved_bytes, chunks, fds)
            case GetChunks(name=name, after=after):
                return self._newer_chunks(name, after)
            case OpenArena(name=name):
                pass
        if isinstance(request, Commit | Decommit | DropArena):
            return Committed(committed_bytes=memory.committed_bytes)
        return ArenaReply(arena=memory.info(name))

    def _newer_chunks(self, name: str, after: int) -> ChunksReply:
        chunks = self._memory.chunks(name).newer(after, MAX_FDS + 1)
        ranges = self._memory.info(name).ranges
        return ChunksReply(chunks=tuple(chunks[:MAX_FDS]), ranges=ranges, more=len(chunks) > MAX_FDS)

    def _hello(self, client: _Client, role: Role) -> Welcome:
        if client.role is not None:
            raise ProtocolError("Hello came twice; open another connection for another role")
        client.role = role
        return Welcome(
            device=self.device,
            anchor_id=self.anchor_id,
            pid=os.getpid(),
            budget_bytes=self._memory.budget_bytes,
            epoch=self._epoch,
        )

    def _status(self) -> AnchorStatus:
        lease = self._lease
        return AnchorStatus(
            device=self.device,
            anchor_id=self.anchor_id,
            pid=os.getpid(),
            epoch=self._epoch,
            budget_bytes=self._memory.budget_bytes,
            committed_bytes=self._memory.committed_bytes,
            arenas=self._memory.infos(),
            lease=None if lease is None else LeaseInfo(pid=lease.client.pid, epoch=lease.epoch),
            uptime_s=time.monotonic() - self._started_s,
        )

    # -- epochs and leases

    def _enter(self, epoch: int) -> None:
        """The one rule of epochs: older is refused, newer becomes ours (and voids the lease)."""
        if epoch < self._epoch:
            raise StaleEpoch(epoch=epoch, current=self._epoch)
        if epoch > self._epoch:
            _log(f"epoch {self._epoch} -> {epoch}")
            self._epoch = epoch

    def _lease_to(self, client: _Client) -> Ok:
        """Grants or renews the lease of the present epoch."""
        if client.role != "worker":
            raise StateError(f"a {client.role} cannot be the worker of {self.device}; connect as a worker")
        lease = self._lease
        if lease is None or lease.client is not client:
            if lease is not None and lease.epoch == self._epoch and not self._is_dead(lease):
                raise LeaseHeld(
                    f"process {lease.client.pid} is the worker of {self.device} in epoch {lease.epoch}; "
                    f"end that process, or take the lease with a newer epoch"
                )
            self._grant(client)
        else:
            lease.epoch = self._epoch
        _log(f"process {client.pid} is the worker of epoch {self._epoch}")
        return Ok()

    def _grant(self, client: _Client) -> None:
        try:
            pidfd = process.open_pidfd(client.pid)
        except OSError as error:
            raise StateError(
                f"process {client.pid} cannot be watched ({error.strerror}), so it cannot be the worker "
                f"of {self.device}; run workers and anchors in one pid namespace"
            ) from error
        self._end_lease()
        lease = self._lease = _Lease(client=client, pidfd=pidfd, epoch=self._epoch)
        # The connection says the same in most cases, but a child that was forked may hold it open.
        self._selector.register(pidfd, selectors.EVENT_READ, partial(self._holder_died, lease))

    def _is_dead(self, lease: _Lease) -> bool:
        """Whether its holder writes no more: its successor in the same epoch may come before the connection ends. On a
        GPU what it had begun goes on until the process is gone with all that it held."""
        if parse_device(self.device).kind == "cuda":
            return process.wait_gone(lease.pidfd, 0.0)
        return process.is_dead(lease.client.pid)

    def _check_worker(self, client: _Client) -> None:
        lease = self._lease
        if lease is None or lease.client is not client or lease.epoch != self._epoch:
            raise StateError(f"process {client.pid} is not the worker of {self.device}; take the lease first")

    def _holder_died(self, lease: _Lease, _: int) -> None:
        if self._lease is lease:
            self._drop(lease.client, "the process is dead")

    def _end_lease(self) -> None:
        if self._lease is not None:
            self._selector.unregister(self._lease.pidfd)
            os.close(self._lease.pidfd)
            self._lease = None

    # -- faults

    def _inject(self, kind: FaultKind) -> Ok:
        if kind == "lost":
            self._lose_device()
        if self._lease is None:
            raise StateError(f"{self.device} has no worker to {kind}; start one that takes the lease")
        _log(f"injected: {kind} of process {self._lease.client.pid}")
        process.kill(self._lease.pidfd, signal.SIGKILL if kind == "crash" else signal.SIGSTOP)
        return Ok()

    def _end_lost(self, why: str) -> NoReturn:
        """The device is gone, and what this process holds of it is nothing. Its end is how everybody hears of it."""
        try:
            self._listener.stop_listening()
            _log(why)
        finally:
            os._exit(EXIT_LOST)

    def _lost_by_itself(self, reason: str) -> NoReturn:
        """The worker goes first: if it outlived this process, that would be an anchor that crashed, whose memory it
        hands over to another one."""
        try:
            self._listener.stop_listening()
            self._end_worker()
        finally:
            self._end_lost(f"lost: {reason}")

    def _end_worker(self) -> None:
        if self._lease is not None:
            process.kill(self._lease.pidfd, signal.SIGKILL)
            if not process.wait_dead(self._lease.client.pid, _KILL_TIMEOUT_S):
                _log(f"process {self._lease.client.pid} did not end within {_KILL_TIMEOUT_S} s")

    def _lose_device(self) -> NoReturn:
        """The device dies. On a real one the computation dies with its memory, so the worker goes first; the
        garbage then makes whoever still reads this memory compute wrong numbers."""
        try:
            self._listener.stop_listening()
            self._end_worker()
            # Nobody is to wait for a device that is gone while its memory is still being overwritten.
            for client in self._clients:
                if client.role == "controller":
                    client.channel.close()
            process.get_out_of_the_way(0)  # a real device's end is no work for the host
            if self._lease is not None:
                process.wait_gone(self._lease.pidfd, _KILL_TIMEOUT_S)
            _log(f"injected: lost; {self._memory.scribble()} bytes overwritten")
        except Exception:
            _log(f"bug while losing the device:\n{traceback.format_exc()}")
        finally:
            os._exit(EXIT_LOST)


def _memory_of(device: str, budget_bytes: int) -> DeviceMemory:
    """Raises ConfigError where the hardware or its driver is missing."""
    parsed, pool = parse_device(device), None
    if parsed.is_chunked:
        raise_descriptor_limit()
        pool = ChunkPool(driver_of(parsed)())
    return DeviceMemory(device=device, budget_bytes=budget_bytes, pool=pool)


def _only(fds: tuple[int, ...]) -> int:
    if len(fds) != 1:
        raise ProtocolError(f"AdoptArena came with {len(fds)} descriptors; send the arena's one")
    return fds[0]


def _log(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} anchor {os.getpid()}: {text}", file=sys.stderr, flush=True)


# -- the process


def run_anchor(*, device: str, budget_bytes: int, runtime_dir: str, ready_fd: int | None = None) -> None:
    """Runs the anchor of `device` in this process, the main thread, until SIGTERM or a Shutdown request.

    SIGINT and SIGHUP are ignored: Ctrl-C in the terminal of whoever started it must not cost the memory.
    Writes a line of JSON (`Ready`) to `ready_fd` once it listens and closes it. Raises
    AnchorRunning, ConfigError.
    """
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    if budget_bytes <= 0:
        raise ConfigError(f"a budget of {budget_bytes} bytes holds nothing; give {device} a positive one")
    listener = _listen(device, runtime_dir)
    try:
        anchor = Anchor(device=device, budget_bytes=budget_bytes, listener=listener)
    except BaseException:
        listener.close()
        raise
    wakeup, wakeup_end = socket.socketpair()
    lost, lost_end = socket.socketpair()
    try:
        _wake_on_sigterm(anchor, wakeup, wakeup_end)
        _listen_for_its_end(anchor, lost, lost_end)
        _log(f"{device}: {budget_bytes} bytes, at {listener.path}; ends on SIGTERM")
        if ready_fd is not None:
            _tell(ready_fd, Ready(pid=os.getpid()))
        anchor.run()
    finally:
        anchor.close()
        signal.set_wakeup_fd(-1)
        for end in (wakeup, wakeup_end, lost, lost_end):
            end.close()
        _log("stopped")


def _listen_for_its_end(anchor: Anchor, lost: socket.socket, lost_end: socket.socket) -> None:
    """Of a GPU. Without NVML the anchor serves all the same, and the log says so."""
    if parse_device(anchor.device).kind != "cuda":
        return
    try:
        watch = open_watch(open_cuda(parse_device(anchor.device).index).pci_bus_id())
    except ConfigError as error:
        _log(f"a failure of this GPU is only seen by the calls that it fails: {error}")
        return
    anchor.lose_when_readable(lost)

    def tell(reason: str) -> None:
        with contextlib.suppress(OSError):  # the anchor has just stopped
            lost_end.send(reason.encode()[:4096])

    watch_aside(watch, tell, _log)


def _listen(device: str, runtime_dir: str) -> Listener:
    try:
        return listen(anchor_socket(runtime_dir, device))
    except AddressHeld as error:
        raise AnchorRunning(
            f"{device} has an anchor already, process {error.pid or '(unknown)'}; use that one, or end it with SIGTERM"
        ) from error


def _wake_on_sigterm(anchor: Anchor, wakeup: socket.socket, wakeup_end: socket.socket) -> None:
    wakeup.setblocking(False)
    wakeup_end.setblocking(False)
    anchor.stop_when_readable(wakeup)
    signal.set_wakeup_fd(wakeup_end.fileno())
    signal.signal(signal.SIGTERM, lambda *_: None)  # a handler, so that the descriptor above is written to


def _tell(ready_fd: int, message: Ready | Failure) -> None:
    """The starter may be gone; an anchor does not depend on it."""
    try:
        os.write(ready_fd, msgspec.json.encode(message) + b"\n")
    except BrokenPipeError:
        pass
    finally:
        os.close(ready_fd)


def _detach(ready_fd: int | None) -> None:
    """Leaves the process that started us: no parent that must reap us, none of its descriptors."""
    if os.fork():
        os._exit(0)
    os.chdir("/")
    last = os.sysconf("SC_OPEN_MAX")
    kept = 2 if ready_fd is None else ready_fd
    os.closerange(3, kept)
    os.closerange(kept + 1, last)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="anchortp.state.anchor", description="The anchor of one device.")
    parser.add_argument("--device", required=True, help="cpu:0, host, ...")
    parser.add_argument("--budget-bytes", type=int, required=True, help="memory that may be committed")
    parser.add_argument("--runtime-dir", required=True, help="a private directory for the socket")
    parser.add_argument("--ready-fd", type=int, help="where to say that it listens")
    parser.add_argument("--detach", action="store_true", help="go on in the background")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit status 0 after a clean stop, 1 if it could not start, EXIT_LOST after `lost`."""
    args = _parse(argv)
    runtime_dir = os.path.abspath(args.runtime_dir)
    if args.detach:
        _detach(args.ready_fd)
    os.umask(0o077)
    try:
        run_anchor(
            device=args.device,
            budget_bytes=args.budget_bytes,
            runtime_dir=runtime_dir,
            ready_fd=args.ready_fd,
        )
    except AnchorTPError as error:
        _log(str(error))
        if args.ready_fd is not None:
            _tell(args.ready_fd, failure_of(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
