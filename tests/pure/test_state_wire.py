"""Channel over a socket pair in one process: framing, descriptors, time limits, and what a peer may send."""

from __future__ import annotations

import errno
import os
import socket
from array import array
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp.errors import ChannelClosed, ChannelTimeout, ConfigError, ProtocolError
from anchortp.state import wire
from anchortp.state.wire import (
    HEADER,
    MAGIC,
    MAX_FDS,
    WIRE_VERSION,
    AddressHeld,
    Channel,
    connect,
    listen,
    remove_stale,
)


class Text(msgspec.Struct, frozen=True, tag=True):
    text: str


class Blob(msgspec.Struct, frozen=True, tag=True):
    data: bytes


class Stranger(msgspec.Struct, frozen=True, tag=True):
    pass


Known = Text | Blob
NOW_S = 0.0
SOON_S = 10.0


def open_fds() -> list[str]:
    """What every descriptor of this process is open on."""
    listed = os.listdir("/proc/self/fd")
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in listed if os.path.lexists(f"/proc/self/fd/{fd}"))


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    left, right = socket.socketpair()
    with Channel(left, Known) as a, Channel(right, Known) as b:
        yield a, b


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    left, right = socket.socketpair()
    with left, Channel(right, Known, max_payload_bytes=1 << 20) as channel:
        yield left, channel


def frame(payload: bytes, *, magic=MAGIC, version=WIRE_VERSION, num_fds=0, length=None) -> bytes:
    return HEADER.pack(magic, version, num_fds, len(payload) if length is None else length) + payload


def packed(message: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(message)


def send_with_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else [])


# -- what works


def test_messages_arrive_whole_and_in_order(pair) -> None:
    a, b = pair
    messages = [Text("one"), Blob(bytes(range(256))), Text("")]
    for message in messages:
        a.send(message)
    assert [b.recv(SOON_S).message for _ in messages] == messages
    b.send(Text("back"))
    assert a.recv(SOON_S).message == Text("back")


def test_descriptors_arrive_with_their_message_and_close_on_exec(pair) -> None:
    a, b = pair
    readable, writable = os.pipe()
    a.send(Text("none"))
    a.send(Text("both"), fds=(readable, writable))
    a.send(Text("none"))
    os.close(readable)
    os.close(writable)
    assert b.recv(SOON_S).fds == ()
    received = b.recv(SOON_S)
    assert received.message == Text("both") and not any(map(os.get_inheritable, received.fds))
    assert b.recv(SOON_S).fds == ()
    os.write(received.fds[1], b"through")
    assert os.read(received.fds[0], 10) == b"through"
    received.close_fds()


def test_messages_larger_than_the_socket_takes(pair) -> None:
    a, b = pair
    big = Blob(os.urandom(5 << 20))
    a.post(big)
    a.post(Text("after"))
    received = []
    while len(received) < 2:
        received += b.receive_ready()
        a.flush()
    assert [item.message for item in received] == [big, Text("after")] and not a.has_backlog


def test_receive_ready_never_blocks_and_returns_what_is_complete(pair) -> None:
    a, b = pair
    assert b.receive_ready() == []
    for index in range(100):
        a.send(Text(str(index)))
    assert [item.message.text for item in b.receive_ready()] == [str(index) for index in range(100)]
    assert b.receive_ready() == []


def test_a_posted_frame_keeps_its_descriptors_until_it_leaves(pair) -> None:
    a, b = pair
    a.post(Blob(bytes(2 << 20)))
    readable, writable = os.pipe()
    a.post(Text("fds"), fds=(readable, writable))
    os.close(readable)
    os.close(writable)
    received = []
    while len(received) < 2:
        received += b.receive_ready()
        a.flush()
    os.write(received[1].fds[1], b"!")
    assert os.read(received[1].fds[0], 1) == b"!"
    received[1].close_fds()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=40), st.integers(0, 3)), min_size=1, max_size=6),
    st.lists(st.integers(1, 60), min_size=1),
)
def test_frames_cut_anywhere_come_out_whole(contents: list[tuple[str, int]], cuts: list[int]) -> None:
    left, right = socket.socketpair()
    null = os.open(os.devnull, os.O_RDONLY)
    received = []
    with left, Channel(right, Known) as channel:
        for index, (text, num_fds) in enumerate(contents):
            data, fds = frame(packed(Text(text)), num_fds=num_fds), [null] * num_fds
            size = cuts[index % len(cuts)]
            for start in range(0, len(data), size):
                send_with_fds(left, data[start : start + size], fds if start == 0 else [])
                received += channel.receive_ready()
    os.close(null)
    assert [(item.message.text, len(item.fds)) for item in received] == contents
    for item in received:
        item.close_fds()


# -- time limits and ends


def test_nothing_to_receive_is_a_timeout_that_can_be_repeated(pair) -> None:
    a, b = pair
    with pytest.raises(ChannelTimeout, match="no message within"):
        b.recv(0.01)
    a.send(Text("late"))
    assert b.recv(SOON_S).message == Text("late")


def test_half_a_message_survives_a_timeout(raw) -> None:
    sock, channel = raw
    data = frame(packed(Text("halves")))
    sock.sendall(data[:15])
    with pytest.raises(ChannelTimeout):
        channel.recv(NOW_S)
    sock.sendall(data[15:])
    assert channel.recv(SOON_S).message == Text("halves")


def test_a_peer_that_stops_reading_inside_a_message_ends_the_channel(pair) -> None:
    a, b = pair
    with pytest.raises(ChannelTimeout, match="shut down"):
        a.send(Blob(bytes(4 << 20)), timeout_s=0.01)
    with pytest.raises(ChannelTimeout, match="shut down"):
        a.send(Text("more"))
    with pytest.raises(ChannelClosed, match="middle of a message"):
        while True:
            b.recv(SOON_S)


def test_a_message_of_which_nothing_left_can_be_given_up(pair) -> None:
    a, b = pair
    a.post(Blob(bytes(1 << 20)))  # stuck half way
    readable, writable = os.pipe()
    with pytest.raises(ChannelTimeout, match="read nothing"):
        a.send(Text("given up"), fds=(readable,), timeout_s=NOW_S)
    os.close(readable)
    os.close(writable)
    received = []
    while a.has_backlog or not received:
        a.flush()
        received += b.receive_ready()
    a.send(Text("next"))
    assert isinstance(received[0].message, Blob) and b.recv(SOON_S).message == Text("next")


def test_a_backlog_is_bounded() -> None:
    left, right = socket.socketpair()
    with right, Channel(left, Known, max_backlog_bytes=1 << 20) as channel:
        with pytest.raises(ChannelTimeout, match="does not read"):
            for _ in range(100):
                channel.post(Blob(bytes(1 << 16)))
        assert not channel.has_backlog


def test_complete_messages_come_before_the_end(pair) -> None:
    a, b = pair
    a.send(Text("last words"))
    a.close()
    assert not b.peer_gone()
    assert [item.message for item in b.receive_ready()] == [Text("last words")]
    with pytest.raises(ChannelClosed, match="peer closed"):
        b.receive_ready()
    with pytest.raises(ChannelClosed, match="peer closed"):
        b.recv(SOON_S)
    with pytest.raises(ChannelClosed, match="peer is gone"):
        b.send(Text("hello?"))
    assert b.peer_gone() and b.fileno() >= 0


def test_last_words_arrive_although_the_peer_never_read_ours(pair) -> None:
    a, b = pair
    b.send(Text("never read"))
    a.send(Text("last words"))
    a.close()
    assert b.recv(SOON_S).message == Text("last words")
    with pytest.raises(ChannelClosed):
        b.recv(SOON_S)


def test_peer_gone_sees_the_end_without_taking_anything(pair) -> None:
    a, b = pair
    assert not b.peer_gone()
    a.close()
    assert b.peer_gone() and b.peer_gone()


def test_a_closed_channel_says_so(pair) -> None:
    a, _ = pair
    a.close()
    a.close()
    for call in (
        lambda: a.send(Text("x")),
        a.receive_ready,
        lambda: a.recv(NOW_S),
        lambda: a.post(Text("x")),
    ):
        with pytest.raises(ChannelClosed, match="this end closed"):
            call()


def test_what_nobody_took_is_closed_with_the_channel(pair) -> None:
    a, b = pair
    readable, writable = os.pipe()
    a.send(Text("first"))
    a.send(Text("second"), fds=(readable,))
    b.recv(SOON_S)
    os.close(readable)
    b._fill()  # the second message is in, and nobody asks for it
    b.close()
    with pytest.raises(BrokenPipeError):
        os.write(writable, b"x")
    os.close(writable)


def test_errors_of_the_caller_are_not_taken_for_the_peers(pair) -> None:
    a, b = pair
    with pytest.raises(OSError) as caught:
        a.send(Text("x"), fds=(1 << 20,))
    assert caught.value.errno == errno.EBADF
    with pytest.raises(ProtocolError, match="split it"):
        a.send(Blob(bytes(wire.MAX_PAYLOAD_BYTES)))
    a.send(Text("still good"))
    assert b.recv(SOON_S).message == Text("still good")


# -- peers that do not speak our protocol

VIOLATIONS = {
    "no message": frame(b"", magic=b"HTTP"),
    "protocol version": frame(packed(Text("x")), version=WIRE_VERSION + 1),
    "is the most": frame(b"", length=(1 << 20) + 1),
    "3 descriptors announced and 0 sent": frame(packed(Text("x")), num_fds=3),
    "none of ours": frame(packed(Stranger())),
    "none of ours (Expected": frame(msgspec.msgpack.encode({"type": "Text", "text": 7})),
    "none of ours (Input data": frame(b""),
    "none of ours (MessagePack data": frame(b"\xc1rubbish"),
    "none of ours (Object missing": frame(msgspec.msgpack.encode({"type": "Text"})),
}


@pytest.mark.parametrize("what", VIOLATIONS)
def test_violations_end_the_channel(raw, what: str) -> None:
    sock, channel = raw
    sock.sendall(frame(packed(Text("good"))) + VIOLATIONS[what] + frame(packed(Text("never"))))
    assert [item.message for item in channel.receive_ready()] == [Text("good")]
    for call in (channel.receive_ready, lambda: channel.recv(SOON_S), lambda: channel.send(Text("x"))):
        with pytest.raises(ProtocolError) as caught:
            call()
        assert what in str(caught.value) and "same version" in str(caught.value)
    assert sock.recv(1) == b""


def test_descriptors_that_nobody_announced_are_refused_and_closed(raw) -> None:
    sock, channel = raw
    readable, writable = os.pipe()
    send_with_fds(sock, frame(packed(Text("x"))), [readable])
    os.close(readable)
    with pytest.raises(ProtocolError, match="no message announced"):
        channel.recv(SOON_S)
    with pytest.raises(BrokenPipeError):  # the last reader is gone
        os.write(writable, b"x")
    os.close(writable)


def test_more_descriptors_than_fit_are_refused_and_closed(raw) -> None:
    sock, channel = raw
    readable, writable = os.pipe()
    send_with_fds(sock, frame(packed(Text("x")), num_fds=MAX_FDS + 1), [readable] * (MAX_FDS + 1))
    os.close(readable)
    with pytest.raises(ProtocolError, match="cut off"):
        channel.recv(SOON_S)
    with pytest.raises(BrokenPipeError):
        os.write(writable, b"x")
    os.close(writable)


def test_a_farewell_tells_the_peer_what_it_did() -> None:
    left, right = socket.socketpair()
    with Channel(left, Known) as a, Channel(right, Known, farewell=lambda error: Text(str(error))) as b:
        a.send(Stranger())
        with pytest.raises(ProtocolError):
            b.recv(SOON_S)
        assert "none of ours" in a.recv(SOON_S).message.text
        with pytest.raises(ChannelClosed):
            a.recv(SOON_S)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_streams_raise_our_errors_and_leak_nothing(data: st.DataObject) -> None:
    stream = bytearray(b"".join(frame(packed(Text(text)), num_fds=1) for text in ("a", "bb", "ccc")))
    for _ in range(data.draw(st.integers(0, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    stream += data.draw(st.binary(max_size=20))
    num_fds = data.draw(st.integers(0, 4))
    before = open_fds()
    null = os.open(os.devnull, os.O_RDONLY)
    left, right = socket.socketpair()
    with left, Channel(right, Known) as channel:
        send_with_fds(left, bytes(stream), [null] * num_fds)
        left.shutdown(socket.SHUT_WR)
        with pytest.raises((ProtocolError, ChannelClosed)):
            while True:
                channel.recv(SOON_S).close_fds()
    os.close(null)
    assert open_fds() == before


# -- addresses


def test_listen_makes_a_private_directory_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run" / "a.sock"
    listener = listen(path)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert listener.accept() is None
    with Channel(connect(path, SOON_S), Known) as a, Channel(listener.accept(), Known) as b:
        a.send(Text("hi"))
        assert b.recv(SOON_S).message == Text("hi")
        assert a.peer().pid == b.peer().pid == os.getpid() and b.peer().uid == os.geteuid()
    listener.close()
    listener.close()
    assert list(path.parent.iterdir()) == []
    with pytest.raises(ChannelClosed, match="nobody listens"):
        connect(path, SOON_S)


def test_one_listener_per_path(tmp_path: Path) -> None:
    path = tmp_path / "run" / "a.sock"
    first = listen(path)
    with pytest.raises(AddressHeld, match=f"process {os.getpid()} listens") as caught:
        listen(path)
    assert caught.value.pid == os.getpid()
    connect(path, SOON_S).close()  # the refused one took nothing away
    first.stop_listening()
    with pytest.raises(AddressHeld):
        listen(path)
    first.close()
    listen(path).close()


def test_what_a_dead_listener_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run" / "a.sock"
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(os.fspath(path))
    path.with_name("a.sock.lock").write_text("999999\n")
    with pytest.raises(ChannelClosed, match="nobody listens"):
        connect(path, SOON_S)
    listener = listen(path)
    connect(path, SOON_S).close()
    listener.close()


def test_what_a_dead_process_left_is_removed_and_a_living_one_keeps_its_own(tmp_path):
    path = tmp_path / "anchor.sock"
    remove_stale(path)
    assert list(tmp_path.iterdir()) == []
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(os.fspath(path))
    remove_stale(path)
    assert list(tmp_path.iterdir()) == []
    listener = listen(path)
    remove_stale(path)
    connect(path).close()
    listener.close()
    remove_stale(tmp_path / "nowhere" / "anchor.sock")


def test_directories_that_others_can_enter_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    with pytest.raises(ConfigError, match="mode 0755"):
        listen(directory / "a.sock")
    directory.chmod(0o700)
    (tmp_path / "link").symlink_to(directory)
    with pytest.raises(ConfigError, match="link"):
        listen(tmp_path / "link" / "a.sock")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError):
        listen(tmp_path / "file" / "a.sock")


def test_files_and_long_paths_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    (directory / "a.sock").write_text("mine")
    with pytest.raises(ConfigError, match="not a socket"):
        listen(directory / "a.sock")
    assert (directory / "a.sock").read_text() == "mine"
    too_long = directory / ("x" * 108)
    for call in (listen, connect):
        with pytest.raises(ConfigError, match="shorter runtime directory"):
            call(too_long)


def test_another_users_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = listen(tmp_path / "run" / "a.sock")
    monkeypatch.setattr(wire.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(wire.PeerRefused, match="run both as one user"):
        connect(listener.path, SOON_S)
    with pytest.raises(wire.PeerRefused):
        listener.accept()
    monkeypatch.undo()
    listener.close()


def test_a_listener_that_takes_nobody_is_a_timeout(tmp_path: Path) -> None:
    listener = listen(tmp_path / "run" / "a.sock")
    socks = []
    with pytest.raises(ChannelTimeout, match="takes no connection"):
        while True:
            socks.append(connect(listener.path, 0.05))
    assert len(socks) > 100
    for sock in socks:
        sock.close()
    listener.close()
