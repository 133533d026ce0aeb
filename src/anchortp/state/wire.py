"""Framed messages, with descriptors, over a Unix stream socket between processes of one user on one host.

A frame is a header (magic, protocol version, number of descriptors, payload length) and a msgpack payload.
Descriptors travel as SCM_RIGHTS with the frame's first byte, so they are there once its header is. unix(7).
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import select
import socket
import stat
import struct
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from anchortp.errors import ChannelClosed, ChannelTimeout, ConfigError, ProtocolError, WireError

MAGIC = b"ATPw"
WIRE_VERSION = 1
HEADER = struct.Struct("<4sHHI")
MAX_PAYLOAD_BYTES = 64 << 20
MAX_FDS = 64  # per message; the kernel takes 253
MAX_PATH_BYTES = 107  # sockaddr_un.sun_path less its closing zero
DEFAULT_TIMEOUT_S = 10.0

_SCRATCH_BYTES = 64 << 10
_MAX_FILLS = 16  # reads of one `receive_ready`: one busy peer must not starve the others
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_FDS * array("i").itemsize)
_SEND_FLAGS = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
_RECV_FLAGS = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT


class PeerRefused(WireError):
    """The process at the other end belongs to another user."""


class AddressHeld(WireError):
    """Another process listens at this path. `pid` is its process id, 0 where it is not known."""

    def __init__(self, path: Path, pid: int):
        self.pid = pid
        super().__init__(f"process {pid or '(unknown)'} listens at {path} already; connect to it, or stop it first")


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A message and the descriptors that came with it. Who takes it owns them and has to close them."""

    message: Any
    fds: tuple[int, ...] = ()

    def close_fds(self) -> None:
        for fd in self.fds:
            os.close(fd)


class Channel:
    """Messages of one tagged union over one connected socket, which the channel owns.

    One thread may send while another receives; nothing else may be concurrent. After ProtocolError, and after
    a timeout in the middle of a frame, the connection is shut down: every later call raises the same error.
    `close` is the caller's to call in any case; until then `fileno` stays valid, for selectors.
    """

    def __init__(
        self,
        sock: socket.socket,
        message_type: Any,
        *,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
        max_backlog_bytes: int = MAX_PAYLOAD_BYTES + HEADER.size,
        farewell: Callable[[ProtocolError], Any] | None = None,
    ):
        """`message_type`: what may be received, a union of tagged msgspec Structs; anything can be sent.

        `max_payload_bytes` bounds what is received, `max_backlog_bytes` what `post` keeps for a peer that
        does not read. `farewell` makes the last message to a peer that broke the protocol.
        """
        sock.setblocking(False)
        self._sock = sock
        self._max_payload_bytes = max_payload_bytes
        self._max_backlog_bytes = max_backlog_bytes
        self._farewell = farewell
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(message_type)
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._inbox = bytearray()
        self._inbox_fds: deque[int] = deque()
        self._outbox: deque[_Frame] = deque()
        self._at_end = False
        self._error: WireError | None = None
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable.register(sock, select.POLLOUT)

    def send(self, message: Any, fds: Sequence[int] = (), timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Sends a message and duplicates of `fds`, after whatever `post` left behind.

        Raises ChannelClosed, or ChannelTimeout when the peer does not read. Unless that says that the
        connection was shut down, nothing of this message was sent and the channel can be used on.
        """
        frame = self._enqueue(message, fds)
        deadline_s = time.monotonic() + timeout_s
        while not self.flush():
            if not _wait(self._writable, deadline_s):
                self._take_back(frame, timeout_s)

    def post(self, message: Any, fds: Sequence[int] = ()) -> None:
        """As `send`, but never blocks: what the socket does not take now waits for `flush`.

        Raises ChannelTimeout, and shuts down, when more than `max_backlog_bytes` would wait.
        """
        frame = self._enqueue(message, fds)
        if self.flush():
            return
        if sum(len(waiting.rest) for waiting in self._outbox) > self._max_backlog_bytes:
            self._fail(ChannelTimeout("the peer does not read its messages; the connection was shut down"))
        frame.keep_fds()

    def flush(self) -> bool:
        """Sends what the socket takes now, without blocking. True when nothing is left."""
        self._check()
        while self._outbox:
            if not self._push(self._outbox[0]):
                return False
            self._outbox.popleft()
        return True

    @property
    def has_backlog(self) -> bool:
        """Whether `flush` has something to send: watch for writability as long as it does."""
        return bool(self._outbox)

    def recv(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> Received:
        """The next message. Raises ChannelClosed, ProtocolError, ChannelTimeout (not the end)."""
        self._check()
        deadline_s = time.monotonic() + timeout_s
        while (received := self._next()) is None:
            if self._at_end:
                raise self._closed_by_peer()
            if not _wait(self._readable, deadline_s):
                raise ChannelTimeout(f"no message within {timeout_s} s; the peer is stuck, or needs more time")
            self._fill()
        return received

    def receive_ready(self) -> list[Received]:
        """The messages that are complete, without blocking; for a selector that says the socket is readable.

        May be empty. Takes in 1 MiB at most, so a selector that is level-triggered has to ask again. Errors
        (ChannelClosed, ProtocolError) come after the last good message was returned.
        """
        self._check()
        for _ in range(_MAX_FILLS):
            if not self._fill():
                break
        ready = []
        try:
            while (received := self._next()) is not None:
                ready.append(received)
        except ProtocolError:
            if not ready:
                raise
        if self._at_end and not ready:
            raise self._closed_by_peer()
        return ready

    def peer_gone(self) -> bool:
        """Whether the peer has closed, or this channel failed, and nothing is left to read. Never blocks."""
        if self._error is not None or self._at_end:
            return not self._inbox
        try:
            return not self._inbox and not self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def peer(self) -> PeerCredentials:
        return peer_credentials(self._sock)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        """Ends the connection and closes every descriptor that nobody took. Harmless when repeated."""
        self._error = self._error or ChannelClosed("this end closed the connection; connect again")
        self._discard()
        self._sock.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- sending

    def _enqueue(self, message: Any, fds: Sequence[int]) -> _Frame:
        self._check()
        payload = self._encoder.encode(message)
        assert len(fds) <= MAX_FDS, f"{len(fds)} descriptors in one message; {MAX_FDS} at most"
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ProtocolError(
                f"{type(message).__name__} takes {len(payload)} bytes; "
                f"a message has {MAX_PAYLOAD_BYTES} at most: split it"
            )
        header = HEADER.pack(MAGIC, WIRE_VERSION, len(fds), len(payload))
        frame = _Frame(rest=memoryview(header + payload), fds=tuple(fds))
        self._outbox.append(frame)
        return frame

    def _push(self, frame: _Frame) -> bool:
        """Sends as much of the frame as the socket takes; True when all of it is gone."""
        while frame.rest:
            try:
                num_bytes = self._sock.sendmsg([frame.rest], frame.ancillary(), _SEND_FLAGS)
            except BlockingIOError:
                return False
            except OSError as error:
                self._drop_outbox()
                if not isinstance(error, ConnectionError):
                    raise  # the caller's: a descriptor that is none, say
                # Not shut down: the peer's last words may still be there to be received.
                raise ChannelClosed(f"the peer is gone ({error.strerror}); connect again") from error
            frame.advance(num_bytes)
        return True

    def _take_back(self, frame: _Frame, timeout_s: float) -> NoReturn:
        if frame.begun:
            self._fail(
                ChannelTimeout(
                    f"the peer stopped reading inside a message ({timeout_s} s); the connection was shut down"
                )
            )
        self._outbox.remove(frame)
        raise ChannelTimeout(f"the peer read nothing for {timeout_s} s; it is stuck, or needs more time")

    # -- receiving

    def _fill(self) -> bool:
        """Takes in what one read gives; False when there is nothing now, or nothing ever more."""
        try:
            num_bytes, ancillary, flags, _ = self._sock.recvmsg_into([self._scratch], _ANCILLARY_BYTES, _RECV_FLAGS)
        except BlockingIOError:
            return False
        except OSError:
            self._at_end = True  # ECONNRESET: the peer closed without reading all that we had sent
            return False
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._inbox_fds.extend(array("i", data[: len(data) - len(data) % 4]))
        if flags & socket.MSG_CTRUNC:
            self._violated("descriptors were cut off (too many in one message, or too many files open here)")
        if num_bytes == 0:
            self._at_end = True
            return False
        self._inbox += self._scratch[:num_bytes]
        return True

    def _next(self) -> Received | None:
        """The next complete message of the inbox, if there is one."""
        inbox = self._inbox
        if len(inbox) < HEADER.size:
            return None
        magic, version, num_fds, payload_bytes = HEADER.unpack_from(inbox)
        self._check_header(magic, version, num_fds, payload_bytes)
        stop = HEADER.size + payload_bytes
        if len(inbox) < stop:
            return None
        if len(inbox) == stop and len(self._inbox_fds) > num_fds:
            self._violated("descriptors came that no message announced")
        try:
            message = self._decoder.decode(inbox[HEADER.size : stop])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._violated(f"a message that is none of ours ({error})")
        del inbox[:stop]
        return Received(message=message, fds=tuple(self._inbox_fds.popleft() for _ in range(num_fds)))

    def _check_header(self, magic: bytes, version: int, num_fds: int, payload_bytes: int) -> None:
        if magic != MAGIC:
            self._violated("bytes that are no message")
        if version != WIRE_VERSION:
            self._violated(f"protocol version {version} where this process speaks {WIRE_VERSION}")
        if payload_bytes > self._max_payload_bytes:
            self._violated(f"a message of {payload_bytes} bytes where {self._max_payload_bytes} is the most")
        if num_fds > len(self._inbox_fds):
            self._violated(f"{num_fds} descriptors announced and {len(self._inbox_fds)} sent")

    # -- the end

    def _violated(self, what: str) -> NoReturn:
        error = ProtocolError(f"the peer broke the protocol: {what}. Run the same version of anchortp at both ends.")
        if self._farewell is not None:
            with contextlib.suppress(WireError):
                self.post(self._farewell(error))
        self._fail(error)

    def _fail(self, error: WireError) -> NoReturn:
        self._error = error
        self._discard()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        raise error

    def _discard(self) -> None:
        self._drop_outbox()
        self._inbox.clear()
        while self._inbox_fds:
            os.close(self._inbox_fds.popleft())

    def _drop_outbox(self) -> None:
        while self._outbox:
            self._outbox.popleft().close_fds()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _closed_by_peer(self) -> ChannelClosed:
        where = " in the middle of a message" if self._inbox else ""
        return ChannelClosed(f"the peer closed the connection{where}; connect again")


@dataclass(slots=True, kw_only=True, eq=False)
class _Frame:
    """A frame on its way out: what is left of it, and the descriptors that go with its first byte."""

    rest: memoryview
    fds: tuple[int, ...]
    begun: bool = False
    owns_fds: bool = False

    def ancillary(self) -> list[tuple[int, int, array]]:
        return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", self.fds))] if self.fds else []

    def advance(self, num_bytes: int) -> None:
        self.rest = self.rest[num_bytes:]
        self.begun = True
        self.close_fds()

    def keep_fds(self) -> None:
        """Makes the frame independent of the sender's descriptors, which may be closed before it leaves."""
        if self.fds and not self.owns_fds:
            self.fds = tuple(os.dup(fd) for fd in self.fds)
            self.owns_fds = True

    def close_fds(self) -> None:
        if self.owns_fds:
            for fd in self.fds:
                os.close(fd)
        self.fds, self.owns_fds = (), False


def _wait(poll: select.poll, deadline_s: float) -> bool:
    """True when the socket is ready or its peer gone, False at the deadline."""
    return bool(poll.poll(max(0, math.ceil((deadline_s - time.monotonic()) * 1000))))


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCredentials:
    """Who was at the other end when the connection was made, as the kernel says (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    """The process at the other end of a connected Unix socket."""
    layout = struct.Struct("3i")
    pid, uid, gid = layout.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size))
    return PeerCredentials(pid=pid, uid=uid, gid=gid)


def private_directory(path: str | os.PathLike[str]) -> Path:
    """Makes the directory, or checks that it is ours alone: our own, mode 0700, no symbolic link. Absolute.

    Raises ConfigError otherwise: who can write there could pass himself off as an anchor.
    """
    directory = Path(os.path.abspath(path))
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.lstat(directory)
    except OSError as error:
        raise ConfigError(
            f"the runtime directory {directory} cannot be made: {error.strerror}; choose another"
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"the runtime directory {directory} is no directory (or a link to one); give a real one")
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"the runtime directory {directory} is open to other users (owner {status.st_uid}, mode "
            f"{stat.S_IMODE(status.st_mode):04o}). Make it yours with mode 0700, or choose another."
        )
    return directory


class Listener:
    """A listening socket and the lock that makes this process the only one to listen at its path.

    The lock is a flock, so the kernel gives it up with the process, however it ends.
    """

    def __init__(self, *, path: Path, sock: socket.socket, lock_fd: int):
        self.path = path
        self._sock = sock
        self._lock_fd = lock_fd

    def accept(self) -> socket.socket | None:
        """The next connection, None when nobody waits. Never blocks.

        Raises PeerRefused, its connection closed, when the peer is another user's.
        """
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        return _same_user(sock)

    def fileno(self) -> int:
        return self._sock.fileno()

    def stop_listening(self) -> None:
        """Nobody can connect any more; the lock stays until `close`. Harmless when repeated."""
        if self._sock.fileno() >= 0:
            self.path.unlink(missing_ok=True)
            self._sock.close()

    def close(self) -> None:
        """Leaves nothing behind. Harmless when repeated."""
        self.stop_listening()
        if self._lock_fd >= 0:
            _lock_path(self.path).unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = -1


def listen(path: str | os.PathLike[str]) -> Listener:
    """Listens at `path`, in a directory of mode 0700 that is made if need be.

    Removes what a dead process left there. Raises AddressHeld when a living one listens, ConfigError for a
    path or directory that cannot be.
    """
    path = _checked_path(path)
    private_directory(path.parent)
    lock_fd = _lock(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if path.exists() and not path.is_socket():
            raise ConfigError(f"{path} is not a socket; remove it, or choose another runtime directory")
        path.unlink(missing_ok=True)  # stale: its owner would hold the lock
        sock.bind(os.fspath(path))
        sock.listen(128)
    except BaseException:
        sock.close()
        os.close(lock_fd)
        raise
    return Listener(path=path, sock=sock, lock_fd=lock_fd)


def remove_stale(path: Path) -> None:
    """Removes what a process that was killed left there; where one listens, or is still dying, nothing."""
    try:
        lock_fd = _lock(path)
    except (AddressHeld, FileNotFoundError):  # or the directory is gone
        return
    path.unlink(missing_ok=True)
    _lock_path(path).unlink(missing_ok=True)
    os.close(lock_fd)


def connect(path: str | os.PathLike[str], timeout_s: float = DEFAULT_TIMEOUT_S) -> socket.socket:
    """A connection to the process that listens at `path`.

    Raises ChannelClosed when nobody listens, ChannelTimeout when its queue stays full, PeerRefused when it is
    another user's.
    """
    path = _checked_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A blocking connect with a send timeout waits for room in the queue; a non-blocking one would not.
        seconds, micros = divmod(max(1, round(timeout_s * 1e6)), 1_000_000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", seconds, micros))
        sock.connect(os.fspath(path))
    except BlockingIOError as error:
        sock.close()
        raise ChannelTimeout(f"the process at {path} takes no connection ({timeout_s} s); it is stuck") from error
    except (FileNotFoundError, ConnectionRefusedError) as error:
        sock.close()
        raise ChannelClosed(f"nobody listens at {path}; start that process first") from error
    except OSError as error:
        sock.close()
        raise ChannelClosed(f"cannot connect to {path}: {error.strerror}; check the runtime directory") from error
    return _same_user(sock)


def _same_user(sock: socket.socket) -> socket.socket:
    peer = peer_credentials(sock)
    if peer.uid != os.geteuid():
        sock.close()
        raise PeerRefused(f"process {peer.pid} belongs to user {peer.uid}, not {os.geteuid()}; run both as one user")
    return sock


def _checked_path(path: str | os.PathLike[str]) -> Path:
    path = Path(os.path.abspath(path))
    if (num_bytes := len(os.fsencode(path))) > MAX_PATH_BYTES:
        raise ConfigError(
            f"the socket path {path} is {num_bytes} bytes long and the system takes {MAX_PATH_BYTES}; "
            f"choose a shorter runtime directory"
        )
    return path


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _lock(path: Path) -> int:
    """Locks the path's lock file, our pid in it, while the returned descriptor lives. Raises AddressHeld."""
    lock_path = _lock_path(path)
    while True:
        fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(fd, 32, 0)
            os.close(fd)
            raise AddressHeld(path, int(text) if text.strip().isdigit() else 0) from None
        if _is_file_at(lock_path, fd):
            break
        os.close(fd)  # its holder removed it between our open and our lock
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _is_file_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False
